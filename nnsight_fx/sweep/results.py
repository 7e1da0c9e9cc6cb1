"""What a sweep found, labelled."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from ..errors import MissingExtraError
from ..lines import user_line
from ..viz.heatmap import heatmap
from .steps import TEXT, TOKENS
from .store import coordinates

if TYPE_CHECKING:
    import numpy
    import pandas
    import xarray


class Results:
    """A value for each cell of the grid.

    `values[name]` is a tensor of shape (len of each axis ..., shape of one result); a body that returns one tensor has
    the name `"result"`. `array` (xarray) has the axes' names and values as labels, `dataset` all names at once. `errors` are
    the standard errors of values that are means, `manifest` is that of the store. `baselines` has what a ready-made sweep
    measured with nothing patched ("clean", "corrupted"), `labels` the tokens at an axis's positions, or the beginnings of
    prompts: both go into heat maps, and `labels` beside the numbers of the axis (`position_label`) into `array` and frames.
    Modules on an axis are there by their paths. Of generations `text` has what was generated, an array of strings of the axes' shape, and
    `steps` names the values with a dimension for the steps, the first behind the axes.
    """

    def __init__(
        self,
        over: Mapping[str, Sequence],
        values: dict[str, torch.Tensor],
        manifest: dict[str, object],
        errors: dict[str, torch.Tensor] | None = None,
        baselines: dict[str, torch.Tensor] | None = None,
        labels: dict[str, list[str]] | None = None,
    ):
        self.over, self.values, self.manifest = {k: list(v) for k, v in over.items()}, values, manifest
        self.errors, self.baselines, self.labels = errors or {}, baselines or {}, labels or {}
        self.steps: set[str] = set()
        self.text: numpy.ndarray | None = None

    def mean(self, axis: str = "prompt") -> Results:
        """The mean over an axis, and its standard error (of n values: their deviation, with n - 1, over the root of n).

        Computed in float64. Of one value the error is NaN.
        """
        if axis not in self.over:
            raise ValueError(f"{user_line()}: there is no axis `{axis}`; there is {', '.join(self.over)}.")
        dim, n = list(self.over).index(axis), len(self.over[axis])
        doubles = {name: value.double() for name, value in self.values.items()}
        means = {name: value.mean(dim) for name, value in doubles.items()}
        squares = {name: (value - means[name].unsqueeze(dim)).square().sum(dim) for name, value in doubles.items()}
        errors = {
            name: (total / (n * (n - 1))).sqrt() if n > 1 else total * math.nan for name, total in squares.items()
        }
        over = {k: v for k, v in self.over.items() if k != axis}
        return Results(over, means, self.manifest, errors, self.baselines, self.labels)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.values[name]

    @property
    def dataset(self) -> xarray.Dataset:
        """All results with their labels; needs the extra `sweep`."""
        xr = _extra("xarray")
        coords: dict[str, object] = {name: coordinates(values) for name, values in self.over.items()}
        coords |= {f"{name}_label": (name, texts) for name, texts in self.labels.items() if name in self.over}
        arrays = {}
        for name, value in self.values.items():
            dims = [*self.over, *self._inner(name)]
            arrays[name] = (dims, (value.float() if value.dtype is torch.bfloat16 else value).numpy())
            if name in self.errors:
                arrays[f"{name}_stderr"] = (dims, self.errors[name].numpy())
        if self.text is not None:
            arrays[TEXT] = ([*self.over, *(f"{TEXT}_{i}" for i in range(self.text.ndim - len(self.over)))], self.text)
        return xr.Dataset(arrays, coords=coords, attrs={k: str(v) for k, v in self.manifest.items()})

    def _inner(self, name: str) -> list[str]:
        """The dimensions of one result."""
        inner = [f"{name}_{i}" for i in range(self.values[name].dim() - len(self.over))]
        if name in self.steps:  # behind the rows, where a cell has several
            inner[len(inner) - 1 if name == TOKENS else 0] = "step"
        return inner

    @property
    def array(self) -> xarray.DataArray:
        """The one result, labelled; needs the extra `sweep`."""
        return self.dataset[self._only()]

    def to_dataframe(self, steps: bool = False) -> pandas.DataFrame:
        """One row for each cell (and element of a result), the axes as columns; needs the extra `sweep`.

        Of generations without what each step gave; `steps=True`: one row for each step, and with it.
        """
        found = self.dataset
        if self.steps and not steps and (self.text is not None or self.values.keys() - self.steps):
            found = found.drop_vars([name for name in self.steps if name in found])
        return found.to_dataframe().reset_index()

    def heatmap(self, path: str | os.PathLike | None = None, name: str | None = None, **labels: object) -> object:
        """Draw a result of one number a cell over two axes: the first upwards, the second to the right.

        `path` is written by its suffix (PNG, SVG, PDF); the figure is returned. `labels` go to `viz.heatmap`
        (`title`, `bar`, `x` and `y` in place of the axes' values, `center` of the colours). Of a ready-made sweep the title has
        the baselines, the colours are centred on what was measured with nothing patched, and positions are tokens.
        Needs the extra `viz`.
        """
        name = name or self._only()
        value = self.values[name].squeeze() if self.values[name].dim() != len(self.over) else self.values[name]
        if len(self.over) != 2 or value.dim() != 2:
            has = f"`{name}` has shape {tuple(self.values[name].shape)} over {list(self.over)}"
            extra = [f"{name}_{i}" for i in range(self.values[name].dim() - len(self.over))]
            if len(self.over) < 2 and value.dim() <= 1:  # a line says it all
                advice = f"Draw a line: `results.dataset[{name!r}].plot()`, or sweep over a second axis"
            else:
                advice = (
                    "Let the body return one number a cell (`value.mean()`), or draw a mean over what is too much: "
                    f"`results.dataset[{name!r}].mean({[*extra, *self.over][0]!r}).plot()`"
                )
            raise ValueError(f"{user_line()}: a heat map has two axes and a number for each cell; {has}. {advice}.")
        (up, rows), (right, columns) = self.over.items()
        given = {
            "x": self.labels.get(right) or [str(c) for c in coordinates(columns)],
            "y": self.labels.get(up) or [str(r) for r in coordinates(rows)],
            "xlabel": right,
            "ylabel": up,
            "bar": name,
        }
        numbers = {what: found.float().mean().item() for what, found in self.baselines.items()}
        if numbers:
            *_, given["center"] = numbers.values()
            given["title"] = ", ".join(f"{what} {number:+.3f}" for what, number in numbers.items())
        figure = heatmap(value.float(), **{**given, **labels})
        if path is not None:
            figure.savefig(path)
        return figure

    def _only(self) -> str:
        if len(self.values) != 1:
            raise ValueError(
                f"{user_line()}: this sweep has {len(self.values)} results, {', '.join(self.values)}: say which"
            )
        return next(iter(self.values))

    def __repr__(self) -> str:
        axes = ", ".join(f"{name}: {len(values)}" for name, values in self.over.items())
        found = ", ".join(f"{name}: {tuple(v.shape)} {v.dtype}" for name, v in self.values.items())
        return f"Results({axes}; {found})"


def _extra(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise MissingExtraError(
            f"labelled results need {name}: pip install 'nnsight-fx[sweep]'. `results.values` needs nothing."
        ) from e
