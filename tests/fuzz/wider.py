"""Verbs of the newer kinds: numbers and parts of containers, loops over calls, constants that have the batch's sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nnsight_fx import save

from .nets import Place
from .verbs import Constants, Machine, fit, read, write

NUMBER = bool | int | float


def factor(number: Any) -> float:
    """What a leaf that is no tensor is as a number."""
    return number if isinstance(number, NUMBER) else 0.5 if number is None else len(number)


@dataclass(frozen=True)
class SavePart:
    """A number, a text, `None`, a container in a container, an object, as it is in the model."""

    place: Place

    def do(self, m: Machine) -> None:
        if not m.detaches:
            with m.at(self.place) as envoy:
                m.kept.append(save([read(envoy, self.place)]))


@dataclass(frozen=True)
class Look:
    """A number of the model's, as Python sees it, kept and put into a value."""

    place: Place
    a: int

    def do(self, m: Machine) -> None:
        value = m.value(self.a)
        with m.at(self.place) as envoy:
            number = read(envoy, self.place)
            m.kept.append(number)
            m.push(value * factor(number))


@dataclass(frozen=True)
class IfNumber:
    """Python goes by a number of the model's."""

    place: Place
    then: tuple = ()
    orelse: tuple = ()

    def do(self, m: Machine) -> None:
        with m.at(self.place) as envoy:
            number = factor(read(envoy, self.place))
            m.do(self.then if number > 1 else self.orelse)


@dataclass(frozen=True)
class WriteNumber:
    """Another number, in place of one of the model's."""

    place: Place
    slot: int
    whole: bool = False

    def do(self, m: Machine) -> None:
        c = m.constants[self.slot]
        with m.at(self.place) as envoy:
            write(envoy, self.place, c.position + 3 if self.whole else c.number)


@dataclass(frozen=True)
class Hand:
    """A container goes on as it is, or as a site's another one: `b.output = a.output`."""

    place: Place
    to: Place

    def do(self, m: Machine) -> None:
        with m.at(self.place) as envoy:
            whole = read(envoy, self.place)
        with m.at(self.to) as envoy:
            write(envoy, self.to, whole)


@dataclass(frozen=True)
class Loop:
    """`for step in tracer.iter[start:stop]`: the calls of a module, kept and counted; a write on some of them."""

    place: Place
    start: int = 0
    stop: int | None = 2
    on: int | None = None
    slot: int = 0
    inner: tuple = ()

    def do(self, m: Machine) -> None:
        envoy, values, seen, kept, steps = m.model.get(self.place.path), m.values, m.kept, save([]), save([])
        number = m.constants[self.slot].number
        seen += [kept, steps]
        for step in m.tracer.iter[self.start : self.stop]:
            value = read(envoy, self.place)
            steps.append(step)
            kept.append(value.detach() if m.detaches else value)
            m.values, m.kept = [*values, value], kept
            m.do(self.inner)
            if step == self.on:
                write(envoy, self.place, m.values[-1] * number if fits(m.values[-1], value) else value * number)
        m.values, m.kept = values, seen
        m.kept.append(len(steps))


@dataclass(frozen=True)
class NextCall:
    """`envoy.next(n).output`, and the trace's own `next`."""

    place: Place
    n: int = 1
    all: bool = False

    def do(self, m: Machine) -> None:
        envoy = m.model.get(self.place.path)
        if self.all:
            m.tracer.next(self.n)
            m.push(read(envoy, self.place))
        else:
            m.push(read(envoy.next(self.n), self.place))


def fits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return tuple(a.shape) == tuple(b.shape) and a.dtype == b.dtype


# -- the batch's sizes ---------------------------------------------------------------------------------------------------


