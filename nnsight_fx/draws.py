"""Random draws that depend on a seed and a number alone: what is done again draws the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def own_draws(model: Any) -> Iterator[None]:
    """Leave the caller's generators where they were."""
    devices = [d for d in model.devices if d.type == "cuda"]
    with torch.random.fork_rng(devices=devices):
        yield


def draw_for(seed: int, number: int) -> None:
    """From here on torch draws what belongs to a number."""
    own = (seed + 0x9E3779B97F4A7C15 * (number + 1)) % 2**63
    if torch.accelerator.is_available():
        torch.manual_seed(own)
    else:  # the same, without the stack that torch keeps for each kind of device that is not there
        torch.default_generator.manual_seed(own)
