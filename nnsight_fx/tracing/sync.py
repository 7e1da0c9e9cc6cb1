"""Sync points: Python needs numbers, so the model runs as far as they need, and the body goes on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..errors import NotRecordableError
from ..lines import user_line
from ..plan import tree
from ..plan.keys import NO_KWARGS, Identity, Items, Recorded, Value
from ..plan.plan import Op
from ..plan.verbs import Apply, Sync
from .functions import inside
from .lazy import LazyTensor, held_by, key_of
from .objects import LazyObject, real_of
from .steps import Step, nothing

if TYPE_CHECKING:
    from .tape import Tape


class SyncPoints:
    """Those of one recording. `run_until(tape)` runs the model, and returns what gives the real value of a key."""

    def __init__(self, tape: Tape, run_until: Callable[[Tape], Callable[[Recorded], Any]]):
        self.tape, self.run_until = tape, run_until
        self.thread = threading.get_ident()
        self.deciding = False  # is a sync point looking at conditions
        self.reals: dict[Recorded, torch.Tensor] = {}  # values that a later wave of the trace used

    def earlier(self, lazy: LazyTensor) -> torch.Tensor:
        """The real tensor of a value of an earlier wave of the same trace, or of an earlier trace of the session."""
        if held_by(lazy) is None and self.tape.pending is not None:
            self.tape.pending()
            if type(lazy) is not LazyTensor:
                return lazy  # it was saved
        real = held_by(lazy)
        if real is not None:
            return real
        self.tape.check_open((lazy,), {})
        key = key_of(lazy)
        if key not in self.reals:
            value = self.run_until(self.tape)
            if not self.tape.conditions.hold(lazy, value):
                raise self.tape.conditions.error(lazy)
            self.reals[key] = value(key)
        return self.reals[key]

    def apply(self, fn: Callable, args: tuple, kwargs: dict) -> Any:
        """Call `fn` on the real values when the model gets there; what it returns is looked at, so this syncs."""
        n = self.tape.number(Apply(Identity(fn)), args, kwargs, result=nothing)
        got = self.values_of([Value(n, -1)])[0]
        leaves, spec = tree.flatten(got)
        return tree.unflatten(leaves, spec, got)

    def sync(self, lazies: list[LazyTensor]) -> list[torch.Tensor]:
        """The real tensors of recorded values; the model runs as far as they need."""
        if self.tape.bridged:
            return [self.earlier(x) for x in lazies]
        self.tape.check_open(lazies, {})
        if any(inside(key_of(x)) for x in lazies):
            raise NotRecordableError(
                f"{user_line()}: a value inside a custom `forward` has no numbers while it is recorded."
            )
        return self.values_of([key_of(x) for x in lazies])

    def values_of(self, keys: list[Recorded]) -> list[Any]:
        """What the run gives for keys; the model runs as far as they need."""
        if threading.get_ident() != self.thread:
            raise NotRecordableError(
                f"{user_line()}: a recorded value is looked at in another thread than its trace's, where the model cannot run. "
                "Look at it in the body itself, and hand the number over."
            )
        self.tape.accesses.settle()
        self.tape.objects.keep_saved()
        if not self.deciding:
            self.deciding = True
            try:
                self.tape.conditions.decide(keys, lambda key: self.values_of([key])[0])
            finally:
                self.deciding = False
        for key in keys:
            op = Op(Sync(), self.tape.invoke.index, Items(tuple, (key,)), NO_KWARGS)
            self.tape.ops.append(op)
            self.tape.specs.append(None)
            self.tape.lines.append(user_line())
            step = self.tape.step.children.get(op)
            if step is None:
                step = self.tape.step.children[op] = Step(self.tape.step, op)
            self.tape.step = step
        line, self.tape.begun = user_line(), True
        with self.running():
            value = self.run_until(self.tape)
        if self.tape.invoke.latest is not None and (
            self.tape.accesses.passed is None or self.tape.accesses.passed[0] != self.tape.invoke.latest
        ):
            self.tape.accesses.passed = (
                self.tape.invoke.latest,
                line,
            )  # the line that ran the model there, not one that looked again
        return [value(k) for k in keys]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The model runs: what now uses a recorded value is a function that was meant to get the real one."""
        self.tape.busy = True
        try:
            yield
        finally:
            self.tape.busy = False

    def real_args(self, args: object) -> Any:
        """Arguments with every recorded value, and what stands for an object, replaced by the real one."""
        if any(isinstance(x, LazyObject) for x in tree.flatten(args)[0]):
            args = tree.tree_map(lambda x: real_of(x) if isinstance(x, LazyObject) else x, args)
        lazies = [x for x in tree.flatten(args)[0] if self.tape.operands.unsettled(x)]
        if not lazies:
            return args
        real = dict(zip(map(id, lazies), self.values_of([self.tape.operands.key_of(x) for x in lazies]), strict=True))
        return tree.tree_map(
            lambda x: real.get(id(x), getattr(x, "value", x) if type(x).__name__ == "Lifted" else x), args
        )
