"""Recording a body before any input is known: an edit.

Nothing can be evaluated, so nothing is: an operation on a `DraftTensor` gives another one, whatever it turns out to be (a
tensor, a tuple, a size). `Draft.replay` does the same operations again on the values of a trace, which have shapes.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch

from ..compat.tensors import wrapper
from ..errors import NotRecordableError
from ..lines import Line, user_line
from ..plan import tree
from ..plan.ambient import under
from ..plan.keys import Identity, Outside, Plain, SizeExpr, Span, Value, decode
from ..plan.lifting import name_of
from ..plan.names import LIVE_CALLS, NEEDS_DATA, NEEDS_MEMORY, effect_of
from ..plan.plan import Op
from ..plan.verbs import Apply, AtSite, Barrier, Call, CallModule, Read, Site, Skip, StopRun, Verb, Write
from .lazy import LazyTensor
from .recorder import Recorder
from .recording import Recording
from .steps import Missing, SiteMeta
from .tape import Tape

SITES = Read | Write | Skip
Passes = Callable[[str, str], tuple[int, int]]  # of a site: how often it was passed before this forward, and is in it


class DraftTensor(LazyTensor):
    """What an edit works on: nothing is known of it, not even that it is a tensor."""

    _key: Value

    _placed = False

    @staticmethod
    def __new__(cls, tape: Recording, key: Value, line: Line) -> DraftTensor:
        made = wrapper(cls)
        made.__dict__.update(_tape=tape, _key=key, _line=line)
        return made

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._tape.add(Call(Identity(getattr)), (self, name))

    def __setattr__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            self._tape.add(Call(Identity(setattr), "inplace"), (self, name, value))

    def __len__(self) -> int:
        parts = _bounds(self._tape.ops[self._key.op])
        return parts if parts is not None else _refuse("its length")

    def __iter__(self) -> Iterator[torch.Tensor]:
        parts = _bounds(self._tape.ops[self._key.op])
        if parts is not None:  # `*h.shape[:2]`
            return iter([self[i] for i in range(parts)])
        _refuse("how many parts it has: take them by index (`out[0]`)")

    def __index__(self) -> int:
        _refuse("a number")

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"DraftTensor({self._tape.describe(self._key)}, made at {self._line})"


class Draft(Recording):
    """The recording of an edit."""

    def __init__(self):
        super().__init__()
        self.fakes = self.sites = None  # type: ignore[assignment]  # there is no input yet
        self.turn: Turn | None = None  # of `tracer.iter`, where one is open
        self.turns: list[Turn | None] = []  # of each operation

    def call(self, func: object, args: tuple, kwargs: dict) -> int | DraftTensor:
        self.check_open(args, kwargs)
        name = name_of(func)
        if name == "__hash__":
            return id(args[0])
        if name in NEEDS_DATA | NEEDS_MEMORY | LIVE_CALLS:
            _refuse(f"`{name}`")
        return self.add(Call(Identity(func), effect_of(name, kwargs, args)), args, kwargs)

    def add(
        self,
        verb: Verb,
        args: tuple = (),
        kwargs: dict | None = None,
        *,
        result: Callable[[], object] | None = None,
        sizes: tuple = (),
    ) -> DraftTensor:
        self.check_open(args, kwargs or {})
        op = Op(verb, 0, *self.operands.arguments(args, kwargs or {}), self.modes())
        line = user_line()
        self.ops.append(op)
        self.turns.append(self.turn)
        self.lines.append(line)
        self.specs.append(None)
        return DraftTensor(self, Value(len(self.ops) - 1, -1), line)

    def meta(self, site: Site) -> SiteMeta | Missing:
        return Missing("an edit is written before any input is known")

    def fake_of_result(self, key: Value) -> NoReturn:
        _refuse("its shape")

    def read(self, site: Site) -> DraftTensor:
        return self.add(Read(site))

    def read_input(self, site: Site) -> DraftTensor:
        return self.add(Read(site, first=True))

    def write(self, site: Site, value: object) -> None:
        self.add(Write(site), (value,))

    def write_input(self, site: Site, value: object) -> None:
        self.add(Write(site, first=True), (value,))

    def skip(self, path: str, call: int, value: object) -> None:
        self.add(Skip((path, "output", call)), (value,))

    def module(self, path: str, args: tuple, kwargs: dict) -> DraftTensor:
        return self.add(CallModule(path), args, kwargs)

    def hooked(self, path: str, module: torch.nn.Module, args: tuple, kwargs: dict) -> DraftTensor:
        return self.add(CallModule(path, Identity(module)), args, kwargs)

    def replay(self, tape: Tape) -> None:
        """Do what is recorded here, on the values of a recording with an input, in the invoke that is open."""
        results: dict[int, Any] = {}
        sites: Any = tape.sites
        for numbers in self.runs():
            for call in self.calls(numbers, lambda path, kind: (0, sites.calls(path, kind))):
                for n in numbers:
                    results[n] = self.do(n, tape, results, call)
        tape.settle()

    def runs(self) -> Iterator[list[int]]:
        """The operations, those of one body of a `tracer.iter` together."""
        for turn, group in itertools.groupby(range(len(self.ops)), lambda n: self.turns[n]):
            numbers = list(group)
            yield from [numbers] if turn is not None else [[n] for n in numbers]

    def calls(self, numbers: list[int], passes: Passes) -> Iterable[int | None]:
        """For which calls of its first site, in this forward, a body of a `tracer.iter` is; `None`: it says no call."""
        turn = self.turns[numbers[0]]
        first = next((op.verb for op in [self.ops[n] for n in numbers] if isinstance(op.verb, SITES)), None)
        if turn is None or first is None:
            return (None,)
        before, count = passes(*_passed(first))
        return [call for call in range(count) if turn.holds(before + call)]

    def do(self, n: int, tape: Tape, results: dict[int, object], call: int | None = None) -> object:
        """Do one operation, with what those before it gave; `call` is that of its site which is meant."""

        def lookup(key: Value | Outside) -> Any:
            assert not isinstance(key, SizeExpr)  # no size is known here
            return results[key.op] if isinstance(key, Value) else self.constants[key.slot]

        op, line, mark = self.ops[n], self.lines[n], len(tape.ops)
        if call is not None and isinstance(op.verb, SITES):
            path, kind, _ = op.verb.site
            op = op._replace(verb=replace(op.verb, site=(path, kind, call)))
        try:
            with under(op.ambient), Recorder(tape):
                result = _again(tape, op, decode(op.args, lookup), decode(op.kwargs, lookup))
        except Exception as error:
            error.add_note(f"nnsight_fx: in the edit at {line}")
            raise
        tape.lines[mark:] = [line] * (len(tape.lines) - mark)
        return result

    def settle(self) -> None:
        """What the body does to containers is recorded as it does it."""

    def save(self, lazy: LazyTensor) -> NoReturn:
        raise NotRecordableError(
            f"{user_line()}: an edit has no values to save; save them in a trace of the edited model."
        )

    def sync(self, lazies: list[LazyTensor]) -> NoReturn:
        _refuse("a number")

    def update(self, lazy: LazyTensor, value: object) -> NoReturn:
        _refuse("`.update()`")


class Turn(NamedTuple):
    """The occurrences that a body of an edit's `tracer.iter` is for."""

    start: int
    stop: int | None
    step: int

    def holds(self, occurrence: int) -> bool:
        inside = occurrence >= self.start and (self.stop is None or occurrence < self.stop)
        return inside and (occurrence - self.start) % self.step == 0


