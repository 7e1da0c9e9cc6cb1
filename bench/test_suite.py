"""Every workload under pytest-benchmark, on a model small enough to compile in seconds: `make bench`."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch

from .models import MODELS
from .peers import Bench
from .workloads import WORKLOADS

WHO = ("ours", "ours, hooks", "eager", "torch.compile", "raw hooks")


@functools.cache
def bench() -> Bench:
    folder = tempfile.TemporaryDirectory()
    made = Bench(MODELS["tiny"], MODELS["tiny"].build(), Path(folder.name))
    made.folder = folder  # type: ignore[attr-defined]  # it goes with the bench
    return made


@functools.cache
def calls(workload: str) -> dict:
    torch.compiler.reset()
    ids, vector = bench().model.ids(1, 14), torch.randn(bench().model.width)
    return bench().calls(WORKLOADS[workload], ids, vector)


CASES = [
    (w.name, who)
    for w in WORKLOADS.values()
    for who in WHO
    if w.plain is not None or who not in ("eager", "torch.compile")
]


@pytest.mark.parametrize(("workload", "who"), CASES)
def test_workload(benchmark, workload, who):
    benchmark.group = f"{workload}, 1 x 14, 4 layers"
    call = calls(workload)[who]
    call()
    call()
    benchmark.pedantic(call, rounds=5, iterations=2, warmup_rounds=1)
