"""`tracer.cond(value)`: a block that takes effect only where a value is true, which the run decides.

The body of the block is recorded whether or not it will take effect. Each operation in it carries the predicates that
must hold (`Op.when`), and so does everything that uses a value made in it. Reading a site changes nothing, and is not
conditional.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..errors import NotRecordableError, UnsavedValueError
from ..lines import user_line
from ..plan.keys import Key, Recorded, Value, references
from ..plan.verbs import Barrier, Grad, Observe, Reach, Read, ReadObject, RunBackward, SetGrad, Verb, Visit
from .lazy import LazyTensor, key_of, line_of
from .objects import LazyObject

if TYPE_CHECKING:
    from .contexts import Tracer
    from .tape import Tape

ALWAYS = Read | ReadObject | Observe | Reach | Barrier
NEVER: dict[type[Verb], str] = {
    Grad: "a gradient",
    SetGrad: "a gradient",
    RunBackward: "a backward",
    Visit: "a call with `hook=True`",
}


class Stopping(BaseException):
    """Leaves the body at `tracer.stop()`; never leaves the `with` block."""


class Left(BaseException):
    """Leaves a block whose condition a sync point has found not to hold."""

    def __init__(self, block: Condition):
        self.block = block


class Condition:
    """`with tracer.cond(value):`, open."""

    def __init__(self, tracer: Tracer, value: object):
        self.tracer, self.value, self.line = tracer, value, user_line()

    def __enter__(self) -> None:
        self.tracer.check_open()
        self.predicate = predicate(self.value, self.tracer.constant)
        self.tracer.conditions.append(self)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.tracer.conditions.remove(self)
        return type(error) is Stopping or (isinstance(error, Left) and error.block is self)


def predicate(value: object, constant: Callable[[object], torch.Tensor]) -> torch.Tensor:
    """The truth of a value as a 0-d tensor, of a recorded one a recorded tensor."""
    if isinstance(value, LazyObject) or not isinstance(value, torch.Tensor):
        return constant(bool(value))
    if value.numel() != 1:
        raise RuntimeError(
            f"{user_line()}: the condition has shape {tuple(value.shape)}: Boolean value of Tensor with more than one value is "
            "ambiguous. Use `.any()` or `.all()`."
        )
    return value.ne(0).reshape(())


class Conditions:
    """Those of one recording."""

    def __init__(self, tape: Tape):
        self.tape = tape
        self.blocks: list[Condition] = []  # the open ones, outermost first; the trace's own list
        self.used = False  # has anything been recorded that depends on a condition
        self.saves: dict[int, tuple[Recorded, ...]] = {}  # id of a value that is saved in blocks only -> what must hold

    def open(self) -> tuple[Recorded, ...]:
        """The predicates of the open blocks."""
        return tuple(self.tape.operands.key_of(block.predicate) for block in self.blocks)

    def of(self, verb: Verb, keys: tuple[Key, ...]) -> tuple[Recorded, ...]:
        """What must hold for an operation on arguments `keys`."""
        if not (self.blocks or self.used) or isinstance(verb, ALWAYS):
            return ()
        when = tuple(dict.fromkeys([*self.open(), *self._made(references(*keys))]))
        if when and type(verb) in NEVER:
            raise NotRecordableError(
                f"{user_line()}: {NEVER[type(verb)]} depends on a `tracer.cond` and cannot be recorded. Decide in Python, `if value:`, which "
                "runs the model up to there."
            )
        return when

    def _made(self, values: Iterable[Value]) -> list[Recorded]:
        return [key for n, _ in sorted(values) if n >= 0 for key in self.tape.ops[n].when]

    def save(self, lazy: LazyTensor) -> None:
        """A value is saved here: undefined after the trace where the open blocks do not hold, unless it is saved elsewhere."""
        here = self.open() if self.blocks else ()
        self.used = self.used or bool(here)
        if id(lazy) not in self.tape.saved and here:
            self.saves[id(lazy)] = here
        elif not here:
            self.saves.pop(id(lazy), None)

    def hold(self, lazy: LazyTensor, value: Callable[[Recorded], Any]) -> bool:
        """Has the run made a value, and saved it?"""
        if not self.used:
            return True
        when = [*self._made(references(key_of(lazy))), *self.saves.get(id(lazy), ())]
        try:
            return all(held.is_meta or bool(held) for held in map(value, when))  # a scan cannot tell
        except KeyError:  # a predicate in a block that did not hold
            return False

    def undefined(self, lazy: LazyTensor) -> bool:
        """Can a value be without data because a block did not take effect?"""
        return id(lazy) in self.saves or bool(self._made(references(key_of(lazy))))

    def error(self, lazy: LazyTensor) -> UnsavedValueError:
        return UnsavedValueError(
            f"{user_line()}: `{self.tape.describe(key_of(lazy))}`, made at {line_of(lazy)}, has no value: it was made or saved in a "
            "`tracer.cond` that did not hold in this run."
        )

    def decide(self, keys: list[Recorded], look: Callable[[Recorded], object]) -> None:
        """Before values are looked at: are they there? Leaves the innermost open block that is not; `look` syncs."""
        for block, key in zip(list(self.blocks), self.open(), strict=True):
            if not look(key):
                raise Left(block)
        for key in self._made(references(*keys)):
            if not look(key):
                raise UnsavedValueError(
                    f"{user_line()}: `{self.tape.describe(keys[0])}` has no value: it was made in a `tracer.cond` that did not hold "
                    "in this run."
                )
