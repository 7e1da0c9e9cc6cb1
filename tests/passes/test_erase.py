"""`erase`: what nobody touched costs nothing."""

import operator

import torch
import torch.fx as fx

from nnsight_fx import NNsight, passes
from nnsight_fx.capture.marker import site

from .graphs import capture, graph, job_of, net, net_graph, outputs, record, targets

X = torch.linspace(-1, 1, 12).reshape(3, 4)
RECORDED = record(lambda m, tracer, saved: None, X)


def test_fires():
    def forward(x):
        return (torch.relu(site(x * 2, "a", "output", 0, True)),)

    gm = graph(forward)
    assert passes.erase(gm) == 1
    x, double, relu, output = gm.graph.nodes
    assert relu.args == (double,) and site not in targets(gm)


def test_leaves_unrelated_nodes():
    def forward(x):
        dead = torch.sin(x)  # fx cannot tell it from an operation with side effects: it stays
        x.add_(1)
        torch.rand(3)
        return (site(dead * 1, "a", "output", 0, True),)

    gm = graph(forward)
    kept = [t for t in targets(gm) if t is not site]
    passes.erase(gm)
    assert targets(gm) == kept


def test_does_not_fire_on_an_identity_that_is_no_marker():
    def other(x, path, kind, leaf, last):
        return x

    made = fx.Graph()
    x = made.placeholder("x")
    getter = made.call_function(operator.getitem, (x, 0))  # dead, but the model's own
    made.output((made.call_function(other, (x, "a", "output", 0, True)),))
    gm = fx.GraphModule({}, made)
    before = str(gm.graph)
    assert passes.erase(gm, job_of(RECORDED)) == 0
    assert str(gm.graph) == before and getter in gm.graph.nodes


def test_several_users_and_chains():
    def forward(x):
        first = site(x, "a", "input", 0, True)
        second = site(first, "a", "output", 0, True)
        last = site(second, "", "output", 0, True)
        return last, torch.relu(second), first + last

    gm = graph(forward)
    assert passes.erase(gm) == 3
    x = next(iter(gm.graph.nodes))
    assert outputs(gm)[0] is x and len(x.users) == 3


def test_dead_getters_of_the_plan_go_and_nothing_else():
    made = fx.Graph()
    x = made.placeholder("x")
    pair = made.call_function(torch.max, (x, 0))
    unused = made.call_function(operator.getitem, (pair, 1))
    deeper = made.call_function(torch.narrow, (unused, 0, 0, 1))
    changed = made.call_method("add_", (x, 1))
    made.output((made.call_function(operator.getitem, (pair, 0)),))
    gm, job = fx.GraphModule({}, made), job_of(RECORDED)
    job.emitted = {pair, unused, deeper, changed}
    assert passes.erase(gm, job) == 2
    assert unused not in gm.graph.nodes and deeper not in gm.graph.nodes
    assert changed in gm.graph.nodes and pair in gm.graph.nodes


def test_numerics():
    module, gm = net(), net_graph()
    assert passes.erase(gm) == 6
    gm.recompile()
    assert torch.equal(gm(X, *module.parameters())[0], module(X))


def test_a_real_model():
    module = net()
    model = NNsight(module)
    model.compile(backend="eager", fullgraph=True)
    with model.trace(X):
        out = model.output.save()
    compiled = capture(model).segments[0]
    (variant,) = next(iter(compiled.variants.values()))
    assert dict((name, made) for name, made, _ in variant.report)["erase"] == len(
        [n for n in compiled.gm.graph.nodes if n.target is site]
    )
    assert torch.equal(out, module(X))
