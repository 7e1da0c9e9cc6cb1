"""Skips of a call by several invokes: all of them skip it, or none; what they give becomes one value."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..errors import SkipError
from ..lines import Line
from . import tree
from .plan import InterventionGraph
from .verbs import Site, Skip


def skip_of(plan: InterventionGraph, at: Site, invoke: int) -> int:
    """The operation by which an invoke skips a call."""
    return next(n for n in plan.touches[at] if isinstance(plan.ops[n].verb, Skip) and plan.ops[n].invoke == invoke)


def check_skips(plan: InterventionGraph, lines: Sequence[Line]) -> None:
    """Before anything runs: is each call that is skipped skipped by everybody? Raises `SkipError`."""
    for path, calls in plan.skips.items():
        for call in calls:
            at = (path, "output", call)
            check_skip(plan, at, {op.invoke for _, op, verb in plan.of_kind(Skip) if verb.site == at}, lines)


def check_skip(plan: InterventionGraph, at: Site, invokes: Collection[int], lines: Sequence[Line]) -> None:
    """One forward cannot both run and skip a call. Raises `SkipError`."""
    groups = plan.groups
    if not {groups.rows[i] for i in invokes} < groups.inputs:
        return
    written = ", ".join(
        str(lines[n]) for n in plan.touches[at] if isinstance(plan.ops[n].verb, Skip) and n < len(lines)
    )
    raise SkipError(
        f"`{at[0]}` is skipped in {len(invokes)} of {len(groups.inputs)} invokes ({written}); "
        "one forward cannot both run and skip a module. Skip it in every invoke, or use two traces."
    )


def in_force(parts: dict[int, tuple] | None, groups: Any) -> dict[int, tuple] | None:
    """Who of those that skip a call has the last word: one over the whole batch, or those over rows behind it."""
    found: dict[int, tuple] = {}
    for i in sorted(parts or ()):
        whole = i >= len(groups.rows) or groups.rows[i] is None
        keep = {} if whole else {j: p for j, p in found.items() if groups.rows[j] is not None}
        found = {**keep, i: parts[i]}  # type: ignore[index]
    return found if parts is not None else None


def gather(parts: dict[int, tuple], groups: object) -> tuple[list, tree.Spec]:
    """The output of a skipped module from what each invoke gave: rows concatenated leaf by leaf."""
    ordered = list((in_force(parts, groups) or {}).values())
    if len(ordered) == 1:
        return ordered[0][1], ordered[0][0]
    leaves = [
        torch.cat(column) if isinstance(column[0], torch.Tensor) else column[0]
        for column in zip(*(p[1] for p in ordered), strict=True)
    ]
    return leaves, ordered[0][0]
