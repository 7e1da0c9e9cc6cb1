"""`session.explain()`, and what `model.explain()` says of a sweep: what ran together and how, and why anything ran alone."""

from __future__ import annotations

import contextlib
import functools
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..engine.clock import seconds
from ..engine.notes import SHARED, Notes
from ..engine.notes import facts as facts_of
from ..envoys.envoy import host_of
from ..lines import user_line
from ..plan.printing import short

if TYPE_CHECKING:
    from ..envoys.envoy import Envoy


@dataclass
class Group:
    """Traces that ran together, or the reason why they did not."""

    strategy: str
    lines: list[object]
    why: str | None = None
    forwards: int = 0
    structures: int = 1
    flops: int | None = None  # what was computed, where it was counted
    naive: int | None = None  # what the traces would have computed one by one
    notes: list[str] = field(default_factory=list)
    further: int = 0  # traces beside those of `lines`
    compiles: int = 0  # graphs that were compiled for it
    waited: float = 0.0  # seconds of capturing and compiling
    ran: Notes | None = None  # what was noted of the traces, where each was a run of its own

    @property
    def traces(self) -> int:
        return len(self.lines) + self.further

    @property
    def key(self) -> tuple:
        """What groups have in common that are told as one."""
        return self.strategy, self.why, self.engine

    def ran_alone(self, notes: Sequence[Notes]) -> None:
        """A trace of it has run by itself."""
        self.ran = (
            functools.reduce(operator.add, notes, *([] if self.ran is None else [self.ran])) if notes else self.ran
        )
        self.structures = max(self.structures, 0 if self.ran is None else len(self.ran.plans))

    def join(self, other: Group) -> None:
        """Take over another one's figures: one line tells of both. Lines of code are held once."""
        lines = list(dict.fromkeys([*self.lines, *other.lines]))
        self.further, self.lines = self.traces + other.traces - len(lines), lines
        self.forwards += other.forwards
        self.structures = max(self.structures, other.structures)
        self.compiles += other.compiles
        self.waited += other.waited
        counted = [None not in (g.flops, g.naive) for g in (self, other)]
        self.flops, self.naive = (
            (self.flops + other.flops, self.naive + other.naive) if all(counted) else (None, None)  # type: ignore[operator]
        )
        self.ran_alone([] if other.ran is None else [other.ran])
        known = {_bare(note) for note in self.notes}
        self.notes += [note for note in other.notes if _bare(note) not in known]

    def note(self, line: str) -> None:
        """Add a line, once."""
        if line not in self.notes:
            self.notes.append(line)

    def to_dict(self) -> dict:
        hidden = ("lines", "further", "ran")
        facts = {k: v for k, v in vars(self).items() if v not in (None, []) and k not in hidden}
        facts |= {} if self.ran is None else {"ran": facts_of(self.ran)}
        return facts | {
            "engine": self.engine,
            "traces": self.traces,
            "lines": sorted({str(line) for line in self.lines}),
        }

    @property
    def engine(self) -> str | None:
        """What ran them: "hooks" or "captured graphs"."""
        if self.strategy in SHARED:
            return SHARED[self.strategy]
        return None if self.ran is None else "captured graphs" if self.ran.engine == "spliced" else "hooks"

    def __str__(self) -> str:
        where = ", ".join(sorted({str(line) for line in self.lines})[:3])
        text = f"{self.traces} trace(s) from {where}: {self.strategy}"
        if self.engine is not None:
            text += f" on {self.engine}"
        if self.forwards:
            text += f", {self.forwards} forward(s)"
        if self.structures > 1:
            text += f", {self.structures} structures"
        if self.flops and self.naive:
            text += f", {self.flops / self.naive:.2f} of the FLOPs of the loop"
        if self.compiles:
            text += f", {self.compiles} graph{'s' * (self.compiles != 1)} compiled for it"
        if self.waited >= 0.05:
            text += f" ({seconds(self.waited)} capturing and compiling)"
        alone = [] if self.ran is None else [f"fallback: {why}" for why in self.ran.fallbacks]
        alone += [] if self.ran is None else [f"sync point: {line} needed a number" for line in self.ran.syncs]
        lines = [*([self.why] if self.why else []), *self.notes, *alone]
        return text + "".join(f"\n    {line}" for line in lines)


class Report:
    """Readable as text, `.to_dict()` for tools."""

    def __init__(self, what: str = "session", line: object = None):
        self.what, self.line = what, line
        self.groups: list[Group] = []
        self.notes: list[str] = []  # of all of it: which engine, and why

    def at_once(self, line: object, why: str, ran: Sequence[Notes] = ()) -> None:
        """A trace that was not put off."""
        group = Group("at once", [line], why, forwards=sum(n.forwards for n in ran))
        self._alone(group, ran)

    def take(self, other: Report) -> None:
        """What another one tells, too: like with like."""
        self.notes += [note for note in other.notes if note not in self.notes]
        for group in other.groups:
            same = next((g for g in self.groups if g.key == group.key), None)
            if same is None:
                self.groups.append(replace(group, lines=[*group.lines], notes=[*group.notes]))
            else:
                same.join(group)

    def alone(self, line: object, ran: Sequence[Notes]) -> None:
        """A trace outside of any session."""
        group = Group("one by one", [line], forwards=sum(n.forwards for n in ran))
        self._alone(group, ran)

    def _alone(self, group: Group, ran: Sequence[Notes]) -> None:
        group.ran_alone(ran)
        group.compiles, group.waited = sum(n.compiles for n in ran), sum(n.capture_s + n.compile_s for n in ran)
        self.add(group)

    def add(self, group: Group) -> None:
        """What ran next; alone for the same reason as what ran before is told with it."""
        last = self.groups[-1] if self.groups else None
        alone = group.strategy in ("at once", "one by one")
        if last is not None and alone and last.key == group.key:
            last.join(group)
        else:
            self.groups.append(group)

    def to_dict(self) -> dict:
        """The same facts as plain data."""
        about = {"what": self.what, "line": None if self.line is None else str(self.line), "notes": self.notes}
        return about | {"groups": [g.to_dict() for g in self.groups]}

    def __str__(self) -> str:
        title = self.what if self.line is None else f"{self.what} at {short(self.line)}"
        groups = [f"  {g}".replace("\n", "\n  ") for g in self.groups]
        return "\n".join([title, *(f"  {note}" for note in self.notes), *groups])

    __repr__ = __str__


def _bare(note: str) -> str:
    """A note without its figure, which is another one in each forward."""
    return re.sub(r"^\d+% ", "", note)


@contextlib.contextmanager
def gathered(model: Envoy, report: Report) -> Iterator[Report]:
    """What runs in the block is told in `report`, and not elsewhere."""
    outer, host_of(model).shared.verb = host_of(model).shared.verb, report
    try:
        yield report
    finally:
        host_of(model).shared.verb = outer


@contextlib.contextmanager
def as_one(model: Envoy, what: str, line: object) -> Iterator[Report]:
    """Everything that runs in the block is one run, for `model.explain()`: that of the outermost verb, at `line`."""
    outer = host_of(model).shared.verb
    try:
        with gathered(model, Report(what, line)) as report:
            yield report
    finally:
        if outer is None:
            host_of(model).told.ran = report
        else:
            outer.take(report)


def one_run(verb: Callable) -> Callable:
    """A function of a model, `verb(model, ...)`, that `model.explain()` tells as one run."""

    @functools.wraps(verb)
    def told(model: Envoy, *args: object, **kwargs: object) -> Callable:
        with as_one(model, verb.__name__, user_line()):
            return verb(model, *args, **kwargs)

    return told
