"""A patching grid (every layer and position) through a session, against a loop of traces and nnsight 0.8.1.

    python -m bench.sweep [--layers 30] [--tokens 14] [--rounds 5] [--sample 20] [--no-peer] [--out bench/results/sweep.json]

A model of SmolLM2-135M's shape with random weights; a cell puts one position of one layer's output of a clean run into a
corrupted one and reads the difference of two logits at the last position. Recording is part of every time, compiling is
told apart. All have their turn in each round, and ratios are over the pairs of the rounds: our session; the same session on a model
that is not compiled; the session with some steps of the forked strategy off; and, on `--sample` cells spread over the grid, a loop
of traces on hooks, nnsight's loop, and nnsight with 16 rows a forward, batched by hand. `cells` has the seconds of smaller grids.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nnsight_fx import NNsight

from .measure import arguments, interleaved, medians, ratio, timed, write
from .models import MODELS
from .peers import BEGIN, END, Bench, Peer

ROWS = 16  # a forward of the peer, batched by hand


def grid(model: NNsight, clean: torch.Tensor, corrupt: torch.Tensor, cells: list, session: bool) -> tuple[Any, list]:
    """The difference of two logits for each cell: as a session, or one trace after the other."""
    layers, scores, scope = model.model.layers, [], None

    def patch(cached: list) -> None:
        for layer, position in cells:
            with model.trace(corrupt, use_cache=False):
                layers[layer].output[:, position] = cached[layer][:, position]
                logits = model.lm_head.output[:, -1]
                scores.append((logits[:, 7] - logits[:, 9]).save())

    with torch.no_grad():
        if session:
            with model.session() as scope:
                with model.trace(clean, use_cache=False):
                    cached = [layer.output for layer in layers]
                patch(cached)
        else:
            with model.trace(clean, use_cache=False):
                cached = [layer.output.save() for layer in layers]
            patch(cached)
    return scope, [s.item() for s in scores]


STEPS = {"fork": {"demand", "causal"}, "fork, demand": {"causal"}, "fork, causal": {"demand"}}  # what is off

PEER = f"""
{BEGIN}
def metric(logits):
    return logits[:, 7] - logits[:, 9]

if "clean" not in kept:
    with torch.no_grad(), model.trace(input_ids=clean, use_cache=False):
        outputs = nnsight.save([block.output for block in blocks])
    kept["clean"] = [c[0] if isinstance(c, tuple) else c for c in outputs]
cached = kept["clean"]

def one(layer, position):
    with model.trace(input_ids=corrupt, use_cache=False):
        blocks[layer].output[:, position] = cached[layer][:, position]
        score = metric(model.lm_head.output[:, -1]).save()
    return score

def many(rows):
    here = [torch.zeros(len(rows), corrupt.shape[1], 1, dtype=torch.bool) for _ in cached]
    for row, (layer, position) in enumerate(rows):
        here[layer][row, position] = True
    with model.trace(input_ids=corrupt.repeat(len(rows), 1), use_cache=False):
        for layer, chosen, c in zip(blocks, here, cached):
            layer.output = torch.where(chosen, c, layer.output)
        score = metric(model.lm_head.output[:, -1]).save()
    return score

