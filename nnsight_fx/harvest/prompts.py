"""A data set as rows of model input: what one item is, which of its positions are kept, and which items share a forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..envoys.envoy import host_of
from ..errors import PromptError
from ..lines import user_line
from ..report.provenance import hashed

if TYPE_CHECKING:
    from ..envoys.envoy import Envoy


Positions = int | slice | Sequence[int] | None
Run = Callable[["list[Item]", int], dict[str, torch.Tensor]]


class Item(NamedTuple):
    """One prompt: its number in the data set, its tokens (or, of a model without, one row of its input), and a digest of it."""

    number: int
    value: Any
    digest: str

    @property
    def length(self) -> int:
        return len(self.value)


@dataclass
class Reader:
    """Items of a data set for one model. `tokens`: the model takes prompts, and items are those."""

    model: Envoy
    column: str
    max_length: int | None

    @functools.cached_property
    def tokens(self) -> bool:
        return hasattr(self.model, "tokenizer")

    def read(self, dataset: Iterable, start: int = 0) -> Iterator[Item]:
        """The items, in order. Text is not looked into before it is needed: see `tokenised`."""
        for number, given in enumerate(dataset, start):
            value = self._plain(given, number) if self.tokens else given
            yield Item(number, value, hashed(value))

    def tokenised(self, item: Item) -> Item:
        """With token ids, an int64 tensor (tokens,); cut to `max_length`."""
        if not self.tokens:
            return item
        value = item.value
        ids = host_of(self.model).inputs.ids_of(value)[0] if isinstance(value, str) else value
        ids = torch.as_tensor(ids).reshape(-1).long()[: self.max_length]
        if not len(ids):
            raise PromptError(f"prompt {item.number} of the data set has no tokens. Leave it out.")
        return item._replace(value=ids)

    def _plain(self, given: object, number: int) -> str | torch.Tensor:
        """A string, or the ids that are no padding."""
        if isinstance(given, Mapping) and "input_ids" not in given:
            if self.column not in given:
                raise PromptError(
                    f"row {number} of the data set has neither `input_ids` nor `{self.column}`; there is "
                    f"{', '.join(f'`{k}`' for k in given)}. Say which is the text: `column=`."
                )
            given = given[self.column]
        if isinstance(given, str):
            return given
        mask = None
        if isinstance(given, Mapping):
            mask, given = given.get("attention_mask"), given["input_ids"]
        ids = torch.as_tensor(np.asarray(given) if not isinstance(given, torch.Tensor) else given)
        if ids.numel() and (ids.is_floating_point() or ids.dim() == 0 or ids.numel() != ids.shape[-1]):
            raise PromptError(
                f"row {number} of the data set is {ids.dtype} of shape {tuple(ids.shape)}: a prompt is text or one row of ids."
            )
        ids = ids.reshape(-1)
        return ids if mask is None else ids[torch.as_tensor(mask).reshape(-1).bool()]


def kept(item: Item, positions: Positions) -> list[int]:
    """The positions of a prompt that are kept, from 0 on."""
    n = item.length
    if isinstance(positions, slice):
        return list(range(n))[positions]
    wanted = [positions] if isinstance(positions, int) else list(positions or ())
    if wrong := [p for p in wanted if not -n <= p < n]:
        raise PromptError(
            f"prompt {item.number} has {n} tokens and no position {wrong[0]}. A slice takes what there is: `positions=slice(1, None)`."
        )
    return [p % n for p in wanted]


def width(length: int) -> int:
    """To which length prompts are padded: four widths an octave, so that there are few, and none is a quarter longer."""
    step = max(8, 2 ** (length.bit_length() - 3))
    return -(-length // step) * step


@dataclass
class Batches:
    """Which items share a forward: `size` of them, or as many as make `tokens` tokens with their padding."""

    size: int | None
    tokens: int
    pairs: bool = False  # no batch of one row, where two fit as well: it would be compiled for itself

    def __call__(self, items: list[Item], sized: bool) -> Iterator[tuple[list[int], int | None]]:
        """Indices into `items` and the width that they are padded to; longest first, so that what is too large fails at once."""
        if not sized:
            yield from ((chunk, None) for group in self._alike(items) for chunk in self._cut(group, self.size or 32))
            return
        order = sorted(range(len(items)), key=lambda i: -items[i].length)
        while order:
            wide = width(items[order[0]].length)
            rows = self.size or max(1 + self.pairs, self.tokens // wide)
            rows += self.pairs and len(order) == rows + 1
            yield order[:rows], wide
            order = order[rows:]

    @staticmethod
    def _cut(group: list[int], size: int) -> Iterator[list[int]]:
        yield from (group[i : i + size] for i in range(0, len(group), size))

    @staticmethod
    def _alike(items: list[Item]) -> Iterable[list[int]]:
        found: dict[object, list[int]] = {}
        for i, item in enumerate(items):
            found.setdefault(_shape(item.value), []).append(i)
        return found.values()


def rows_of(items: list[Item]) -> tuple[tuple, dict]:
    """Rows of input of one shape as the arguments of a plain model."""
    first = items[0].value
    if isinstance(first, Mapping):
        return (), {k: torch.stack([torch.as_tensor(i.value[k]) for i in items]) for k in first}
    return (torch.stack([torch.as_tensor(i.value) for i in items]),), {}


def _shape(value: object) -> tuple:
    if isinstance(value, Mapping):
        return tuple((k, _shape(v)) for k, v in value.items())
    if not isinstance(value, torch.Tensor | np.ndarray):
        raise PromptError(
            f"an item of this data set is a {type(value).__name__}. A plain model takes tensors, each one row of its input "
            f"(without the batch's dimension), or dicts of them. ({user_line()})"
        )
    return tuple(value.shape)
