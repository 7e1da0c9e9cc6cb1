"""Where plans touch a graph: what that says about cutting it, forking in it, and what of it nobody needs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch.fx as fx

from ..passes.outline import seams
from ..plan.keys import ALL, NOTHING, Items, Key, NumberSlot, Plain, Span, Value
from ..plan.lifting import name_of
from ..plan.plan import InterventionGraph, Op
from ..plan.verbs import Call, Read, Site, Write


def blocks(order: Collection[Site]) -> set[Site]:
    """Where a model's repeated parts end and the first begins: the outermost children that are numbered."""
    numbered: dict[str, list[str]] = {}
    for path, _, _ in order:
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is not None:
            numbered.setdefault(".".join(parts[:at]), []).append(".".join(parts[: at + 1]))
    found: set[Site] = set()
    for paths in numbered.values():
        each = list(dict.fromkeys(paths))
        if len(each) > 1:
            found |= {(each[0], "input", 0), *((path, "output", 0) for path in each)}
    return found & set(order)


def keep_until(gm: fx.GraphModule, last: Site) -> None:
    """Drop what comes behind a site, outputs included."""
    marker = dict(seams(gm))[last][-1]
    nodes = list(gm.graph.nodes)
    gm.graph.output_node().args = ((marker,),)
    for node in reversed(nodes[nodes.index(marker) + 1 : -1]):
        gm.graph.erase_node(node)


LAST = Plain(int, -1)  # the last position, where the plan says so itself: of one position it is that, too


def positions(cells: Iterable, where: Site, rows: int, size: int, shape: Sequence[int]) -> list[int] | None:
    """The one position of each row that is read at a site, of a value of this shape, if that is all that is done with it there."""
    found: dict = {}
    known: dict[InterventionGraph, set[Key] | None] = {}
    for cell in cells:
        plan = cell.plan
        if plan not in known:
            known[plan] = _read_at(plan, where, len(shape)) if len(shape) > 1 and shape[1] else None
        places = known[plan]
        if places is None:
            return None
        if not places:
            continue
        slots = {place.slot for place in places if isinstance(place, NumberSlot)}
        at = {cell.constants[slot] for slot in slots} | ({shape[1] - 1} if LAST in places else set())
        start = cell.joins_at
        mine = range(start, start + size)
        if len(at) > 1 or any(found.get(row, min(at)) not in at for row in mine):
            return None
        found.update(dict.fromkeys(mine, min(at)))
        cell.ones = [0 if slot in slots else c for slot, c in enumerate(cell.constants)]
    return [found.get(row, 0) for row in range(rows)]


def _read_at(plan: InterventionGraph, where: Site, dims: int) -> set[Key] | None:
    """The positions at which a plan reads a site, if it does nothing else with it."""
    found: set[Key] = set()
    for n in plan.touches.get(where, ()):
        places = _indexed_at(plan, Value(n, 0), 1, dims) if isinstance(plan.ops[n].verb, Read) else None
        if places is None:
            return None
        found |= places
    return found


def _indexed_at(plan: InterventionGraph, value: Value, ahead: int, dims: int) -> set[Key] | None:
    """The positions at which a plan indexes a value, of which `ahead` dimensions come before that of the positions.

    `value[:, p]`, `value[0, p, 7]`, `value[..., -1, :]`, `value[0][p]`, `value[:, -1:]`.
    """
    found: set[Key] = set()
    for m, op in enumerate(plan.ops):
        if all(v.op != value.op for v in plan.needs[m]):
            continue
        items = _index(op, value, dims)
        if not items or not all(_number(i) or isinstance(i, Span) for i in items[:ahead]):
            return None
        if len(items) > ahead:
            place = _place(items[ahead])
            places = None if place is None else {place}
        else:
            places = _indexed_at(plan, Value(m, 0), 0, dims - 1) if all(map(_number, items)) else None
        if places is None:
            return None
        found |= places
    return found


def _index(op: Op, value: Value, dims: int) -> tuple[Key, ...] | None:
    """The entries of the index in `value[index]`, a number or slice for each of the first dimensions."""
    if not isinstance(op.verb, Call) or name_of(op.verb.fn.obj) not in ("__getitem__", "getitem") or op.effect:
        return None
    indexed, index = op.args.items
    if indexed != value:
        return None
    items = index.items if isinstance(index, Items) and index.cls is tuple else (index,)
    if items[:1] != (Plain(type(...), ...),):
        return items
    rest = items[1:]
    plain = all(_number(i) or isinstance(i, Span) for i in rest)
    return (*[ALL] * (dims - len(rest)), *rest) if plain else None


def _number(key: Key) -> bool:
    return (isinstance(key, NumberSlot) and key.kind == "int") or (isinstance(key, Plain) and key.cls is int)


def _place(key: Key) -> Key | None:
    """The one position that an entry of an index chooses; `None` for more, or another."""
    if isinstance(key, NumberSlot) and key.kind == "int":
        return key
    return LAST if key in (LAST, Span(LAST, NOTHING, NOTHING)) else None


def fork_of(plan: InterventionGraph, order: dict[Site, int]) -> Site | None:
    """The first site at which a plan changes something; `None` for one that only looks."""
    roots: dict[int, set[Site]] = {}  # the sites whose values an operation's result may share memory with
    found: set[Site] = set()
    for n, op in enumerate(plan.ops):
        if isinstance(op.verb, Read):
            roots[n] = {op.verb.site}
        else:
            roots[n] = {s for m, _ in plan.needs[n] for s in roots.get(m, ())}
        if isinstance(op.verb, Write):
            found.add(op.verb.site)
        elif isinstance(op.verb, Call) and op.effect == "inplace":
            found |= roots[n]
    return min(found, key=lambda s: order[s]) if found else None
