"""What an operation costs, in a graph that is for any number of positions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.fx as fx


@dataclass(frozen=True)
class Cost:
    """`value` at `positions` positions; it grows with a power of their number.

    Divided by a number of positions that is a symbol, it is the cost of one of them.
    """

    value: float
    positions: int = 1
    power: float = 0.0

    @classmethod
    def of(cls, first: tuple[float, int], second: tuple[float, int]) -> Cost:
        """From what it is at two numbers of positions."""
        (a, n), (b, m) = first, second
        return cls(a, n, math.log(b / a) / math.log(m / n) if a > 0 and b > 0 and n != m else 0.0)

    def at(self, positions: int) -> float:
        return self.value * (positions / self.positions) ** self.power

    def __mul__(self, by: float) -> Cost:
        return replace(self, value=self.value * by)

    __rmul__ = __mul__

    def __truediv__(self, by: float | torch.SymInt) -> Cost:
        if isinstance(by, torch.SymInt):
            return replace(self, value=self.value / self.positions, power=self.power - 1)
        return replace(self, value=self.value / by)


def cost(nodes: Iterable[fx.Node], what: str, positions: int) -> float:
    """What nodes cost together: their `flops`, or `bytes`, for one row."""
    found = (n.meta.get(what, 0) for n in nodes)
    return sum(x.at(positions) if isinstance(x, Cost) else x for x in found)
