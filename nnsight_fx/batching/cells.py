"""Traces as rows of one walk over a graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from ..capture.marker import marker_of, site
from ..engine.run import Run
from ..passes.cost import cost
from ..passes.outline import seams
from ..passes.tokens import Layout
from ..plan.interleave import Firing
from ..plan.keys import Keep
from ..plan.plan import Op
from ..plan.verbs import Site, Write
from .batch import move_aliases
from .rows import Mixed


class Cell(Run):
    """One trace in a forward of many: it is given its rows of a site, and gives back what it makes of them."""

    shared = "forked"
    size = 1  # its rows
    start = 0  # the first of them: of the clean run, until it leaves that
    leaves: Site | None = None  # the site at which it does, to have rows of its own
    joins_at = 0  # where those are
    ones: list = []  # its constants, where the site that is read last holds one position of a row

    def _write(self, op: Op, verb: Write, firing: Firing) -> None:
        for i, value in enumerate(self.arguments(op)[0][0]):
            if not (isinstance(value, Keep) and value.index == i):
                firing.leaves[i] = firing.leaves[value.index] if isinstance(value, Keep) else value

    changed: frozenset[Site] = frozenset()  # the sites that it changes
    base = 0  # the first of its rows of the clean run, for good
    layout: Layout | None = None  # where the rows are as tokens

    def part(self, x: torch.Tensor, meta: dict) -> torch.Tensor:
        """Its rows of the value of a node: a view, but where the beginning of its rows is the clean run's."""
        if meta.get("clean"):
            return x.narrow(meta["rows"], self.base, self.size)
        if meta.get("packed") is None:
            return x.narrow(meta["rows"], self.start, self.size)
        assert self.layout is not None
        return self.layout.part(x, meta["rows"], meta["packed"], self.start, self.size)

    def put(self, x: torch.Tensor, meta: dict, new: torch.Tensor) -> None:
        """Write its rows of the value of a node, of which `part` gave a copy."""
        assert self.layout is not None
        self.layout.put(x, meta["rows"], meta["packed"], self.start, self.size, new)

    def shares(self, meta: dict) -> bool:
        """Are earlier positions of its rows there the clean run's?"""
        if meta.get("packed") is None or meta.get("clean") or self.layout is None:
            return False
        return any(self.layout.starts[self.start : self.start + self.size])

    @property
    def over(self) -> bool:
        return self.stopping or len(self.done) == len(self.plan.ops)


class Finished(Exception):
    """Nobody wants anything of what is left. Never reaches the user."""


class Walk(fx.Interpreter):
    """An outlined, forked graph on real values, with the traces' operations at its sites."""

    def __init__(
        self,
        gm: fx.GraphModule,
        call: Callable[[str, Sequence], object],
        cells: list[Cell],
        positions: int = 1,
    ):
        super().__init__(gm)
        self.call, self.cells = call, cells
        self.groups = {group[-1]: (where, group) for where, group in seams(gm)}
        self.flops = 0.0
        self.cost = {
            name: cost(region.graph.nodes, "flops", positions)  # type: ignore[union-attr]
            for name, region in gm.named_children()
        }

    def go(self, *args: object) -> None:
        for cell in self.cells:
            cell.work(None)
        with contextlib.suppress(Finished):
            self.run(*args)

    def run_node(self, n: fx.Node) -> object:
        if n.op == "call_module":
            args: Any = self.map_nodes_to_values(n.args, n)
            held = [(x, _rows(a)) for a, x in zip(n.args, args, strict=True)]
            rows = max((x.shape[d] for x, d in held if d is not None), default=0)
            self.flops += self.cost[str(n.target)] * rows
            return self.call(str(n.target), args)
        if n.op == "output":
            return None
        if n.target is not site:
            return super().run_node(n)
        marker = marker_of(n)
        value = self.env[marker.value]
        if n not in self.groups:
            return value
        where, group = self.groups[n]
        leaves = self._fire(where, group, value)
        for other in group[:-1]:
            self.env[other] = leaves[marker_of(other).leaf]
        if all(cell.over for cell in self.cells):
            raise Finished
        return leaves[marker.leaf]

    def _fire(self, where: Site, group: list[fx.Node], last: object) -> list:
        markers = [marker_of(n) for n in group]
        leaves: list = [None] * (max(m.leaf for m in markers) + 1)
        metas: list[dict] = [{}] * len(leaves)
        for n, marker in zip(group, markers, strict=True):
            leaves[marker.leaf] = last if n is group[-1] else self.env[n]
            metas[marker.leaf] = marker.value.meta
        written: set[int] = set()
        for cell in self.cells:
            if cell.leaves == where:
                cell.start = cell.joins_at
            if where in cell.plan.touches and not cell.stopping:
                self._visit(cell, where, leaves, metas, written)
        return leaves

    def _visit(self, cell: Cell, where: Site, leaves: list, metas: list[dict], written: set[int]) -> None:
        """One trace at one site, on its own rows; what it replaces is replaced in a copy, which nothing else aliases."""
        changes = cell.plan.writes or any(isinstance(cell.plan.ops[n].verb, Write) for n in cell.plan.touches[where])
        used = {j for n in cell.plan.touches[where] for j in range(len(leaves)) if (n, j) in cell.plan.users}
        dims = [meta.get("rows") for meta in metas]
        if changes and any(dims[j] is None and leaves[j] is not None for j in used):
            raise Mixed(f"`{'.'.join(where[:2])}` holds a tensor that all rows share")
        own = [x if d.get("rows") is None or x is None else cell.part(x, d) for x, d in zip(leaves, metas, strict=True)]
        firing = Firing(where, list(own), None)
        cell.fire(firing)
        for j, (old, new) in enumerate(zip(own, firing.leaves, strict=True)):
            shares = cell.shares(metas[j])
            if new is old and not (shares and where in cell.changed):
                continue
            if dims[j] is None or (new is not old and metas[j].get("clean")):
                raise Mixed(f"`{'.'.join(where[:2])}` holds a tensor that all rows share")
            if new is not old and j not in written:
                leaves[j] = leaves[j].clone()
                written.add(j)
            if shares:
                cell.put(leaves[j], metas[j], new)
                continue
            place = cell.part(leaves[j], metas[j])
            place.copy_(new)
            move_aliases(cell.env, new, place)


def _rows(node: object) -> int | None:
    dim = node.meta.get("rows") if isinstance(node, fx.Node) else None
    return dim if isinstance(dim, int) else None
