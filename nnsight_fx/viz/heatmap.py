"""Heat maps of one number a cell: a layer and a token, a head and a layer."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ..errors import MissingExtraError
from ..signatures import exact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LABELS = 64  # on one axis; beyond that every n-th is written


@exact
def heatmap(
    values: torch.Tensor,
    *,
    x: Sequence[str],
    y: Sequence[str],
    title: str = "",
    bar: str = "",
    xlabel: str = "token",
    ylabel: str = "layer",
    center: float = 0.0,
) -> Figure:
    """Draw `values` as a grid of coloured cells, row 0 at the bottom, `center` (zero) in the middle of the colours.

        figure = heatmap(scores, x=tokens, y=[str(i) for i in range(30)], bar="recovered")
        figure.savefig("scores.png")

    `values` is (len(y), len(x)); cells that are not finite stay grey. `bar` names the colour bar. The figure
    belongs to the caller: `matplotlib.pyplot` is not touched, and no display is needed. A notebook shows it where it is a
    cell's last value.
    """
    figure_class = load_matplotlib()
    data = values.detach().to("cpu", torch.float64)
    if data.shape != (len(y), len(x)):
        raise ValueError(
            f"`values` has shape {tuple(data.shape)}, but {len(y)} labels in `y` and {len(x)} in `x`. "
            f"Give one row for each `y` and one column for each `x`."
        )
    finite = (data[data.isfinite()] - center).abs()
    reach = finite.max().item() if finite.numel() else 0.0

    figure = figure_class(figsize=_size(len(x), len(y)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.8")
    colours = {"cmap": "RdBu_r", "vmin": center - (reach or 1.0), "vmax": center + (reach or 1.0)}
    image = axes.imshow(data.numpy(), origin="lower", aspect="auto", **colours)
    _label(axes.xaxis, x, xlabel, rotation=60)
    _label(axes.yaxis, y, ylabel)
    if title:
        figure.suptitle(_wrapped(title, round(10 * figure.get_figwidth())), fontsize="medium", parse_math=False)
    figure.colorbar(image, ax=axes).set_label(_drawable(bar), parse_math=False)
    return figure


def load_matplotlib() -> type[Figure]:
    """Return matplotlib's Figure class, as a notebook shows it without magic, or say which extra has it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            'heat maps are drawn with matplotlib, which is not installed. Run: pip install "nnsight-fx[viz]"'
        ) from error
    return _shown(Figure)


@cache
def _shown(figure_class: type[Figure]) -> type[Figure]:
    class Picture(figure_class):
        """A figure that IPython draws, also where `%matplotlib inline` was not said."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    return Picture


def _size(columns: int, rows: int) -> tuple[float, float]:
    """Inches: cells of readable size, in a picture of at most 24 x 20."""
    return min(3.0 + 0.42 * columns, 24.0), min(2.0 + 0.2 * rows, 20.0)


def _label(axis: Any, labels: Sequence[str], name: str, rotation: int = 0) -> None:
    every = range(0, len(labels), max(1, -(-len(labels) // _MOST_LABELS)))
    texts = [_drawable(labels[i]) for i in every]
    axis.set_ticks(list(every), texts, rotation=rotation, parse_math=False)
    axis.set_label_text(name)


def _wrapped(title: str, columns: int) -> str:
    lines = (textwrap.wrap(_drawable(line), columns) for line in title.splitlines())
    return "\n".join(part for parts in lines for part in parts)


def _drawable(text: str) -> str:
    """`text` with what the font cannot draw, or the eye not see, written as an escape."""
    known = _characters()
    return "".join(c if ord(c) in known and c.isprintable() else ascii(c)[1:-1] for c in text)


@cache
def _characters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())
