"""What the generations of a sweep give, step by step, as arrays of one shape for all cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import numpy

TOKENS, TEXT = "tokens", "text"  # of what was generated
NONE = -1  # where a generation has ended: no token has this number


def padded(tokens: torch.Tensor, steps: int) -> torch.Tensor:
    """New tokens, int64 of shape (rows, up to steps), as (rows, steps); of one row (steps,). Behind the end stands -1."""
    out = torch.full((len(tokens), steps), NONE, dtype=torch.int64)
    out[:, : tokens.shape[1]] = tokens.cpu()
    return out[0] if len(out) == 1 else out


def stacked(returned: Mapping[str, torch.Tensor | Sequence[torch.Tensor]], steps: int) -> dict[str, torch.Tensor]:
    """Values as they are; lists with one for each step as (steps, ...): behind the end NaN, where that is a number of theirs, else -1."""
    found = {}
    for name, value in returned.items():
        if isinstance(value, torch.Tensor):
            found[name] = value.detach().cpu()
            continue
        rows = torch.stack([x.detach().cpu() for x in value]) if value else torch.empty(0)
        fill = math.nan if rows.is_floating_point() or rows.is_complex() else NONE
        out = torch.full((steps, *rows.shape[1:]), fill, dtype=torch.int64 if rows.dtype is torch.bool else rows.dtype)
        out[: len(rows)] = rows[:steps]
        found[name] = out
    return found


def missing(like: torch.Tensor) -> torch.Tensor:
    """What stands for a value of a cell that has none: NaN, where that is a number of its kind, else -1 (of flags `False`)."""
    if like.dtype is torch.bool:
        return torch.zeros_like(like)
    return torch.full_like(like, math.nan if like.is_floating_point() or like.is_complex() else NONE)


def texts(tokenizer: Any, tokens: torch.Tensor) -> numpy.ndarray:
    """The text of each row of new tokens, as an array of the dimensions in front of the steps; without special tokens."""
    import numpy

    rows = tokens.reshape(-1, tokens.shape[-1]).tolist()
    found = numpy.empty(len(rows), dtype=object)
    found[:] = [tokenizer.decode([t for t in row if t >= 0], skip_special_tokens=True) for row in rows]
    return found.reshape(tuple(tokens.shape[:-1]))
