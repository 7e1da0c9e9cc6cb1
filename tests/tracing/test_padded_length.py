"""The padded length of a batch whose prompts are not all known yet: asked for only where it is needed, refused by name."""

from __future__ import annotations

import functools
import traceback
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nnsight_fx import LanguageModel, PaddedLengthUnknown

SHORT, ALSO_SHORT, LONG = [[5, 7, 11]], [[3, 2, 9]], [[3, 2, 9, 8]]


@functools.cache
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(params=["hooks", "eager", "aot_eager"])
def model(request: pytest.FixtureRequest) -> Any:
    made: Any = LanguageModel(llama())
    if request.param != "hooks":
        made.compile(backend=request.param)
    return made


@torch.no_grad()
def cached(model: Any) -> torch.Tensor:
    with model.trace(SHORT):
        clean = model.model.layers[0].output.save()
    return clean + 1


@torch.no_grad()
def test_a_whole_value_is_written_before_the_length_is_known(model: Any) -> None:
    value = cached(model)
    with model.trace(SHORT):
        model.model.layers[0].output = value
        want = model.lm_head.output.save()
    for other in (ALSO_SHORT, [[4]]):
        with model.trace(other):
            untouched = model.lm_head.output.save()
        with model.trace() as tracer:
            with tracer.invoke(SHORT):
                model.model.layers[0].output = value
                first = model.lm_head.output.save()
            with tracer.invoke(other):
                second = model.lm_head.output[:, -1].save()
        torch.testing.assert_close(first, want)
        torch.testing.assert_close(second, untouched[:, -1])


@torch.no_grad()
def test_a_batch_that_becomes_longer_is_told_with_the_line(model: Any) -> None:
    value = cached(model)
    with pytest.raises(
        RuntimeError,
        match=r"test_padded_length.py:\d+: `model.layers.0.output` is written .* \(1, 3, 32\), .* \(1, 4, 32\)",
    ):
        with model.trace() as tracer:
            with tracer.invoke(SHORT):
                model.model.layers[0].output = value
            with tracer.invoke(LONG):
                model.lm_head.output.save()


@torch.no_grad()
def test_a_length_that_python_needs_is_an_error_at_the_line(model: Any) -> None:
    with pytest.raises(PaddedLengthUnknown) as failed:
        with model.trace() as tracer:
            with tracer.invoke(SHORT):
                range(model.model.layers[0].output.shape[1])
            with tracer.invoke(LONG):
                model.lm_head.output.save()
    frames = traceback.extract_tb(failed.value.__traceback__)
    assert {frame.filename for frame in frames} == {__file__}
    assert "range(model" in str(frames[-1].line)
    text = "".join(traceback.format_exception_only(failed.value))
    assert text.startswith("nnsight_fx.errors.PaddedLengthUnknown: ")


@torch.no_grad()
def test_the_advice_runs_as_printed(model: Any) -> None:
    p1, p2 = SHORT, LONG
    with model.trace() as tracer:
        a, b = tracer.batch(p1, p2)
        with a:
            length = len(range(model.model.layers[0].output.shape[1]))
            model.model.layers[0].output[:, -1].save()
        with b:
            model.lm_head.output.save()
    with model.trace(SHORT, pad_to=32):
        fixed = len(range(model.model.layers[0].output.shape[1]))
    assert (length, fixed) == (4, 32)
