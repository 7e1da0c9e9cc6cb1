"""The streams that random numbers come from: Python's, numpy's and torch's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


def _states() -> tuple:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), (kind, keys.tobytes(), *rest), torch.get_rng_state()  # type: ignore[union-attr]


@contextmanager
def untouched(moved: Callable[[], None] = lambda: None) -> Iterator[None]:
    """What runs in the block on fakes moves no stream; `moved` is called where it would have.

    Operations on fakes draw nothing. `random.random()`, `np.random.rand()` and `torch.manual_seed(0)` would.
    """
    before, numpy = _states(), np.random.get_state()
    same = True
    try:
        yield
    finally:
        after = _states()
        same = before[:2] == after[:2] and torch.equal(before[2], after[2])
        if not same:
            random.setstate(before[0])
            np.random.set_state(numpy)
            torch.set_rng_state(before[2])
    if not same:
        moved()
