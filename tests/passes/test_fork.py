"""`fork`: rows join where they are first changed."""

import pytest
import torch

from nnsight_fx.capture.marker import site
from nnsight_fx.passes.fork import fork, join, more

from .graphs import graph, targets

X, W = torch.linspace(-1, 1, 12).reshape(3, 4), torch.linspace(0, 1, 16).reshape(4, 4)
A, B = ("a", "output", 0), ("b", "output", 0)


def two(x, w):
    h = site(torch.relu(x @ w), "a", "output", 0, True)
    g = site(torch.tanh(h @ w), "b", "output", 0, True)
    return (g + h,)


def rowed(function, *inputs, shared=()):
    """A graph of which it is known that everything but `shared` holds the rows in dimension 0."""
    gm = graph(function, *inputs)
    for node in gm.graph.nodes:
        if node.op != "output" and node.name not in shared:
            node.meta["rows"] = 0
    return gm


def run(gm, *inputs):
    gm.graph.lint()
    gm.recompile()
    return gm(*inputs)[0]


def rows(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


def test_fires():
    gm = rowed(two, X, W, shared={"w"})
    assert fork(gm, at=[A]) == 1
    order = targets(gm)
    assert order.index(join) + 1 == order.index(site) and order.count(join) == 1
    assert [n.name for n in gm.graph.nodes if n.op == "placeholder"] == ["x", "w", "joins_0"]
    both = run(gm, X, W, rows(2, 0))
    assert torch.equal(both, rowed(two, X, W, shared={"w"})(torch.cat([X, X[2:], X[:1]]), W)[0])


def test_leaves_unrelated_nodes():
    gm = rowed(two, X, W, shared={"w"})
    before = targets(gm)
    fork(gm, at=[B])
    assert [t for t in targets(gm) if t is not join] == before


@pytest.mark.parametrize("at", [[("c", "output", 0)], [("a", "output", 1)], [("a", "input", 0)], []])
def test_does_not_fire_at_other_sites(at):
    gm = rowed(two, X, W, shared={"w"})
    before = targets(gm)
    assert fork(gm, at=at) == 0 and targets(gm) == before


def test_every_value_used_behind_joins_and_what_is_shared_does_not():
    def forward(x, w):
        early, number = torch.relu(x), torch.sigmoid(w)
        h = site(x @ w, "a", "output", 0, True)
        return (site(h + early @ number, "b", "output", 0, True) + x,)

    gm = rowed(forward, X, W, shared={"w", "sigmoid"})
    assert fork(gm, at=[A, B]) == 2
    joined = [n.args[0].name for n in gm.graph.nodes if n.target is join]
    assert sorted(joined[:3]) == ["matmul", "relu", "x"] and len(joined) == 5  # at b: the sum, and x again
    got = run(gm, X, W, rows(1), rows(0, 3))
    want = forward(torch.cat([X, X[1:2]]), W)[0]
    assert torch.equal(got, torch.cat([want, want[0:1], want[3:4]]))
    assert torch.equal(run(gm, X, W, rows(), rows()), forward(X, W)[0])


def test_the_number_of_rows_grows_and_what_mixes_them_with_others_is_refused():
    def forward(n, x, w):
        h = site(x @ w, "a", "output", 0, True)
        return (h.view(n, 2, 2) * 2,)

    gm = rowed(lambda n, x, w: forward(n, x, w), shared={"n", "w"})
    for node in gm.graph.nodes:
        if node.name == "n":
            node.meta["rows"] = "count"
    assert fork(gm, at=[A]) == 1 and more in targets(gm)
    assert run(gm, 3, X, W, rows(0, 0)).shape == (5, 2, 2)

    gm = rowed(two, X, W, shared={"w"})
    next(n for n in gm.graph.nodes if n.target is torch.relu).meta = {"mixed": True}
    with pytest.raises(ValueError, match="holds the rows together with something else"):
        fork(gm, at=[A])
