"""What our Python costs: `program()` and an inline trace against nnsight 0.8.1's trace, and a save more on each.

    python bench/recording.py [--runs 300] [--rounds 7] [--out bench/results/recording.json]

A 12-layer MLP, 8 wide, where the model itself takes next to nothing; `no_grad`. Rounds of ours and of nnsight's (in its own
process) follow one another; medians of the rounds' means.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from nnsight_fx import NNsight

LAYERS, WIDTH = 12, 8

PEER = """
import time
torch.manual_seed(0)
model = NNsight(torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(12))))

def none():
    with model.trace(x):
        pass

def one():
    with model.trace(x):
        saved = model[6].output.save()
    return saved

def many():
    with model.trace(x):
        a = model[0].output.save()
        b = model[1].output.save()
        c = model[2].output.save()
        d = model[3].output.save()
        e = model[4].output.save()
        f = model[5].output.save()
        g = model[6].output.save()
        h = model[7].output.save()
        i = model[8].output.save()
        j = model[9].output.save()
        k = model[10].output.save()
    return k

with torch.no_grad():
    for name, call in (("none", none), ("one", one), ("many", many)):
        for _ in range(20):
            call()
        start = time.perf_counter()
        for _ in range(runs):
            call()
        out[name] = (time.perf_counter() - start) / runs
"""


def ours(engine: str) -> dict[str, Callable[[torch.Tensor], Any]]:
    """The same calls on one of our engines."""
    torch.manual_seed(0)
    model = NNsight(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))))
    if engine != "hooks":
        model.compile(backend=engine)

    def none(x: torch.Tensor) -> None:
        with model.trace(x):
            pass

    def one(x: torch.Tensor) -> Any:
        with model.trace(x):
            saved = model[6].output.save()
        return saved

    def many(x: torch.Tensor) -> Any:
        with model.trace(x):
            saved = [model[i].output.save() for i in range(LAYERS - 1)]
        return saved

    program = model.program(lambda tracer: model[6].output)
    return {"none": none, "one": one, "many": many, "program": lambda x: program(x)}


def mean(call: Callable[[torch.Tensor], Any], x: torch.Tensor, runs: int) -> float:
    start = time.perf_counter()
    for _ in range(runs):
        call(x)
    return (time.perf_counter() - start) / runs


def measure(runs: int, rounds: int) -> dict[str, Any]:
    """Microseconds a call."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests/peer"))
    from nnsight_peer import run_peer  # type: ignore[import-not-found]

    x, found = torch.randn(2, WIDTH), {}
    calls = {engine: ours(engine) for engine in ("hooks", "inductor")}
    with torch.no_grad():
        for each in calls.values():
            for call in each.values():
                mean(call, x, 20)
        for _ in range(rounds):
            for engine, each in calls.items():
                for name, call in each.items():
                    found.setdefault(f"{engine}, {name}", []).append(mean(call, x, runs))
            theirs = run_peer(PEER, x=x, runs=runs)
            for name in ("none", "one", "many"):
                found.setdefault(f"nnsight 0.8.1, {name}", []).append(theirs[name])
    us = {name: statistics.median(times) * 1e6 for name, times in found.items()}
    one = us["nnsight 0.8.1, one"]
    return {
        "workload": f"{LAYERS}-layer MLP, {WIDTH} wide; a trace with no save, one, {LAYERS - 1}; and `program()` with one",
        "us": us,
        "us_a_save": {
            who: (us[f"{who}, many"] - us[f"{who}, one"]) / (LAYERS - 2) for who in ("hooks", "inductor", "nnsight 0.8.1")
        },
        "ratio": {name: t / one for name, t in us.items() if name.endswith(("one", "program"))},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "hardware": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"runs": 300, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "recording.json")
    args = parser.parse_args()
    found = measure(args.runs, args.rounds)
    print(json.dumps(found, indent=2))
    args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
