"""The trace bench under pytest-benchmark, on a model small enough to compile in seconds."""

from __future__ import annotations

import pytest
import torch
from steer import smollm2, steer_and_save  # type: ignore[import-not-found]

from nnsight_fx import NNsight


@pytest.fixture(scope="module")
def setup():
    module = smollm2(layers=4)
    model = NNsight(module)
    model.compile()
    return module, model, torch.randint(0, 49152, (1, 14)), torch.randn(576)


@pytest.mark.benchmark(group="steer + saves, 4 layers, 1 x 14")
def test_ours(benchmark, setup):
    _, model, ids, vector = setup
    steer_and_save(model, ids, vector)
    benchmark(steer_and_save, model, ids, vector)


@pytest.mark.benchmark(group="steer + saves, 4 layers, 1 x 14")
def test_plain_torch_compile(benchmark, setup):
    module, _, ids, _ = setup
    plain = torch.compile(module)
    with torch.no_grad():
        plain(input_ids=ids, use_cache=False)
        benchmark(lambda: plain(input_ids=ids, use_cache=False))
