"""What ran outside captured code, and who is told: counters over all models, and the reasons of one capture."""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Iterator

from ...errors import FallbackError, FallbackWarning, RecompileError
from ...lines import user_line

REASONS = 256  # why something ran outside captured code: the latest kept


class Watch:
    """Counters over all models, for `assert_max_compiles` and `assert_no_fallback`."""

    def __init__(self):
        self.compiles = 0
        self.fell = 0  # how often something ran outside captured code
        self.reasons: deque[str] = deque(maxlen=REASONS)  # the latest

    def fall_back(self, why: str) -> None:
        self.fell += 1
        self.reasons.append(why)

    def since(self, fell: int) -> list[str]:
        """Why something ran outside captured code since that many had."""
        new = self.fell - fell
        return list(self.reasons)[-new:] if new else []


watch = Watch()


class Fallbacks:
    """Why something of one capture ran outside captured code, and what the user was warned of."""

    def __init__(self):
        self.reasons: list[str] = []
        self.warned: set[str] = set()

    def fall_back(self, why: str) -> None:
        if why not in self.reasons:
            self.reasons = [*self.reasons[1 - REASONS :], why]
        watch.fall_back(why)

    def warn(self, why: str) -> None:
        """Say at the user's line, once, why the model does not run as it was asked to."""
        if why in self.warned:
            return
        self.warned = {*([] if len(self.warned) >= REASONS else self.warned), why}
        warnings.warn_explicit(f"nnsight_fx: {why}.", FallbackWarning, *user_line())


@contextlib.contextmanager
def assert_max_compiles(n: int) -> Iterator[None]:
    """Raise `RecompileError` when more than `n` graph variants are compiled in the block, over all models."""
    before = watch.compiles
    yield
    if watch.compiles - before > n:
        raise RecompileError(f"{watch.compiles - before} graphs were compiled in this block, at most {n} were expected")


@contextlib.contextmanager
def assert_no_fallback() -> Iterator[None]:
    """Raise `FallbackError` when anything that a plan touches ran outside captured code in the block."""
    before = watch.fell
    yield
    if watch.fell > before:
        raise FallbackError("ran outside captured code: " + "; ".join(watch.since(before)))
