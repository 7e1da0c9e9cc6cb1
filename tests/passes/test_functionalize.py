"""`functionalize`: in-place operations in functional form."""

import functools

import pytest
import torch
import torch.fx as fx
import torch.nn as nn

from nnsight_fx import NNsight, passes
from nnsight_fx.capture.marker import site
from nnsight_fx.passes.effects import changes
from nnsight_fx.passes.job import constant

from .graphs import call, capture, eager, graph, job_of, net, net_graph, record, targets

X = torch.linspace(-1, 1, 12).reshape(3, 4)
RECORDED = record(lambda m, tracer, saved: None, X)
aten = torch.ops.aten


def row_by_row(x):
    h = x * 2
    h.select(1, 1).add_(1)
    return (torch.relu(h),)


def run(function, *inputs):
    """A graph before and after, on the same inputs."""
    gm = graph(function, *inputs)
    job = job_of(RECORDED)
    before = [x.clone() for x in inputs]
    want = gm(*before)
    rewrites = passes.functionalize(gm, job)
    gm.graph.lint()
    gm.recompile()
    after = [x.clone() for x in inputs]
    torch.testing.assert_close(gm(*after), want)
    torch.testing.assert_close(after, before)  # inputs change as they did
    return gm, rewrites


def test_fires():
    gm, rewrites = run(row_by_row, X)
    assert rewrites == 1
    assert targets(gm)[1:4] == [aten.select.int, aten.add.Tensor, aten.select_scatter.default]
    assert not any(changes(n) for n in gm.graph.nodes)
    assert all("example_value" in n.meta for n in gm.graph.nodes if n.op != "output")


def test_leaves_unrelated_nodes():
    def forward(x):
        h = site(x * 2, "a", "output", 0, True)
        row = h[:, 1]  # a view that nothing is written through stays one
        h = site(h + row.sum(), "b", "output", 0, True)
        h.mul_(2)
        return (site(h, "c", "output", 0, True),)

    gm, rewrites = run(forward, X)
    assert rewrites == 1 and aten.select_scatter.default not in targets(gm)
    assert [n.args[1:] for n in gm.graph.nodes if n.target is site] == [
        (name, "output", 0, True) for name in ("a", "b", "c")
    ]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (torch.relu(x[:, 1]),),
        lambda x: ((x > 0) & (x < 1),),
        lambda x: (nn.functional.relu(x, inplace=False),),
        lambda x: (nn.functional.batch_norm(x, x[0], x[0], None, None, False),),
    ],
    ids=["views", "and_", "a flag", "evaluation"],
)
def test_does_not_fire_where_nothing_is_changed(function):
    gm, job = graph(function, X), job_of(RECORDED)
    before = str(gm.graph)
    assert passes.functionalize(gm, job) == 0 and str(gm.graph) == before


def test_does_not_fire_without_fakes_or_across_modes():
    gm, job = graph(row_by_row), job_of(RECORDED)
    assert passes.functionalize(gm, job) == 0
    gm = graph(row_by_row, X)
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(torch._C._set_grad_enabled, (True,))
    assert passes.functionalize(gm, job) == 0


def test_several_views_of_one_base_and_inputs():
    def forward(x, y):
        h = x + y
        row, column = h[0], h[:, 0]
        row.add_(1)
        column.mul_(2)  # sees the row's change at [0, 0]
        y.add_(h)  # an input: changed, once, at the end
        y.add_(1)
        return h, row, column, torch.relu(y)

    gm, rewrites = run(forward, X, X + 3)
    assert rewrites == 4
    assert targets(gm).count(aten.copy_.default) == 1 == sum(changes(n) for n in gm.graph.nodes)


def test_values_and_sources_of_a_plan():
    def body(m, tracer, saved):
        h = m.a.output
        h[:, 1] += torch.arange(3.0)
        saved.append(h.save())

    recorded = record(body, X)
    gm, job = net_graph(X, *net().parameters()), job_of(recorded)
    passes.splice(gm, job)

    def example(node):
        if node.target is constant:
            value = recorded.constants[node.args[0]]
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
        return node.meta["example_value"]

    mode = next(n for n in gm.graph.nodes).meta["example_value"].fake_mode
    numbers = [n for n in gm.graph.nodes if n.target is constant and n.args[1] == "int"]
    assert passes.functionalize(gm, job) == 0  # no fake for what the body brings along
    functional = functools.partial(passes.functionalize, example=example)
    passes.run(gm, job, (functional, passes.lift_constants, passes.expose, passes.erase))
    assert numbers and aten.select_scatter.default in targets(gm)
    module = net()
    own, given = call(gm, job, recorded, X, *module.parameters())
    torch.testing.assert_close([given[v] for v in recorded.saved], eager(body, X))
    assert job.report[0][0] == "functionalize" and site not in targets(gm)


def test_numerics_of_a_random_chain():
    def forward(x, mask):
        h = torch.tanh(x)
        h.unsqueeze(0).expand(2, 3, 4)[1].mul(2)
        part = h[1:, ::2]
        part.copy_(part.flip(0))
        h.masked_fill_(mask, -1.0)
        h.t().sub_(0.5)
        return h, part, h.view(2, 6).sum(0)

    run(forward, X, X > 0.5)


def test_a_real_model():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    module = module.requires_grad_(False).train()
    model = NNsight(module)
    model.compile(backend="eager", fullgraph=True)
    with model.trace(X):
        model.output.save()
    segment = capture(model).segments[0]
    gm = segment.copy()
    kept = {n: [x.clone() for x in module.buffers()] for n in ("want", "got")}
    assert passes.functionalize(gm, job_of(RECORDED)) > 0
    passes.erase(gm)
    gm.recompile()
    inputs = [n.name for n in segment.gm.graph.nodes if n.op == "placeholder"]
    assert isinstance(gm, fx.GraphModule) and len(inputs) == len([n for n in gm.graph.nodes if n.op == "placeholder"])

    def arguments(buffers):
        names = [name for name, _ in module.named_parameters()] + [name for name, _ in module.named_buffers()]
        values = dict(zip(names, [*module.parameters(), *buffers], strict=True))
        return [X if "args_0" in n else next(v for k, v in values.items() if _is(n, k)) for n in inputs]

    def _is(placeholder, name):
        owner, _, leaf = name.rpartition(".")
        return f"modules_{owner}_" in placeholder and placeholder.rstrip("_").endswith(leaf)

    want = segment.gm(*arguments(kept["want"]))
    torch.testing.assert_close(gm(*arguments(kept["got"])), want)
    torch.testing.assert_close(kept["got"], kept["want"])