SIZED = {
    "rows": lambda a, s, c: a + s.rows if fit3(a, s) else a,
    "tokens": lambda a, s, c: a * s.tokens if fit3(a, s) else a,
    "grid": lambda a, s, c: a - s.grid if fit3(a, s) else a,
    "row mask": lambda a, s, c: torch.where(s.row_mask[:, None, None], a, c.number) if fit3(a, s) else a,
    "grid mask": lambda a, s, c: a.masked_fill(~s.grid_mask[..., None], c.number) if fit3(a, s) else a,
    "chosen rows": lambda a, s, c: a[s.row_mask] if fit3(a, s) else a,
    "chosen tokens": lambda a, s, c: a[s.grid_mask] if fit3(a, s) else a,
    "order": lambda a, s, c: a[s.order] if fit3(a, s) else a,
    "position of each row": lambda a, s, c: a[torch.arange(a.shape[0]), s.positions] if fit3(a, s) else a,
    "gather": lambda a, s, c: a.gather(1, s.columns.expand(-1, 1, a.shape[2])) if fit3(a, s) else a,
    "table": lambda a, s, c: a + s.table[s.ids] if fit3(a, s) else a,
    "embedding": lambda a, s, c: a * torch.nn.functional.embedding(s.ids, s.table) if fit3(a, s) else a,
    "numbers": lambda a, s, c: a * len(s.positions) + a.shape[1] if fit3(a, s) else a,
    "heads": lambda a, s, c: a.view(a.shape[0], a.shape[1], 2, -1).transpose(1, 2) if fit3(a, s) else a,
    "mean": lambda a, s, c: a - a.sum(0, keepdim=True) / a.shape[0] if fit3(a, s) else a,
}
SIZED_IN_PLACE = {
    "add rows": lambda a, s, c: a.add_(s.rows),
    "copy tokens": lambda a, s, c: a.copy_(s.tokens.expand_as(a)),
    "set rows": lambda a, s, c: a.__setitem__(s.row_mask, c.number),
    "set tokens": lambda a, s, c: a.__setitem__(s.grid_mask, c.vector[: a.shape[-1]]),
    "set position of each row": lambda a, s, c: a.__setitem__((torch.arange(a.shape[0]), s.positions), c.number),
    "scatter": lambda a, s, c: a.scatter_(1, s.columns.expand(-1, 1, a.shape[2]), 0.5),
    "index_add_": lambda a, s, c: a.index_add_(0, s.order, s.grid),
    "imul": lambda a, s, c: a.__imul__(s.tokens),
    "last": lambda a, s, c: a.__setitem__((slice(None), -1), s.rows[:, 0]),
}


def fit3(a: torch.Tensor, s: Any) -> bool:
    """Is it of the batch's own sizes?"""
    return a.dim() == 3 and a.is_floating_point() and tuple(a.shape) == tuple(s.grid.shape)


@dataclass(frozen=True)
class Sized:
    fn: str
    a: int
    slot: int = 0

    def do(self, m: Machine) -> None:
        m.push(SIZED[self.fn](m.value(self.a), m.sized, m.constants[self.slot]))


@dataclass(frozen=True)
class SizedInPlace:
    fn: str
    a: int
    slot: int = 0

    def do(self, m: Machine) -> None:
        a = m.value(self.a)
        if fit3(a, m.sized) and a.dtype == torch.float32:
            SIZED_IN_PLACE[self.fn](a, m.sized, m.constants[self.slot])


@dataclass(frozen=True)
class SizedWrite:
    """`module.output = constants`, `module.output += constants`."""

    place: Place
    way: str = "set"

    def do(self, m: Machine) -> None:
        with m.at(self.place) as envoy:
            value, s = read(envoy, self.place), m.sized
            if not fit3(value, s):
                return
            if self.way == "set":
                write(envoy, self.place, s.grid)
            elif self.way == "blend":
                write(envoy, self.place, torch.where(s.row_mask[:, None, None], value, s.rows + s.tokens))
            elif self.place.leaf is None:
                setattr(envoy, self.place.kind, getattr(envoy, self.place.kind) + s.rows)


# -- objects, in a later trace ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Again:
    """What an earlier trace of the program has saved: its tensors in a value, and it itself at a site."""

    n: int
    a: int
    to: Place | None = None

    def do(self, m: Machine) -> None:
        kept = [value[0] for value in m.before if isinstance(value, list) and len(value) == 1]
        if not kept:
            return
        one = kept[self.n % len(kept)]
        h = one if isinstance(one, torch.Tensor) else getattr(one, "h", None)
        if isinstance(h, torch.Tensor):
            a = m.value(self.a)
            m.push(a + fit(h, a))
        if self.to is not None and not isinstance(one, torch.Tensor | NUMBER | str | type(None)):
            with m.at(self.to) as envoy:
                write(envoy, self.to, one)


__all__ = [
    "SIZED",
    "SIZED_IN_PLACE",
    "Again",
    "Constants",
    "Hand",
    "IfNumber",
    "Look",
    "Loop",
    "NextCall",
    "SavePart",
    "Sized",
    "SizedInPlace",
    "SizedWrite",
    "WriteNumber",
]
