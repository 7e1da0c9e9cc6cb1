"""One session, a patching grid over prompts of several lengths: what a further length costs, and what a cell does.

    python -m bench.lengths [--layers 30] [--lengths 8 11 14 17] [--backend inductor] [--runs 3] [--out lengths.json]

A model of SmolLM2-135M's shape with random weights; a cell puts one of the last three positions of one layer's output of a
clean run into a corrupted one. `first` is the session that captures and compiles, with an empty `TORCHINDUCTOR_CACHE_DIR`
if its time is to mean something.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from nnsight_fx import LanguageModel

from .measure import write
from .models import smollm2


def session(model: Any, pairs: list[torch.Tensor]) -> list[float]:
    """The difference of two logits for each cell."""
    layers, scores = model.model.layers, []
    with torch.no_grad(), model.session():
        for clean, corrupt in pairs:
            with model.trace(clean, use_cache=False):
                cached = [layer.output for layer in layers]
            for layer, value in zip(layers, cached, strict=True):
                for position in range(-3, 0):
                    with model.trace(corrupt, use_cache=False):
                        layer.output[:, position] = value[:, position]
                        logits = model.lm_head.output[:, -1]
                        scores.append((logits[:, 7] - logits[:, 9]).save())
    return [s.item() for s in scores]


def measure(layers: int, lengths: list[int], backend: str, runs: int) -> dict[str, Any]:
    """Seconds of wall clock and of all threads, of the first session and of those behind it."""
    model = LanguageModel(smollm2(layers))
    model.compile(backend=backend)
    torch.manual_seed(0)
    pairs = [torch.randint(0, 49152, (2, 1, n)) for n in lengths]
    each, scores = [], []
    for _ in range(runs + 1):
        begun, cpu = time.perf_counter(), time.process_time()
        scores = session(model, pairs)
        each.append({"s": time.perf_counter() - begun, "cpu_s": time.process_time() - cpu})
    (facts,) = model.explain().to_dict()["captures"]
    found = {"lengths": lengths, "layers": layers, "backend": backend, "cells": len(scores)}
    found |= {"first": each[0], "then": each[1:], "captures": facts["captures"], "compiles": facts["compiles"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 11, 14, 17])
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("lengths.json"))
    args = parser.parse_args()
    write(measure(args.layers, args.lengths, args.backend, args.runs), args.out)


if __name__ == "__main__":
    main()
