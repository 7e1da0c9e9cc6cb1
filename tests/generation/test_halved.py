"""A grid of generations that does not fit into memory: halved until it does, told, and the same tokens."""

from __future__ import annotations

import pytest
import torch

from nnsight_fx import LanguageModel

from .test_generate import llama

OPTIONS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PROMPT = torch.tensor([[5, 7, 11, 3]])


def grid(model: LanguageModel, strengths: list[float]) -> torch.Tensor:
    vector = torch.linspace(-1, 1, 32)

    def steer(tracer, strength):
        for _step in tracer.iter[:]:
            model.model.layers[1].output[:] += strength * vector

    found = model.sweep(steer, [PROMPT], over={"strength": strengths}, generate=OPTIONS, progress=False)
    return found["tokens"][0]


@pytest.mark.parametrize("fits", [4, 1])
def test_halved(fits: int) -> None:
    module, strengths = llama(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    want = grid(LanguageModel(module), strengths)
    model, widths = LanguageModel(module), []

    def small(_, args, kwargs):
        widths.append(len(kwargs["input_ids"]))
        if len(kwargs["input_ids"]) > max(fits + 3, 2):  # idle rows among them
            raise MemoryError("there is no more")

    handle = module.register_forward_pre_hook(small, with_kwargs=True)
    try:
        found = grid(model, strengths)
    finally:
        handle.remove()
    assert torch.equal(found, want) and max(widths) > fits
    assert "out of memory with 8 generations in a loop: halved" in str(model.explain())
