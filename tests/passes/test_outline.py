"""`outline`: equal pieces between sites become one submodule."""

import operator

import pytest
import torch
import torch.nn as nn
from torch.fx.experimental.proxy_tensor import make_fx

from nnsight_fx import NNsight
from nnsight_fx.capture.marker import site
from nnsight_fx.passes.outline import outline, seams, sink_views

from .graphs import capture, graph, net, net_graph, targets

X, W, B = torch.linspace(-1, 1, 12).reshape(3, 4), torch.randn(4, 4), torch.randn(4)
PARAMETERS = [p for layer in ("a", "b", "c") for p in (W, B)]
A, B_OUT = ("a", "output", 0), ("b", "output", 0)


def modules(gm):
    return [n.target for n in gm.graph.nodes if n.op == "call_module"]


def test_fires():
    gm = net_graph(X, *PARAMETERS)
    assert outline(gm, at=[A, B_OUT]) == 3
    assert len(modules(gm)) == 3 and set(modules(gm)) == {
        "region_0",
        "region_1",
    }  # a and b are equal, relu and c are not
    assert [where for where, _ in seams(gm)] == [A, B_OUT]  # the other markers are gone
    region = gm.get_submodule("region_0")
    assert [n.op for n in region.graph.nodes] == ["placeholder"] * 3 + ["call_function", "output"]


def test_leaves_unrelated_nodes():
    gm = net_graph(X, *PARAMETERS)
    before = [n.name for n in gm.graph.nodes if n.op in ("placeholder", "output")]
    outline(gm, at=[A])
    assert [n.name for n in gm.graph.nodes if n.op in ("placeholder", "output")] == before


@pytest.mark.parametrize(
    "second", [lambda h, w: torch.relu(h @ w.T), lambda h, w: h @ w[:, :3], lambda h, w: (h @ w) * 2.0]
)
def test_does_not_take_the_look_alike_for_the_same(second):
    """Another function, another shape, another number."""

    def forward(x, v, w):
        h = site(torch.relu(x @ v) * 1.0, "a", "output", 0, True)
        return (second(h, w) * 1.0,)

    gm = graph(forward, X, W, W)
    want = gm(X, W, W)[0]
    assert outline(gm, at=[A]) == 2
    assert len(set(modules(gm))) == 2
    gm.recompile()
    assert torch.equal(gm(X, W, W)[0], want)


def test_does_not_fire_where_a_size_or_a_tuple_crosses_a_site():
    def forward(x):
        parts = torch.chunk(x, 2, 1)
        h = site(x * 2, "a", "output", 0, True)
        return (h[:, :2] + parts[0],)

    gm = graph(forward, X)
    chunk = next(n for n in gm.graph.nodes if n.target is torch.chunk)
    getter = next(iter(chunk.users))
    last = gm.graph.output_node()
    last.prepend(getter)  # behind the site
    for user in list(getter.users):
        last.prepend(user)
    code = list(gm.graph.nodes)
    assert outline(gm, at=[A]) == 0
    assert list(gm.graph.nodes) == code


@pytest.mark.parametrize("spare", [True, False])
def test_a_region_may_give_more_than_is_used(spare):
    """Of the last of five equal blocks the sum is not used; of the third another value is, which no other gives."""

    def forward(x, w):
        seen = []
        for i in range(5):
            h = site(torch.relu(x @ w), str(i), "output", 0, True)
            inner = h * 2
            x = inner + x
            seen.append(x * 3)
            if i == 2:
                seen.append(inner)
        return tuple(seen)

    gm = graph(forward, X, W)
    want = gm(X, W)
    before = [n for n in gm.graph.nodes if n.target is operator.matmul]
    assert outline(gm, before=before, alike=lambda n: None, spare=spare) == 5
    assert modules(gm) == [f"region_{i}" for i in ((0, 0, 1, 0, 0) if spare else (0, 0, 1, 0, 2))]
    assert all(n.users for n in gm.graph.nodes if n.target is operator.getitem)
    gm.graph.lint()
    gm.recompile()
    assert all(map(torch.equal, gm(X, W), want))


