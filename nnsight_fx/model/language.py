"""`LanguageModel`: a wrapped transformers model that takes prompts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch.nn as nn

from ..generation.generator import Generator
from .aliasing import Rename
from .host import ModelHost
from .loading import ModelNotFoundError as ModelNotFoundError
from .loading import ModelSource
from .model import NNsight
from .prompts import PromptInputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..engine.request import Compile
from ..envoys.envoy import Envoy


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
        envoys: object = None,
        dispatch: bool = False,
        **from_pretrained: object,
    ):
        self._source: ModelSource | None = None
        if not isinstance(model, nn.Module):
            source = ModelSource(model, from_pretrained)
            found = None if dispatch else source.structure()
            model, self._source = (source.model(), None) if found is None else (found, source)
            tokenizer = source.tokenizer() if tokenizer is None else tokenizer
        elif from_pretrained:
            names = ", ".join(f"`{n}`" for n in from_pretrained)
            raise TypeError(
                f"LanguageModel(module, ...) got {names}, which are for loading, and this model is loaded. "
                "Drop them, or give a hub id or folder instead of the module."
            )
        self._tokenizer = tokenizer
        super().__init__(model, rename=rename, envoys=envoys)

    def _inputs(self, host: ModelHost) -> PromptInputs:
        return PromptInputs(host, self._tokenizer)

    @property
    def dispatched(self) -> bool:
        """Are the weights loaded?"""
        return self._source is None

    def dispatch(self) -> None:
        """Load the weights now, for edited copies too. Envoys that were taken before stay what they are."""
        source, family = self._source, list(self._host.shared.family)
        if source is None:
            return
        for model in family:
            model._source = None
        try:
            self._tree.adopt(source.model())
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

    def generate(self, *args: object, compile: Compile = None, trace: bool = True, **kwargs: Any) -> Any:
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
    def generator(self) -> Envoy | Generator:
        """What `generate` returns (`.output`), and the tokens as they come (`.streamer.output`)."""
        return self._child("generator") if "generator" in self._module._modules else Generator(self, "model.generator")
