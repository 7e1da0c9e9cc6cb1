"""A grid of steered generations, against loops of them and against transformers' `generate` with all rows batched by hand.

    python -m bench.generation [--layers 30] [--tokens 32] [--strengths 8] [--prompts 4] [--rounds 3] [--out bench/results/generation.json]

A model of SmolLM2's shape with random weights. A cell adds a strength times a vector to what one of 4 layers returns, at every step, on
one prompt of 12 tokens, greedy. All have their turn in each round: `ours` is `model.sweep(..., generate=)` on hooks, recording
included; by hand is one `generate` over all rows, with a hook a layer that adds each row's own vector; the loops run a sample of the
cells, seconds a cell. `widths` has the tokens a second of fewer cells, `python_ms_a_token` what ours takes beyond by hand, over the tokens.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch

from nnsight_fx import LanguageModel

from .measure import arguments, interleaved, medians, ratios, timed, write
from .models import MODELS
from .peers import BEGIN, END, Bench, Peer

LENGTH, STEERED, SAMPLE = 12, 4, 4
LOOP, HAND = "ours, one by one on hooks", "by hand, all rows in one generate"

PEER = f"""
{BEGIN}
def one(prompt, layer, strength):
    with torch.no_grad(), model.generate(prompt, max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0) as tracer:
        for step in tracer.iter[0:steps]:
            blocks[layer].output[:] += strength * vectors[layer]
        ids = tracer.result.save()
    return ids

def call():
    return [one(prompts[p : p + 1], layer, strength) for p, layer, strength in cells]
{END}"""


class Grid:
    """The cells, and who runs them."""

    def __init__(self, layers: int, tokens: int, strengths: int, prompts: int):
        self.shape = MODELS["smollm2"]
        self.module = self.shape.build(layers)
        self.module.config.use_cache = self.module.generation_config.use_cache = True
        self.model = LanguageModel(self.module)
        self.vectors = torch.randn(layers, self.shape.width)
        self.prompts = torch.randint(0, self.shape.config["vocab_size"], (prompts, LENGTH))
        self.steered = [(n + 1) * layers // (STEERED + 1) for n in range(STEERED)]
        self.strengths = [0.5 * n for n in range(strengths)]
        self.options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        self.cells = [(p, layer, s) for p in range(prompts) for layer in self.steered for s in self.strengths]

    def ours(self, prompts: int | None = None, layers: int = STEERED) -> torch.Tensor:
        def steer(tracer: Any, layer: int, strength: float) -> None:
            for _step in tracer.iter[:]:
                self.model.model.layers[layer].output[:] += strength * self.vectors[layer]

        over = {"layer": self.steered[:layers], "strength": self.strengths}
        given = [self.prompts[p : p + 1] for p in range(len(self.prompts))][:prompts]
        found = self.model.sweep(steer, given, over=over, generate=self.options, progress=False)
        return found["tokens"].flatten(0, 2)

    def by_hand(self, cells: list | None = None) -> torch.Tensor:
        cells = self.cells if cells is None else cells
        ids = self.prompts[[p for p, _, _ in cells]]
        hooks = []
        for layer in self.steered:
            added = torch.stack([self.vectors[at] * (s if at == layer else 0) for _, at, s in cells])[:, None]
            block = self.module.model.layers[layer]
            hooks.append(block.register_forward_hook(lambda module, args, out, added=added: out + added))
        try:
            with torch.no_grad():
                made = self.module.generate(ids, attention_mask=torch.ones_like(ids), **self.options)
        finally:
            for hook in hooks:
                hook.remove()
        return made[:, LENGTH:]

    def one_by_one(self, cells: list) -> torch.Tensor:
        made = []
        for p, layer, strength in cells:
            with torch.no_grad(), self.model.generate(self.prompts[p : p + 1], **self.options) as tracer:
                for _step in tracer.iter[:]:
                    self.model.model.layers[layer].output[:] += strength * self.vectors[layer]
                ids = tracer.result.save()
            made.append(ids[0, LENGTH:])
        return torch.stack(made)


def measure(layers: int, tokens: int, strengths: int, prompts: int, rounds: int) -> dict[str, Any]:
    grid = Grid(layers, tokens, strengths, prompts)
    some = grid.cells[:: max(1, len(grid.cells) // SAMPLE)][:SAMPLE]
    calls: dict[str, Any] = {
        "ours": grid.ours,
        HAND: grid.by_hand,
        LOOP: lambda: grid.one_by_one(some),
    }
    values, first, held = {}, {}, {}
    for who, call in calls.items():
        values[who], first[who] = timed(call)
        held[who] = psutil.Process().memory_info().rss / 2**30
    at = [grid.cells.index(cell) for cell in some]
    cells = {"ours": len(grid.cells), HAND: len(grid.cells), LOOP: len(some)}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(grid.shape, grid.module, Path(folder))
        given = {
            "cls": grid.shape.cls.__name__,
            "config": {**grid.shape.config, "num_hidden_layers": layers, "use_cache": True},
            "weights": str(bench.weights),
            "blocks_path": grid.shape.blocks,
            "norm_path": grid.shape.norm,
            "generates": True,
            "vectors": grid.vectors,
            "prompts": grid.prompts,
            "steps": tokens,
            "cells": [list(cell) for cell in some],
        }
        peer, who = Peer(PEER, given), "nnsight 0.8.1, loop"
        values[who] = torch.cat([ids[:, LENGTH:] for ids in peer.values()])
        calls[who], cells[who] = peer.timed(1), len(some)
        seconds = {name: [s / cells[name] for s in each] for name, each in interleaved(calls, rounds).items()}
    widths = {}
    for chosen in (1, STEERED):
        taken = statistics.median([timed(lambda chosen=chosen: grid.ours(1, chosen))[1] for _ in range(3)])
        widths[str(chosen * strengths)] = chosen * strengths * tokens / taken
    more = [(a - b) / tokens * 1e3 for a, b in zip(seconds["ours"], seconds[HAND], strict=True)]
    return {
        "workload": f"{STEERED} layers x {strengths} strengths x {prompts} prompts of {LENGTH} tokens, {tokens} new ones, {layers} layers of SmolLM2's shape",
        "grad": "no_grad, parameters frozen",
        "s_a_cell": medians(seconds),
        "ratio": ratios(seconds),
        "tokens_a_second": {who: tokens / s for who, s in medians(seconds).items()},
        "widths": widths,
        "python_ms_a_token": statistics.median(more),
        "first_s": first,
        "resident_gib": held,
        "cells_that_differ": {
            who: sum(
                not torch.equal(values["ours"][n], row)
                for n, row in zip(at if len(each) == len(some) else range(len(each)), each, strict=True)
            )
            for who, each in values.items()
            if who != "ours"
        },
    }


def main() -> None:
    args = arguments(__doc__, "generation", layers=30, tokens=32, strengths=8, prompts=4, rounds=3).parse_args()
    write(measure(args.layers, args.tokens, args.strengths, args.prompts, args.rounds), args.out)


if __name__ == "__main__":
    main()