def test_several_users_and_values_across_sites():
    def forward(x, v, w):
        h = torch.relu(x @ v)
        first = site(h, "a", "output", 0, True)
        second = site(torch.relu(first @ w), "a", "output", 0, True)
        return (first + second + h, second)

    gm = graph(forward, X, W, W.T.contiguous())
    want = gm(X, W, W.T.contiguous())
    assert outline(gm, at=[A, ("a", "output", 1)]) == 3
    assert modules(gm)[:2] == ["region_0", "region_0"]
    gm.graph.lint()
    gm.recompile()
    for got, expected in zip(gm(X, W, W.T.contiguous()), want, strict=True):
        assert torch.equal(got, expected)
    assert [where for where, _ in seams(gm)] == [A, ("a", "output", 1)]


def test_a_real_model():
    torch.manual_seed(0)
    module = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(5)]).requires_grad_(False)
    model = NNsight(module)
    model.compile(backend="eager")
    with model.trace(X):
        model.output.save()
    (segment,) = capture(model).segments
    gm = segment.copy()
    assert outline(gm, at=[(str(i), "output", 0) for i in range(5)]) == 5
    assert set(modules(gm)) == {"region_0"}
    gm.recompile()
    args = [X if n.meta["example_value"].shape == X.shape else None for n in gm.graph.nodes if n.op == "placeholder"]
    parameters = [p for layer in module for p in layer.parameters()]
    given = iter(parameters)
    args = [X if x is X else next(given) for x in args]
    torch.testing.assert_close(gm(*args)[0], module(X), rtol=0, atol=0)
    assert net() is not None and targets(gm)


def traced(function):
    return make_fx(function)(X, W)


def begins(gm, target):
    return [n for n in gm.graph.nodes if n.target is target]


def test_views_are_taken_again_where_they_are_used():
    aten = torch.ops.aten

    def forward(x, w):
        turned = w.t()
        h = (x @ turned).sin()
        flat = h.view(4, 3).t()
        return (flat @ turned).cos() @ turned, flat

    gm = traced(forward)
    before = begins(gm, aten.mm.default)[1:]
    assert sink_views(gm, before) == 4  # `turned` twice, and the two that make `flat`
    assert outline(gm, before=before, alike=lambda n: None) == 3
    gm.recompile()
    for got, want in zip(gm(X, W), forward(X, W), strict=True):
        assert torch.equal(got, want)
    first = gm.get_submodule("region_0")
    assert len(first.graph.output_node().args[0]) <= 2  # `h`, and the view that is a result


def test_a_slice_is_taken_again_where_it_is_used():
    class Sliced(nn.Module):
        def forward(self, x, w, n):
            h = x @ w
            last, some = h[:, -1:, None], h[:n]
            return last.sin(), some.sin()

    gm = torch.fx.symbolic_trace(Sliced())
    _, some = begins(gm, operator.getitem)
    before = [n for n in gm.graph.nodes if n.op == "call_method"]
    assert sink_views(gm, before) == 1
    assert [n.target for n in before] == [operator.getitem, "sin"]
    assert before[1].args == (some,)  # it stays: the number would have to cross with it
    gm.recompile()
    x, w = torch.randn(2, 4, 3), torch.randn(3, 3)
    for got, want in zip(gm(x, w, 1), Sliced()(x, w, 1), strict=True):
        assert torch.equal(got, want)


def test_a_view_of_what_is_changed_stays_where_it_is():
    def forward(x, w):
        h = x @ w
        seen = h.view(4, 3)
        h.add_(1.0)
        return (seen @ x) @ w

    gm = traced(forward)
    assert sink_views(gm, begins(gm, torch.ops.aten.mm.default)[1:]) == 0
