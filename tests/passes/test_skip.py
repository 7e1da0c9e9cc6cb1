"""`skip`: the modules that the plan skips leave the graph."""

import operator

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight, passes
from nnsight_fx.capture.marker import site, supply
from nnsight_fx.plan.plan import InterventionGraph

from .graphs import call, capture, eager, graph, job_of, net, net_graph, outputs, record, targets

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def skip_b(m, tracer, saved):
    m.b.skip(m.b.input * 3)
    saved.extend([m.b.output.save(), m.c.output.save()])


RECORDED = record(skip_b, X)


def job(recorded=RECORDED, **options):
    return job_of(recorded, **{"removes": True, **options})


def around(middle):
    """A graph with `middle` between the markers of `b`."""

    def forward(x):
        h = site(x, "b", "input", 0, True)
        return (site(middle(h), "b", "output", 0, True),)

    return graph(forward)


def test_fires():
    gm, j = around(lambda h: torch.relu(torch.sin(h))), job()
    assert passes.skip(gm, j) == 1
    assert targets(gm) == [site, supply, site] and j.removed == {("b", "output", 0)}
    entry, value, out = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert value.args == ("b", "skip", 0, 0) and out.args == (value, "b", "output", 0, True)
    passes.splice(gm, j)
    assert supply not in targets(gm) and out.args[0].target == "mul"


def test_leaves_unrelated_nodes():
    gm, j = net_graph(), job()
    before = [n for n in gm.graph.nodes if n.args[1:3] != ("b", "output")]
    linear = next(n for n in gm.graph.nodes if n.args[1:3] == ("b", "output")).args[0]
    passes.skip(gm, j)
    assert [n for n in before if n not in gm.graph.nodes] == [linear]


LOOK_ALIKES = {
    "changes a tensor": lambda h: h.add_(1),
    "draws numbers": lambda h: nn.functional.dropout(h, 0.5, True),
    "switches a mode": lambda h: (torch._C._set_grad_enabled(False), torch.relu(h))[1],
    "calls itself": lambda h: site(site(h, "b", "input", 0, True), "b", "output", 0, True),
}


@pytest.mark.parametrize("why", ["changes a tensor", "draws numbers", "calls itself"])
def test_does_not_fire_on_a_region_with_effects(why):
    gm, j = around(LOOK_ALIKES[why]), job()
    before = str(gm.graph)
    assert passes.skip(gm, j) == 0 and str(gm.graph) == before and not j.removed


def test_does_not_fire_on_a_mode_or_a_value_that_leaves():
    gm = around(torch.relu)
    relu = next(n for n in gm.graph.nodes if n.target is torch.relu)
    with gm.graph.inserting_before(relu):
        mode = gm.graph.call_function(torch._C._set_grad_enabled, (False,))
    assert passes.skip(gm, job()) == 0
    gm.graph.erase_node(mode)
    output = gm.graph.output_node()
    own = outputs(gm)
    output.args = ((*own, relu),)  # an attention map that the model returns, say
    assert passes.skip(gm, job()) == 0
    output.args = (own,)
    assert passes.skip(gm, job()) == 1


@pytest.mark.parametrize(
    "options", [{"removes": False}, {"half": frozenset({("b", "skip", 0)})}], ids=["not allowed", "in the capture half"]
)
def test_does_not_fire_where_the_capture_did_it(options):
    assert passes.skip(around(torch.relu), job(**options)) == 0


def test_does_not_fire_on_another_call_or_half_a_module():
    j = job()
    j.entry.counts[("b", "input")] = 1
    assert passes.skip(around(torch.relu), j) == 0

    def head(x):
        return (torch.relu(site(x, "b", "input", 0, True)),)

    assert passes.skip(graph(head), job()) == 0


def test_several_leaves_calls_and_nested_modules():
    class Pair(nn.Module):
        def forward(self, x):
            return x + 1, x + 2

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Pair(), Pair()

        def forward(self, x):
            return self.b(self.a(x)[1])

    def body(m, tracer, saved):
        x = m.a.input
        m.a.skip((x * 10, x * 20))
        m.b.skip((m.b.input - 1, x))
        saved.append(m.output[0].save())

    def forward(x):
        h = site(x, "a", "input", 0, True)
        first, second = h + 1, h + 2
        site(first, "a", "output", 0, False)
        h = site(second, "a", "output", 1, True)
        h = site(h, "b", "input", 0, True)
        inner = site(h + 1, "b.inner", "input", 0, True)  # sites of what is skipped go with it
        first = site(inner * 1, "b", "output", 0, False)
        return first, site(inner * 2, "b", "output", 1, True)

    recorded = record(body, X, module=Root())
    gm, j = graph(forward), job(recorded)
    assert passes.skip(gm, j) == 2
    assert j.removed == {("a", "output", 0), ("b", "output", 0)}
    assert "b.inner" not in str(gm.graph) and operator.add not in targets(gm)
    passes.run(gm, j)
    torch.testing.assert_close(call(gm, j, recorded, X)[0], (X * 20 - 1, X))


def test_numerics():
    module, gm, j = net(), net_graph(), job()
    passes.run(gm, j)
    given = call(gm, j, RECORDED, X, *module.parameters())[1]
    torch.testing.assert_close([given[v] for v in RECORDED.saved], eager(skip_b, X), rtol=0, atol=0)
    assert targets(gm).count(nn.functional.linear) == 2


def test_a_real_model():
    module = net()
    model = NNsight(module)
    model.compile(backend="eager", fullgraph=True)
    with model.trace(X):
        model.a.output.save()  # from here on it is captured
    saved = []
    with model.trace(X) as tracer:
        skip_b(model, tracer, saved)
    torch.testing.assert_close(saved, eager(skip_b, X), rtol=0, atol=0)
    assert capture(model).captures == 1 and capture(model).last[-1][0][:2] == ("skip", 1)
    assert isinstance(RECORDED.plan, InterventionGraph) and RECORDED.plan.ops[2].verb.name == "skip"