def call():
    with torch.no_grad():
        return [many(cells)] if batched else [one(*cell) for cell in cells]
{END}"""


def measure(layers: int, tokens: int, rounds: int, sample: int, with_peer: bool, backend: str) -> dict[str, Any]:
    """Milliseconds a cell, each way; and the largest difference in the score."""
    module = MODELS["smollm2"].build(layers)
    clean, corrupt = torch.randint(0, 49152, (2, 1, tokens))
    cells = [(layer, position) for layer in range(layers) for position in range(tokens)]
    some = cells[:: max(1, len(cells) // sample)][:sample]
    hooks, model = NNsight(module), NNsight(module)
    model.compile(backend=backend)
    capture = model._host.capture_for(None)
    assert capture is not None

    def session(some: list = cells, off: frozenset[str] = frozenset()) -> tuple[Any, list]:
        capture.disable = off
        return grid(model, clean, corrupt, some, True)

    calls: dict[str, Callable[[], Any]] = {
        "session": session,
        "hooks, a session": lambda: grid(hooks, clean, corrupt, cells, True),
        "hooks, one by one": lambda: grid(hooks, clean, corrupt, some, False),
        **{name: functools.partial(session, off=frozenset(off)) for name, off in STEPS.items()},
    }
    forwards = {"hooks, one by one": len(some) + 1}  # the clean run, which is a small part of a whole grid
    (_, scores), first = timed(session)
    compiles = model.explain().to_dict()["captures"][0]["compiles"]
    by_cell, flops = dict(zip(cells, scores, strict=True)), {}
    for name in ("session", *STEPS):
        told = calls[name]()[0].explain().to_dict()["groups"][-1]
        flops[name] = told["flops"] / told["naive"] if "naive" in told else 1.0
    alone = calls["hooks, one by one"]()[1]
    found: dict[str, Any] = {
        "workload": f"{layers} x {tokens} cells, {layers} layers of SmolLM2's shape, 1 x {tokens} tokens",
        "backend": backend,
        "rounds": rounds,
        "first_s": first,
        "compiles": compiles,
        "largest_difference": max(abs(by_cell[c] - s) for c, s in zip(some, alone, strict=True)),
    }
    with tempfile.TemporaryDirectory() as folder:
        for who, those in peers(module, clean, corrupt, some, Path(folder)).items() if with_peer else ():
            theirs = torch.cat(those.values()).tolist()
            away = max(abs(by_cell[tuple(c)] - s) for c, s in zip(those.given["cells"], theirs, strict=True))
            found["largest_difference_to_peer"] = max(away, found.get("largest_difference_to_peer", 0))
            calls[who], forwards[who] = those.timed(1), len(theirs)
        seconds = {
            who: [s / forwards.get(who, len(cells)) for s in each] for who, each in interleaved(calls, rounds).items()
        }
    steps = {name: seconds.pop(name) for name in STEPS} | {"all": seconds["session"]}
    found["ms_a_cell"] = medians(seconds, 1e3)
    found["ratio"] = {who: ratio(seconds["session"], each) for who, each in seconds.items() if who != "session"}
    found["steps"] = {
        name: {
            "ms_a_cell": statistics.median(each) * 1e3,
            "ratio": ratio(each, seconds["hooks, one by one"]),
            "flops_over_the_loops": flops["session" if name == "all" else name],
        }
        for name, each in steps.items()
    }
    found["cells"] = smaller(session, cells, rounds, found["ms_a_cell"]["hooks, one by one"])
    return found


def peers(module: Any, clean: torch.Tensor, corrupt: torch.Tensor, some: list, folder: Path) -> dict[str, Peer]:
    """The same cells on nnsight 0.8.1: in a loop, and so many rows a forward with a mask at every layer."""
    shape = MODELS["smollm2"]
    bench = Bench(shape, module, folder)
    given = {
        "cls": shape.cls.__name__,
        "config": {**shape.config, "num_hidden_layers": len(bench.parts.blocks)},
        "weights": str(bench.weights),
        "blocks_path": shape.blocks,
        "norm_path": shape.norm,
        "generates": False,
        "clean": clean,
        "corrupt": corrupt,
    }
    loop, batch = ([list(cell) for cell in each] for each in (some, some[:ROWS]))
    return {
        "nnsight 0.8.1, loop": Peer(PEER, {**given, "cells": loop, "batched": False}),
        f"nnsight 0.8.1, {ROWS} rows a forward": Peer(PEER, {**given, "cells": batch, "batched": True}),
    }


def smaller(session: Callable, cells: list, rounds: int, alone: float) -> dict[int, dict[str, float]]:
    """Seconds of smaller grids, beside a loop's."""
    sizes = sorted({max(1, len(cells) // part) for part in (30, 10, 3, 1)})
    calls = {str(n): functools.partial(session, cells[:: len(cells) // n][:n]) for n in sizes}
    for call in calls.values():
        call()
    found = medians(interleaved(calls, rounds))
    return {n: {"session": found[str(n)], "hooks, one by one": n * alone / 1e3} for n in sizes}


def main() -> None:
    parser = arguments(__doc__, "sweep", layers=30, tokens=14, rounds=5, sample=20)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    write(measure(args.layers, args.tokens, args.rounds, args.sample, not args.no_peer, args.backend), args.out)


if __name__ == "__main__":
    main()
