"""Generation whose forwards are not all calls of the root: encoders in front of the loop, wrappers, a `generate` of one's own."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import nnsight_fx
from nnsight_fx import LanguageModel, MissedSiteError, NNsight

pytestmark = pytest.mark.xdist_group("forwards")
ENGINES = ["hooks", "eager", pytest.param("aot_eager", marks=pytest.mark.slow)]
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(3)) * 3


def gpt2() -> nn.Module:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=100, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=100
    )  # fmt: skip
    return LlamaForCausalLM(config)


def peft() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj"], **options))


def t5() -> nn.Module:
    sizes = {"num_layers": 2, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "vocab_size": 100}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, pad_token_id=0, **sizes))


def bart() -> nn.Module:
    config = BartConfig(
        encoder_layers=2, decoder_layers=2, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, vocab_size=100, max_position_embeddings=64, pad_token_id=1, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def bert2gpt2() -> nn.Module:
    encoder = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100, max_position_embeddings=64
    )  # fmt: skip
    decoder = gpt2().config
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 0, 0
    return EncoderDecoderModel(config)


def whisper() -> nn.Module:
    config = WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, vocab_size=100, num_mel_bins=8, max_source_positions=20, max_target_positions=40, pad_token_id=0,
        bos_token_id=0, eos_token_id=99, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


class Recurrent(nn.Module):
    """A `generate` that calls parts of the model, not the model."""

    def __init__(self):
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(100, 32), nn.Linear(32, 32), nn.Linear(32, 100)

    def forward(self, input_ids):
        return self.head(self.cell(self.embed(input_ids)))

    def generate(self, input_ids, steps=4, streamer=None, disable_compile=None):
        h = self.embed(input_ids).mean(1)
        ids = []
        for _ in range(steps):
            h = torch.tanh(self.cell(h))
            ids.append(self.head(h).argmax(-1))
        return torch.stack(ids, 1)


MODELS: dict[str, tuple[Callable, str]] = {  # how it is made, where its wrapper's inner model is
    "gpt2": (gpt2, ""),
    "peft": (peft, "base_model.model."),
    "compiled": (lambda: torch.compile(gpt2(), backend="eager"), "_orig_mod."),
    "t5": (t5, ""),
    "bart": (bart, ""),
    "bert2gpt2": (bert2gpt2, ""),
    "whisper": (whisper, ""),
    "own": (Recurrent, ""),
}
BLOCKS = {  # (encoder's block, how often it runs), (the loop's block, how often)
    "gpt2": (None, ("transformer.h.1", 4)),
    "peft": (None, ("base_model.model.model.layers.1", 4)),
    "compiled": (None, ("_orig_mod.transformer.h.1", 4)),
    "t5": (("encoder.block.0", 1), ("decoder.block.1", 4)),
    "bart": (("model.encoder.layers.0", 1), ("model.decoder.layers.1", 4)),
    "bert2gpt2": (("encoder.encoder.layer.0", 1), ("decoder.transformer.h.1", 4)),
    "whisper": (("model.encoder.layers.1", 1), ("model.decoder.layers.0", 4)),
    "own": (("embed", 1), ("cell", 4)),
}


@functools.cache
def module(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval().requires_grad_(False)


@functools.cache
def wrapped(name: str, engine: str) -> Any:
    model = (NNsight if name == "own" else LanguageModel)(module(name))
    if engine != "hooks":
        model.compile(backend=engine)
    return model


def inputs(name: str) -> tuple[tuple, dict]:
    draw = torch.Generator().manual_seed(1)
    if name == "own":
        return (torch.randint(3, 99, (2, 7), generator=draw),), {}
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if name == "whisper":
        features = torch.randn(2, 8, 40, generator=draw)
        return (), {"input_features": features, **options, "attention_mask": torch.ones(2, 40, dtype=torch.long)}
    ids = torch.randint(3, 99, (2, 7), generator=draw)
    return (), {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}


def generate(model: Any, name: str, **more: Any) -> Any:
    args, kwargs = inputs(name)
    if name == "own":
        return model.trace(*args, fn="generate", **more) if isinstance(model, NNsight) else model.generate(*args)
    return model.generate(*args, **kwargs, **more)


def first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def with_first(out: Any, h: torch.Tensor) -> Any:
    return (h, *out[1:]) if isinstance(out, tuple) else h


@torch.no_grad()
def by_hand(name: str, steer: dict[str, float]) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
    """The tokens, and what the blocks gave, each steered by its share of `VECTOR`."""
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in steer}
    hooks = []
    for path, share in steer.items():

        def hook(m: nn.Module, args: tuple, out: Any, path: str = path, share: float = share) -> Any:
            seen[path].append(first(out).clone())
            return with_first(out, first(out) + share * VECTOR)

        hooks.append(module(name).get_submodule(path).register_forward_hook(hook))
    try:
        return generate(module(name), name), seen
    finally:
        for h in hooks:
            h.remove()


def at(model: Any, path: str) -> Any:
    return functools.reduce(lambda e, p: e[int(p)] if p.isdigit() else getattr(e, p), path.split("."), model)


def steered(envoy: Any, share: float) -> None:
    out = envoy.output
    envoy.output = with_first(out, first(out) + share * VECTOR)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", list(MODELS))
def test_every_step_of_the_loop(name: str, engine: str) -> None:
    path, count = BLOCKS[name][1]
    want, seen = by_hand(name, {path: 1.0})
    model = wrapped(name, engine)
    with generate(model, name) as tracer:
        got = nnsight_fx.save([])
        for _ in tracer.iter[:]:
            got.append(first(at(model, path).output).clone())
            steered(at(model, path), 1.0)
        ids = tracer.result.save()
    assert torch.equal(ids, want)
    assert len(got) == count and all(torch.equal(a, b) for a, b in zip(got, seen[path], strict=True))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [n for n, (encoder, _) in BLOCKS.items() if encoder])
def test_the_encoder_and_the_loop_in_one_body(name: str, engine: str) -> None:
    """The encoder runs once, in front of the loop; a body without a loop is for each block's first call."""
    (encoder, _), (decoder, _) = BLOCKS[name]
    model = wrapped(name, engine)
    want, seen = by_hand(name, {encoder: 0.5, decoder: 0.0})
    with generate(model, name) as tracer:
        h = first(at(model, encoder).output).clone().save()
        steered(at(model, encoder), 0.5)
        d = first(at(model, decoder).output).save()
        ids = tracer.result.save()
    assert torch.equal(h, seen[encoder][0]) and torch.equal(d, seen[decoder][0]) and torch.equal(ids, want)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["t5", "bart", "own"])
