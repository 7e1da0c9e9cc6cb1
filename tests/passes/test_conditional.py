"""`conditional`: a predicated select, or a branch where there is work to save."""

import operator

import pytest
import torch
import torch.fx as fx
import torch.nn as nn

from nnsight_fx import NNsight, passes
from nnsight_fx.passes.conditional import branch
from nnsight_fx.passes.job import select

from .graphs import job_of, net, record, targets

X = torch.linspace(-1, 1, 8).reshape(2, 4)
RECORDED = record(lambda m, tracer, saved: saved.append(m.a.output.save()), X)
COND = torch.ops.higher_order.cond


def by_hand(build):
    """A graph over a predicate and a value, with `select`s by hand."""
    made = fx.Graph()
    p, x = made.placeholder("p"), made.placeholder("x")
    made.output(build(made, p, x))
    return fx.GraphModule({}, made), job_of(RECORDED)


def lowered(build, raw=False):
    gm, job = by_hand(build)
    job.raw_numbers = raw
    rewrites = passes.conditional(gm, job)
    gm.graph.lint()
    gm.recompile()
    return gm, rewrites


def cheap(g, p, x):
    return g.call_function(select, (p, g.call_function(torch.mul, (x, 2.0)), x))


def work(g, p, x):
    return g.call_function(select, (p, g.call_function(torch.softmax, (g.call_function(torch.mul, (x, 2.0)), -1)), x))


def on_a_copy(g, p, x):
    copy = g.call_method("clone", (x,))
    part = g.call_method("select", (copy, 0, 1))
    g.call_method("exp_", (part,))
    return g.call_function(select, (p, copy, x))


def test_fires():
    gm, rewrites = lowered(cheap)
    assert rewrites == 1 and torch.where in targets(gm) and COND not in targets(gm)


@pytest.mark.parametrize("build", [work, on_a_copy])
@pytest.mark.parametrize("raw", [False, True])
def test_work_is_a_branch(build, raw):
    gm, rewrites = lowered(build, raw)
    assert rewrites == 1 and (branch if raw else COND) in targets(gm) and torch.where not in targets(gm)
    assert not {torch.softmax, "exp_", "clone"} & set(targets(gm))  # it moved into the branch


def test_leaves_unrelated_nodes():
    gm, rewrites = lowered(lambda g, p, x: g.call_function(torch.where, (p, g.call_function(torch.exp, (x,)), x)))
    assert rewrites == 0 and targets(gm) == [torch.exp, torch.where]


def shared(g, p, x):
    """What somebody else uses is computed anyway."""
    new = g.call_function(torch.exp, (x,))
    return g.call_function(operator.add, (g.call_function(select, (p, new, x)), new))


def changed_between(g, p, x):
    """What the block reads is changed before its place."""
    new = g.call_function(torch.exp, (x,))
    g.call_method("zero_", (x,))
    return g.call_function(select, (p, new, x))


def draws(g, p, x):
    new = g.call_function(torch.rand_like, (x,))
    return g.call_function(select, (p, new, x))


@pytest.mark.parametrize("build", [shared, changed_between, draws])
def test_does_not_fire_on_the_look_alike(build):
    gm, rewrites = lowered(build)
    assert rewrites == 1 and torch.where in targets(gm) and COND not in targets(gm)


def test_nested_and_chained():
    def build(g, p, x):
        inner = work(g, p, x)
        outer = g.call_function(select, (p, g.call_function(torch.exp, (inner,)), x))
        return g.call_function(select, (p, g.call_function(torch.tanh, (outer,)), outer))

    gm, rewrites = lowered(build)
    assert rewrites == 3
    for holds in (True, False):
        want = torch.tanh(torch.exp(torch.softmax(X * 2.0, -1))) if holds else X
        torch.testing.assert_close(gm(torch.tensor(holds), X), want)


@pytest.mark.parametrize("build", [cheap, work, on_a_copy, shared, changed_between])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("holds", [False, True])
def test_numerics(build, raw, holds):
    gm, _ = lowered(build, raw)

    def by_python(x):
        new = {
            cheap: lambda: x * 2.0,
            work: lambda: torch.softmax(x * 2.0, -1),
            on_a_copy: lambda: torch.stack([x[0], x[1].exp()]),
            shared: lambda: x.exp(),
            changed_between: lambda: x.exp(),
        }[build]()
        if build is changed_between:
            x.zero_()
        return (new if holds else x) + (new if build is shared else 0)

    assert torch.equal(gm(torch.tensor(holds), X.clone()), by_python(X.clone()))


def test_in_a_model():
    raw = net()
    model = NNsight(raw)
    model.compile(backend="aot_eager", fullgraph=True)
    for holds in (True, False):
        with model.trace(X) as tracer:
            with tracer.cond(model.a.output.sum() * 0 + float(holds)):
                model.b.output = nn.functional.softmax(model.b.output, -1)
            out = tracer.result.save()
        h = raw.b(raw.a(X))
        torch.testing.assert_close(out, raw.c(torch.relu(h.softmax(-1) if holds else h)))
    (report,) = [p for p in model.explain().to_dict()["captures"][0]["passes"] if p["pass"] == "conditional"]
    assert report["rewrites"] == 1
