"""The tiny models of the public programs, and plain hooks for their references."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
import transformers as hf

from nnsight_fx import LanguageModel, NNsight
from tests.coverage.architectures import BERT, CLIP_TEXT, EXPERTS, HEADED, LLAMA, SMALL, TOKENS, VISION, ids, image

TWO: dict[str, Any] = {"num_hidden_layers": 2}
PAIR: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2, **TOKENS,
}  # fmt: skip

IDS, OTHER = ids(2, 6), ids(4, 6)[2:]
IMAGE = image()["pixel_values"]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def fixed(*shape: int, seed: int = 3) -> torch.Tensor:
    """The same normal numbers every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(*sizes: int, bias: bool = False) -> nn.Linear:
    """A layer whose weights do not depend on what was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Linear(*sizes, bias=bias)


class SAE(nn.Module):
    """A sparse autoencoder as users write it."""

    def __init__(self, d: int = 32, features: int = 48):
        super().__init__()
        self.W_enc, self.W_dec = nn.Parameter(fixed(d, features) / 6), nn.Parameter(fixed(features, d, seed=4) / 7)
        self.b_dec = nn.Parameter(fixed(d, seed=5) / 10)
        self.requires_grad_(False)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu((x - self.b_dec) @ self.W_enc)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return f @ self.W_dec + self.b_dec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))


class ConvNet(nn.Module):
    """Convolutions, batch norm and a ReLU that works in place."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu, self.conv2 = nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        return self.head(self.relu(self.conv2(h)).mean((2, 3)))


class Shared(nn.Module):
    """One ReLU that runs after each of three layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.relu(layer(x))
        return x


class Recurrent(nn.Module):
    """An LSTM between an embedding and a classifier, which reads both its outputs and its last state."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(50, 8), nn.LSTM(8, 16, batch_first=True), nn.Linear(32, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out, (h, _) = self.lstm(self.embed(tokens))
        return self.head(torch.cat([out.mean(1), h[-1]], -1))


class Attends(nn.Module):
    """A block that asks `nn.MultiheadAttention` for no weights."""

    def __init__(self):
        super().__init__()
        self.attn, self.norm = nn.MultiheadAttention(16, 4, batch_first=True), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, _ = self.attn(x, x, x, need_weights=False)
        return self.norm(x + out)


def decoder(prefix: str, cls: str = "", eager: bool = False, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        made = getattr(hf, f"{prefix}Config")(**config)
        if eager:
            made._attn_implementation = "eager"
        return getattr(hf, cls or f"{prefix}ForCausalLM")(made)

    return build


def peft_llama() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    base = decoder("Llama", **LLAMA | TWO)()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        return get_peft_model(base, config)


def llava() -> nn.Module:
    vision = hf.CLIPVisionConfig(**VISION | TWO)
    text = hf.LlamaConfig(**LLAMA | TWO)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=99)
    )


def clip() -> nn.Module:
    return hf.CLIPModel(hf.CLIPConfig(text_config=CLIP_TEXT | TWO, vision_config=VISION | TWO, projection_dim=16))


