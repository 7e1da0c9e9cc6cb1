"""Benchmark CI: a short run whose ratios are reported beside the committed ones, and whose compile counts must be the committed.

    python -m bench.check            # report; exit status 1 where something compiles more or less often than it did
    python -m bench.check --write    # commit these figures

A ratio is held against the committed one with the spread of the repeats of both runs: a machine that is busy spreads more.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

import nnsight_fx
from nnsight_fx import NNsight

from .measure import RESULTS, interleaved
from .models import smollm2

LAYERS, REPEATS, RUNS = 8, 5, 10
KEPT = RESULTS / "check.json"


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


def measure() -> dict[str, Any]:
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
    ratios: dict[str, list[float]] = {"torch.compile": [], "hooks": []}
    for _ in range(REPEATS):
        medians = interleaved(calls, RUNS)
        for peer, each in ratios.items():
            each.append(medians["ours"] / medians[peer])
    steer(ours, ids, vector * 2)  # another vector: nothing compiles
    facts = ours.explain().to_dict()["captures"][0]
    return {
        "ratios": {peer: sorted(each) for peer, each in ratios.items()},
        "counts": {name: facts[name] for name in ("captures", "compiles", "regions")},
    }


def report(now: dict[str, Any], then: dict[str, Any]) -> tuple[list[str], bool]:
    """Lines, and whether the counts are the committed ones."""
    lines = []
    for peer, ratios in now["ratios"].items():
        before = then["ratios"][peer]
        new, old = ratios[len(ratios) // 2], before[len(before) // 2]
        allowed = max(ratios[-1] - ratios[0], before[-1] - before[0])
        verdict = "slower" if new > old + allowed else "faster" if new < old - allowed else "as committed"
        lines.append(f"ours over {peer}: {new:.3f}, committed {old:.3f}, spread {allowed:.3f}: {verdict}")
    same = now["counts"] == then["counts"]
    lines.append(
        f"captures, compiles, regions: {now['counts']}" + ("" if same else f", committed {then['counts']}: FAILED")
    )
    return lines, same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    now = measure() if parser.parse_args().write or KEPT.exists() else None
    if now is None:
        print(f"{KEPT} is not there: nothing to compare with", file=sys.stderr)
        return 1
    if parser.parse_args().write:
        KEPT.write_text(json.dumps(now, indent=2) + "\n")
    lines, same = report(now, json.loads(KEPT.read_text()))
    print("\n".join(lines))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
