"""`LanguageModel`: a wrapped transformers model that takes prompts."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from . import compat, tokens
from .aliasing import Rename
from .compat.transformers import cache_among
from .engine.past import growing
from .generator import Generator
from .loading import ModelNotFoundError as ModelNotFoundError
from .loading import Source
from .model import Batch, NNsight
from .padding import Padding, padding_of
from .tokens import PromptError
from .tracing import tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCES = {"input_ids": 1, "inputs_embeds": 2}  # what can hold the tokens, and the dimensions of one row


class LanguageModel(NNsight):
    """Wrap a transformers language model, by hub id, by folder, or one that is loaded already.

    ```python
    model = LanguageModel("openai-community/gpt2", dtype=torch.bfloat16)
    with model.trace("The Eiffel Tower is in"):
        logits = model.lm_head.output[:, -1].save()  # (1, vocabulary)

    model = LanguageModel(module, tokenizer=tok)  # any causal model or encoder
    ```

    A prompt is a string, a list of token ids, or a tensor of them; a list of prompts, a tensor (rows, tokens)
    or a dict with `input_ids` is as many rows. All reach the model as `input_ids` and `attention_mask`, int64
    of shape (rows, tokens), on its device. Shorter prompts are padded on the left, so that `[:, -1]` is the
    last token of each, and `position_ids` then count from a row's first token: the values of a prompt do not
    depend on its batch. A tokenizer of your own keeps its `padding_side`; where that is "right", the default
    of most, padding comes behind the prompt. So it does for an encoder, or an encoder and decoder, that cannot take it
    on the left (BART). A model that can take it on neither side, or a causal one that cannot on the left (RWKV), gets no
    prompts of several lengths: a `PromptError` says why. Every other keyword (`labels`, `use_cache`, ...) is the model's.

    By id or folder, the structure is built at once, on the `meta` device, to be looked at and scanned; the weights are
    loaded by the first trace, by `dispatch()`, or at once with `dispatch=True` (and where they are quantised). Further
    keywords (`dtype`, `device_map`, `attn_implementation`, ...) go to `from_pretrained`: the model is in `eval()` mode.
    Code that comes with the weights runs only with `trust_remote_code=True`.

    Raises `ModelNotFoundError` where there is no model, and `PromptError` for a prompt that makes no tokens.
    """

    def __init__(
        self,
        model: str | os.PathLike | nn.Module,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        rename: Rename | None = None,
        envoys: Any = None,
        dispatch: bool = False,
        **from_pretrained: Any,
    ):
        self._source: Source | None = None
        if not isinstance(model, nn.Module):
            source = Source(model, from_pretrained)
            found = None if dispatch else source.structure()
            model, self._source = (source.model(), None) if found is None else (found, source)
            tokenizer = source.tokenizer() if tokenizer is None else tokenizer
        elif from_pretrained:
            names = ", ".join(f"`{n}`" for n in from_pretrained)
            raise TypeError(
                f"LanguageModel(module, ...) got {names}, which are for loading, and this model is loaded. "
                "Drop them, or give a hub id or folder instead of the module."
            )
        super().__init__(model, rename=rename, envoys=envoys)
        self._tokenizer = tokenizer

    @property
    def dispatched(self) -> bool:
        """Are the weights loaded?"""
        return self._source is None

    def dispatch(self) -> None:
        """Load the weights now, for edited copies too. Envoys that were taken before stay what they are."""
        source, family = self._source, list(self._shared.family)
        if source is None:
            return
        for model in family:
            model._source = None
        try:
            self._adopt(source.model())
        except BaseException:
            for model in family:
                model._source = source
            raise

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None if the model came without."""
        return self._tokenizer

    @property
    def config(self) -> Any:
        """The transformers configuration of the model."""
        return self._module.config

    def generate(self, *args: Any, compile: bool | dict | None = None, trace: bool = True, **kwargs: Any) -> Any:
        """Generate tokens with the interventions of a `with` block; keywords are those of transformers' `generate`.

        ```python
        with model.generate("The Eiffel Tower is in", max_new_tokens=5) as tracer:
            for step in tracer.iter[:]:                          # each forward: the prompt, then one token each
                model.transformer.h[3].output += vector
            ids = tracer.result.save()                           # (1, prompt + 5)
        ```

        A body without a loop is for the first forward, the prompt's. A step runs when the loop goes on to the next, so
        values of earlier steps can be used in later ones. The body runs under `no_grad`, as `generate` does.
        """
        return self.trace(*args, fn="generate", compile=compile, trace=trace, **kwargs)

    @property
    def generator(self) -> Any:
        """What `generate` returns (`.output`), and the tokens as they come (`.streamer.output`)."""
        return self._child("generator") if "generator" in self._module._modules else Generator(self, "model.generator")

    # -- inputs ----------------------------------------------------------------------------------------

    def _has_input(self, kwargs: dict) -> bool:
        return any(name in SOURCES or isinstance(value, torch.Tensor) for name, value in kwargs.items())

    def _prepare(self, args: tuple, kwargs: dict) -> Batch:
        given = tokens.named(args, kwargs)
        source = _source(given)
        if source is None:  # images, say
            return super()._prepare((), given)
        value = given.pop(source)
        text = tokens.is_text(value)
        if source == "input_ids":
            main, lengths = tokens.token_ids(self._ids_of(value), self._pad_id, self._left)
            self._check_padding(lengths)
        else:
            main, lengths = tokens.sequences(source, value, 0.0, self._left, SOURCES[source])
        for name in tokens.FILL.keys() & given.keys():
            given[name] = tokens.companion(name, given[name], lengths, self._left)
        if given.get("attention_mask") is None and not _is_filled(cache_among(given)):
            ones = [torch.ones(n, dtype=torch.long, device=main.device) for n in lengths]
            given["attention_mask"] = tokens.sequences("attention_mask", ones, 0, self._left)[0]
        batch = super()._prepare((), {source: main, "attention_mask": None} | given)
        return dataclasses.replace(batch, rows=len(lengths), text=text, length=main.shape[1])

    def _collate(self, batches: list[Batch], pad_to: int | None = None) -> Batch:
        lengths = [n for b in batches if (n := self._length(b)) is not None]
        if len(lengths) < len(batches):
            return super()._collate(batches, pad_to)
        if pad_to is not None and max(lengths) > pad_to:
            raise PromptError(
                f"a prompt has {max(lengths)} tokens, more than `pad_to={pad_to}`. "
                f"Give `pad_to={max(lengths)}` or more, or a shorter prompt."
            )
        padded = [self._padded(b, pad_to or max(lengths)) for b in batches]
        rows = [b.rows for b in batches]
        kwargs = padded[0]
        if len(padded) > 1:
            names = dict.fromkeys(name for each in padded for name in each)
            kwargs = {n: tokens.merge(n, [each[n] for each in padded if n in each], rows) for n in names}
        return Batch((), self._positioned(kwargs), sum(rows), any(b.text for b in batches), pad_to or max(lengths))

    def _length(self, batch: Batch) -> int | None:
        source = _source(batch.kwargs)
        return None if source is None else batch.kwargs[source].shape[1]

    def _let_vary(self, batch: Batch, generates: bool) -> None:
        """Text: its length, and several rows'. A generation: what it has cached, which grows with every step."""
        if batch.text:
            for x in self._along_tokens(batch).values():
                compat.dynamo.may_vary(x, 0, 1)
        past = growing(batch) if generates else None
        if past is not None:
            rows = (0,) if batch.text else ()
            for layer in past.cache.layers:
                compat.dynamo.may_vary(layer.keys, *rows, 2)
                compat.dynamo.may_vary(layer.values, *rows, 2)
            if past.mask is not None:
                compat.dynamo.may_vary(past.mask, *rows, 1)

    def _unknown_dims(self, batch: Batch) -> tuple:
        along = {id(value) for value in self._along_tokens(batch).values()}
        leaves = tree.flatten((batch.args, batch.kwargs))[0]
        dims = super()._unknown_dims(batch)
        return tuple((0, 1) if id(x) in along else d for x, d in zip(leaves, dims, strict=True))

    def _results(self, generations: list[Any]) -> Any:
        """The tokens of all: prompts padded where the model wants it, what was generated on the right."""
        results = [g.result for g in generations]
        if any(not isinstance(x, torch.Tensor) or x.dim() != 2 or x.is_floating_point() for x in results):
            return super()._results(generations)
        encoded = getattr(self.config, "is_encoder_decoder", False)
        prompts = [0 if encoded else g.kwargs["input_ids"].shape[1] for g in generations]
        behind = max(x.shape[1] - n for x, n in zip(results, prompts, strict=True))
        parts = [
            (
                tokens.pad(x[:, :n], max(prompts), self._pad_id, self._left),
                tokens.pad(x[:, n:], behind, self._pad_id, False),
            )
            for x, n in zip(results, prompts, strict=True)
        ]
        return torch.cat([torch.cat(part, 1) for part in parts])

    # -- padding ---------------------------------------------------------------------------------------

    @property
    def _left(self) -> bool:
        """Does padding come in front of a prompt?"""
        if self._tokenizer is not None:
            return getattr(self._tokenizer, "padding_side", "left") == "left"
        can = self._padding
        return not can.left or can.reads_last or bool(can.right)

    @property
    def _padding(self) -> Padding:
        """On which side the model takes padding: looked at once for a module tree."""
        known = self.__dict__.get("_padding_known")
        if known is None or known[0] is not self._markers:
            known = self.__dict__["_padding_known"] = (self._markers, padding_of(self._module))
        return known[1]

    def _check_padding(self, lengths: list[int]) -> None:
        """Prompts of these lengths are to be padded."""
        if len(set(lengths)) < 2:
            return
        can, side = self._padding, "left" if self._left else "right"
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
    def _pad_id(self) -> int:
        tokenizer, config = self._tokenizer, getattr(self._module, "config", None)
        places = ((tokenizer, "pad_token_id"), (tokenizer, "eos_token_id"), (config, "pad_token_id"))
        known = (getattr(place, name, None) for place, name in places)
        return next((i for i in known if isinstance(i, int) and i >= 0), 0)

    def _ids_of(self, value: Any) -> Any:
        """Token ids of a string, or of the strings in a list; whatever else comes stays as it is."""
        if not tokens.is_text(value):
            return value
        if self._tokenizer is None:
            raise PromptError(
                "the prompt is text, and this model has no tokenizer. Give it one, "
                "`LanguageModel(module, tokenizer=tok)`, or a prompt of token ids."
            )
        prompts = [value] if isinstance(value, str) else value
        ids = iter(self._tokenizer([p for p in prompts if isinstance(p, str)])["input_ids"])
        return [next(ids) if isinstance(p, str) else p for p in prompts]

    def _along_tokens(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The inputs of a batch with a row for each prompt and a place for each token."""
        shape = (batch.rows, self._length(batch))
        along = {n: batch.kwargs[n] for n in ("input_ids", *tokens.FILL) if n in batch.kwargs}
        return {
            name: value
            for name, value in along.items()
            if isinstance(value, torch.Tensor) and value.shape[:2] == shape and value.dim() < 4
        }

    def _padded(self, batch: Batch, width: int) -> dict[str, Any]:
        if width == self._length(batch):
            return batch.kwargs
        self._check_padding([self._length(batch) or 0, width])
        along = self._along_tokens(batch)
        if "attention_mask" not in along:
            raise PromptError(
                f"a prompt of {self._length(batch)} tokens must be padded to {width} and has no "
                "`attention_mask` of shape (rows, tokens) to mark it. Give one, or prompts of one length."
            )
        fill = {**tokens.FILL, "input_ids": self._pad_id}
        return batch.kwargs | {n: tokens.pad(x, width, fill[n], self._left) for n, x in along.items()}

    def _positioned(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Add `position_ids` where padding on the left would shift the tokens (SEMANTICS D9)."""
        mask = kwargs.get("attention_mask")
        if kwargs.get("position_ids") is not None or mask is None or mask.dim() != 2:
            return kwargs
        length = kwargs[_source(kwargs) or ""].shape[1]
        positions = tokens.positions(mask, length)
        if positions is None or not self._padding.positions:
            return kwargs
        return kwargs | {"position_ids": positions}


def _source(kwargs: dict) -> str | None:
    return next((name for name in SOURCES if kwargs.get(name) is not None), None)


def _is_filled(cache: Any) -> bool:
    """Does a cache hold tokens? The mask must cover them too, and the model makes that one itself."""
    return cache is not None and (not hasattr(cache, "get_seq_length") or int(cache.get_seq_length()) > 0)
