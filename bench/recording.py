"""What our Python costs: `program()` and an inline trace against nnsight 0.8.1's trace, and a save more on each.

    python -m bench.recording [--runs 300] [--rounds 7] [--out bench/results/recording.json]

A 12-layer MLP, 8 wide, where the model itself takes next to nothing; `no_grad`. Rounds of ours and of nnsight's (in its own
process) follow one another; medians of the rounds' means.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from nnsight_fx import NNsight

from .measure import arguments, setting, write
from .peers import run_peer

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


def imports() -> dict[str, float]:
    """Seconds of an import in a new process, whose files the system has in memory: the best of four."""
    peer = os.environ.get("NNSIGHT_PEER_PYTHON", ".peer/bin/python")
    names = {"nnsight_fx": sys.executable, "torch, transformers": sys.executable, "nnsight": peer}
    found = {}
    for name, python in names.items():
        code = f"import time; start = time.perf_counter(); import {name}; print(time.perf_counter() - start)"
        runs = [subprocess.run([python, "-c", code], capture_output=True, text=True, check=True) for _ in range(4)]
        found[name] = min(float(run.stdout.splitlines()[-1]) for run in runs)
    return found


def mean(call: Callable[[torch.Tensor], Any], x: torch.Tensor, runs: int) -> float:
    start = time.perf_counter()
    for _ in range(runs):
        call(x)
    return (time.perf_counter() - start) / runs


def measure(runs: int, rounds: int) -> dict[str, Any]:
    """Microseconds a call."""
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
        "import_s": imports(),
        **setting(),
    }  # fmt: skip


def main() -> None:
    args = arguments(__doc__, "recording", runs=300, rounds=7).parse_args()
    write(measure(args.runs, args.rounds), args.out)


if __name__ == "__main__":
    main()
