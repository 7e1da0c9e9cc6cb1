"""What one trace did, noted while it ran, for `tracer.explain()` and `model.explain()`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..tracing.printing import short


@dataclass
class Notes:
    """The facts of one trace; `+` joins those of its forwards."""

    line: str = ""  # where the trace was opened
    engine: str = "hooks"
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

    def __add__(self, other: Notes) -> Notes:
        joined: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in COUNTED}
        lists: dict[str, Any] = {
            name: list(dict.fromkeys(getattr(self, name) + getattr(other, name))) for name in LISTED
        }
        return Notes(
            self.line or other.line,
            "spliced" if "spliced" in (self.engine, other.engine) else "hooks",
            **joined,
            **lists,
        )

    def __str__(self) -> str:
        lines = [
            f"trace at {self.line}: {self.engine}, {self.forwards} forward{'s' * (self.forwards != 1)}, {self.operations} recorded "
            f"operations"
        ]
        if self.engine == "spliced":
            lines.append(f"  {self.segments} segments ran, {self.compiles} compiled for it, {self.hits} cache hits")
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


COUNTED = ("forwards", "segments", "compiles", "hits", "operations", "saved", "bytes", "graphs")
LISTED = ("syncs", "live", "fallbacks")


def notes_of(line: Any, runs: Iterable[Any], delivered: list) -> Notes:
    """The notes of one recording: its runs, and the tensors that were delivered."""
    made = functools.reduce(operator.add, map(_of_run, runs))
    made.line, made.saved = short(line), len(delivered)
    made.bytes, made.graphs = sum([n for n, _ in delivered]), sum([g for _, g in delivered])
    return made


def _of_run(run: Any) -> Notes:
    segments = getattr(run, "segments_run", 0)
    return Notes(
        engine="spliced" if segments else "hooks",
        forwards=1,
        segments=segments,
        compiles=run.compiles,
        hits=run.hits,
        operations=len(run.plan.ops),
        syncs=[short(run.lines[n]) for n in run.plan.syncs if n < len(run.lines)],
        live=sorted(getattr(run, "live_sites", ())),
        fallbacks=list(run.report),
    )


def size(n: int) -> str:
    """Bytes, readable."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024  # type: ignore[assignment]
    return f"{n:.1f} GiB"
