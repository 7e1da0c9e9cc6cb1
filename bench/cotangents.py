"""Many cotangents for one prompt, against a loop of eager `torch.autograd.grad` on hand-written hooks.

    python -m bench.cotangents [--cotangents 128] [--layers 12] [--tokens 32] [--rounds 3] [--out bench/results/cotangents.json]

A model of SmolLM2's shape, one prompt; cotangents of the last position's logits, gradients by every block's output. `by hand` runs the
forward once, too, with its graph retained, and goes back once for each cotangent; `by hand, batched` lets torch's own
`is_grads_batched` take 64 of them at a time. Each of our calls includes its forward.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from nnsight_fx import NNsight

from .measure import arguments, interleaved, medians, ratios, write
from .models import MODELS

TOGETHER = 64


def by_hand(module: Any, ids: torch.Tensor, cotangents: torch.Tensor, batched: bool) -> list[torch.Tensor]:
    kept = []

    def keep(m: Any, args: Any, out: Any) -> None:
        value = out[0] if isinstance(out, tuple) else out
        kept.append(value if value.requires_grad else value.requires_grad_())

    handles = [layer.register_forward_hook(keep) for layer in module.model.layers]
    target = module(ids, use_cache=False).logits[:, -1]
    for handle in handles:
        handle.remove()
    pieces = cotangents.split(TOGETHER) if batched else cotangents
    rows = [torch.autograd.grad(target, kept, c, retain_graph=True, is_grads_batched=batched) for c in pieces]
    return [torch.cat(each) if batched else torch.stack(each) for each in zip(*rows, strict=True)]


def measure(cotangents: int, layers: int, tokens: int, rounds: int) -> dict[str, Any]:
    shape = MODELS["smollm2"]
    module = shape.build(layers)
    module.requires_grad_(False)
    hooks, compiled = NNsight(module), NNsight(module)
    compiled.compile()
    ids = torch.randint(0, shape.config["vocab_size"], (1, tokens))
    given = torch.randn(cotangents, 1, shape.config["vocab_size"])

    def ours(model: Any) -> list[torch.Tensor]:
        def body(tracer: object) -> tuple:
            sources = [layer.output for layer in model.model.layers]
            return model.lm_head.output[:, -1], sources

        _, pull = model.vjp(body, {"input_ids": ids, "use_cache": False}, chunk=TOGETHER, progress=False)
        return pull(given)

    calls = {
        "ours": lambda: ours(compiled),
        "ours, hooks": lambda: ours(hooks),
        "by hand": lambda: by_hand(module, ids, given, False),
        "by hand, batched": lambda: by_hand(module, ids, given, True),
    }
    begun = time.perf_counter()
    values = {"ours": calls["ours"]()}
    first = time.perf_counter() - begun
    values |= {who: call() for who, call in calls.items() if who != "ours"}
    seconds = interleaved(calls, rounds)
    pairs = [(a, b) for v in values.values() for a, b in zip(values["by hand"], v, strict=True)]
    return {
        "workload": f"{cotangents} cotangents of the last logits, by {layers} blocks of SmolLM2's shape, {tokens} tokens",
        "grad": "parameters frozen",
        "first_s": first,
        "median_s": medians(seconds),
        "ratio": ratios(seconds),
        "largest_difference": max(float((a - b).abs().max()) for a, b in pairs),
    }


def main() -> None:
    args = arguments(__doc__, "cotangents", cotangents=128, layers=12, tokens=32, rounds=3).parse_args()
    write(measure(args.cotangents, args.layers, args.tokens, args.rounds), args.out)


if __name__ == "__main__":
    main()
