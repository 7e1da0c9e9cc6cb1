"""Prompts as tensors of one length, and several of them as one input.

>>> sequences("input_ids", [[5, 6, 7], [8]], fill=0, left=True)
(tensor([[5, 6, 7],
         [0, 0, 8]]), [3, 1])
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import PromptError
from ..plan import tree

FORMS = (
    "a string, a list of strings, a list of token ids, a list of such lists, an integer tensor or array of "
    "1 or 2 dimensions, or a dict with `input_ids`"
)

# What fills the place of a missing token in each input that runs along the tokens (the ids: the pad token).
FILL: dict[str, float] = {
    "inputs_embeds": 0.0,
    "attention_mask": 0,
    "token_type_ids": 0,
    "position_ids": 0,
    "special_tokens_mask": 1,
    "labels": -100,  # what the losses of torch and transformers leave out
}
SHARED = ("token_type_ids", "position_ids")


def named(args: tuple, kwargs: Mapping[str, object]) -> dict:
    """An input by the model's names. What is given by position is the `input_ids`, or a dict of inputs."""
    if len(args) > 1:
        raise PromptError(
            f"{len(args)} inputs given by position; a model takes one, {FORMS}. Put several prompts in a "
            "list and give every other input by keyword."
        )
    first = {} if not args else dict(args[0]) if isinstance(args[0], Mapping) else {"input_ids": args[0]}
    if twice := first.keys() & kwargs.keys():
        names = ", ".join(f"`{n}`" for n in sorted(twice))
        raise PromptError(f"{names} given by position and again by keyword. Give each input once.")
    return {**first, **kwargs}


def is_text(value: object) -> bool:
    """A string, or a list with one in it?"""
    several = isinstance(value, (list, tuple)) and any(isinstance(v, str) for v in value)
    return isinstance(value, str) or several


def sequences(name: str, value: Any, fill: float, left: bool, dims: int = 1) -> tuple[torch.Tensor, list[int]]:
    """Return `value` as one tensor (rows, longest, ...), and the length of each row.

    One row has `dims` dimensions; a single one gains that of the rows. A list of rows is padded with `fill`,
    at the left or right; a tensor that has its rows comes back as it is. No row or an empty one is an error.
    """
    if _is_list_of_rows(value):
        rows = [_tensor(name, row) for row in value]
        if wrong := [tuple(row.shape) for row in rows if row.dim() != dims]:
            raise PromptError(f"a row of `{name}` has shape {wrong[0]}, not {dims} dimension(s). Give {FORMS}.")
    else:
        tensor = _tensor(name, value)
        if tensor.dim() < dims:
            raise PromptError(f"`{name}` cannot be {_shown(value)}. Give {FORMS}.")
        rows = tensor if tensor.dim() > dims else tensor[None]
    lengths = [len(row) for row in rows]
    if not lengths or 0 in lengths:
        empty = f"prompt {lengths.index(0)} has no tokens" if lengths else "there is no prompt"
        raise PromptError(f"{empty} in `{name}`. Give at least one, for example the tokenizer's bos token.")
    if isinstance(rows, list):
        rows = torch.cat([pad(row[None], max(lengths), fill, left) for row in rows])
    return rows, lengths


def token_ids(value: object, fill: float, left: bool) -> tuple[torch.Tensor, list[int]]:
    """`sequences` of whole numbers: ids of shape (rows, longest), int64."""
    ids, lengths = sequences("input_ids", value, fill, left)
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise PromptError(
            f"token ids are whole numbers of shape (rows, tokens), and `input_ids` is {ids.dtype} of shape "
            f"{tuple(ids.shape)}. Give {FORMS}; embeddings go by keyword, `inputs_embeds=`."
        )
    return ids.long(), lengths


def companion(name: str, value: object, lengths: list[int], left: bool) -> object:
    """Another input along the tokens (one of `FILL`), in the rows of the prompts and padded like them.

    One row of `SHARED` inputs serves all prompts.
    """
    rows = len(lengths)
    if _is_list_of_rows(value):
        value, own = sequences(name, value, FILL[name], left)
        if own != lengths and not (name in SHARED and own * rows == lengths):
            raise PromptError(
                f"the rows of `{name}` have {own} tokens and those of the prompts {lengths}. "
                "Give one value for each token."
            )
    elif isinstance(value, (list, tuple, np.ndarray)):
        value = _tensor(name, value)
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    if value.dim() == 1 and (name in SHARED or lengths == [len(value)]):
        value = value[None]
    if len(value) == 1 and name in SHARED:
        value = value.repeat(rows, 1)
    if len(value) != rows:
        raise PromptError(f"`{name}` has {len(value)} rows, the prompts are {rows}. Give one for each.")
    return value.long() if name == "attention_mask" and value.dim() == 2 else value


def pad(tensor: torch.Tensor, width: int, fill: float, left: bool) -> torch.Tensor:
    """`tensor` (rows, tokens, ...) with `fill` up to `width` tokens, at the left or right."""
    extra = width - tensor.shape[1]
    if not extra:
        return tensor
    return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + ((extra, 0) if left else (0, extra)), value=fill)


def positions(mask: torch.Tensor, length: int) -> torch.Tensor | None:
    """The positions of the last `length` tokens of `mask` (rows, tokens); None without padding on the left.

    Each row counts from its first real token. On left padding that is `(mask.cumsum(-1) - 1).clamp(min=0)`;
    over a gap that the user masked it counts on, as the model does with the row alone.
    """
    if bool(mask[:, 0].all()):
        return None
    first = mask.ne(0).int().argmax(-1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - first).clamp(min=0)[:, -length:]


def merge(name: str, values: list, rows: list[int]) -> object:
    """One input of several invokes: their rows are concatenated, a value that is the same in all stays."""
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    if tensors and len(values) < len(rows):
        raise PromptError(
            f"`{name}` is given in {len(values)} of {len(rows)} invokes. Give it in every one or in none."
        )
    if len(tensors) == len(values) and all(_has_rows(v, n) for v, n in zip(values, rows, strict=True)):
        if len({v.shape[1:] for v in tensors}) == 1:
            return torch.cat(tensors)
        shapes = ", ".join(str(tuple(v.shape)) for v in tensors)
        raise PromptError(
            f"`{name}` of the invokes cannot be one batch: the shapes {shapes} differ beyond dimension 0. "
            "Give it in one shape, or run the prompts in traces of their own."
        )
    if all(_same(values[0], v) for v in values[1:]):
        return values[0]
    shown = ", ".join(_shown(v) for v in values)
    raise PromptError(
        f"`{name}` differs between the invokes: {shown}. They run in one forward, so give the same to all."
    )


def _is_list_of_rows(value: object) -> bool:
    """A list whose items are rows themselves; a list of numbers is one row."""
    return isinstance(value, (list, tuple)) and any(
        not isinstance(v, Number) and getattr(v, "ndim", 1) > 0 for v in value
    )


def _tensor(name: str, value: object) -> torch.Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PromptError(f"`{name}` cannot be {_shown(value)} ({error}). Give {FORMS}.") from None


def _has_rows(value: torch.Tensor, rows: int) -> bool:
    return value.dim() > 0 and len(value) == rows


def _same(a: object, b: object) -> bool:
    def equal(x: object, y: Any) -> bool:
        return type(x) is type(y) and bool(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y)

    (one, spec), (two, other) = tree.flatten(a), tree.flatten(b)
    return spec == other and all(x is y or equal(x, y) for x, y in zip(one, two, strict=True))


def _shown(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
