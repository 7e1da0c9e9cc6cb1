"""Heat maps: labelled, drawn without pyplot, with errors that say what to do."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from nnsight_fx.viz import heatmap

LAYERS = ["0", "1", "2"]
TOKENS = ["When", " Mary"]


def test_axes_carry_the_labels_and_the_bar_its_name():
    figure = heatmap(torch.arange(6.0).view(3, 2), x=TOKENS, y=LAYERS, title="patched", bar="recovered")
    axes, bar = figure.axes
    assert [t.get_text() for t in axes.get_xticklabels()] == TOKENS
    assert [t.get_text() for t in axes.get_yticklabels()] == LAYERS
    assert (axes.get_xlabel(), axes.get_ylabel(), figure.get_suptitle()) == ("token", "layer", "patched")
    assert bar.get_ylabel() == "recovered"


def test_row_0_is_at_the_bottom_and_0_in_the_middle_of_the_colours():
    axes = heatmap(torch.tensor([[1.0, -3.0]]), x=TOKENS, y=["0"]).axes[0]
    assert axes.images[0].get_clim() == (-3.0, 3.0)
    assert axes.images[0].origin == "lower"


def test_the_colours_may_have_another_centre():
    axes = heatmap(torch.tensor([[1.0, -3.0]]), x=TOKENS, y=["0"], center=-2.0).axes[0]
    assert axes.images[0].get_clim() == (-5.0, 1.0)


@pytest.mark.parametrize("cell", [0.0, float("nan"), float("inf")])
def test_a_grid_without_a_range_is_drawn(cell):
    assert _png(heatmap(torch.full((1, 2), cell), x=TOKENS, y=["0"]))


def test_awkward_tokens_are_drawn_as_escapes_not_as_mathematics():
    tokens = ["$x$", "\n", " 子", "Ġ", "$", "\u200b"]
    figure = heatmap(torch.zeros(1, 6), x=tokens, y=["0"], title="$a", bar="b$")
    shown = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert shown == ["$x$", "\\n", " \\u5b50", "Ġ", "$", "\\u200b"]
    assert _png(figure)  # a missing glyph would be a warning, and warnings are errors here


def test_a_title_keeps_its_lines_and_stays_inside_the_picture():
    figure = heatmap(torch.zeros(1, 2), x=TOKENS, y=["0"], title="first\n" + "word " * 20)
    lines = figure.get_suptitle().splitlines()
    assert lines[0] == "first" and len(lines) > 2
    assert max(map(len, lines)) <= 10 * figure.get_figwidth()


def test_long_axes_keep_every_nth_label():
    figure = heatmap(torch.zeros(1, 300), x=[str(i) for i in range(300)], y=["0"])
    shown = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert len(shown) <= 64 and shown[:2] == ["0", "5"]
    assert figure.get_figwidth() == 24.0


def test_values_may_need_a_gradient_and_have_any_dtype():
    heatmap(torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True), x=TOKENS, y=LAYERS)


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"shape \(2, 3\), but 3 labels in `y` and 2 in `x`"):
        heatmap(torch.zeros(2, 3), x=TOKENS, y=LAYERS)


def test_pyplot_is_not_touched():
    before = "matplotlib.pyplot" in sys.modules
    _png(heatmap(torch.zeros(3, 2), x=TOKENS, y=LAYERS))
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "nnsight-fx\[viz\]"'):
        heatmap(torch.zeros(3, 2), x=TOKENS, y=LAYERS)


def _png(figure) -> bool:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue().startswith(b"\x89PNG")
