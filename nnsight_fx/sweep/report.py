"""`session.explain()`: what ran together and how, and why anything ran alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Group:
    """Traces that ran together, or the reason why they did not."""

    strategy: str
    lines: list[Any]
    why: str | None = None
    forwards: int = 0
    structures: int = 1
    flops: int | None = None  # what was computed, where it was counted
    naive: int | None = None  # what the traces would have computed one by one
    notes: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        """Add a line, once."""
        if line not in self.notes:
            self.notes.append(line)

    def to_dict(self) -> dict[str, Any]:
        facts = {k: v for k, v in vars(self).items() if v not in (None, []) and k != "lines"}
        return facts | {"traces": len(self.lines), "lines": sorted({str(line) for line in self.lines})}

    def __str__(self) -> str:
        where = ", ".join(sorted({str(line) for line in self.lines})[:3])
        text = f"{len(self.lines)} trace(s) from {where}: {self.strategy}"
        if self.forwards and self.strategy != "at once":
            text += f", {self.forwards} forward(s)"
        if self.structures > 1:
            text += f", {self.structures} structures"
        if self.flops and self.naive:
            text += f", {self.flops / self.naive:.2f} of the FLOPs of the loop"
        return text + "".join(f"\n    {line}" for line in [*([self.why] if self.why else []), *self.notes])


class Report:
    """Readable as text, `.to_dict()` for tools."""

    def __init__(self):
        self.groups: list[Group] = []

    def at_once(self, line: Any, why: str) -> None:
        """A trace that was not put off."""
        self.add(Group("at once", [line], why, forwards=1))

    def add(self, group: Group) -> None:
        """What ran next; alone for the same reason as what ran before is told with it."""
        last = self.groups[-1] if self.groups else None
        alone = group.strategy in ("at once", "one by one")
        if last is not None and alone and (last.strategy, last.why) == (group.strategy, group.why):
            last.lines += group.lines
            last.forwards += group.forwards
        else:
            self.groups.append(group)

    def to_dict(self) -> dict[str, Any]:
        """The same facts as plain data."""
        return {"groups": [g.to_dict() for g in self.groups]}

    def __str__(self) -> str:
        return "\n".join(["session"] + [f"  {g}".replace("\n", "\n  ") for g in self.groups])

    __repr__ = __str__
