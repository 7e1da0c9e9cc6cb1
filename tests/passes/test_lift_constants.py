"""`lift_constants`: what changes from run to run becomes an input."""

import operator

import pytest
import torch
import torch.fx as fx

from nnsight_fx import NNsight, assert_max_compiles, passes
from nnsight_fx.passes.job import CutSite, Job, Progress, TakesConstant, TakesParameter, constant, fetch, parameter
from nnsight_fx.plan.keys import Value
from nnsight_fx.plan.plan import Groups, InterventionGraph

from .graphs import call, eager, job_of, net, net_graph, outputs, record, targets

X = torch.linspace(-1, 1, 12).reshape(3, 4)
EMPTY = InterventionGraph.of((), Groups((None,), 0), "", ())


def job_for(**options) -> Job:
    return Job(EMPTY, Progress([0], set(), {}, set()), **options)


def by_hand(build):
    made = fx.Graph()
    x = made.placeholder("x")
    made.output(tuple(build(made, x)))
    return fx.GraphModule({}, made)


def test_fires():
    def build(g, x):
        c, v = g.call_function(constant, (4, "tensor")), g.call_function(fetch, (3, 1))
        p = g.call_function(parameter, ("lm_head", "weight"))
        f = g.call_function(constant, (5, "float"))
        return [g.call_function(torch.add, (x, each)) for each in (c, v, p, f)]

    gm, job = by_hand(build), job_for()
    assert passes.lift_constants(gm, job) == 4
    assert job.takes == [
        TakesConstant(4, "tensor"),
        Value(3, 1),
        TakesParameter("lm_head", "weight"),
        TakesConstant(5, "float"),
    ]
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    assert [n.args[1] for n in outputs(gm)] == inputs[1:]
    assert targets(gm) == [torch.add] * 4


def test_an_integer_is_read_from_a_tensor_and_checked():
    gm, job = by_hand(lambda g, x: [g.call_method("select", (x, 0, g.call_function(constant, (0, "int"))))]), job_for()
    assert passes.lift_constants(gm, job) == 1
    assert targets(gm) == ["item", operator.ge, torch._check, "select"]
    gm.recompile()
    assert torch.equal(gm(X, torch.tensor(2))[0], X[2])
    with pytest.raises(RuntimeError, match="Expected cond to be True"):
        gm(X, torch.tensor(-1))


def test_python_numbers_where_the_graph_runs_as_it_is():
    gm = by_hand(lambda g, x: [g.call_function(operator.getitem, (x, g.call_function(constant, (0, "int"))))])
    passes.lift_constants(gm, job_for(raw_numbers=True))
    gm.recompile()
    assert targets(gm) == [operator.getitem] and torch.equal(gm(X, 1)[0], X[1])


def test_leaves_unrelated_nodes():
    def build(g, x):
        rest = g.call_function(operator.getitem, (x, (slice(None), 2)))
        return [rest, g.call_function(torch.add, (rest, g.call_function(constant, (0, "tensor"))))]

    gm = by_hand(build)
    before = outputs(gm)[0]
    passes.lift_constants(gm, job_for())
    assert outputs(gm)[0] is before and before.args[1] == (slice(None), 2)


@pytest.mark.parametrize("index", [2, (slice(None), 2), (None, 1), (Ellipsis, 0), torch.tensor(1)])
def test_does_not_fire_on_numbers_that_are_structure(index):
    gm, job = by_hand(lambda g, x: [g.call_function(operator.getitem, (x, index))]), job_for()
    before = str(gm.graph)
    assert passes.lift_constants(gm, job) == 0 and str(gm.graph) == before and not job.takes


@pytest.mark.parametrize(
    "index",
    [
        (1,),
        (slice(None), 3),
        (2, slice(1, 3)),
        (1, 2),
        (Ellipsis, 2),
        (slice(None), None, 2),
        (None, 1, slice(None, 2)),
        (1, Ellipsis, 2),
        (1, Ellipsis, None),
    ],
)
@pytest.mark.parametrize("write", [False, True])
def test_every_position_of_an_index(index, write):
    numbers = [n for n in index if type(n) is int]

    def build(g, x):
        slots = iter(range(len(numbers)))
        lifted = tuple(g.call_function(constant, (next(slots), "int")) if type(n) is int else n for n in index)
        if write:
            g.call_function(operator.setitem, (x, lifted, -7.0))
            return [x]
        return [g.call_function(operator.getitem, (x, lifted))]

    gm, job = by_hand(build), job_for()
    assert passes.lift_constants(gm, job) == len(numbers)
    gm.recompile()
    x, want = X.clone(), X.clone()
    got = gm(x, *map(torch.tensor, numbers))[0]
    if write:
        want[index] = -7.0
    assert torch.equal(got, want if write else want[index])
    assert got is x if write else torch.equal(x, X) and got._base is not x  # read as a copy, since nobody could tell


def test_several_users_and_chains():
    def build(g, x):
        n = g.call_function(constant, (0, "int"))
        row = g.call_function(operator.getitem, (x, n))
        number = g.call_function(operator.getitem, (row, n))
        return [row, number, g.call_function(torch.mul, (row, n))]

    gm, job = by_hand(build), job_for()
    row, number, _ = outputs(gm)
    job.exports, job.cut = {(0, 0): row}, CutSite(("a", "output", 0), 0, [number, None])
    assert passes.lift_constants(gm, job) == 1  # one input for all uses
    made = outputs(gm)
    assert job.exports == {(0, 0): made[0]} and job.cut.leaves == [made[1], None]
    gm.recompile()
    got = gm(X, torch.tensor(2))
    assert torch.equal(got[0], X[2]) and torch.equal(got[1], X[2, 2]) and torch.equal(got[2], X[2] * 2)


def at(position, scale=0.5):
    def body(m, tracer, saved):
        m.a.output[:, position] += scale * 3
        m.b.output = m.b.output * scale
        saved.append(m.c.output.save())

    return body


@pytest.mark.parametrize("position", [0, 1, 3, -1])
def test_numerics(position):
    module, recorded = net(), record(at(position), X)
    gm, job = net_graph(), job_of(recorded)
    passes.run(gm, job)
    assert {take.kind for take in job.takes} == {"int", "float"}
    given = call(gm, job, recorded, X, *module.parameters())[1]
    torch.testing.assert_close([given[v] for v in recorded.saved], eager(at(position), X))


def test_a_real_model():
    model = NNsight(net())
    model.compile(backend="aot_eager", fullgraph=True)
    with assert_max_compiles(1):
        for position in (0, 1, 3, -1):
            for scale in (0.0, 1.0, 2.5):
                saved = []
                with model.trace(X) as tracer:
                    at(position, scale)(model, tracer, saved)
                torch.testing.assert_close(saved, eager(at(position, scale), X))
