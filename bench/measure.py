"""How the benches measure: in turn, and with what the figures depend on beside them."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

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
    """Versions and hardware."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "hardware": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), **gpu},
    }


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
