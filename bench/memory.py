"""What traces leave in memory, and what one needs at its peak, beside the bare compiled model.

    python -m bench.memory [--traces 1000] [--layers 30] [--tokens 512] [--rounds 5] [--out bench/results/memory.json]

Growth: Python objects and resident memory over `--traces` traces of a small model, each with other values, a sync point every
tenth, behind 100 traces to warm up; one process an engine. Peak: resident memory above what was there before a call, of one
trace with one save (the middle block's output, behind which nothing runs, or the logits, which all of the model makes), and of
a plain `torch.compile` of the model. The ratio is of the logits' trace: the same work. Llama of SmolLM2's shape, `no_grad`;
a new process each, in turn (Linux: `/proc/self/clear_refs`).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn as nn

from nnsight_fx import NNsight

from .measure import arguments, ratio, turns, write
from .models import smollm2

ENGINES = ("hooks", "eager", "aot_eager", "inductor")
MIB = 2**20
BLOCK, LOGITS = "trace, a block's output", "trace, the logits"


def growth(engine: str, traces: int) -> dict[str, float]:
    """Objects and MiB more after `traces` traces."""
    torch.manual_seed(0)
    model, me = NNsight(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))), psutil.Process()
    if engine != "hooks":
        model.compile(backend=engine)

    def trace(i: int) -> None:
        with model.trace(torch.randn(2, 16)) as tracer:
            if i % 10 == 0:
                assert model[0].output.sum() > -1e9  # a sync point
            model[0].output[:, i % 16] = float(i)
            model[2].output = model[2].output + torch.randn(16)
            tracer.result.save()

    def now() -> tuple[int, int]:
        gc.collect()
        return len(gc.get_objects()), me.memory_info().rss

    for i in range(100):
        trace(i)
    objects, memory = now()
    for i in range(traces):
        trace(i)
    more, larger = now()
    return {"objects": more - objects, "rss_mib": (larger - memory) / MIB}


def peak(who: str, layers: int, tokens: int) -> dict[str, float]:
    """MiB above what was resident before, at the peak of a call; the median of five."""
    module, ids = smollm2(layers), torch.randint(0, 49152, (1, tokens))
    call: Callable[[], Any]
    if who == "torch.compile":
        plain = torch.compile(module)

        def call() -> Any:
            return plain(input_ids=ids, use_cache=False)
    else:
        model = NNsight(module)
        model.compile()

        def call() -> Any:
            with model.trace(ids, use_cache=False):
                saved = (model.lm_head if who == LOGITS else model.model.layers[layers // 2]).output.save()
            return saved

    found = []
    with torch.no_grad():
        for _ in range(3):
            call()
        for _ in range(5):
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
            before = psutil.Process().memory_info().rss
            call()
            status = Path("/proc/self/status").read_text()
            high = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
            found.append((high - before) / MIB)
    return {"peak_mib": statistics.median(found)}


def alone(*call: Any) -> dict[str, float]:
    """A measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", "--one", json.dumps(call)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(traces: int, layers: int, tokens: int, rounds: int) -> dict[str, Any]:
    grown = {engine: alone("growth", engine, traces) for engine in ENGINES}
    peaks: dict[str, list[float]] = {who: [] for who in (BLOCK, LOGITS, "torch.compile")}
    for who in turns(list(peaks), rounds):
        peaks[who].append(alone("peak", who, layers, tokens)["peak_mib"])
    return {
        "growth": {"workload": f"{traces} traces, each with other values, a sync point every tenth", **grown},
        "peak": {
            "workload": f"one trace with one save, {layers} layers of SmolLM2's shape, 1 x {tokens} tokens, Inductor, no_grad",
            **{who: {"peak_mib": statistics.median(each)} for who, each in peaks.items()},
            "ratio": ratio(peaks[LOGITS], peaks["torch.compile"]),
        },
    }


def main() -> None:
    parser = arguments(__doc__, "memory", traces=1000, layers=30, tokens=512, rounds=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, *rest = json.loads(args.one)
        with contextlib.redirect_stdout(sys.stderr):
            found = {"growth": growth, "peak": peak}[name](*rest)
        print(json.dumps(found))
        return
    write(measure(args.traces, args.layers, args.tokens, args.rounds), args.out)


if __name__ == "__main__":
    main()
