"""From which position on does a plan change a site?"""

from __future__ import annotations

from typing import NamedTuple

from ..plan.keys import ALL, Items, Keep, Key, NumberSlot, Plain, Span, Value, references
from ..plan.lifting import name_of
from ..plan.plan import InterventionGraph, Op
from ..plan.verbs import Call, Read, Site, Write

Leaf = tuple[Site, int]
INDEXED = ("__getitem__", "getitem", "__setitem__", "setitem")


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
    sites = [(n, op.verb.site) for n, op in enumerate(plan.ops) if isinstance(op.verb, Read | Write)]

    def change(leaf: Leaf, start: int) -> None:
        found[leaf] = min(start, found.get(leaf, positions))
        if leaf in written:
            change(written[leaf], 0)

    for n, op in enumerate(plan.ops):
        if isinstance(op.verb, Read):
            for j in {j for m, j in plan.users if m == n}:
                covers[n, j] = {(op.verb.site, j): Cover(0, True, n)}
            continue
        if isinstance(op.verb, Write):
            for j, key in enumerate(op.tree):
                leaf = (op.verb.site, j)
                if _same(key, leaf, covers):
                    continue
                held = covers.get(key, {}) if isinstance(key, Value) else {}
                copied = next((c for c in held if held[c].whole and copies.get(c, (None,))[0] == leaf), None)
                change(leaf, 0 if copied is None else min(copies[copied][1], found.get(copied, positions)))
                if copied is not None:
                    written[copied] = leaf
            continue
        copied = _cloned(op)
        if copied is not None:
            of = list(covers.get(copied, {}).items())
            if len(of) == 1 and of[0][1].whole and of[0][0] not in copies:
                copy: Leaf = (("", "copy", n), 0)
                copies[copy], covers[n, 0] = (of[0][0], found.get(of[0][0], positions)), {copy: Cover(0, True, n)}
                continue
        base, index = _indexed(op)
        shared: dict[Leaf, Cover] = {}
        for value in dict.fromkeys(_references(op)):
            for leaf, cover in covers.get(value, {}).items():
                if op.effect == "inplace" and (base is None or value == base):
                    late = leaf not in copies and any(cover.read < m < n and site != leaf[0] for m, site in sites)
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


def _references(op: Op) -> list[Value]:
    return list(references(op.args, op.kwargs))


def _same(key: Key, leaf: Leaf, covers: dict) -> bool:
    """Is what a write puts there what was there?"""
    if isinstance(key, Plain) and isinstance(key.value, Keep):
        return key.value.index == leaf[1]
    cover = covers.get(key, {}).get(leaf) if isinstance(key, Value) else None
    return cover is not None and cover.whole


def _cloned(op: Op) -> Value | None:
    """The value that a call clones."""
    clones = isinstance(op.verb, Call) and name_of(op.verb.fn.obj) == "clone"
    of = op.args.items[0] if clones and op.args.items else None
    return of if isinstance(of, Value) else None


def _indexed(op: Op) -> tuple[Value | None, Key | None]:
    """Of `value[index]` and `value[index] = ...` both."""
    if not isinstance(op.verb, Call) or name_of(op.verb.fn.obj) not in INDEXED:
        return None, None
    base, index, *_ = op.args.items
    return (base, index) if isinstance(base, Value) else (None, None)


def _first(index: Key | None, constants: list, positions: int) -> int:
    """The first position in `[:, position]` and `[:, start:]`; 0 in anything else."""

    def number(key: Key) -> object:
        if isinstance(key, NumberSlot) and key.kind == "int":
            return constants[key.slot]
        return key.value if isinstance(key, Plain) else None

    if not isinstance(index, Items) or len(index.items) < 2 or index.items[0] != ALL:
        return 0
    place = index.items[1]
    if isinstance(place, Span):
        at, step = number(place.start), number(place.step)
        if step not in (None, 1):
            return 0
    else:
        at = number(place)
    if type(at) is not int or not -positions <= at <= positions:
        return 0
    return min(at % positions if at < 0 else at, positions - 1)
