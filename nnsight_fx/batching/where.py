"""Where plans touch a graph: what that says about cutting it, forking in it, and what of it nobody needs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch.fx as fx

from ..passes.outline import seams
from ..plan.plan import CALL, READ, WRITE, InterventionGraph, Op, Site


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


def positions(cells: Iterable[Any], where: Site, rows: int, size: int) -> list[int] | None:
    """The one position of each row that is read at a site, if that is all that is done with it there."""
    found: dict[int, Any] = {}
    for cell in cells:
        plan = cell.plan
        slots: set[int] = set()
        for n in plan.touches.get(where, ()):
            if plan.ops[n].kind != READ:
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
    if op.kind != CALL or getattr(op.target.obj, "__name__", "") not in ("__getitem__", "getitem") or op.effect:
        return None
    value, index = op.args[2]
    if value != ("v", n, 0) or index[0] != "t" or len(index[2]) < 2:
        return None
    rows, place, *rest = index[2]
    plain = all(k[0] == "k" and all(x == ("l", type(None), None) for x in k[1:]) for k in (rows, *rest))
    return place[1] if plain and place[:1] == ("n",) else None


def fork_of(plan: InterventionGraph, order: dict[Site, int]) -> Site | None:
    """The first site at which a plan changes something; `None` for one that only looks."""
    roots: dict[int, set[Site]] = {}  # the sites whose values an operation's result may share memory with
    found: set[Site] = set()
    for n, op in enumerate(plan.ops):
        if op.kind == READ:
            roots[n] = {op.target}
        else:
            roots[n] = {s for m, _ in plan.needs[n] for s in roots.get(m, ())}
        if op.kind == WRITE:
            found.add(op.target)
        elif op.kind == CALL and op.effect == "inplace":
            found |= roots[n]
    return min(found, key=lambda s: order[s]) if found else None
