"""Where plans touch a graph: what that says about cutting it, forking in it, and what of it nobody needs."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch.fx as fx

from ..passes.outline import seams
from ..plan.keys import ALL, Items, NumberSlot, Value
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


def positions(cells: Iterable, where: Site, rows: int, size: int) -> list[int] | None:
    """The one position of each row that is read at a site, if that is all that is done with it there."""
    found: dict = {}
    for cell in cells:
        plan = cell.plan
        slots: set[int] = set()
        for n in plan.touches.get(where, ()):
            if not isinstance(plan.ops[n].verb, Read):
                return None
            for m, op in enumerate(plan.ops):
                if any(v[0] == n for v in plan.needs[m]):
                    slot = _one_position(op, n)
                    if slot is None:
                        return None
                    slots.add(slot)
        if not slots:
            continue
        at = {cell.constants[slot] for slot in slots}
        start = cell.joins_at
        mine = range(start, start + size)
        if len(at) > 1 or any(found.get(row, min(at)) not in at for row in mine):
            return None
        found.update(dict.fromkeys(mine, min(at)))
        cell.ones = [0 if slot in slots else c for slot, c in enumerate(cell.constants)]
    return [found.get(row, 0) for row in range(rows)]


def _one_position(op: Op, n: int) -> int | None:
    """The slot of the position in `value[:, position]`."""
    if not isinstance(op.verb, Call) or name_of(op.verb.fn.obj) not in ("__getitem__", "getitem") or op.effect:
        return None
    value, index = op.args.items
    if value != Value(n, 0) or not isinstance(index, Items) or len(index.items) < 2:
        return None
    rows, place, *rest = index.items
    plain = all(k == ALL for k in (rows, *rest))
    return place.slot if plain and isinstance(place, NumberSlot) else None


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
