"""Where a trace stops the model: told from the scan alone as a forward on fakes with the plan in it would tell it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import nnsight_fx
from nnsight_fx import LanguageModel, NNsight
from nnsight_fx.scan.wave_sites import WaveSites

X = torch.linspace(-1, 1, 32).reshape(4, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def blocks() -> NNsight:
    torch.manual_seed(0)
    model = NNsight(nn.Sequential(*(Block() for _ in range(4))).requires_grad_(False))
    model.compile(backend="eager")
    return model


def written(model: Any, tracer: Any) -> Any:
    model[1].up.output[:, 0] = 0
    found = model[2].output.save()
    tracer.stop()
    return found


def read(model: Any, tracer: Any) -> Any:
    found = model[1].down.input.save()
    tracer.stop()
    return found


def changed_in_place(model: Any, tracer: Any) -> Any:
    h = model[1].output
    h.mul_(2)
    found = h.sum().save()
    tracer.stop()
    return found


def reshaped(model: Any, tracer: Any) -> Any:
    model[1].output = model[1].output[:2]
    found = model[2].output.save()
    tracer.stop()
    return found


def skipped(model: Any, tracer: Any) -> Any:
    model[1].skip(model[0].output)
    found = model[2].output.save()
    tracer.stop()
    return found


def called(model: Any, tracer: Any) -> Any:
    found = model[3].up(model[0].output).save()
    tracer.stop()
    return found


BODIES: dict[str, tuple[Callable, bool]] = {  # and does it take a forward on fakes
    "written": (written, False),
    "read": (read, False),
    "changed in place": (changed_in_place, False),
    "reshaped": (reshaped, True),
    "skipped": (skipped, True),
    "a module is called": (called, False),
}


SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
T5 = {
    "vocab_size": 60,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 3,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
FAMILIES: dict[str, tuple[Callable, str]] = {  # and a module that stops it; Albert calls its one layer three times
    "mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_key_value_heads=1)), "model.layers.1"),
    "gemma2": (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8)), "model.layers.1"),
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), "decoder.block.1.layer.0"),
    "albert": (lambda: hf.AlbertModel(hf.AlbertConfig(**SIZES, embedding_size=16)), "encoder.albert_layer_groups.0.albert_layers.0"),
    "mamba": (lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=3)), "backbone.layers.1"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*lru_cache")  # of Mamba: Dynamo says it once
@pytest.mark.parametrize("name", FAMILIES)
def test_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward on fakes for the stop, and what hooks give."""
    torch.manual_seed(0)
    module, path = FAMILIES[name][0]().eval().requires_grad_(False), FAMILIES[name][1]
    decodes = {"decoder_input_ids": torch.tensor([[0, 4, 5]])} if module.config.is_encoder_decoder else {}
    ids = torch.arange(7)[None] + 5

    def run(model: Any) -> tuple:
        with model.trace(ids, **decodes) as tracer:
            h = model.get(path).output
            h = h[0] if isinstance(h, tuple) else h
            h[:, -1] += 1
            found = h.save(), (h.mean() * 2).save()
            tracer.stop()
        return found

    want, captured = run(LanguageModel(module)), LanguageModel(module)
    captured.compile(backend="eager")
    monkeypatch.setattr(WaveSites, "replay", None)
    for _ in range(2):
        torch.testing.assert_close(run(captured), want)
    assert "spliced" in str(captured.explain())


@pytest.mark.parametrize("name", BODIES)
def test_the_same_site(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, replays = BODIES[name]
    model, told, ran = blocks(), [], []
    original, replay = WaveSites.stop_site, WaveSites.replay

    def stop_site(self: Any, tape: Any, plan: Any, values: Any) -> Any:
        found = original(self, tape, plan, values)
        told.append((found, replay(self, tape, plan, values).stop_site))
        return found

    def counted(self: Any, *args: Any) -> Any:
        ran.append(args)
        return replay(self, *args)

    monkeypatch.setattr(WaveSites, "stop_site", stop_site)
    monkeypatch.setattr(WaveSites, "replay", counted)
    results = []
    for _ in range(2):
        with model.trace(X) as tracer:
            results.append(nnsight_fx.save(body(model, tracer)))
    plain = NNsight(model._module)
    with plain.trace(X) as tracer:
        want = nnsight_fx.save(body(plain, tracer))
    assert told and all(found == wanted for found, wanted in told)
    assert sum(len(args) == 3 for args in ran) == replays  # once, for both traces
    for result in results:
        assert torch.equal(result, want)
    assert "spliced" in str(model.explain())
