"""What our Python costs: `program()` and an inline trace against nnsight 0.8.1's trace, and a save more on each.

    python -m bench.recording [--runs 300] [--rounds 7] [--out bench/results/recording.json]

A 12-layer MLP, 8 wide, where the model itself takes next to nothing; `no_grad`. Rounds of ours and of nnsight's (in its own
process) follow one another; a ratio is over the pairs of the rounds, ours over nnsight's with as many saves (`program`: with one).
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from nnsight_fx import NNsight

from .measure import Told, arguments, interleaved, medians, ratio, timed, write
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

call = {"none": none, "one": one, "many": many}[name]
with torch.no_grad():
    for _ in range(20):
        call()
    start = time.perf_counter()
    for _ in range(runs):
        call()
out["seconds"] = (time.perf_counter() - start) / runs
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


def imports(rounds: int) -> dict[str, Any]:
    """Seconds of an import in a new process, whose files the system has in memory."""
    peer = os.environ.get("NNSIGHT_PEER_PYTHON", ".peer/bin/python")
    names = {"nnsight_fx": sys.executable, "torch, transformers": sys.executable, "nnsight": peer}

    def seconds(name: str) -> float:
        code = f"import time; start = time.perf_counter(); import {name}; print(time.perf_counter() - start)"
        done = subprocess.run([names[name], "-c", code], capture_output=True, text=True, check=True)
        return float(done.stdout.splitlines()[-1])

    for name in names:
        seconds(name)
    found = interleaved({name: Told(functools.partial(seconds, name)) for name in names}, rounds)
    return {"import_s": medians(found), "import_ratio": ratio(found["nnsight_fx"], found["nnsight"])}


def measure(runs: int, rounds: int) -> dict[str, Any]:
    """Microseconds a call."""
    x, counts, peer = torch.randn(2, WIDTH), ("none", "one", "many"), "nnsight 0.8.1"
    calls: dict[str, Callable[[], Any]] = {
        f"{engine}, {name}": functools.partial(call, x)
        for engine in ("hooks", "inductor")
        for name, call in ours(engine).items()
    }
    with torch.no_grad():
        for call in calls.values():
            timed(call, 20)
        for name in counts:
            calls[f"{peer}, {name}"] = Told(lambda name=name: run_peer(PEER, x=x, runs=runs, name=name)["seconds"])
        found = interleaved(calls, rounds, runs)

    def beside(name: str) -> str:
        return f"{peer}, {name}" if name in counts else f"{peer}, one"

    saves = {
        who: [
            (many - one) / (LAYERS - 2) for many, one in zip(found[f"{who}, many"], found[f"{who}, one"], strict=True)
        ]
        for who in ("hooks", "inductor", peer)
    }
    return {
        "workload": f"{LAYERS}-layer MLP, {WIDTH} wide; a trace with no save, one, {LAYERS - 1}; and `program()` with one",
        "us": medians(found, 1e6),
        "ratio": {
            who: ratio(each, found[beside(who.rpartition(", ")[2])])
            for who, each in found.items()
            if not who.startswith(peer)
        },
        "us_a_save": medians(saves, 1e6),
        "save_ratio": {who: ratio(each, saves[peer]) for who, each in saves.items() if who != peer},
        **imports(rounds),
    }


def main() -> None:
    args = arguments(__doc__, "recording", runs=300, rounds=7).parse_args()
    write(measure(args.runs, args.rounds), args.out)


if __name__ == "__main__":
    main()
