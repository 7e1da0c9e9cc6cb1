"""`truncate`: what comes behind a stop leaves the graph."""

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight, passes
from nnsight_fx.capture.marker import site

from .graphs import call, capture, eager, graph, job_of, net, net_graph, record, targets

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def stop_at_a(m, tracer, saved):
    saved.append((m.a.output + 1).save())
    tracer.stop()


RECORDED = record(stop_at_a, X)


def stopped(tail, removes=True, recorded=RECORDED):
    """A graph that goes on with `tail` behind the stop, and its job after `splice`."""

    def forward(x):
        return (tail(site(x * 2, "a", "output", 0, True)),)

    gm, job = graph(forward), job_of(recorded, removes=removes)
    passes.splice(gm, job)
    return gm, job


def test_fires():
    gm, job = stopped(lambda h: torch.relu(site(h, "b", "input", 0, True)))
    assert passes.truncate(gm, job) == 3  # a marker, an operation, and what the segment returned
    assert site in targets(gm) and torch.relu not in targets(gm)
    assert gm.graph.output_node().args == ((),) and job.removed == {None}
    passes.expose(gm, job)
    assert (job.own, job.gives) == (0, [RECORDED.saved[0]])


def test_leaves_unrelated_nodes():
    gm, job = net_graph(), job_of(RECORDED, removes=True)
    passes.splice(gm, job)
    head = list(gm.graph.nodes)
    head = head[: head.index(job.stop) + 1]
    passes.truncate(gm, job)
    kept = list(gm.graph.nodes)
    assert kept[: len(head)] == head
    assert set(kept[len(head) : -1]) <= job.emitted  # what was recorded at the stop


def two_modes(h):
    return torch.relu(h)


@pytest.mark.parametrize(
    "tail",
    [
        lambda h: h.add_(1),
        lambda h: nn.functional.dropout(h, 0.5, True),
        lambda h: nn.functional.batch_norm(h, h, h, None, None, True),
        lambda h: torch.relu(torch.bernoulli(h)),
    ],
    ids=["in place", "dropout", "statistics", "random"],
)
def test_does_not_fire_on_a_tail_with_effects(tail):
    gm, job = stopped(tail)
    before = str(gm.graph)
    assert passes.truncate(gm, job) == 0 and str(gm.graph) == before and not job.removed


def test_does_not_fire_on_the_end_of_a_mode():
    gm, job = stopped(torch.relu)
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(torch._C._set_grad_enabled, (True,))
    assert passes.truncate(gm, job) == 0


def test_does_not_fire_without_a_stop_here():
    def body(m, tracer, saved):
        saved.append(m.a.output.save())

    gm, job = stopped(torch.relu, recorded=record(body, X))
    assert job.stop is None and passes.truncate(gm, job) == 0
    gm, job = stopped(torch.relu, removes=False)  # the capture half has stopped the model
    assert job.stop is not None and passes.truncate(gm, job) == 0


def test_several_values_at_the_stop_and_before():
    def body(m, tracer, saved):
        saved.append(m.a.input.save())
        h = m.b.output
        saved.extend([h.save(), (h * h).sum().save()])
        tracer.stop()

    module, recorded = net(), record(body, X)
    gm, job = net_graph(), job_of(recorded, removes=True)
    passes.run(gm, job)
    given = call(gm, job, recorded, X, *module.parameters())[1]
    torch.testing.assert_close([given[v] for v in recorded.saved], eager(body, X), rtol=0, atol=0)
    assert targets(gm).count(nn.functional.linear) == 2 and torch.relu not in targets(gm)


def test_a_skip_behind_the_stop():
    def body(m, tracer, saved):
        saved.append(m.b.input.save())
        m.b.skip(m.b.input)
        tracer.stop()

    module, recorded = net(), record(body, X)
    gm, job = net_graph(), job_of(recorded, removes=True)
    passes.run(gm, job)
    given = call(gm, job, recorded, X, *module.parameters())[1]
    torch.testing.assert_close([given[v] for v in recorded.saved], eager(body, X), rtol=0, atol=0)


def test_numerics():
    module, gm, job = net(), net_graph(), job_of(RECORDED, removes=True)
    passes.run(gm, job)
    own, given = call(gm, job, RECORDED, X, *module.parameters())
    assert own == ()
    torch.testing.assert_close([given[v] for v in RECORDED.saved], eager(stop_at_a, X), rtol=0, atol=0)


def test_a_real_model():
    model = NNsight(net())
    model.compile(backend="eager", fullgraph=True)
    with model.trace(X):
        model.a.output.save()  # from here on it is captured
    saved = []
    with model.trace(X) as tracer:
        stop_at_a(model, tracer, saved)
    torch.testing.assert_close(saved, eager(stop_at_a, X), rtol=0, atol=0)
    report = {name: rewrites for name, rewrites, _ in capture(model).last[-1]}
    assert capture(model).captures == 1 and report["truncate"] > 0
