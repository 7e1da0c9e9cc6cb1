"""`causal`: what differs from row to row is laid out as tokens."""

import pytest
import torch
import torch.nn.functional as F

from nnsight_fx.batching.positions import positions
from nnsight_fx.batching.rows import Mixed
from nnsight_fx.capture.marker import site
from nnsight_fx.passes.causal import Facts, causal
from nnsight_fx.passes.fork import fork
from nnsight_fx.passes.tokens import Layout, NotCausal, attend, choose, pack, repack, unpack

from .graphs import graph, targets

X = torch.linspace(-1, 1, 2 * 5 * 8).sin().reshape(2, 5, 8)
W = torch.linspace(-1, 2, 64).cos().reshape(8, 8)
AT = ("a", "output", 0)


def attention(x, w):
    return masked(x, w, None, True)


def masked(x, w, mask, is_causal=False):
    h = site(F.linear(x, w), "a", "output", 0, True)
    q = F.linear(h, w).view(2, 5, 2, 4).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=is_causal)
    h = h + out.transpose(1, 2).reshape(2, 5, 8) + x
    return (site(torch.relu(h), "b", "output", 0, True),)


def rowed(function, *inputs):
    gm = graph(function, *inputs)
    for node in gm.graph.nodes:
        if node.op != "output" and node.name not in ("w", "mask"):
            node.meta["rows"] = 0
    return gm


def literal(gm):
    """The views of these graphs have a number for the rows: -1, as a capture for any number would not know it."""
    for node in gm.graph.nodes:
        if node.target in ("view", "reshape"):
            node.args = (node.args[0], -1, *node.args[2:])
    return gm


def rewritten(function, *inputs):
    gm = literal(rowed(function, *inputs))
    facts = positions(gm, {(AT, 0)})
    return gm, causal(gm, facts=facts)


def test_fires_and_equals_eager():
    """A third row, which leaves row 0 at position 3 of `a`, has two tokens."""
    gm, count = rewritten(attention, X, W)
    assert count == 1 and {pack, attend} <= set(targets(gm)) and F.scaled_dot_product_attention not in targets(gm)
    fork(gm, at=[AT])
    gm.graph.lint()
    gm.recompile()
    layout = Layout(5, [0, 0, 3], [0, 1, 0])
    (out,) = gm(X, W, layout, 10, torch.tensor([3, 4]))
    assert out.shape == (12, 1, 8)
    want = attention(X, W)[0]
    torch.testing.assert_close(layout.part(out, 0, 1, 0, 2), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layout.part(out, 0, 1, 2, 1), want[:1], rtol=1e-5, atol=1e-6)


def test_leaves_what_is_before_the_site():
    gm, _ = rewritten(attention, X, W)
    first = next(n for n in gm.graph.nodes if n.target is F.linear)
    assert first.meta["clean"] and tuple(first.meta["example_value"].shape) == (2, 5, 8)


def test_does_not_fire_without_facts():
    gm = rowed(attention, X, W)
    before = targets(gm)
    assert causal(gm, facts=Facts(5, {})) == 0 and targets(gm) == before


@pytest.mark.parametrize(
    "change",
    [lambda h: h.cumsum(1), lambda h: h.mean(1, keepdim=True), lambda h: h.flip(1), lambda h: h.softmax(1)],
    ids=["cumsum", "mean", "flip", "softmax"],
)
def test_does_not_fire_where_positions_meet(change):
    gm = rowed(lambda x, w: (change(site(F.linear(x, w), "a", "output", 0, True)),), X, W)
    with pytest.raises(Mixed):
        positions(gm, {(AT, 0)})


@pytest.mark.parametrize("kind", ["-inf", "min"])  # bool: tests/sweep
@pytest.mark.parametrize("later", [0, 1])
def test_a_mask_is_looked_at(kind, later):
    keep = torch.ones(5, 5).tril(later).bool()
    low = -torch.inf if kind == "-inf" else torch.finfo(torch.float32).min
    mask = torch.zeros(5, 5).masked_fill(~keep, low)
    gm, count = rewritten(lambda x, w, mask: masked(x, w, mask), X, W, mask)
    assert count == 1
    gm.recompile()
    layout = Layout(5, [0, 0], [0, 1])
    if later:
        with pytest.raises(NotCausal, match="later"):
            gm(X, W, mask, layout, 10)
    else:
        want = masked(X, W, mask)[0]
        torch.testing.assert_close(layout.part(gm(X, W, mask, layout, 10)[0], 0, 1, 0, 2), want, rtol=1e-5, atol=1e-6)


def test_a_row_that_is_masked_by_a_finite_number_only():
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), torch.finfo(torch.float32).min)
    mask[0] = torch.finfo(torch.float32).min
    gm, _ = rewritten(lambda x, w, mask: masked(x, w, mask), X, W, mask)
    gm.recompile()
    with pytest.raises(NotCausal):
        gm(X, W, mask, Layout(5, [0, 0], [0, 1]), 10)


def test_a_layout():
    layout = Layout(4, [0, 2, 3], [0, 0, 0])
    assert layout.index.tolist() == [[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 2, 6]]
    assert [layout.rows(n) for n in (4, 6, 7)] == [1, 2, 3]
    x = torch.arange(7.0)[:, None, None]
    assert layout.part(x, 0, 1, 1, 1)[0, :, 0].tolist() == [0, 1, 4, 5]
    layout.put(x, 0, 1, 1, 1, torch.full((1, 4, 1), 9.0))
    assert x[:, 0, 0].tolist() == [0, 1, 2, 3, 9, 9, 6]
    whole = unpack(x, 1, layout, 7)
    assert whole[..., 0].tolist() == [[0, 1, 2, 3], [0, 1, 9, 9], [0, 1, 2, 6]]
    assert torch.equal(repack(whole, 1, layout, 7), x)
    assert choose(x, torch.tensor([1, 2, 3]), layout, 7)[:, 0, 0].tolist() == [1, 9, 6]
