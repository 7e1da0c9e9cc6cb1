"""`splice`: recorded operations among the model's nodes."""

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight, passes
from nnsight_fx.capture.marker import site, supply
from nnsight_fx.errors import PlanMismatchError
from nnsight_fx.passes.job import Unfit, constant, fetch
from nnsight_fx.plan.keys import Value

from .graphs import call, capture, eager, graph, job_of, net, net_graph, record, targets

X = torch.linspace(-1, 1, 12).reshape(3, 4)
V = torch.arange(4.0)


def steer(m, tracer, saved):
    m.a.output = m.a.output + V
    saved.append(m.c.output.save())


def marked(x):
    s = site(x * 2, "a", "output", 0, True)
    return (torch.relu(s),)


def test_fires():
    recorded = record(steer, X)
    gm = graph(marked)
    job = job_of(recorded)
    assert passes.splice(gm, job) == 2
    c, _, marker, add, relu = [n for n in gm.graph.nodes if n.op.startswith("call")]
    assert (c.target, c.args) == (constant, (0, "tensor"))
    assert (add.target, add.args, relu.args) == ("add", (marker, c), (add,))
    assert job.emitted == {c, add}


def test_leaves_unrelated_nodes():
    def forward(x):
        s = site(x * 2, "a", "output", 0, True)
        side = torch.sin(x)
        return torch.relu(s), side, torch.cos(side)

    gm = graph(forward)
    before = {n.name: (n.target, n.args) for n in gm.graph.nodes if n.name in ("mul", "sin", "cos")}
    passes.splice(gm, job_of(record(steer, X)))
    assert {n.name: (n.target, n.args) for n in gm.graph.nodes if n.name in before} == before


@pytest.mark.parametrize("path, kind, leaf", [("a", "input", 0), ("aa", "output", 0), ("", "output", 0)])
def test_does_not_fire_on_another_site(path, kind, leaf):
    def forward(x):
        return (torch.relu(site(x * 2, path, kind, leaf, True)),)

    gm = graph(forward)
    before = str(gm.graph)
    job = job_of(record(steer, X))
    assert passes.splice(gm, job) == 0
    assert str(gm.graph) == before and not job.exports and not job.exit.done


def test_does_not_fire_on_another_call():
    job = job_of(record(steer, X))
    job.entry.counts[("a", "output")] = 1  # the first call was in an earlier segment
    assert passes.splice(graph(marked), job) == 0


def test_several_users_and_chains():
    def body(m, tracer, saved):
        h = m.a.output
        m.a.output = h * 2
        saved.append(m.a.output.save())  # sees the write
        m.a.output = m.a.output + h  # h is still what it was

    def forward(x):
        h = x + 1
        s = site(h, "a", "output", 0, True)
        return torch.relu(s), s * 3, h * 5

    recorded = record(body, X)
    gm, job = graph(forward), job_of(record(body, X))
    passes.run(gm, job)
    (relu, triple, aside), given = call(gm, job, recorded, X)
    h = X + 1
    torch.testing.assert_close((relu, triple, aside), (torch.relu(h * 3), h * 9, h * 5))
    torch.testing.assert_close(given[recorded.saved[0]], h * 2)


def test_a_tuple_leaves_its_other_leaves_alone():
    def body(m, tracer, saved):
        first, second = m.a.output
        m.a.output = (first, second * 10)

    class Pair(torch.nn.Module):
        def forward(self, x):
            return x + 1, x + 2

    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Pair()

        def forward(self, x):
            return self.a(x)

    def forward(x):
        return site(x + 1, "a", "output", 0, False), site(x + 2, "a", "output", 1, True)

    recorded = record(body, X, module=Root())
    gm, job = graph(forward), job_of(recorded)
    passes.run(gm, job)
    torch.testing.assert_close(call(gm, job, recorded, X)[0], (X + 1, (X + 2) * 10))


