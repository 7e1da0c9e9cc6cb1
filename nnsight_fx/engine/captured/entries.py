"""Entries: the functions by which a model is called, each with what Dynamo compiled for that kind of call."""

from __future__ import annotations

import itertools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ... import compat
from ...capture.markers import Markers, Stop
from ...capture.marking import mark
from ...capture.repeats import ENTRY
from ...capture.segment import Segment
from ...plan.plan import InterventionGraph
from ...scan.scan import callee
from .options import Options

if TYPE_CHECKING:
    from .steady import Steady

ENTRIES = 128  # captures kept a model and set of options
STEADY = 512  # plans kept that run as a call
Backend = Callable[[torch.fx.GraphModule, list], Callable]  # what Dynamo calls with each graph that it captured

_serial, _clock = itertools.count(), itertools.count(1)


@dataclass
class EntryPoint:
    """A function of the model that is captured."""

    call: Callable
    inner: Callable | None = None  # what Dynamo evaluates
    cached: Callable | None = None  # runs what is captured, and raises `NotCaptured` where nothing fits
    whole: bool = False  # was it captured in one graph, so that no hook has anything to do any more
    missed: int = 0  # how often nothing fitted, though it was there
    segments: list[Segment] = field(default_factory=list)  # what was captured of it
    used: int = 0  # when it ran last


class Entries(Mapping[tuple, EntryPoint]):
    """The entries of one model, by what they were captured for; those used last are kept."""

    def __init__(self):
        self._kept: dict[tuple, EntryPoint] = {}
        self.steady: OrderedDict[tuple, Steady] = OrderedDict()  # (signature, plan) -> the plan as a call

    def __getitem__(self, key: tuple) -> EntryPoint:
        return self._kept[key]

    def __iter__(self) -> Iterator[tuple]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: tuple, make: Callable[[], EntryPoint]) -> EntryPoint:
        """The entry of that key; `make` makes one where there is none."""
        if key not in self._kept:
            self._kept[key] = make()
        found = self._kept[key]
        self.touch(found)
        if len(self._kept) > ENTRIES:
            gone = self._kept.pop(min(self._kept, key=lambda k: self._kept[k].used))
            for call in [call for call, steady in self.steady.items() if steady.entry is gone]:
                del self.steady[call]
        return found

    def touch(self, entry: EntryPoint) -> None:
        """An entry runs: it is the last to go."""
        entry.used = next(_clock)

    def remember(self, key: tuple, steady: Steady | None) -> None:
        """A plan has run: remember whether it runs as a call."""
        self.steady.pop(key, None)
        if steady is not None:
            self.steady[key] = steady
            if len(self.steady) > STEADY:
                self.steady.popitem(last=False)

    def drop(self, segment: Segment) -> None:
        """Forget a captured graph."""
        for entry in self._kept.values():
            entry.segments = [s for s in entry.segments if s is not segment]

    def clear(self) -> None:
        self._kept.clear()
        self.steady.clear()

    @property
    def segments(self) -> list[Segment]:
        """All that is captured."""
        return [segment for entry in self._kept.values() for segment in entry.segments]

    def shares(self, fn: str | None, plan: InterventionGraph, own: tuple) -> bool:
        """Is there a graph for all plans that changes no object of the model's, and none for this plan alone?"""
        pure = any(s.pure and s.plan is None for s in self.segments)
        none: frozenset[str] = frozenset()
        return pure and (fn, None, none, own) in self._kept and (fn, plan, none, own) not in self._kept


def by_dynamo(
    module: torch.nn.Module, fn: str | None, markers: Markers, options: Options, backend: weakref.WeakMethod[Backend]
) -> EntryPoint:
    """An entry that Dynamo captures. Dynamo keeps the backend with the code, where no collector sees a ring: hence it is weak."""
    inner = entry_point(module, fn)
    root, hooked = compat.guards.root(inner), markers.hooked()

    def graph_backend(gm: torch.fx.GraphModule, inputs: list) -> Callable:
        if not hooked:
            compat.guards.forget_tables(root)
        found = backend()
        assert found is not None
        return found(gm, inputs)

    call, cached = compat.dynamo.dynamo_compile(inner, graph_backend, options.dynamic, options.fullgraph)
    return EntryPoint(call, inner, cached)


def entry_point(module: torch.nn.Module, fn: str | None) -> Callable:
    """The function that Dynamo captures. Dynamo's cache and its recompile limit belong to the code, so it has one of its own."""
    inner = _inner(module, fn)
    code = inner.__code__.replace(co_name=f"{ENTRY}{next(_serial)}")
    return types.FunctionType(code, inner.__globals__, code.co_name, inner.__defaults__, inner.__closure__)


def _inner(module: torch.nn.Module, fn: str | None) -> types.FunctionType:
    called = callee(module, fn)

    def inner(args: tuple, kwargs: dict) -> object:
        try:
            out = called(*args, **kwargs)
        except Stop:
            return None
        return mark(out, "", "result", True) if torch.compiler.is_compiling() else out

    return inner  # type: ignore[return-value]