def test_values_flow_from_the_encoder_into_the_loop(name: str, engine: str) -> None:
    (encoder, _), (decoder, count) = BLOCKS[name]
    model = wrapped(name, engine)
    held: list[torch.Tensor] = []

    def keep(m: nn.Module, args: tuple, out: Any) -> None:
        held.append(first(out).mean())

    def add(m: nn.Module, args: tuple, out: Any) -> Any:
        return with_first(out, first(out) + held[0] * VECTOR)

    blocks = [module(name).get_submodule(p) for p in (encoder, decoder)]
    hooks = [b.register_forward_hook(f) for b, f in zip(blocks, (keep, add), strict=True)]
    with torch.no_grad():
        want = generate(module(name), name)
    for h in hooks:
        h.remove()
    with generate(model, name) as tracer:
        mean = first(at(model, encoder).output).mean()
        for _ in tracer.iter[:]:
            out = at(model, decoder).output
            at(model, decoder).output = with_first(out, first(out) + mean * VECTOR)
        ids = tracer.result.save()
    assert torch.equal(ids, want)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", list(MODELS))
def test_edits_hold_wherever_the_modules_are_called(name: str, engine: str) -> None:
    encoder, (decoder, _) = BLOCKS[name]
    shares = {decoder: 1.0} | ({encoder[0]: 0.5} if encoder else {})
    want, _ = by_hand(name, shares)
    model, tuples = wrapped(name, engine), gives_tuple(name)
    with model.edit() as edited:
        for path, share in shares.items():
            envoy = at(edited, path)
            if tuples[path]:
                envoy.output[0][:] += share * VECTOR
            else:
                envoy.output += share * VECTOR
    with generate(edited, name) as tracer:
        ids = tracer.result.save()
    assert torch.equal(ids, want)


@functools.cache
def gives_tuple(name: str) -> dict[str, bool]:
    """Which of the blocks return a tuple."""
    paths = [b[0] for b in BLOCKS[name] if b]
    found: dict[str, bool] = {}
    hooks = []
    for path in paths:

        def hook(m: nn.Module, args: tuple, out: Any, path: str = path) -> None:
            found[path] = isinstance(out, tuple)

        hooks.append(module(name).get_submodule(path).register_forward_hook(hook))
    with torch.no_grad():
        generate(module(name), name)
    for h in hooks:
        h.remove()
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["peft", "t5", "bert2gpt2"])
def test_a_cache_has_every_call(name: str, engine: str) -> None:
    paths = [b for b in BLOCKS[name] if b]
    model = wrapped(name, engine)
    _, seen = by_hand(name, {path: 0.0 for path, _ in paths})
    with generate(model, name) as tracer:
        cache = tracer.cache(modules=[path for path, _ in paths])
        tracer.result.save()
    for path, count in paths:
        visits = cache[path if name != "bert2gpt2" or path.startswith("model") else f"model.{path}"].visits
        assert len(visits) == count
        assert all(torch.equal(first(v.output), want) for v, want in zip(visits, seen[path], strict=True))


def test_the_streamer_of_an_encoder_decoder_model() -> None:
    want, _ = by_hand("t5", {"decoder.block.1": 0.0})
    model = wrapped("t5", "hooks")
    with generate(model, "t5", num_beams=1) as tracer:
        tokens = nnsight_fx.save([])
        for _ in tracer.iter[:5]:
            tokens.append(model.generator.streamer.output)
    assert torch.equal(torch.stack([t.flatten() for t in tokens], 1), want)


def test_a_module_that_generate_does_not_call_is_an_error() -> None:
    model = wrapped("peft", "hooks")
    with pytest.raises(MissedSiteError, match="occurrence 0 of `.*output` never came: there were 0"):
        with generate(model, "peft"):
            model.base_model.output.logits.save()


def test_an_edit_that_no_forward_passes_is_an_error() -> None:
    model = wrapped("peft", "hooks")
    with model.edit() as edited:
        edited.base_model.output.logits[:] = 0
    with pytest.raises(MissedSiteError, match="`base_model.output`, which no forward of the generation has passed"):
        with generate(edited, "peft") as tracer:
            tracer.result.save()


def test_nothing_stays_on_the_modules() -> None:
    for name in ("peft", "t5"):
        assert not any("_compiled_call_impl" in m.__dict__ for m in module(name).modules())
