"""Seconds of capturing and of compiling: how many, on what input, for which trace."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..plan import tree
from .waiting import Waiting

CAPTURE, COMPILE = "capture", "compile"
KEPT = 512  # of each capture: the latest

_told = threading.local()


class Spent(NamedTuple):
    """One capture, or one compile."""

    what: str
    seconds: float
    shape: str  # of the model's input
    plan: str  # of which trace


class Ledger:
    """What capturing and compiling took: the latest one by one, and the sums."""

    def __init__(self) -> None:
        self.each: deque[Spent] = deque(maxlen=KEPT)
        self.seconds = {CAPTURE: 0.0, COMPILE: 0.0}
        self.number = {CAPTURE: 0, COMPILE: 0}

    def add(self, spent: Spent) -> None:
        self.each.append(spent)
        self.seconds[spent.what] += spent.seconds
        self.number[spent.what] += 1

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def by_shape(self) -> list[dict[str, object]]:
        """The latest of it, one row for each shape and plan."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for spent in self.each:
            row = rows.setdefault(
                (spent.shape, spent.plan),
                {
                    "shape": spent.shape,
                    "plan": spent.plan,
                    "captures": 0,
                    "capture_s": 0.0,
                    "compiles": 0,
                    "compile_s": 0.0,
                },
            )
            row[f"{spent.what}s"] += 1
            row[f"{spent.what}_s"] = round(row[f"{spent.what}_s"] + spent.seconds, 3)
        return list(rows.values())


process = Ledger()  # of all models


def shape_of(inputs: object, varying: Sequence[tuple[int | None, ...]] = ()) -> str:
    """The shapes of an input's tensors, each once: `1 x 14`; `1 x any` where a graph's input is `varying` so."""
    tensors = [x for x in tree.flatten(inputs)[0] if isinstance(x, torch.Tensor) and x.dim()]
    found = dict.fromkeys(" x ".join(map(str, _varying(tuple(x.shape), varying))) for x in tensors)
    return ", ".join(found) or "no tensor"


def _varying(shape: tuple[int, ...], varying: Sequence[tuple[int | None, ...]]) -> tuple[int | str, ...]:
    for of in varying:
        if len(of) == len(shape) and all(a in (None, b) for a, b in zip(of, shape, strict=True)):
            return tuple("any" if n is None else n for n in of)
    return shape


def seconds(s: float) -> str:
    """`0.3 s`, `12 s`."""
    return f"{s:.1f} s" if s < 9.95 else f"{s:.0f} s"


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Tell whoever waits on this thread what takes the time in this block; where nobody listens, the terminal."""
    if getattr(_told, "listener", None) is None:
        _told.listener = Waiting()
    _told.listener(what)
    try:
        yield
    finally:
        _told.listener("")


@contextlib.contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """`listener` is told what this thread is about while that takes long: capturing, compiling."""
    outer = getattr(_told, "listener", None)
    _told.listener = listener
    try:
        yield
    finally:
        _told.listener = outer
