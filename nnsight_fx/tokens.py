"""Prompts as tensors of one length, and several of them as one input.

    >>> sequences("input_ids", [[5, 6, 7], [8]], fill=0, left=True)
    (tensor([[5, 6, 7],
             [0, 0, 8]]), [3, 1])
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import Any

import torch
import torch.nn.functional as F

from .errors import NNsightFXError
from .tracing import tree
from .tracing.lazy import user_line

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


class PromptError(NNsightFXError, ValueError):
    """A prompt that makes no tokens, or prompts that cannot run as one batch."""

    def __init__(self, text: str):
        super().__init__(f"{user_line()}: {text}")


def named(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """An input by the model's names: what is given by position holds the `input_ids`, or is a dict of inputs."""
    if len(args) > 1:
        raise PromptError(
            f"{len(args)} inputs given by position; a model takes one, {FORMS}. Put several prompts in a list, "
            "and give every other input by keyword."
        )
    first = {} if not args else dict(args[0]) if isinstance(args[0], Mapping) else {"input_ids": args[0]}
    if twice := first.keys() & kwargs.keys():
        names = ", ".join(f"`{n}`" for n in sorted(twice))
        raise PromptError(f"{names} given by position and again by keyword. Give each input once.")
    return {**first, **kwargs}


def is_text(value: Any) -> bool:
    """A string, or a list with one in it?"""
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and any(isinstance(v, str) for v in value)
    )


def sequences(
    name: str, value: Any, fill: float, left: bool, dims: int = 1
) -> tuple[torch.Tensor, list[int]]:
    """Return `value` as one tensor (rows, longest, ...) and the rows' own lengths.

    One row has `dims` dimensions; a single one gains that of the rows. A list of rows is padded with `fill`, at
    the left or right. A tensor that has its rows comes back as it is. Floats of no given meaning are an error.
    """
    if not _is_list_of_rows(value):
        tensor = _tensor(name, value)
        tensor = tensor if tensor.dim() > dims else tensor[None]
        return tensor, [tensor.shape[1]] * tensor.shape[0] if tensor.dim() > 1 else []
    rows = [_tensor(name, row) for row in value]
    if shapes := [tuple(row.shape) for row in rows if row.dim() != dims]:
        raise PromptError(f"a row of `{name}` has shape {shapes[0]}, not {dims} dimension(s). Give {FORMS}.")
    lengths = [len(row) for row in rows]
    rows = [row for row in rows if len(row)] or rows  # as_tensor([]) is of floats
    if len(rows) < len(lengths):
        return rows[0][None], lengths
    return torch.cat([pad(row[None], max(lengths), fill, left) for row in rows]), lengths


def check_ids(ids: torch.Tensor, lengths: list[int]) -> None:
    """Raise `PromptError` unless `ids` are whole numbers in rows, each of at least one token."""
    if not lengths or 0 in lengths:
        which = f"prompt {lengths.index(0)} has no tokens" if lengths else "there is no prompt"
        raise PromptError(
            f"{which} in the input. Give at least one token, for example the tokenizer's bos token."
        )
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise PromptError(
            f"token ids are whole numbers of shape (rows, tokens), and `input_ids` is {ids.dtype} of shape "
            f"{tuple(ids.shape)}. Give {FORMS}; embeddings go by keyword, `inputs_embeds=`."
        )


def companion(name: str, value: Any, lengths: list[int], left: bool) -> Any:
    """Another input that runs along the tokens (one of `FILL`), given as `value`, in the rows of the prompts.

    Padded like them; one row of `token_type_ids` or `position_ids` serves all prompts.
    """
    if isinstance(value, (list, tuple)) or type(value).__module__ == "numpy":
        if not _is_list_of_rows(value):
            value = _tensor(name, value)
        else:
            value, own = sequences(name, value, FILL[name], left)
            _check_lengths(name, own, lengths)
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    width, rows = max(lengths), len(lengths)
    if value.dim() == 1 and rows == 1 and len(value) == width:
        value = value[None]
    if value.dim() == 2 and len(value) == 1 and name in ("token_type_ids", "position_ids"):
        value = value.expand(rows, -1)
    if len(value) != rows:
        raise PromptError(
            f"`{name}` has {len(value)} rows and the prompts are {rows}. Give one row for each prompt."
        )
    return value.long() if name == "attention_mask" and value.dim() == 2 else value


def pad(tensor: torch.Tensor, width: int, fill: float, left: bool) -> torch.Tensor:
    """`tensor` (rows, tokens, ...) with `fill` up to `width` tokens, at the left or right."""
    extra = width - tensor.shape[1]
    if not extra:
        return tensor
    return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + ((extra, 0) if left else (0, extra)), value=fill)


def positions(mask: torch.Tensor, length: int) -> torch.Tensor | None:
    """The positions of the last `length` tokens of `mask` (rows, tokens), or None if no padding is on the left.

    Each row counts from its first real token, which equals `(mask.cumsum(-1) - 1).clamp(min=0)` on left padding
    and, unlike it, counts on over a gap that the user masked, as the model does with the row alone.
    """
    if bool(mask[:, 0].all()):
        return None
    first = mask.ne(0).int().argmax(-1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - first).clamp(min=0)[:, -length:]


def merge(name: str, values: list, rows: list[int]) -> Any:
    """One input of several invokes: tensors with their rows are concatenated, equal values stay as they are."""
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
    shown = ", ".join(tree.describe(v) if hasattr(tree, "describe") else _shown(v) for v in values)
    raise PromptError(
        f"`{name}` differs between the invokes: {shown}. They run in one forward, so give the same to all."
    )


def _is_list_of_rows(value: Any) -> bool:
    """A list whose items are rows themselves; a list of numbers is one row."""
    return isinstance(value, (list, tuple)) and any(
        not isinstance(v, Number) and getattr(v, "ndim", 1) > 0 for v in value
    )


def _tensor(name: str, value: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PromptError(f"`{name}` cannot be {_shown(value)} ({error}). Give {FORMS}.") from None


def _check_lengths(name: str, own: list[int], lengths: list[int]) -> None:
    if own != lengths:
        raise PromptError(
            f"the rows of `{name}` have {own} tokens and those of the prompts {lengths}. "
            "Give it one value for each token."
        )


def _has_rows(value: torch.Tensor, rows: int) -> bool:
    return value.dim() > 0 and len(value) == rows


def _same(a: Any, b: Any) -> bool:
    (one, spec), (two, other) = tree.flatten(a), tree.flatten(b)
    return spec == other and all(
        x is y or (torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else _equal(x, y))
        for x, y in zip(one, two, strict=True)
    )


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
