"""`narrow`: each invoke's rows of a batched run."""

import pytest
import torch
import torch.fx as fx

from nnsight_fx import NNsight, passes
from nnsight_fx.passes.job import put_rows, rows

from .graphs import Noting, call, eager, graph, job_of, net, net_graph, outputs, record, targets

X, Y = torch.linspace(-1, 1, 8).reshape(2, 4), torch.linspace(2, 3, 12).reshape(3, 4)


def by_rows(m, invoke, saved):
    h = m.a.output
    saved.append(h.save())
    if invoke:
        m.b.output = m.b.output * 2
    saved.append(m.c.output.save())


RECORDED = record(by_rows, X, Y)


def by_hand(build, *inputs):
    """A graph of one input, and the job of a batch of five rows."""
    made = fx.Graph()
    x = made.placeholder("x")
    made.output(tuple(build(made, x)))
    gm = fx.GraphModule({}, made)
    if inputs:
        x.meta["example_value"] = inputs[0]
    return gm, job_of(RECORDED)


def test_fires():
    gm, job = by_hand(lambda g, x: [g.call_function(rows, (x, 2, 3, 5, True))])
    assert passes.narrow(gm, job) == 1
    (cut,) = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert cut.target is torch.narrow and cut.args[1:] == (0, 2, 3)


@pytest.mark.parametrize("start, size, parts", [(0, 2, 2), (2, 3, 2), (1, 2, 3), (0, 5, 1)])
def test_puts_rows_back_between_the_others(start, size, parts):
    def build(g, x):
        new = g.call_function(torch.zeros, (size, 4))
        return [g.call_function(put_rows, (x, new, start, size, 5, True))]

    gm, job = by_hand(build)
    assert passes.narrow(gm, job) == 1
    (joined,) = [n for n in gm.graph.nodes if n.target is torch.cat]
    assert len(joined.args[0]) == parts
    gm.recompile()
    want = torch.ones(5, 4)
    want[start : start + size] = 0
    assert torch.equal(gm(torch.ones(5, 4))[0], want)


def test_leaves_unrelated_nodes():
    def build(g, x):
        return [g.call_function(torch.narrow, (x, 0, 1, 2)), g.call_function(torch.cat, ([x, x],))]

    gm, job = by_hand(build)
    before = str(gm.graph)
    assert passes.narrow(gm, job) == 0 and str(gm.graph) == before


@pytest.mark.parametrize("size, narrows", [(5, True), (4, False), (0, False)])
def test_does_not_fire_on_a_leaf_without_the_batch(size, narrows):
    # What the scan could not tell (`None`) goes by the size of dimension 0; a leaf that is not the batch stays whole.
    x = torch.ones(size, 2) if size else torch.tensor(1.0)
    gm, job = by_hand(lambda g, x: [g.call_function(rows, (x, 2, 3, 5, None))], x)
    assert passes.narrow(gm, job) == 1
    assert (torch.narrow in targets(gm)) == narrows
    gm.recompile()
    assert torch.equal(gm(x)[0], x[2:] if narrows else x)


def test_a_leaf_without_the_batch_is_replaced_whole():
    def build(g, x):
        return [g.call_function(put_rows, (x, g.call_method("neg", (x,)), 2, 3, 5, None))]

    gm, job = by_hand(build, torch.ones(4))
    passes.narrow(gm, job)
    gm.recompile()
    assert torch.equal(gm(torch.ones(4))[0], -torch.ones(4))


def test_several_users_and_chains():
    def build(g, x):
        first = g.call_function(rows, (x, 0, 2, 5, True))
        put = g.call_function(put_rows, (x, g.call_method("neg", (first,)), 0, 2, 5, True))
        again = g.call_function(rows, (put, 0, 2, 5, True))
        return [first, again, put]

    gm, job = by_hand(build)
    first, again, put = outputs(gm)
    job.exports = {(0, 0): first, (1, 0): again}
    job.emitted = {first, again, put}
    assert passes.narrow(gm, job) == 3
    assert list(job.exports.values()) == list(outputs(gm)[:2])
    assert job.emitted.isdisjoint({first, again, put})
    gm.recompile()
    x = torch.ones(5, 4)
    assert torch.equal(gm(x)[1], -x[:2]) and torch.equal(gm(x)[2][2:], x[2:])


def test_numerics():
    module, gm, job = net(), net_graph(), job_of(RECORDED)
    both = torch.cat([X, Y])
    Noting(gm).run(both, *module.parameters())
    passes.run(gm, job)
    given = call(gm, job, RECORDED, both, *module.parameters())[1]
    want = eager(by_rows, X, Y)
    torch.testing.assert_close([given[v] for v in RECORDED.saved], want)
    assert [len(v) for v in want] == [2, 2, 3, 3]


def test_a_real_model():
    got = eager(by_rows, X, Y, backend="eager", fullgraph=True)
    torch.testing.assert_close(got, eager(by_rows, X, Y), rtol=0, atol=0)
    alone = NNsight(net())
    with alone.trace(X):
        h = alone.c.output.save()
    torch.testing.assert_close(got[1], h)


def test_one_invoke_needs_no_rows():
    def body(m, tracer, saved):
        saved.append(m.a.output.save())

    gm, job = graph(lambda x: (x,)), job_of(record(body, X))
    assert passes.narrow(gm, job) == 0
