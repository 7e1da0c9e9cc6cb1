"""Prompts as inputs: text, token ids or embeddings, padded where several run together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import compat
from ..compat.transformers import cache_among
from ..errors import PromptError
from ..plan import tree
from ..scan.past import growing
from . import tokens
from .inputs import Batch, ModuleInputs
from .longest import Positions, positions_of
from .padding import Padding, padding_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..generation.generation import Generation
    from .host import ModelHost

SOURCES = {"input_ids": 1, "inputs_embeds": 2}  # what can hold the tokens, and the dimensions of one row


class PromptInputs(ModuleInputs):
    """The inputs of a language model."""

    def __init__(self, host: ModelHost, tokenizer: PreTrainedTokenizerBase | None):
        super().__init__(host)
        self.tokenizer = tokenizer
        self._known: tuple[object, Padding] | None = None  # which module tree was looked at, and what it takes
        self._table: tuple[object, Positions | None] | None = None  # the same for its table of positions

    def has_input(self, kwargs: dict) -> bool:
        return any(name in SOURCES or isinstance(value, torch.Tensor) for name, value in kwargs.items())

    def prepare(self, args: tuple, kwargs: dict) -> Batch:
        given = tokens.named(args, kwargs)
        source = _source(given)
        if source is None:  # images, say
            return super().prepare((), given)
        value = given.pop(source)
        text = tokens.is_text(value)
        if source == "input_ids":
            main, lengths = tokens.token_ids(self.ids_of(value), self.pad_id, self.left)
            self.check_padding(lengths)
        else:
            main, lengths = tokens.sequences(source, value, 0.0, self.left, SOURCES[source])
        for name in tokens.FILL.keys() & given.keys():
            given[name] = tokens.companion(name, given[name], lengths, self.left)
        if given.get("attention_mask") is None and not _is_filled(cache_among(given)):
            ones = [torch.ones(n, dtype=torch.long, device=main.device) for n in lengths]
            given["attention_mask"] = tokens.sequences("attention_mask", ones, 0, self.left)[0]
        if given.get("position_ids") is None:
            self.check_length(max(lengths), given.get("attention_mask"))
        batch = super().prepare((), {source: main, "attention_mask": None} | given)
        return dataclasses.replace(batch, rows=len(lengths), text=text, length=main.shape[1])

    def check_generated(self, kwargs: dict) -> None:
        table, cache = self.positions, cache_among(kwargs)
        ids = kwargs.get("decoder_input_ids", kwargs.get("input_ids"))
        static = getattr(
            cache, "is_compileable", False
        )  # its length would have to be read from the device at each step
        if table is None or not isinstance(ids, torch.Tensor) or static:
            return
        length = ids.shape[1] + (int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0)
        if length > table.count:  # with its padding
            positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
            if isinstance(positions, torch.Tensor):
                length = int(positions.max()) + 1
            elif isinstance(mask, torch.Tensor) and mask.dim() == 2 and ids is kwargs.get("input_ids"):
                length = int(mask.sum(1).max())
        if length > table.count:
            raise PromptError(
                f"a generation has come to {length} tokens, and this model has {table.count} positions (`{table.path}`). Give a "
                "shorter prompt, or a smaller `max_new_tokens`."
            )

    def collate(self, batches: list[Batch], pad_to: int | None = None) -> Batch:
        lengths = [n for b in batches if (n := self.length(b)) is not None]
        if len(lengths) < len(batches):
            return super().collate(batches, pad_to)
        if pad_to is not None and max(lengths) > pad_to:
            raise PromptError(
                f"a prompt has {max(lengths)} tokens, more than `pad_to={pad_to}`. "
                f"Give `pad_to={max(lengths)}` or more, or a shorter prompt."
            )
        padded = [self.padded(b, pad_to or max(lengths)) for b in batches]
        rows = [b.rows for b in batches]
        kwargs = padded[0]
        if len(padded) > 1:
            names = dict.fromkeys(name for each in padded for name in each)
            kwargs = {n: tokens.merge(n, [each[n] for each in padded if n in each], rows) for n in names}
        return Batch((), self.positioned(kwargs), sum(rows), any(b.text for b in batches), pad_to or max(lengths))

    def length(self, batch: Batch) -> int | None:
        source = _source(batch.kwargs)
        return None if source is None else batch.kwargs[source].shape[1]

    def let_vary(self, batch: Batch, generates: bool) -> None:
        """Text: its length, and several rows'. A generation: what it has cached, which grows with every step."""
        if batch.text:
            for x in self.along_tokens(batch).values():
                compat.dynamo.may_vary(x, 0, 1)
        past = growing(batch) if generates else None
        if past is not None:
            rows = (0,) if batch.text else ()
            for layer in past.cache.layers:
                compat.dynamo.may_vary(layer.keys, *rows, 2)
                compat.dynamo.may_vary(layer.values, *rows, 2)
            if past.mask is not None:
                compat.dynamo.may_vary(past.mask, *rows, 1)

    def unknown_dims(self, batch: Batch) -> tuple:
        along = {id(value) for value in self.along_tokens(batch).values()}
        leaves = tree.flatten((batch.args, batch.kwargs))[0]
        dims = super().unknown_dims(batch)
        return tuple((0, 1) if id(x) in along else d for x, d in zip(leaves, dims, strict=True))

    def results(self, generations: Sequence[Generation]) -> Any:
        """The tokens of all: prompts padded where the model wants it, what was generated on the right."""
        results = [g.result for g in generations]
        if any(not isinstance(x, torch.Tensor) or x.dim() != 2 or x.is_floating_point() for x in results):
            return super().results(generations)
        encoded = getattr(self.host.module.config, "is_encoder_decoder", False)
        prompts = [0 if encoded else g.kwargs["input_ids"].shape[1] for g in generations]
        behind = max(x.shape[1] - n for x, n in zip(results, prompts, strict=True))
        parts = [
            (
                tokens.pad(x[:, :n], max(prompts), self.pad_id, self.left),
                tokens.pad(x[:, n:], behind, self.pad_id, False),
            )
            for x, n in zip(results, prompts, strict=True)
        ]
        return torch.cat([torch.cat(part, 1) for part in parts])

    @property
    def left(self) -> bool:
        """Does padding come in front of a prompt?"""
        if self.tokenizer is not None:
            return getattr(self.tokenizer, "padding_side", "left") == "left"
        can = self.padding
        return not can.left or can.reads_last or bool(can.right)

    @property
    def padding(self) -> Padding:
        """On which side the model takes padding: looked at once for a module tree."""
        markers = self.host.markers  # of one module tree
        if self._known is None or self._known[0] is not markers:
            self._known = (markers, padding_of(self.host.module))
        return self._known[1]

    @property
    def positions(self) -> Positions | None:
        """The model's learned table of positions: looked at once for a module tree."""
        markers = self.host.markers
        if self._table is None or self._table[0] is not markers:
            self._table = (markers, positions_of(self.host.module))
        return self._table[1]

    def check_length(self, length: int, mask: object) -> None:
        """A prompt has so many tokens, with the padding that the user gave it."""
        table = self.positions
        if table is None or length <= table.count:
            return
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            length = int(mask.sum(1).max())
        if length > table.count:
            raise PromptError(
                f"a prompt has {length} tokens, and this model has {table.count} positions (`{table.path}`). Give a shorter prompt; "
                "`max_length=` cuts those of a harvest."
            )

    def check_padding(self, lengths: list[int]) -> None:
        """Prompts of these lengths are to be padded."""
        if len(set(lengths)) < 2:
            return
        can, side = self.padding, "left" if self.left else "right"
        why = can.left if side == "left" else can.right
        if why:
            other = (
                ' A tokenizer with `padding_side="right"` puts the padding behind; the last column is then padding for the shorter prompts.'
                if side == "left" and not can.right
                else ""
            )
            raise PromptError(
                f"the prompts have {', '.join(map(str, lengths))} tokens, and padding on the {side} would change their numbers: {why}. "
                f"Give prompts of one length, or each a trace of its own (in `with model.session():`).{other}"
            )

    @property
    def pad_id(self) -> int:
        tokenizer, config = self.tokenizer, getattr(self.host.module, "config", None)
        places = ((tokenizer, "pad_token_id"), (tokenizer, "eos_token_id"), (config, "pad_token_id"))
        known = (getattr(place, name, None) for place, name in places)
        return next((i for i in known if isinstance(i, int) and i >= 0), 0)

    def ids_of(self, value: Any) -> object:
        """Token ids of a string, or of the strings in a list; whatever else comes stays as it is."""
        if not tokens.is_text(value):
            return value
        if self.tokenizer is None:
            raise PromptError(
                "the prompt is text, and this model has no tokenizer. Give it one, "
                "`LanguageModel(module, tokenizer=tok)`, or a prompt of token ids."
            )
        prompts = [value] if isinstance(value, str) else value
        ids = iter(self.tokenizer([p for p in prompts if isinstance(p, str)])["input_ids"])
        return [next(ids) if isinstance(p, str) else p for p in prompts]

    def along_tokens(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The inputs of a batch with a row for each prompt and a place for each token."""
        shape = (batch.rows, self.length(batch))
        along = {n: batch.kwargs[n] for n in ("input_ids", *tokens.FILL) if n in batch.kwargs}
        return {
            name: value
            for name, value in along.items()
            if isinstance(value, torch.Tensor) and value.shape[:2] == shape and value.dim() < 4
        }

    def padded(self, batch: Batch, width: int) -> dict:
        if width == self.length(batch):
            return batch.kwargs
        self.check_padding([self.length(batch) or 0, width])
        along = self.along_tokens(batch)
        if "attention_mask" not in along:
            raise PromptError(
                f"a prompt of {self.length(batch)} tokens must be padded to {width} and has no "
                "`attention_mask` of shape (rows, tokens) to mark it. Give one, or prompts of one length."
            )
        fill = {**tokens.FILL, "input_ids": self.pad_id}
        return batch.kwargs | {n: tokens.pad(x, width, fill[n], self.left) for n, x in along.items()}

    def positioned(self, kwargs: dict) -> dict:
        """Add `position_ids` where padding on the left would shift the tokens (SEMANTICS D9)."""
        mask = kwargs.get("attention_mask")
        if kwargs.get("position_ids") is not None or mask is None or mask.dim() != 2:
            return kwargs
        length = kwargs[_source(kwargs) or ""].shape[1]
        positions = tokens.positions(mask, length)
        if positions is None or not self.padding.positions:
            return kwargs
        return kwargs | {"position_ids": positions}


def _source(kwargs: dict) -> str | None:
    return next((name for name in SOURCES if kwargs.get(name) is not None), None)


def _is_filled(cache: Any) -> bool:
    """Does a cache hold tokens? The mask must cover them too, and the model makes that one itself."""
    return cache is not None and (not hasattr(cache, "get_seq_length") or int(cache.get_seq_length()) > 0)