class Repeated:
    """An edit over the forwards of a generation: each does what belongs to the sites that it passes.

    An operation whose site comes in an earlier forward only (the encoder's) keeps the result that it had there. One whose
    site has not come yet waits, and so does what needs it.
    """

    def __init__(self, draft: Draft):
        self.draft = draft
        self.results: dict[int, Any] = {}
        self.old: dict = {}  # of the forward before
        self.fresh: set[int] = set()  # what this forward has done
        self.kept: set[int] = set()  # what this forward still uses of the one before
        self.met: set[int] = set()  # what is for some occurrences, which need not come

    def replay(self, tape: Tape, passes: Passes) -> None:
        """Do what can be done in a forward; `passes` tells how often those before it have passed a site, and how often it does."""
        draft, self.old, self.results, self.fresh = self.draft, self.results, {}, set()
        # What needs no site (a random draw) is made anew in each forward, unless something that uses it has waited for this one.
        self.kept = {
            v for n, op in enumerate(draft.ops) if n not in self.old and n not in self.met for v, _ in op.needs
        }
        for numbers in draft.runs():
            for call in draft.calls(numbers, passes):
                for n in numbers:
                    self._do(n, tape, passes, call)
            for n in numbers:
                if n not in self.results and n in self.old:
                    self.results[n] = self.old[n]
            if draft.turns[numbers[0]] is not None:
                self.met.update(numbers)
        tape.settle()

    def _do(self, n: int, tape: Tape, passes: Passes, call: int | None) -> None:
        op: Op = self.draft.ops[n]
        needs = {v for v, _ in op.needs}
        if isinstance(op.verb, SITES):
            again = passes(*_passed(op.verb))[1] > (op.verb.site[2] if call is None else call)
        elif isinstance(op.verb, StopRun):
            again = len(self.results) == n
        else:
            again = n not in self.old or (bool(needs & self.fresh) if needs else n not in self.kept)
        if again and needs <= self.results.keys():
            self.results[n] = self.draft.do(n, tape, self.results, call)
            self.fresh.add(n)

    @property
    def waiting(self) -> list[tuple[Op, Line]]:
        """What no forward has done yet."""
        found = zip(self.draft.ops, self.draft.lines, strict=True)
        return [each for n, each in enumerate(found) if n not in self.results and n not in self.met]