LANGUAGE: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": decoder("GPT2", "GPT2LMHeadModel", **TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "GPT-NeoX": decoder("GPTNeoX", **SMALL | TWO, intermediate_size=64, max_position_embeddings=64),
    "GPT-J": decoder("GPTJ", **TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    "OPT": decoder("OPT", **SMALL | TWO, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64),
    "BLOOM": decoder("Bloom", **TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "Llama": decoder("Llama", **LLAMA | TWO),
    "Llama, eager": decoder("Llama", eager=True, **LLAMA | TWO),
    "Mistral": decoder("Mistral", **HEADED | TWO),
    "Qwen2": decoder("Qwen2", **LLAMA | TWO),
    "Qwen3": decoder("Qwen3", **HEADED | TWO),
    "Gemma 2": decoder("Gemma2", **HEADED | TWO),
    "Phi-3": decoder("Phi3", **LLAMA | TWO),
    "OLMo 2": decoder("Olmo2", **LLAMA | TWO),
    "Mixtral": decoder("Mixtral", **HEADED | TWO, num_local_experts=4, num_experts_per_tok=2),
    "Qwen2-MoE": decoder("Qwen2Moe", **EXPERTS | TWO, num_experts=4, shared_expert_intermediate_size=32, decoder_sparse_step=1, mlp_only_layers=[]),
    "Mamba": decoder("Mamba", **TOKENS, hidden_size=32, num_hidden_layers=2, state_size=8),
    "LoRA on Llama": peft_llama,
    "T5": decoder("T5", "T5ForConditionalGeneration", **TOKENS, d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0),
    "BART": decoder("Bart", "BartForConditionalGeneration", **PAIR, max_position_embeddings=64, forced_eos_token_id=None),
    "BERT": decoder("Bert", "BertForSequenceClassification", **BERT | TWO),
    "DistilBERT": decoder("DistilBert", "DistilBertModel", **TOKENS, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64),
}  # fmt: skip
MODULES: dict[str, Callable[[], nn.Module]] = {
    "Whisper": decoder("Whisper", "WhisperForConditionalGeneration", eager=True, **PAIR, num_mel_bins=16, max_source_positions=20, max_target_positions=32),
    "ViT": decoder("ViT", "ViTForImageClassification", **VISION | TWO, num_labels=5),
    "DINOv2": decoder("Dinov2", "Dinov2Model", **VISION | TWO),
    "Swin": decoder("Swin", "SwinModel", image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4),
    "CLIP": clip,
    "LLaVA": llava,
    "a convolutional net": ConvNet,
    "a shared ReLU": Shared,
    "an LSTM": Recurrent,
    "nn.MultiheadAttention": Attends,
    "nn.TransformerEncoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2),
    "nn.Sequential": lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)),
}  # fmt: skip


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return (LANGUAGE | MODULES)[name]().eval().requires_grad_(False)


@functools.cache
def net(name: str) -> nn.Module:
    """The module of the plain references."""
    return made(name)


@functools.cache
def wrapped(name: str, engine: str) -> Any:
    """The same weights, wrapped; one for all programs of an engine, so that each runs on what others have left."""
    model = (LanguageModel if name in LANGUAGE else NNsight)(made(name))
    if engine != "hooks":
        model.compile(backend=engine)
    return model


# -- plain hooks ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hooks(net: nn.Module, after: dict[str, Callable] | None = None, before: dict[str, Callable] | None = None) -> Iterator[None]:  # fmt: skip
    """`after[path](output)` gives a module's new output, `before[path](x)` its new first argument; None is the old one."""

    def feed(fn: Callable) -> Callable:
        def hook(m: nn.Module, args: tuple, kwargs: dict) -> Any:
            if args:
                new = fn(args[0])
                return None if new is None else ((new, *args[1:]), kwargs)
            first = next(iter(kwargs))
            new = fn(kwargs[first])
            return None if new is None else (args, {**kwargs, first: new})

        return hook

    handles = []
    for path, fn in (after or {}).items():
        handles.append(net.get_submodule(path).register_forward_hook(lambda m, a, out, fn=fn: fn(out)))
    for path, fn in (before or {}).items():
        handles.append(net.get_submodule(path).register_forward_pre_hook(feed(fn), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def every(net: nn.Module, paths: list[str], call: Callable[[], Any]) -> list[list[Any]]:
    """All that modules return while `call` runs, a list for each path; `path:in` is a module's first argument."""
    found: list[list[Any]] = [[] for _ in paths]
    after = {p: kept.append for p, kept in zip(paths, found, strict=True) if not p.endswith(":in")}
    before = {p[:-3]: kept.append for p, kept in zip(paths, found, strict=True) if p.endswith(":in")}
    with hooks(net, after, before):
        call()
    return found


def seen(net: nn.Module, paths: list[str], *args: Any, **kwargs: Any) -> list[Any]:
    """What modules return, or get, in one call of the model: the last of each."""
    return [kept[-1] for kept in every(net, paths, lambda: net(*args, **kwargs))]