def test_values_from_elsewhere_are_fetched():
    def body(m, tracer, saved):
        h = m.a.output
        m.b.output = m.b.output + h

    recorded = record(body, X)
    job = job_of(recorded)
    job.entry.known, job.entry.done, job.entry.at = {(0, 0)}, {0}, [1]  # an earlier segment has read `a`

    def forward(x):
        return (site(x * 2, "b", "output", 0, True),)

    gm = graph(forward)
    passes.splice(gm, job)
    assert fetch in targets(gm)
    passes.run(gm, job, passes.PIPELINE[2:])
    assert job.takes == [Value(0, 0)]
    torch.testing.assert_close(call(gm, job, recorded, X, known={(0, 0): V})[0], (X * 2 + V,))


def test_a_cut_where_real_values_are_needed():
    def body(m, tracer, saved):
        m.a.output.register_hook(print)
        m.b.output = m.b.output * 0

    recorded = record(body, X)
    gm, job = net_graph(), job_of(recorded)
    passes.splice(gm, job)
    assert job.cut is not None and job.cut.site == ("a", "output", 0)
    assert job.exit.done.isdisjoint(n for n, op in enumerate(recorded.plan.ops) if op.verb.name == "write")


def test_a_stop_ends_it():
    def body(m, tracer, saved):
        saved.append((m.a.output + V).save())
        tracer.stop()

    gm, job = net_graph(), job_of(record(body, X))
    passes.splice(gm, job)
    assert job.stop is not None and job.stop.args[1:3] == ("a", "output") and job.exit.stopping
    assert ("b", "output") not in job.exit.counts


def test_a_supplied_value_that_is_not_there_yet():
    def body(m, tracer, saved):
        m.c.output.save()
        m.b.skip(m.a.output)

    gm, job = net_graph(), job_of(record(body, X), removes=True)
    assert passes.skip(gm, job) == 1 and supply in targets(gm)
    with pytest.raises(Unfit):
        passes.splice(gm, job)


def test_a_write_that_the_models_python_has_not_seen():
    def body(m, tracer, saved):
        m.a.output = torch.zeros(5, 4)

    with pytest.raises(PlanMismatchError, match="written with another shape, dtype or structure"):
        passes.splice(net_graph(), job_of(record(body, X)))


@pytest.mark.parametrize("raw", [True, False])
def test_numerics(raw):
    def body(m, tracer, saved):
        h = m.a.output
        h[:, 1] += V[1] * 2.5
        m.b.output = torch.where(m.b.output > 0, m.b.output, h)
        saved.extend([m.c.input.save(), m.c.output.save()])

    module, recorded = net(), record(body, X)
    gm, job = net_graph(), job_of(recorded, raw_numbers=raw)
    passes.run(gm, job)
    given = call(gm, job, recorded, X, *module.parameters())[1]
    torch.testing.assert_close([given[v] for v in recorded.saved], eager(body, X), rtol=0, atol=0)


def test_a_real_model():
    module = net()
    model = NNsight(module)
    model.compile(backend="eager", fullgraph=True)
    for _ in range(2):
        saved = []
        with model.trace(X) as tracer:
            steer(model, tracer, saved)
        torch.testing.assert_close(saved, eager(steer, X), rtol=0, atol=0)
    assert (model.explain().to_dict()["captures"][0]["captures"], capture(model).compiles) == (1, 1)


class Swapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Two()

    def forward(self, x):
        first, second = self.pair(x)
        return first - 3 * second


class Two(nn.Module):
    def forward(self, x):
        return x * 2, x - 1


def test_leaves_that_change_places_are_replaced_at_once():
    model, x = NNsight(Swapping()), torch.arange(4.0)
    with model.trace(x, compile={"backend": "eager"}):
        first, second = model.pair.output
        model.pair.output = (second, first)
        out = model.output.save()
    assert torch.equal(out, (x - 1) - 3 * (x * 2))
