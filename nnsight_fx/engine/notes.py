"""What one trace did, noted while it ran, for `tracer.explain()` and `model.explain()`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from ..plan.printing import short
from .clock import seconds
from .how import How

if TYPE_CHECKING:
    from .captured.run import SplicedRun
    from .run import Run


@dataclass
class Notes:
    """The facts of one trace; `+` joins those of its forwards."""

    line: str = ""  # where the trace was opened
    engine: str = (
        "hooks"  # or "spliced"; in a forward that several traces shared "batched" (on hooks) or "forked" (captured)
    )
    forwards: int = 0
    segments: int = 0  # captured segments that ran
    compiles: int = 0
    hits: int = 0  # segments that ran as they had been compiled before
    operations: int = 0  # of the plan
    syncs: list[str] = field(default_factory=list)  # the lines of the body that needed a number
    live: list[str] = field(default_factory=list)  # sites that were touched between segments
    fallbacks: list[str] = field(default_factory=list)
    saved: int = 0  # tensors delivered
    bytes: int = 0  # and their memory
    graphs: int = 0  # how many of them keep the forward alive, for a backward
    capture_s: float = 0.0  # seconds of capturing, in these runs
    compile_s: float = 0.0
    hows: list[How] = field(default_factory=list)  # how its forwards ran: each way once
    what: str = "trace"  # or the verb that made it
    plans: list[int] = field(default_factory=list, repr=False)  # of each structure, its one plan

    def __add__(self, other: Notes) -> Notes:
        joined: dict = {name: getattr(self, name) + getattr(other, name) for name in COUNTED}
        lists: dict = {name: list(dict.fromkeys(getattr(self, name) + getattr(other, name))) for name in LISTED}
        return Notes(
            self.line or other.line,
            next((e for e in ENGINES if e in (self.engine, other.engine)), "hooks"),
            **joined,
            **lists,
            what=self.what,
        )

    def __str__(self) -> str:
        ran = f"{self.engine}, {self.forwards} forward{'s' * (self.forwards != 1)}"
        if self.engine in SHARED:
            ran = f"{SHARED[self.engine]}, in a forward that it shared with other traces"
        lines = [f"{self.what} at {self.line}: {ran}, {self.operations} recorded operations"]
        if self.engine == "spliced":
            lines.append(
                f"  {self.segments} segments ran, {self.compiles} compiled for it, {self.hits} cache hits{took(self)}"
            )
        lines += [f"  how: {how}" for how in self.hows if how.engine == "captured" or not self.fallbacks]
        lines += [f"  sync point: {line} needed a number, and the model ran up to there" for line in self.syncs]
        lines += [f"  live, between segments: {name}" for name in self.live]
        lines += [f"  fallback: {why}" for why in self.fallbacks]
        lines.append(f"  saved: {self.saved} tensors, {size(self.bytes)}")
        if self.graphs:
            lines.append(
                f"  {self.graphs} of them keep{'s' * (self.graphs == 1)} the forward's activations alive for a backward: call one, "
                "`.detach()` them, or trace under `torch.no_grad()`"
            )
        return "\n".join(lines)


COUNTED = (
    *("forwards", "segments", "compiles", "hits", "operations", "saved", "bytes", "graphs"),
    *("capture_s", "compile_s"),
)
LISTED = ("syncs", "live", "fallbacks", "hows", "plans")
ENGINES = ("spliced", "forked", "batched")
SHARED = {"batched": "hooks", "forked": "captured graphs"}


def notes_of(line: object, runs: Iterable, delivered: list) -> Notes:
    """The notes of one recording: its runs, and the tensors that were delivered."""
    made = functools.reduce(operator.add, map(of_run, runs))
    made.line, made.saved = short(line), len(delivered)
    made.bytes, made.graphs = sum([n for n, _ in delivered]), sum([g for _, g in delivered])
    return made


def took(notes: Notes) -> str:
    """The seconds of capturing and compiling, where there were any."""
    told = [
        f"{seconds(s)} {what}"
        for s, what in ((notes.capture_s, "capturing"), (notes.compile_s, "compiling"))
        if s >= 0.05
    ]
    return f"; {', '.join(told)}" if told else ""


def of_run(run: Run | SplicedRun) -> Notes:
    """The notes of one run, before it is released."""
    segments = getattr(run, "segments_run", 0)
    return Notes(
        engine=run.shared or ("spliced" if segments else "hooks"),
        forwards=run.forwards,
        segments=segments,
        compiles=run.compiles,
        hits=run.hits,
        operations=len(run.plan.ops),
        syncs=[short(run.lines[n]) for n in run.plan.syncs if n < len(run.lines)],
        live=sorted(getattr(run, "live_sites", ())),
        fallbacks=list(run.report),
        hows=[How(run.shared) if run.shared else run.as_it_ran()] if run.forwards else [],
        capture_s=run.capture_s,
        compile_s=run.compile_s,
        plans=[id(run.plan)],
    )


def facts(notes: Notes) -> dict:
    """The notes as plain data."""
    return {name: value for name, value in asdict(notes).items() if name != "plans"}


def size(n: int) -> str:
    """Bytes, readable."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024  # type: ignore[assignment]
    return f"{n:.1f} GiB"
