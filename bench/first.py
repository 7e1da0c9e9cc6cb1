"""The first compiled result: ours (steer + a save a layer) against a plain `torch.compile` of the same model, each in new processes,
in turn; a ratio is over the pairs of the rounds.

    python -m bench.first [--layers 30] [--rounds 5] [--out bench/results/first.json]

- cold: nothing is in any cache on disk;
- warm: another process has done the same, and left Inductor's caches;
- capture=symbolic: `model.compile(capture="symbolic")`, which Dynamo has no part in;
- one more save: in a process that has traced already, the seconds that a plan with another layer and one more save takes.

The imports of the compiler and a first small compile come before, on both sides.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .measure import arguments, medians, ratio, turns, write

CHILD = """
import json, sys, time
import torch
from bench.check import steer
from bench.models import smollm2
import nnsight_fx
from nnsight_fx import NNsight

who, layers = sys.argv[1], int(sys.argv[2])
module = smollm2(layers)
ids, vector = torch.randint(0, 49152, (1, 14)), torch.randn(576)
torch.compile(lambda x: x * 2 + 1)(torch.randn(8))
found = {}
if who != "torch.compile":
    model = NNsight(module)
    model.compile(capture="symbolic" if "symbolic" in who else "dynamo")
    call = lambda: steer(model, ids, vector)
else:
    plain = torch.compile(module)
    call = lambda: torch.no_grad()(plain)(input_ids=ids, use_cache=False)
start = time.perf_counter()
call()
found["first"] = time.perf_counter() - start
if who != "torch.compile":
    def other():
        with torch.no_grad(), model.trace(ids, use_cache=False):
            model.model.layers[layers // 2 + 2].output += vector
            saved = nnsight_fx.save([layer.output[:, -1] for layer in model.model.layers])
            more = model.model.layers[3].mlp.output.save()
            out = model.lm_head.output.save()
    start = time.perf_counter()
    other()
    found["one more save"] = time.perf_counter() - start
print(json.dumps(found))
"""


def child(who: str, layers: int, cache: str) -> dict[str, float]:
    """One process: its seconds."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", CHILD, who, str(layers)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(layers: int, rounds: int) -> dict[str, Any]:
    times: dict[str, dict[str, list[float]]] = {who: {} for who in ("ours", "ours, capture=symbolic", "torch.compile")}
    for who in turns(list(times), rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("cold", "warm"):
                seconds = child(who, layers, cache)
                times[who].setdefault(kind, []).append(seconds.pop("first"))
                for name, s in seconds.items():
                    times[who].setdefault(f"{name}, {kind}", []).append(s)
        print(who, json.dumps(times[who]), flush=True)
    return {
        "workload": f"steer + {layers} last-position saves, {layers} layers of SmolLM2's shape, 1 x 14 tokens",
        "rounds": rounds,
        "median_s": {who: medians(each) for who, each in times.items()},
        "ratio": {
            who: {kind: ratio(each[kind], times["torch.compile"][kind]) for kind in ("cold", "warm")}
            for who, each in times.items()
            if who != "torch.compile"
        },
    }


def main() -> None:
    args = arguments(__doc__, "first", layers=30, rounds=5).parse_args()
    write(measure(args.layers, args.rounds), args.out)


if __name__ == "__main__":
    main()
