"""`differentiate`: a body's backward becomes part of the graph."""

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from nnsight_fx import passes
from nnsight_fx.passes.job import NotDifferentiable, backward, gradient, set_gradient, settled, tap

from .test_lift_constants import job_for

X, W = torch.linspace(-1, 1, 12).reshape(3, 4), torch.randn(4, 4)
FREE = {"inputs": None, "retain_graph": False}


def by_hand(body, *, depth=1):
    """`h = x`, `depth` times `h = tanh(linear(h, w))`, and what `body(graph, h, linears)` returns."""
    g = fx.Graph()
    x, w = g.placeholder("x"), g.placeholder("w")
    h, linears = x, []
    for _ in range(depth):
        linears.append(g.call_function(F.linear, (h, w)))
        h = g.call_function(torch.tanh, (linears[-1],))
    g.output(tuple(body(g, h, linears)))
    return fx.GraphModule({}, g), linears


def job_of(*requires):
    fakes = FakeTensorMode()
    given = [fakes.from_tensor(t.detach().requires_grad_(r)) for t, r in zip((X, W), requires, strict=True)]
    job = job_for()
    job.inputs, job.own = lambda: given, 1
    return job


def read(g, h, _):
    """The gradient of `h.square().sum()` to `h`."""
    t = g.call_function(tap, (h, 1))
    loss = g.call_method("sum", (g.call_function(torch.square, (h,)),))
    back = g.call_function(backward, (loss, None, (t,), FREE, False))
    got = g.call_function(gradient, (back, t))
    g.call_function(settled, (back,))
    return h, got


def run(gm):
    gm.graph.lint()
    gm.recompile()
    with torch.no_grad():
        return gm(X, W)


def test_fires():
    (gm, _), job = by_hand(read), job_of(False, True)
    assert passes.differentiate(gm, job) == 1
    assert all(isinstance(n.target, torch._ops.OpOverload) for n in gm.graph.nodes if n.op == "call_function")
    h, grad, of_weight = run(gm)
    w = W.clone().requires_grad_()
    want = torch.tanh(F.linear(X, w))
    want.square().sum().backward()
    assert torch.equal(h, want) and torch.equal(grad, 2 * want) and torch.equal(of_weight, w.grad)
    assert job.accumulates == [1] and job.requires == [True, False]


def test_does_not_fire_without_a_backward():
    (gm, _), job = by_hand(lambda g, h, _: [h]), job_of(False, True)
    before = list(gm.graph.nodes)
    assert passes.differentiate(gm, job) == 0
    assert list(gm.graph.nodes) == before and job.requires is None


def test_what_is_set_flows_on():
    def body(g, h, linears):
        with g.inserting_before(h):
            t = g.call_function(tap, (linears[0], 1))
        h.args = (t,)
        loss = g.call_method("sum", (h,))
        back = g.call_function(backward, (loss, None, (t,), FREE, False))
        got = g.call_function(gradient, (back, t))
        g.call_function(set_gradient, (got, g.call_function(torch.zeros_like, (got,))))
        g.call_function(settled, (back,))
        return h, got

    (gm, _), job = by_hand(body), job_of(False, True)
    assert passes.differentiate(gm, job) == 1
    h, got, of_weight = run(gm)
    assert torch.allclose(got, 1 - h.square(), atol=1e-6) and not of_weight.any()


def test_blocks_are_blocks_of_the_forward_and_of_the_backward():
    (gm, linears), job = by_hand(read, depth=4), job_of(False, True)
    job.blocks = list(linears)
    passes.differentiate(gm, job)
    aten = torch.ops.aten
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    forward, back = job.blocks[:4], job.blocks[4:]
    assert sorted(order[n] for n in job.blocks) == [order[n] for n in job.blocks]  # in the graph's order
    tanhs = [n for n in gm.graph.nodes if n.target is aten.tanh.default]
    assert all(order[n] < order[t] for n, t in zip(forward, tanhs, strict=True))
    for n in back:
        while n.target in (aten.detach.default, aten.alias.default):  # torch 2.14 on: `alias`
            n = n.next
        assert n.target is aten.tanh_backward.default
    assert len(back) == 3  # the first input has no gradient


def test_a_gradient_that_never_comes():
    def body(g, h, _):
        back = g.call_function(backward, (g.call_method("sum", (h,)), None, (), FREE, False))
        t = g.call_function(tap, (h, 1))
        got = g.call_function(gradient, (back, t))
        return h, got

    (gm, _), job = by_hand(body), job_of(False, True)
    with pytest.raises(NotDifferentiable, match="does not pass"):
        passes.differentiate(gm, job)
