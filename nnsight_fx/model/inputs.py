"""What comes in: one invoke's input as the model takes it, and the inputs of several invokes as one batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .. import compat
from ..errors import InvokeError
from ..lines import user_line
from ..plan import tree

if TYPE_CHECKING:
    from ..generation.generation import Generation
    from .host import ModelHost


@dataclass(frozen=True)
class Batch:
    """One prepared input: what the model is called with, and its rows on dimension 0."""

    args: tuple
    kwargs: dict
    rows: int
    text: bool = False  # was it text, whose length is another one in the next
    length: int | None = None  # how many tokens a row of prompts has

    @functools.cached_property
    def flat(self) -> tuple[list, tree.Spec]:
        """The leaves of both, and their structure."""
        return tree.flatten((self.args, self.kwargs))

    def let_lengths_vary(self) -> None:
        """Tell Dynamo beforehand that the number of tokens will be another in the next input."""
        shape = (self.rows, self.length)
        for x in self.flat[0]:
            if isinstance(x, torch.Tensor) and x.dim() in (2, 3) and x.shape[:2] == shape:
                compat.dynamo.may_vary(x, 1)


class ModuleInputs:
    """Inputs that go to the module as they come."""

    def __init__(self, host: ModelHost):
        self.host = host

    def has_input(self, kwargs: dict) -> bool:
        """Do keywords alone make an input of this model?"""
        return bool(kwargs)

    def prepare(self, args: tuple, kwargs: dict) -> Batch:
        """One invoke's input, on the model's device; where its weights are not loaded, as it came."""
        device = self.host.device
        if device is not None and device.type == "meta":
            device = None
        leaves, spec = tree.flatten((args, kwargs))
        elsewhere, rows = False, None
        for x in leaves:
            if isinstance(x, torch.Tensor):
                elsewhere = elsewhere or (device is not None and x.device != device)
                rows = x.shape[0] if rows is None and x.dim() else rows
        if elsewhere:
            leaves = [x.to(device) if isinstance(x, torch.Tensor) else x for x in leaves]
            args, kwargs = tree.unflatten(leaves, spec, (args, kwargs))  # else the model gets the user's own lists
        batch = Batch(args, kwargs, 1 if rows is None else rows)
        batch.__dict__["flat"] = (leaves, spec)
        return batch

    def given(self, args: tuple, kwargs: dict, rows: int, text: bool) -> Batch:
        """What a generation calls the model with: as it is."""
        return Batch(args, kwargs, rows, text)

    def check_generated(self, kwargs: dict) -> None:
        """Raise where the model has no place for what a generation has come to, before its forward runs."""

    def collate(self, batches: list[Batch], pad_to: int | None = None) -> Batch:
        """Several inputs as one: tensors are concatenated on dimension 0."""
        if len(batches) == 1:
            return batches[0]
        flat = [tree.flatten((b.args, b.kwargs)) for b in batches]
        if any(spec != flat[0][1] for _, spec in flat):
            raise InvokeError(
                f"{user_line()}: the invokes of one batch must be called with the same arguments, and their structures differ. "
                "Call them alike, or use several traces."
            )
        joined = [
            self._join(i, list(column)) for i, column in enumerate(zip(*(leaves for leaves, _ in flat), strict=True))
        ]
        args, kwargs = tree.unflatten(joined, flat[0][1])
        return Batch(args, kwargs, sum(b.rows for b in batches), any(b.text for b in batches))

    @staticmethod
    def _join(index: int, column: list) -> object:
        first = column[0]
        if isinstance(first, torch.Tensor) and first.dim() > 0:
            if any(x.shape[1:] != first.shape[1:] for x in column):
                shapes = ", ".join(str(tuple(x.shape)) for x in column)
                raise InvokeError(
                    f"{user_line()}: argument {index} of the invokes cannot be batched: shapes {shapes} differ behind dimension 0. "
                    "Pad them to one shape, or use several traces."
                )
            return torch.cat(column)
        if any(x is not first and x != first for x in column):
            raise InvokeError(
                f"{user_line()}: argument {index} of the invokes cannot be batched: {column} are not equal, and one forward takes one "
                "value for all rows. Use several traces."
            )
        return first

    def let_vary(self, batch: Batch, generates: bool) -> None:
        """Tell Dynamo beforehand which sizes of an input will be others in the next."""

    def unknown_dims(self, batch: Batch) -> tuple:
        """For each leaf of an input, the dims that hold the rows and the (padded) length, or `None`."""
        return tuple(
            (0 if isinstance(x, torch.Tensor) and x.dim() > 0 and x.shape[0] == batch.rows else None, None)
            for x in tree.flatten((batch.args, batch.kwargs))[0]
        )

    def length(self, batch: Batch) -> int | None:
        """The padded length of a batch, for models that have one."""
        return None

    def arguments(self, fn: str | None, batches: list[Batch], pad_to: int | None) -> Batch:
        """What a function of the model is called with."""
        batch = self.collate(batches, pad_to=pad_to)
        if fn == "generate" and not any("position_ids" in b.kwargs for b in batches):
            batch.kwargs.pop("position_ids", None)  # it counts them itself, step by step
        return batch

    def results(self, generations: Sequence[Generation]) -> Any:
        """What several generations gave, as one batch."""
        results = [g.result for g in generations]
        if not all(isinstance(x, torch.Tensor) and x.shape[1:] == results[0].shape[1:] for x in results):
            raise InvokeError(
                f"{user_line()}: the invokes' results have no common shape, so there is none of the whole batch. Take `tracer.result` "
                "in each invoke."
            )
        return torch.cat(results)
