"""The models that the benches run: their shapes are those of known ones, their weights are random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Model:
    """A shape: its class and configuration, and where its parts are."""

    name: str
    cls: Any
    config: dict[str, Any]
    blocks: str = "model.layers"
    norm: str = "model.norm"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def build(self, layers: int | None = None) -> Any:
        """In evaluation mode, with frozen parameters, drawn from seed 0 on its device."""
        torch.manual_seed(0)
        key = "n_layer" if "n_layer" in self.config else "num_hidden_layers"
        config = self.config if layers is None else {**self.config, key: layers}
        with torch.device(self.device):
            made = self.cls(self.cls.config_class(**config))
        return made.to(self.dtype).eval().requires_grad_(False)

    @property
    def width(self) -> int:
        return self.config.get("hidden_size") or self.config["n_embd"]

    @property
    def layers(self) -> int:
        return self.config.get("num_hidden_layers") or self.config["n_layer"]

    def ids(self, rows: int, tokens: int) -> torch.Tensor:
        return torch.randint(0, self.config["vocab_size"], (rows, tokens), device=self.device)


def _llama(name: str, width: int, inner: int, layers: int, heads: int, shared: int, vocab: int, **more: Any) -> Model:
    config = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    assert LlamaForCausalLM.config_class is LlamaConfig
    return Model(name, LlamaForCausalLM, config, **more)


def _gpt2(name: str, **more: Any) -> Model:
    config = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "use_cache": False}
    assert GPT2LMHeadModel.config_class is GPT2Config
    return Model(name, GPT2LMHeadModel, config, "transformer.h", "transformer.ln_f", **more)


ON_GPU = {"dtype": torch.bfloat16, "device": "cuda"}
MODELS = {
    m.name: m
    for m in (
        _llama("smollm2", 576, 1536, 30, 9, 3, 49152),
        _gpt2("gpt2"),
        _llama("tiny", 64, 128, 4, 4, 2, 256),
        _llama("llama-1b", 2048, 8192, 16, 32, 8, 128256, **ON_GPU),
        _llama("llama-8b", 4096, 14336, 32, 32, 8, 128256, **ON_GPU),
    )
}


def smollm2(layers: int = 30) -> Any:
    """A Llama of SmolLM2-135M's shape."""
    return MODELS["smollm2"].build(layers)
