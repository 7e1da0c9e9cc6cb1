"""How the benches measure: in turn, and with what the figures depend on beside them."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from nnsight_fx.report.provenance import hardware

RESULTS = Path(__file__).with_name("results")


def settle() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], runs: int = 1) -> tuple[Any, float]:
    """What a call gives, and its seconds: the mean of `runs`."""
    settle()
    start, result = time.perf_counter(), None
    for _ in range(runs):
        result = call()
    settle()
    return result, (time.perf_counter() - start) / runs


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int, runs: int = 1) -> dict[str, float]:
    """The median seconds of each call over rounds in which all have their turn; a call may say its seconds itself."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            result, mean = timed(call, 1 if isinstance(call, Told) else runs)
            seconds[name].append(result if isinstance(call, Told) else mean)
    return {name: statistics.median(each) for name, each in seconds.items()}


class Told:
    """A call that gives its seconds: it runs in another process."""

    def __init__(self, call: Callable[[], float]):
        self.call = call

    def __call__(self) -> float:
        return self.call()


def setting() -> dict[str, Any]:
    """What figures are of, and were taken on: the commit, versions, the hardware and how busy it was, when."""
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "hardware": {
            **hardware(),
            "caches": _caches(),
            "threads": torch.get_num_threads(),
            "load": [round(x, 2) for x in os.getloadavg()],
        },
    }


def _commit() -> str | None:
    """The commit that is measured, `+` where files differ from it."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(RESULTS.parent), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = [line for line in git("status", "--porcelain", "-uno").splitlines() if "bench/results" not in line]
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # a copy without its history
        return None


def _caches() -> dict[str, str]:
    """The caches of the first core, by level and kind: `{"L2": "1024K", ...}`."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (folder.joinpath(name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return found


def arguments(doc: str | None, name: str, **numbers: int) -> argparse.ArgumentParser:
    """A bench's options: its numbers, and where the figures go."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in numbers.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    return parser


def write(found: dict[str, Any], path: Path, show: Iterable[str] = ()) -> None:
    """Print the figures and keep them."""
    text = json.dumps(found, indent=2)
    print(json.dumps({k: found[k] for k in show}, indent=2) if show else text)
    path.write_text(text + "\n")
