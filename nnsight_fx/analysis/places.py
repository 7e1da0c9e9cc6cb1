"""The places that ready-made sweeps patch: a part of every layer, its positions and heads, and its values on prompts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..envoys.envoy import host_of
from ..lines import user_line
from ..plan.tree import first
from ..sweep.job import given
from ..tracing.saving import save
from .parts import Column, Parts, heads_of, parts_of

HEADED = ("z", "q", "k", "v")
PARTS = ("residual", "residual_pre", "attention", "mlp", *HEADED)


class PartPlace:
    """One part of every layer: its value, and the index of a position and a head in it."""

    def __init__(self, model: Any, part: str, given: Parts | None):
        if part not in PARTS:
            raise ValueError(f"{user_line()}: `part` is one of {', '.join(PARTS)}; not `{part}`.")
        self.model, self.part, self.table = model, part, parts_of(model, given)
        named = None if part.startswith("residual") else getattr(self.table, part)
        if named is None and not part.startswith("residual"):
            raise ValueError(
                f"{user_line()}: this family has no module for `{part}`; there is {', '.join(self._known())}."
            )
        self.column = named if isinstance(named, Column) else None
        self.path = named.path if isinstance(named, Column) else named
        self.layers = len(model._module.get_submodule(self.table.layers))
        self.heads = heads_of(model, part) if part in HEADED else 1

    def _known(self) -> list[str]:
        return [p for p in PARTS if p.startswith("residual") or getattr(self.table, p) is not None]

    def value(self, layer: int) -> torch.Tensor:
        """In a trace: (batch, length, width)."""
        block = self.model.get(f"{self.table.layers}.{layer}")
        if self.part == "residual":
            return first(block.output)
        if self.part == "residual_pre":
            return block.input
        envoy = block.get(self.path)
        return envoy.input if self.part == "z" else first(envoy.output)

    def columns(self, width: int, head: int | None) -> slice:
        """Where a head lies in the width."""
        start, size = 0, width
        if self.column is not None:
            size = width // self.column.of
            start = self.column.index * size
        if head is None:
            return slice(start, start + size)
        return slice(start + head * (size // self.heads), start + (head + 1) * (size // self.heads))

    def index(self, width: int, position: int | None, head: int | None) -> tuple:
        whole = self.column is None and head is None
        return (
            slice(None),
            slice(None) if position is None else position,
            slice(None) if whole else self.columns(width, head),
        )

    @property
    def axes(self) -> tuple[str, ...]:
        return ("layer", "head") if self.part in HEADED else ("layer", "position")

    def length(self, item: object) -> int:
        """How many tokens the model sees of an input."""
        args, kwargs = given(self.model, item)
        known = host_of(self.model).inputs.length(host_of(self.model).inputs.prepare(args, kwargs))
        if known is not None:
            return known
        with self.model.scan(*args, **kwargs):
            return int(self.value(0).shape[1])

    def tokens(self, items: Iterable) -> list[str] | None:
        """The token at each position, of several prompts `one / other` where they differ; `None` where there is no text."""
        tokenizer: Any = getattr(self.model, "tokenizer", None)
        rows = []
        for item in items:
            args, kwargs = given(self.model, item)
            ids = host_of(self.model).inputs.prepare(args, kwargs).kwargs.get("input_ids")
            if tokenizer is None or not isinstance(ids, torch.Tensor) or ids.dim() != 2 or (ids != ids[0]).any():
                return None
            rows.append(ids[0].tolist())
        pairs = [list(dict.fromkeys(column)) for column in zip(*rows, strict=True)]
        return [" / ".join(tokenizer.decode([i]).strip(" ") for i in pair) for pair in pairs]


class PartValues:
    """The part's values on some inputs: of those that a chunk is about, computed when it begins."""

    def __init__(self, site: PartPlace, items: list):
        self.site, self.items = site, items
        self.held: dict[int, list[torch.Tensor]] = {}

    def prepare(self, wanted: list[int]) -> None:
        """Have those of some inputs, and no others; inputs of one length share a forward.

        On hooks: a forward or two are no reason to compile, and a sweep has many more of them.
        """
        model = self.site.model
        self.held = {i: self.held[i] for i in wanted if i in self.held}
        with torch.no_grad(), model.session():
            for i in wanted:
                if i not in self.held:
                    args, kwargs = given(model, self.items[i])
                    with model.trace(*args, compile=False, **kwargs):
                        self.held[i] = [save(self.site.value(layer).clone()) for layer in range(self.site.layers)]

    def __call__(self, layer: int, prompt: int) -> torch.Tensor:
        """(batch, length, width)"""
        return self.held[prompt][layer]

    def means(self) -> list[torch.Tensor]:
        """Of each layer, over all inputs, their rows and positions: (width,)."""
        totals, count = [torch.zeros((), dtype=torch.float64)] * self.site.layers, 0
        for i in range(len(self.items)):
            self.prepare([i])
            count += self.held[i][0].shape[0] * self.held[i][0].shape[1]
            totals = [t.to(h.device) + h.double().sum((0, 1)) for t, h in zip(totals, self.held[i], strict=True)]
        like = self.held[len(self.items) - 1]
        return [(t / count).to(h.dtype) for t, h in zip(totals, like, strict=True)]
