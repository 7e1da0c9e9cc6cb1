"""Nested tensors, whose rows have lengths of their own: torch's encoder makes them of padded ones, and back."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..errors import NotRecordableError
from ..lines import Line
from ..plan.verbs import Site


def refuse_nested(line: Line, site: Site, leaves: Iterable[object]) -> None:
    """A value of rows of different lengths has no shape, and a body that was recorded for one does not fit."""
    if any(isinstance(x, torch.Tensor) and x.is_nested for x in leaves):
        where = ".".join(part for part in site[:2] if part)
        raise NotRecordableError(
            f"{line}: `{where}` holds a nested tensor, which has no shape that a body could be recorded for: with a padding mask "
            "torch's `TransformerEncoder` takes the padding out of it, when no gradient is wanted. Switch that off "
            "(`encoder.use_nested_tensor = False`), or read a site outside of the encoder."
        )
