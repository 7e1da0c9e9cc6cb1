"""Heads ablated over a data set, against the same on hooks: `patching.ablate` where prompts have several lengths.

    python -m bench.heads [--prompts 32] [--layers 30] [--rounds 3] [--out bench/results/heads.json]

A model of SmolLM2's shape; prompts of 10 to 17 tokens; a cell sets one of the 9 heads of one of two layers to zero, on one prompt, and reads
the difference of two logits at the last position. `ours` computes what is read: `logits_to_keep=1` lets the hooks, one by one, leave
out as much.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from nnsight_fx import LanguageModel, patching, save

from .measure import arguments, interleaved, medians, ratios, write
from .models import MODELS

SHORTEST, LENGTHS = 10, 8
ALONE, SAME = "ours, hooks one by one", "ours, hooks one by one, the last logits alone"


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 7] - logits[:, -1, 9]


def one_by_one(model: Any, prompts: list[torch.Tensor], layers: list[int], heads: int, **options: int) -> Any:
    found = []
    with torch.no_grad():
        for ids in prompts:
            with model.trace(ids, use_cache=False, **options):
                save(difference(model.lm_head.output))
            for layer in layers:
                for head in range(heads):
                    with model.trace(ids, use_cache=False, **options):
                        z = model.model.layers[layer].self_attn.o_proj.input
                        width = z.shape[-1] // heads
                        z[..., head * width : (head + 1) * width] = 0
                        found.append(save(difference(model.lm_head.output)))
    return torch.stack(found).reshape(len(prompts), len(layers), heads)


def measure(prompts: int, layers: int, rounds: int) -> dict[str, Any]:
    shape = MODELS["smollm2"]
    module, heads = shape.build(layers), shape.config["num_attention_heads"]
    hooks, compiled = LanguageModel(module), LanguageModel(module)
    compiled.compile()
    data = [torch.randint(0, shape.config["vocab_size"], (1, SHORTEST + n % LENGTHS)) for n in range(prompts)]
    chosen = [layers // 3, 2 * layers // 3]

    def swept(model: Any, engine: str) -> Any:
        return patching.ablate(model, data, difference, layers=chosen, progress=False, engine=engine, use_cache=False)[
            "result"
        ].squeeze()

    calls = {
        "ours": lambda: swept(compiled, "compiled"),
        "ours, hooks together": lambda: swept(hooks, "hooks"),
        ALONE: lambda: one_by_one(hooks, data, chosen, heads),
        SAME: lambda: one_by_one(hooks, data, chosen, heads, logits_to_keep=1),
    }
    begun = time.perf_counter()
    values = {"ours": calls["ours"]()}
    first = time.perf_counter() - begun
    values |= {who: call() for who, call in calls.items() if who != "ours"}
    seconds = interleaved(calls, rounds)
    cells = len(chosen) * heads
    return {
        "workload": f"{cells} heads x {prompts} prompts of {SHORTEST} to {SHORTEST + LENGTHS - 1} tokens, {layers} layers of SmolLM2's shape",
        "grad": "no_grad, parameters frozen",
        "first_s": first,
        "median_s": medians(seconds),
        "ms_a_cell": medians(seconds, 1e3 / (cells * prompts)),
        "ratio": ratios(seconds),
        "largest_difference": max(float((values["ours"] - v).abs().max()) for v in values.values()),
    }


def main() -> None:
    args = arguments(__doc__, "heads", prompts=32, layers=30, rounds=3).parse_args()
    write(measure(args.prompts, args.layers, args.rounds), args.out)


if __name__ == "__main__":
    main()
