"""The sweep bench under pytest-benchmark, on a model small enough to compile in seconds."""

from __future__ import annotations

import pytest
import torch
from steer import smollm2  # type: ignore[import-not-found]
from sweep import grid  # type: ignore[import-not-found]

from nnsight_fx import NNsight


@pytest.fixture(scope="module")
def setup():
    module = smollm2(layers=4)
    model = NNsight(module)
    model.compile()
    clean, corrupt = torch.randint(0, 49152, (2, 1, 14))
    return model, clean, corrupt, [(layer, position) for layer in range(4) for position in range(14)]


@pytest.mark.parametrize("session", [True, False], ids=["session", "loop of traces"])
@pytest.mark.benchmark(group="patching grid, 4 layers x 14 positions")
def test_grid(benchmark, setup, session):
    model, clean, corrupt, cells = setup
    grid(model, clean, corrupt, cells, session)
    benchmark.pedantic(grid, (model, clean, corrupt, cells, session), rounds=3)
