"""Does compiling pay? What it is likely to take, against what hooks have cost.

Who waits with compiling until the hooks have cost as much as it takes, pays at most about twice what either takes: nobody
knows how many traces are to come.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch.nn as nn

from .captured.options import EXACT
from .clock import seconds

if TYPE_CHECKING:
    from .captured.capture import Capture

# Seconds on two quiet cores, of SmolLM2: the first compile of a process, a module read, a distinct one compiled.
BEGIN_S, CAPTURE_S, COMPILE_S = 3.0, 0.025, 1.2
TURNS, TURNS_S = 100_000, 0.03  # of Python, there
SAVED = 1 / 3  # of a trace's time on hooks, which it does not take compiled: `python -m bench.suite`

_learnt = [0.0, 0.0]  # seconds that compiling took in this process, and what was estimated


def waits(capture: Capture, module: nn.Module) -> str:
    """Why a model that is compiled once it pays (`auto=True`) runs on hooks still; `""` from the time on that it does."""
    if not capture.begun and not capture.captures and capture.options.backend not in EXACT:
        if capture.cost is None:
            capture.cost = estimate(module)
        if capture.hooks_s * SAVED < capture.cost:
            return (
                f"the traces so far took {seconds(capture.hooks_s)} on hooks, and compiling takes about "
                f"{seconds(capture.cost)}: it begins at {seconds(capture.cost / SAVED)}"
            )
    capture.begun = True
    return ""


def learn(module: nn.Module, took: float, times: int) -> None:
    """Compiling a model so many times took so long."""
    _learnt[0] += took
    _learnt[1] += times * work(module)


def estimate(module: nn.Module) -> float:
    """Seconds that capturing and compiling a model are likely to take, for one shape of its inputs."""
    if _learnt[1]:
        return work(module) * _learnt[0] / _learnt[1]
    return (BEGIN_S + work(module)) * max(1.0, _turns() / TURNS_S)


def work(module: nn.Module) -> float:
    """Seconds for it on two quiet cores, in a process that has compiled before."""
    known: dict[tuple, int] = {}

    def kind(m: nn.Module) -> int:
        own = tuple((name, tuple(p.shape)) for name, p in m.named_parameters(recurse=False))
        return known.setdefault((type(m), own, tuple(map(kind, m.children()))), len(known))

    kind(module)
    return CAPTURE_S * sum(1 for _ in module.modules()) + COMPILE_S * len(known)


def _turns() -> float:
    """Seconds for some turns of Python: reading a model and generating code is that, and a busy machine is slow at it."""
    begun, held = time.perf_counter(), {}
    for i in range(TURNS):
        held[i % 97] = i, str(i)
    return time.perf_counter() - begun
