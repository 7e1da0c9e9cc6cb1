"""`read_positions`: the unembedding of the positions that are read."""

import pytest
import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import nnsight_fx
from nnsight_fx import NNsight, assert_max_compiles, assert_no_fallback, passes
from nnsight_fx.passes.indexing import take_at
from nnsight_fx.passes.read_positions import at

from .graphs import Noting, targets
from .test_lift_constants import job_for

X, W = torch.linspace(-1, 1, 60).reshape(3, 5, 4), torch.linspace(0, 1, 24).reshape(6, 4)
P, Q = torch.tensor(-1), torch.tensor(2)


def by_hand(function):
    """A graph of `x, w` and of two numbers, with fakes on its nodes."""
    gm = fx.GraphModule(
        {}, fx.Tracer(autowrap_functions=(take_at, torch.narrow, F.linear, F.layer_norm)).trace(function)
    )
    mode, job = FakeTensorMode(), job_for()
    fakes = [mode.from_tensor(x) for x in (X, W, P, Q)]
    Noting(gm).run(*fakes)
    job.inputs = lambda: fakes
    return gm, job


def apply(gm, job):
    """How many operations were done at positions; the graph gives what it gave."""
    values = [X, W, P, Q]
    want = gm(*[v.clone() for v in values])
    count = passes.read_positions(gm, job)
    gm.graph.lint()
    gm.recompile()
    for got, old in zip(gm(*[v.clone() for v in values]), want, strict=True):
        torch.testing.assert_close(got, old, rtol=0, atol=1e-6)
    return count


def test_fires():
    gm, job = by_hand(lambda x, w, p, q: (take_at(F.linear(F.layer_norm(x, (4,)), w), [1], [p]),))
    assert apply(gm, job) == 2
    assert targets(gm)[:3] == [at, F.layer_norm, F.linear]


def test_several_positions_and_other_dimensions():
    def function(x, w, p, q):
        y = F.linear(x, w)
        return (
            take_at(y, [1], [p]),
            take_at(y, [0, 1, 2], [q, q, p]),
            take_at(y, [-2], [q]),
            take_at(y, [-1, 1], [q, p]),
        )

    gm, job = by_hand(function)
    assert apply(gm, job) == 1 and targets(gm).count(at) == 1
    chosen = next(n for n in gm.graph.nodes if n.target is at)
    assert len(chosen.args) == 3  # each position once


def test_the_rows_of_invokes():
    def function(x, w, p, q):
        y = F.linear(x, w)
        first, rest = torch.narrow(y, 0, 0, 1), torch.narrow(y, 0, 1, 2)
        return take_at(first, [1], [p]), take_at(rest, [1, 2], [q, p]), take_at(first, [1], [q])

    gm, job = by_hand(function)
    assert apply(gm, job) == 1 and targets(gm).count(at) == 1

    def whole(x, w, p, q):
        y = F.linear(x, w)
        first = torch.narrow(y, 0, 0, 1)
        return take_at(first, [1], [p]), take_at(torch.narrow(y, 0, 1, 2), [1], [q]), first

    assert apply(*by_hand(whole)) == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, p, q: (F.linear(x, w),) * 2 and ((y := F.linear(x, w)), take_at(y, [1], [p])),  # read as a whole
        lambda x, w, p, q: (
            take_at(F.linear(x, w), [0], [q]),
            take_at(F.linear(x, w), [2], [p]),
        ),  # of rows, of features
        lambda x, w, p, q: (take_at(torch.cumsum(x, 1), [1], [p]),),  # mixes positions
        lambda x, w, p, q: (take_at(x, [1], [p]),),
    ],
)
def test_does_not_fire(function):
    gm, job = by_hand(function)
    assert apply(gm, job) == 0 and at not in targets(gm)


def test_not_past_what_changes_a_tensor():
    def function(x, w, p, q):
        h = torch.relu(x)
        v = h[:, :, :]
        h.add_(1)
        return (take_at(F.linear(v, w), [1], [p]),)

    gm, job = by_hand(function)
    assert apply(gm, job) == 1
    names = targets(gm)
    assert names.index(at) > names.index("add_")  # behind the change, of the view


def test_not_into_the_blocks_of_the_model():
    gm, job = by_hand(lambda x, w, p, q: (take_at(F.linear(torch.tanh(F.layer_norm(x, (4,))), w), [1], [p]),))
    job.blocks = gm.graph.find_nodes(op="call_function", target=F.linear)
    assert apply(gm, job) == 1
    assert targets(gm)[:4] == [F.layer_norm, torch.tanh, at, F.linear] and job.blocks[0].target is at


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 6, bias=False)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.layer(x))))


def difference(model, x, a, b):
    with torch.no_grad(), model.trace(x):
        model.layer.output[:, 1] *= 2
        logits = model.head.output
        last = logits.log_softmax(-1)[:, -1].save()
        both = nnsight_fx.save([last[..., a] - last[..., b]])
    return [last, *both]


def attribution(model, x, a, b):
    with model.trace(x):
        h = model.layer.output
        loss = (model.head.output[:, -1, a] - model.head.output[:, -1, b]).sum()
        with loss.backward():
            saved = h.grad.save()
    return [saved]


def invokes(model, x, a, b):
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(x):
            one = model.head.output[:, -1].save()
        with tracer.invoke(x * 2):
            model.layer.output[:, 0] += 1
            two = model.head.output[:, -2, a].save()
    return [one, two]


@pytest.mark.parametrize("run", [difference, attribution, invokes])
def test_in_a_trace(run):
    torch.manual_seed(0)
    module = Tiny().requires_grad_(False)
    module.layer.weight.requires_grad_()  # so that there is something to differentiate
    model, exact = NNsight(module), NNsight(module)
    model.compile(backend=lambda gm, inputs: gm.forward)
    exact.compile(backend="eager")
    for i, (rows, a, b) in enumerate([(2, 0, 1), (2, 3, 5), (3, 1, 0), (3, 2, 2)]):
        x = torch.randn(rows, 5, 4)
        want = run(NNsight(module), x, a, b)
        with assert_no_fallback(), assert_max_compiles(2 if i in (0, 2) else 0):
            found, same = run(model, x, a, b), run(exact, x, a, b)
        for got, other, value in zip(found, same, want, strict=True):
            torch.testing.assert_close(got, value, rtol=0, atol=1e-6)
            assert torch.equal(other, value)
    assert dict((name, n) for name, n, _ in model._host.compiled.last[-1])["read_positions"] >= 1 + (run is not invokes)
    assert "read_positions" not in {name for name, _, _ in exact._host.compiled.last[-1]}
