"""The runner: a visible tuple, in order, with what each pass did."""

import functools

import pytest
import torch
import torch.fx as fx

from nnsight_fx import NNsight, passes
from nnsight_fx.engine.captured.capture import Capture
from nnsight_fx.passes.job import constant

from .graphs import call, eager, graph, job_of, net, net_graph, record, targets

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def steer(m, tracer, saved):
    m.a.output = m.a.output + torch.arange(4.0)
    saved.append(m.c.output.save())


def swap_relu(gm, job, *, by=torch.tanh):
    found = [n for n in gm.graph.nodes if n.target is torch.relu]
    for node in found:
        node.target = by
    return len(found)


def test_the_order_and_the_report():
    recorded = record(steer, X)
    gm, job = net_graph(), job_of(recorded)
    report = passes.run(gm, job)
    assert report is job.report
    assert [name for name, _, _ in report] == [
        "skip", "splice", "truncate", "narrow", "lift_constants", "expose", "blocks", "erase", "prune", "read_positions",
        "conditional", "batch_linears", "differentiate", "linearize",
    ]  # fmt: skip
    assert {name: rewrites for name, rewrites, _ in report} == {
        "skip": 0, "splice": 2, "truncate": 0, "narrow": 0, "lift_constants": 1, "expose": 1, "blocks": 0, "erase": 6,
        "prune": 0, "read_positions": 0, "conditional": 0, "batch_linears": 0, "differentiate": 0, "linearize": 0
    }  # fmt: skip
    assert report[-1][2] == len(gm.graph.nodes)


def test_a_pass_can_be_left_out():
    gm, job = net_graph(), job_of(record(steer, X))
    report = passes.run(gm, job, disable={"erase", "lift_constants"})
    assert [name for name, _, _ in report] == [
        "skip",
        "splice",
        "truncate",
        "narrow",
        "expose",
        "blocks",
        "prune",
        "read_positions",
        "conditional",
        "batch_linears",
        "differentiate",
        "linearize",
    ]
    assert constant in targets(gm) and not job.takes


def test_a_pipeline_of_ones_own():
    module, recorded = net(), record(steer, X)
    gm, job = net_graph(), job_of(recorded)
    mine = (*passes.PIPELINE[:2], functools.partial(swap_relu, by=torch.sigmoid), *passes.PIPELINE[2:])
    report = passes.run(gm, job, mine)
    assert report[2][:2] == ("swap_relu", 1)
    out = call(gm, job, recorded, X, *module.parameters())[0][0]
    torch.testing.assert_close(out, module.c(torch.sigmoid(module.b(module.a(X) + torch.arange(4.0)))))
    gm = net_graph()
    assert passes.run(gm, job_of(recorded), mine, disable={"swap_relu"})[2][0] == "truncate"


def test_a_pipeline_of_ones_own_on_a_real_model():
    module = net()
    model = NNsight(module)
    capture = Capture(
        model._host.markers, model._host.captured(backend="eager").options, pipeline=(*passes.PIPELINE, swap_relu)
    )
    model._host.compiled = capture
    with model.trace(X):
        out = model.output.save()
    torch.testing.assert_close(out, module.c(torch.tanh(module.b(module.a(X)))))
    assert capture.last[-1][-1][:2] == ("swap_relu", 1)


def broken(gm, job):
    first = next(n for n in gm.graph.nodes if n.op != "placeholder")
    gm.graph.output_node().append(first)  # behind the output: not a graph any more
    return 1


def test_only_the_runner_lints():
    with pytest.raises(RuntimeError, match="before it has been defined"):
        passes.run(graph(lambda x: (torch.relu(x),)), job_of(record(steer, X)), (broken,))


@pytest.mark.parametrize("step", [*passes.PIPELINE, passes.functionalize], ids=lambda step: step.__name__)
def test_a_pass_neither_lints_nor_recompiles(step, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError(f"{step.__name__} did what the runner does")

    gm, job = net_graph(X, *net().parameters()), job_of(record(steer, X))
    monkeypatch.setattr(fx.Graph, "lint", forbidden)
    monkeypatch.setattr(fx.GraphModule, "recompile", forbidden)
    assert step(gm, job) >= 0


def test_every_pass_says_what_it_does_before_and_after():
    for step in (*passes.PIPELINE, passes.functionalize):
        text = step.__doc__ or ""
        assert "->" in text and "Does not fire when:" in text, step.__name__


def test_zero_means_untouched():
    def forward(x):
        return (torch.relu(x),)

    for step in (*passes.PIPELINE, passes.functionalize):
        gm = graph(forward, X)
        before = str(gm.graph)
        assert step(gm, job_of(record(steer, X))) == 0 and str(gm.graph) == before, step.__name__


def test_the_whole_pipeline_against_eager():
    got = eager(steer, X, backend="eager", fullgraph=True)
    torch.testing.assert_close(got, eager(steer, X), rtol=0, atol=0)
