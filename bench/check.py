"""Benchmark CI: a short run whose ratios are reported beside the committed ones, and whose compile counts must be the committed.

    python -m bench.check            # report; exit status 1 where something compiles more or less often than it did
    python -m bench.check --write    # commit these figures

A ratio is held against the committed one with the spread of the rounds of both runs: a machine that is busy spreads more.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import nnsight_fx
from nnsight_fx import NNsight

from .measure import arguments, interleaved, ratios, write
from .models import smollm2

LAYERS, RUNS = 8, 5


def steer(model: NNsight, ids: torch.Tensor, vector: torch.Tensor) -> list[torch.Tensor]:
    """A vector added in the middle; the last position of every layer and the logits saved."""
    layers = model.model.layers
    with torch.no_grad(), model.trace(ids, use_cache=False):
        saved = nnsight_fx.save([])
        for i, layer in enumerate(layers):
            if i == len(layers) // 2:
                layer.output = layer.output + vector
            saved.append(layer.output[:, -1])
        saved.append(model.lm_head.output)
    return saved


def measure(rounds: int) -> dict[str, Any]:
    """A steering trace of `LAYERS` layers against the bare compiled model, and against itself on hooks."""
    module = smollm2(LAYERS)
    ids, vector = torch.randint(0, 49152, (1, 14)), torch.randn(576)
    ours, hooks, plain = NNsight(module), NNsight(module), torch.compile(module)
    ours.compile()

    def bare() -> None:
        with torch.no_grad():
            plain(input_ids=ids, use_cache=False)

    calls = {
        "ours": lambda: steer(ours, ids, vector),
        "torch.compile": bare,
        "hooks": lambda: steer(hooks, ids, vector),
    }
    for call in calls.values():
        call()
        call()
    found = ratios(interleaved(calls, rounds, RUNS))
    steer(ours, ids, vector * 2)  # another vector: nothing compiles
    facts = ours.explain().to_dict()["captures"][0]
    return {
        "ratio": found,
        "counts": {name: facts[name] for name in ("captures", "compiles", "regions")},
    }


def report(now: dict[str, Any], then: dict[str, Any]) -> tuple[list[str], bool]:
    """Lines, and whether the counts are the committed ones."""
    lines = []
    for peer, ratio in now["ratio"].items():
        before = then["ratio"][peer]
        new, old = ratio["median"], before["median"]
        allowed = max(each["high"] - each["low"] for each in (ratio, before))
        verdict = "slower" if new > old + allowed else "faster" if new < old - allowed else "as committed"
        lines.append(f"ours over {peer}: {new:.3f}, committed {old:.3f}, spread {allowed:.3f}: {verdict}")
    same = now["counts"] == then["counts"]
    lines.append(
        f"captures, compiles, regions: {now['counts']}" + ("" if same else f", committed {then['counts']}: FAILED")
    )
    return lines, same


def main() -> int:
    parser = arguments(__doc__, "check", rounds=15)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write:
        write(measure(args.rounds), args.out)
        return 0
    if not args.out.exists():
        print(f"{args.out} is not there: nothing to compare with", file=sys.stderr)
        return 1
    lines, same = report(measure(args.rounds), json.loads(args.out.read_text()))
    print("\n".join(lines))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
