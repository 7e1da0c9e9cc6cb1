"""Random draws that depend on a seed and a number alone: what is done again draws the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch


class Placed(Protocol):
    """A model, which is on devices."""

    @property
    def device(self) -> torch.device | None: ...

    @property
    def devices(self) -> set[torch.device]: ...


@contextlib.contextmanager
def own_draws(model: Placed) -> Iterator[None]:
    """Leave the caller's generators where they were."""
    devices = [d for d in model.devices if d.type == "cuda"]
    with torch.random.fork_rng(devices=devices):
        yield


def _mixed(seed: int, number: int) -> int:
    return (seed + 0x9E3779B97F4A7C15 * (number + 1)) % 2**63


def generators(model: Placed, seed: int, number: int, rows: int) -> list[torch.Generator]:
    """A generator for each row of what belongs to a number, on the model's device."""
    made = [torch.Generator(device=model.device) for _ in range(rows)]
    for row, each in enumerate(made):
        each.manual_seed(_mixed(_mixed(seed, number), row))
    return made


class Stream:
    """What torch draws for a number, in a line of work that others interrupt."""

    def __init__(self, model: Placed, seed: int, number: int):
        self.devices = [d for d in model.devices if d.type == "cuda"]
        self.begin: tuple[int, int] | None = (seed, number)
        self.state: tuple = ()

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Draw from it in the block, from where it was left."""
        outer = self._take()
        if self.begin is not None:
            draw_for(*self.begin)
            self.begin = None
        else:
            self._put(self.state)
        try:
            yield
        finally:
            self.state = self._take()
            self._put(outer)

    def _take(self) -> tuple:
        return torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in self.devices]

    def _put(self, state: tuple) -> None:
        torch.set_rng_state(state[0])
        for device, each in zip(self.devices, state[1], strict=True):
            torch.cuda.set_rng_state(each, device)


def draw_for(seed: int, number: int) -> None:
    """From here on torch draws what belongs to a number."""
    own = _mixed(seed, number)
    if torch.accelerator.is_available():
        torch.manual_seed(own)
    else:  # the same, without the stack that torch keeps for each kind of device that is not there
        torch.default_generator.manual_seed(own)
