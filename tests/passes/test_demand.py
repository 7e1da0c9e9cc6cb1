"""`demand`: one position is computed alone."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from nnsight_fx.passes.demand import demand, take

from .graphs import graph, targets

X, W, G = torch.linspace(-1, 1, 60).reshape(3, 5, 4), torch.linspace(0, 1, 24).reshape(6, 4), torch.linspace(1, 2, 4)
Q = torch.tensor([4, 0, 2])


def taken(function):
    """A graph that reads one position of what a function of `x`, a weight and a gain gives."""
    return graph(lambda x, w, g, q: (take(function(x, w, g), q),), X, W, G, Q)


def run(gm):
    gm.graph.lint()
    gm.recompile()
    return gm(X, W, G, Q)


def last(h, w, g):
    return F.linear(F.layer_norm(h, (4,), g, g), w)


def rms(h, w, g):
    scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return F.linear(g * (h * scale).to(torch.float32), w)[:, slice(0, None), :]


def test_fires():
    gm = taken(last)
    assert demand(gm) == 2
    assert targets(gm) == [take, F.layer_norm, F.linear]
    assert run(gm)[0].shape == (3, 1, 6)


def test_leaves_unrelated_nodes():
    gm = graph(lambda x, w, g, q: (take(last(x, w, g), q), torch.relu(x)), X, W, G, Q)
    assert demand(gm) == 2
    assert torch.equal(run(gm)[1], torch.relu(X))


@pytest.mark.parametrize(
    "mixes",
    [
        lambda h, w, g: h.cumsum(1),
        lambda h, w, g: torch.softmax(h, 1),
        lambda h, w, g: h.unflatten(2, (2, 2)).transpose(1, 2).flatten(1, 2)[:, :5],
        lambda h, w, g: F.layer_norm(h, (5, 4)),
        lambda h, w, g: h.flip(1),
        lambda h, w, g: (h @ h.transpose(1, 2)) @ h,
        lambda h, w, g: h[:, 1:],
        lambda h, w, g: F.scaled_dot_product_attention(h, h, h),
    ],
)
def test_does_not_pull_through_what_mixes_positions(mixes):
    def forward(x, w, g, q):
        return (take(mixes(x, w, g), q.clamp(max=3)),)

    gm = graph(forward, X, W, G, Q)
    before, want = targets(gm), run(gm)[0]
    assert demand(gm) == 0
    assert targets(gm) == before and torch.equal(run(gm)[0], want)


def test_what_is_used_whole_is_left_whole_and_chains_and_several_users_are_followed():
    def forward(x, w, g, q):
        n = F.layer_norm(x, (4,), g, g)
        y = F.linear(n, w)
        return (take(y, q), take(y, q) * 2, n)

    gm = graph(forward, X, W, G, Q)
    want = run(gm)
    assert demand(gm) == 1  # the norm is an output
    assert targets(gm).count(take) == 1
    for a, b in zip(run(gm), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "function", [last, rms, lambda h, w, g: torch.relu(h) + h * g + 1, lambda h, w, g: h + h[:, :, :1]]
)
def test_numbers(function):
    gm, want = taken(function), taken(function)
    assert demand(gm) > 0
    torch.testing.assert_close(run(gm)[0], run(want)[0])
    y = function(X, W, G)
    torch.testing.assert_close(run(gm)[0][:, 0], torch.stack([y[i, q] for i, q in enumerate(Q)]))


def test_a_real_models_head():
    norm, linear = head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6)).requires_grad_(False)

    def forward(x, w, b, u, c, q):
        return (take(F.linear(F.layer_norm(x, (4,), w, b), u, c), q),)

    given = (X, norm.weight.data, norm.bias.data, linear.weight.data, linear.bias.data, Q)
    gm = graph(forward, *given)
    assert demand(gm) == 2
    gm.recompile()
    torch.testing.assert_close(gm(*given)[0][:, 0], torch.stack([head(X)[i, q] for i, q in enumerate(Q)]))