def _passed(verb: AtSite) -> tuple[str, str]:
    """The site whose passings tell when an operation takes place."""
    path, kind, _ = verb.entrance if isinstance(verb, Skip) else verb.site
    return path, kind


def _bounds(op: Op) -> int | None:
    """How many parts a slice from one known place to another has, of a size or a tuple that is long enough."""
    if (
        not isinstance(op.verb, Call)
        or name_of(op.verb.fn.obj) != "__getitem__"
        or not isinstance(op.args.items[1], Span)
    ):
        return None
    start, stop, step = (key.value if isinstance(key, Plain) else -1 for key in op.args.items[1])
    known = type(stop) is int and (start is None or type(start) is int) and step is None
    return stop - (start or 0) if known and stop >= (start or 0) >= 0 else None


def _refuse(what: str) -> NoReturn:
    raise NotRecordableError(
        f"{user_line()}: an edit is recorded once, before any input is known, so this line cannot have {what}. Compute with "
        "the value as it is (`torch.where` for an `if`, `out[0]` for a part), or do this in the traces."
    )


def _again(tape: Tape, op: Op, args: tuple, kwargs: dict) -> object:
    match op.verb:
        case Read(site, first=first):
            return tape.read_input(site) if first else tape.read(site)
        case Write(site, first=first):
            return (tape.write_input if first else tape.write)(site, *args)
        case Skip((path, _, call)):
            return tape.skip(path, call, *args)
        case CallModule(path, instance):
            return (
                tape.module(path, args, kwargs) if instance is None else tape.hooked(path, instance.obj, args, kwargs)
            )
        case StopRun():
            return tape.stop()
        case Barrier():
            return None
        case Call(fn) | Apply(fn):
            return _called(fn.obj, args, kwargs)
        case verb:
            raise AssertionError(f"an edit records no `{verb.name}`")


def _called(func: Any, args: tuple, kwargs: dict) -> object:
    """A recorded call, as Python makes it on what the values turned out to be."""
    name = name_of(func)
    first = args[0] if args else None
    if isinstance(first, torch.Tensor) or not _of_tensors(func):
        return func(*args, **kwargs)
    if name == "__get__":  # an attribute that tensors have, too
        return getattr(first, func.__self__.__name__)
    if hasattr(operator, name):
        return getattr(operator, name)(*args)
    if name.startswith("__r") and hasattr(operator, f"__{name[3:]}"):
        return getattr(operator, f"__{name[3:]}")(args[1], first)
    return getattr(first, name)(*args[1:], **kwargs)


def _of_tensors(func: object) -> bool:
    """Is a function that torch recorded a method or attribute of tensors?"""
    owner = getattr(func, "__self__", None)
    return getattr(torch.Tensor, name_of(func), None) is func or getattr(owner, "__objclass__", None) is not None


__all__ = ["Draft", "DraftTensor", "tree"]
