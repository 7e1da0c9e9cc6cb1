"""From which position on does a plan change a site?"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..plan.encode import Keep, references
from ..plan.plan import CALL, READ, WRITE, InterventionGraph, Op, Site

Leaf = tuple[Site, int]


class Cover(NamedTuple):
    """What a value may share with a leaf of a site: its positions from `start` on, in dimension 1 if it is the `whole`."""

    start: int
    whole: bool
    read: int


def reach(plan: InterventionGraph, constants: list, positions: int) -> dict[Leaf, int]:
    """For each leaf that a plan changes the first position that may change; 0 where that is not plain to see."""
    covers: dict[tuple[int, int], dict[Leaf, Cover]] = {}
    found: dict[Leaf, int] = {}
    copies: dict[
        Leaf, tuple[Leaf, int]
    ] = {}  # a clone, as a leaf of its own: of which leaf, and where that was changed by then
    written: dict[Leaf, Leaf] = {}  # clones that stand in a leaf's place now
    sites = [n for n, op in enumerate(plan.ops) if op.kind in (READ, WRITE)]

    def change(leaf: Leaf, start: int) -> None:
        found[leaf] = min(start, found.get(leaf, positions))
        if leaf in written:
            change(written[leaf], 0)

    for n, op in enumerate(plan.ops):
        if op.kind == READ:
            for j in {j for m, j in plan.users if m == n}:
                covers[n, j] = {(op.target, j): Cover(0, True, n)}
            continue
        if op.kind == WRITE:
            for j, key in enumerate(op.args[2][0][2]):
                leaf = (op.target, j)
                if _same(key, leaf, covers):
                    continue
                held = covers.get(key[1:], {})
                copied = next((c for c in held if held[c].whole and copies.get(c, (None,))[0] == leaf), None)
                change(leaf, 0 if copied is None else min(copies[copied][1], found.get(copied, positions)))
                if copied is not None:
                    written[copied] = leaf
            continue
        if _clones(op):
            of = list(covers.get(op.args[2][0][1:], {}).items())
            if len(of) == 1 and of[0][1].whole and of[0][0] not in copies:
                copy: Leaf = (("", "copy", n), 0)
                copies[copy], covers[n, 0] = (of[0][0], found.get(of[0][0], positions)), {copy: Cover(0, True, n)}
                continue
        base, index = _indexed(op)
        shared: dict[Leaf, Cover] = {}
        for value in dict.fromkeys(_references(op)):
            for leaf, cover in covers.get(value, {}).items():
                if op.effect == "inplace" and (base is None or value == base):
                    late = leaf not in copies and any(
                        cover.read < m < n and plan.ops[m].target != leaf[0] for m in sites
                    )
                    own = _first(index, constants, positions) if cover.whole and base is not None else cover.start
                    change(leaf, 0 if late else own)
                narrow = base is not None and value == base and cover.whole and not op.effect
                start = _first(index, constants, positions) if narrow else cover.start
                kept = shared.get(leaf)
                shared[leaf] = Cover(min(start, kept.start if kept else start), False, cover.read)
        for m, j in plan.users:
            if m == n and shared:
                covers[n, j] = shared
    return {leaf: start for leaf, start in found.items() if leaf not in copies}


def _references(op: Op) -> list[tuple[int, int]]:
    return list(references((op.args, op.kwargs)))


def _same(key: Any, leaf: Leaf, covers: dict) -> bool:
    """Is what a write puts there what was there?"""
    if key[0] == "l" and isinstance(key[2], Keep):
        return key[2].index == leaf[1]
    cover = covers.get(key[1:], {}).get(leaf) if key[0] == "v" else None
    return cover is not None and cover.whole


def _clones(op: Op) -> bool:
    name = getattr(getattr(op.target, "obj", None), "__name__", "")
    return op.kind == CALL and name == "clone" and op.args[2][:1] != () and op.args[2][0][0] == "v"


def _indexed(op: Op) -> tuple[tuple[int, int] | None, Any]:
    """Of `value[index]` and `value[index] = ...` both."""
    name = getattr(getattr(op.target, "obj", None), "__name__", "")
    if op.kind != CALL or name not in ("__getitem__", "getitem", "__setitem__", "setitem") or op.args[2][0][0] != "v":
        return None, None
    return op.args[2][0][1:], op.args[2][1]


def _first(index: Any, constants: list, positions: int) -> int:
    """The first position in `[:, position]` and `[:, start:]`; 0 in anything else."""

    def number(key: Any) -> Any:
        if key[0] == "n" and key[2] == "int":
            return constants[key[1]]
        return key[2] if key[0] == "l" else None

    if index[0] != "t" or len(index[2]) < 2 or index[2][0][0] != "k":
        return 0
    if any(k != ("l", type(None), None) for k in index[2][0][1:]):
        return 0
    place = index[2][1]
    if place[0] == "k":
        at, step = number(place[1]), number(place[3])
        if step not in (None, 1):
            return 0
    else:
        at = number(place)
    if type(at) is not int or not -positions <= at <= positions:
        return 0
    return min(at % positions if at < 0 else at, positions - 1)
