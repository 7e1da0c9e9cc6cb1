"""How the benches measure: in turn, by pairs, and with what the figures depend on beside them (`bench/setting.py`)."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .setting import setting

RESULTS = Path(__file__).with_name("results")
FEW = 10  # pairs: of fewer, the spread is from the least to the most


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


class Told:
    """A call that gives its seconds: it runs in another process."""

    def __init__(self, call: Callable[[], float]):
        self.call = call

    def __call__(self) -> float:
        return self.call()


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Each name once a round; the next round begins with the next one, so that nobody always comes behind the same."""
    for k in range(rounds):
        at = k % len(names)
        yield from (*names[at:], *names[:at])


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int, runs: int = 1) -> dict[str, list[float]]:
    """The seconds of each call (a mean of `runs`), one of each round in which all have their turn: pairs, across the calls."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name in turns(list(calls), rounds):
        call = calls[name]
        result, mean = timed(call, 1 if isinstance(call, Told) else runs)
        seconds[name].append(result if isinstance(call, Told) else mean)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Ours over theirs: the median over pairs, and the spread, which is from the 10th to the 90th percentile."""
    pairs = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, high = pairs[0], pairs[-1]
    if len(pairs) >= FEW:
        low, *_, high = statistics.quantiles(pairs, n=10, method="inclusive")
    return {"median": statistics.median(pairs), "low": low, "high": high, "pairs": len(pairs)}


def medians(seconds: dict[str, list[float]], scale: float = 1) -> dict[str, float]:
    return {who: statistics.median(each) * scale for who, each in seconds.items()}


def ratios(seconds: dict[str, list[float]], ours: str = "ours") -> dict[str, dict[str, float]]:
    """Ours over everybody else."""
    return {who: ratio(seconds[ours], each) for who, each in seconds.items() if who != ours}


def arguments(doc: str | None, name: str, **numbers: int) -> argparse.ArgumentParser:
    """A bench's options: its numbers, and where the figures go."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in numbers.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    return parser


def write(found: dict[str, Any], path: Path) -> None:
    """Print the figures and keep them, with their setting. A list of numbers is one line."""
    text = json.dumps({**found, **setting()}, indent=2)
    text = re.sub(r"\[\s+([-+\d.e,\s]+?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)
    print(text, flush=True)
    path.write_text(text + "\n")
