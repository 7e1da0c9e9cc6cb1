"""`expose`: results become graph outputs."""

import torch

from nnsight_fx import NNsight, passes

from .graphs import call, capture, eager, graph, job_of, net, net_graph, outputs, record

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def save_two(m, tracer, saved):
    saved.extend([m.b.output.save(), (m.a.output * 2).save()])


def forward(x):
    h = torch.relu(x)
    return h + 1, h


RECORDED = record(lambda m, tracer, saved: None, X)


def test_fires():
    gm, job = graph(forward), job_of(RECORDED)
    relu = next(n for n in gm.graph.nodes if n.target is torch.relu)
    job.exports = {(4, 0): relu}
    own = list(outputs(gm))
    assert passes.expose(gm, job) == 1
    assert outputs(gm) == (*own, relu)  # the node itself: no clone, no detach
    assert (job.own, job.gives) == (2, [(4, 0)])


def test_leaves_unrelated_nodes():
    gm, job = graph(forward), job_of(RECORDED)
    job.exports = {(0, 0): next(n for n in gm.graph.nodes if n.target is torch.relu)}
    before = [(n.name, n.target, n.args) for n in gm.graph.nodes if n.op != "output"]
    passes.expose(gm, job)
    assert [(n.name, n.target, n.args) for n in gm.graph.nodes if n.op != "output"] == before


def test_does_not_fire_on_values_that_stay_inside():
    gm, job = graph(forward), job_of(RECORDED)
    relu = next(n for n in gm.graph.nodes if n.target is torch.relu)
    job.emitted = {relu}  # made by the plan, but neither saved nor used later
    before = str(gm.graph)
    assert passes.expose(gm, job) == 0
    assert str(gm.graph) == before and (job.own, job.gives) == (2, [])


def test_several_values_of_one_node_in_their_order():
    gm, job = graph(forward), job_of(RECORDED)
    x, relu = (n for n in gm.graph.nodes if n.op == "placeholder" or n.target is torch.relu)
    job.exports = {(7, 1): relu, (2, 0): x, (7, 0): relu}
    assert passes.expose(gm, job) == 3
    assert job.gives == [(2, 0), (7, 0), (7, 1)]
    assert outputs(gm)[2:] == (x, relu, relu)


def test_numerics():
    module, recorded = net(), record(save_two, X)
    gm, job = net_graph(), job_of(recorded)
    passes.run(gm, job)
    own, given = call(gm, job, recorded, X, *module.parameters())
    torch.testing.assert_close(own[0], module(X), rtol=0, atol=0)
    torch.testing.assert_close([given[v] for v in recorded.saved], eager(save_two, X), rtol=0, atol=0)


def test_a_real_model():
    def body(m, tracer, saved):
        saved.extend([m.a.output.save(), m.c.output.save()])

    module = net().requires_grad_(True)
    got = eager(body, X, module=module, backend="eager", fullgraph=True)
    torch.testing.assert_close(got, eager(body, X, module=module), rtol=0, atol=0)
    assert all(v.requires_grad for v in got)  # they lie on the model's own autograd graph
    model = NNsight(module)
    model.compile(backend="eager")
    with model.trace(X):
        out = model.output.save()
    assert ("expose", 1) in [step[:2] for step in capture(model).last[-1]] and torch.equal(out, module(X))
