"""Forked batches: traces share the clean run, and each becomes a row of its own where it first changes something.

The captured graph is cut at the sites that the traces touch, and at the model's blocks. Between cuts it runs as compiled
regions, each distinct one compiled once, over all rows that there are; at a cut the traces' operations run on their rows.
"""

from __future__ import annotations

import contextlib
import copy
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx as fx

from .. import compat
from ..capture.marker import marker_of, pass_through, site
from ..capture.segment import Segment
from ..engine import clock
from ..engine.captured.capture import Capture
from ..engine.captured.regions import facts, structure
from ..passes.causal import APART, causal
from ..passes.cost import cost
from ..passes.demand import demand, take
from ..passes.effects import changes
from ..passes.fork import fork
from ..passes.outline import outline, seams, unmark
from ..passes.tokens import Layout, NotCausal
from ..plan import tree
from ..plan.verbs import Site
from ..report.runs import Group
from .cells import Cell, Walk
from .memory import chunks, free, out_of_memory
from .pending import Pending
from .positions import positions as follow
from .reach import reach
from .rowgraph import annotated, captured, lengths
from .rows import Mixed
from .where import blocks, fork_of, keep_until, positions

KEPT = 16  # compiles of a region, for sizes that the guards of one another rule out
WORTH = 0.9  # of the positions: where more must be computed, all are, with the kernels of a batch

_compiled: weakref.WeakKeyDictionary[Segment, dict[tuple, SizedRegion]] = weakref.WeakKeyDictionary()  # by structure
_ready: weakref.WeakKeyDictionary[Segment, dict[tuple, Prepared]] = weakref.WeakKeyDictionary()


class SizedRegion:
    """What lies between two cuts, compiled: once, and again for sizes that the guards of that rule out."""

    def __init__(self, graph: fx.GraphModule, segment: Segment):
        self.graph = graph
        given = (n.meta.get("example_value") for n in graph.graph.nodes if n.op == "placeholder")
        self.fakes = [compat.fakes.as_input(segment.context, x) for x in given]
        self.calls: list[tuple[list, Callable]] = []  # the guards of each, and it

    def call_for(self, segment: Segment, values: Sequence) -> Callable | None:
        """What is compiled for these inputs."""
        hold, context = compat.symbols.hold, segment.context
        return next((call for guards, call in self.calls if hold(context, guards, self.fakes, values)), None)


class Prepared(NamedTuple):
    """A graph for a walk: its compiled regions, is it cut to one position of a row, and does it hold rows as tokens."""

    gm: fx.GraphModule
    regions: dict[str, SizedRegion]
    demanded: bool
    tokens: bool
    why: str | None


class OneLength(Mixed):
    """What a graph for any length does not allow, one for a single length may. Never reaches the user."""

    def __init__(self, why: str, capture: Capture):
        super().__init__(why)
        self.capture = capture


def forked(group: list[Pending], told: Group) -> None:
    """Run traces as rows that leave the clean run at their own sites; `Mixed` where that gives them other numbers."""
    _run([p for cells in _bases(group) for p in cells], told)


def _run(cells: list[Pending], told: Group, whole: bool = False) -> None:
    try:
        sheet = Sheet(cells, told, whole)
        size = sheet.fits
        if len(cells) <= size:
            sheet.run()
            for p in cells:
                p.tracer.forwards.deliver()
            return
    except NotCausal as why:
        told.note(f"every position was computed: {str(why).partition(chr(10))[0]}")
        return _run(cells, told, whole=True)
    except OneLength as why:
        return _of_one_length(cells, told, whole, why)
    except Exception as error:
        if not out_of_memory(error) or len(cells) == 1:
            raise
        told.note(f"out of memory with {len(cells)} traces in a forward: halved")
        size = -(-len(cells) // 2)
    for some in chunks(cells, size):
        _run(some, told, whole)


def _of_one_length(cells: list[Pending], told: Group, whole: bool, why: OneLength) -> None:
    """Run with a graph for the length of these traces: that for any length does not do."""
    fixed, fn = why.capture.one_length, cells[0].wave.fn
    fixed[fn] = str(why)
    try:
        _run(cells, told, whole)
    except Mixed:
        del fixed[fn]  # it was not the length
        raise


def _bases(group: list[Pending]) -> list[list[Pending]]:
    """The traces by the values of their input."""
    found: dict[object, list[Pending]] = {}
    for p in group:
        found.setdefault(_input(p), []).append(p)
    return list(found.values())


def _input(p: Pending) -> tuple:
    def known(x: object) -> object:
        if not isinstance(x, torch.Tensor):
            return x
        if x.device.type == "cpu" and x.numel() * x.element_size() <= 2**16 and x.dtype is not torch.bfloat16:
            return (tuple(x.shape), x.dtype, x.contiguous().numpy().tobytes())
        return id(x)

    return tuple(known(x) for x in tree.flatten((p.wave.batch.args, p.wave.batch.kwargs))[0])


class Sheet:
    """One forward of many traces."""

    def __init__(self, pending: list[Pending], told: Group, whole: bool = False):
        self.pending, self.told = pending, told
        self.whole = whole  # every position of each row is computed
        first = pending[0]
        host = first.host
        assert first.capture is not None
        self.capture = first.capture
        self.bases = _bases(pending)
        batches = [cells[0].wave.batch for cells in self.bases]
        self.size = batches[0].rows  # rows of one trace
        while len(batches) * self.size < 2:
            batches = [*batches, batches[0]]
        self.base_rows = len(batches) * self.size
        batch = _collated(host, batches)
        fn, length = first.wave.fn, batch.length
        vary = self.capture.lets_vary(fn, length, batch.text)
        self.segment, self.args = captured(host, self.capture, fn, batch, first.line, vary)
        self.sizes = compat.symbols.sizes_of(self.segment.fakes, self.args)
        self.any_length = bool(lengths(self.segment))
        with self._for_any_length():
            self.gm = annotated(self.segment, self.args)
        if vary and not self.any_length:
            told.note(f"captured for {length} tokens alone: the model's Python looks at their number")
        elif fn in self.capture.one_length and length is not None:
            told.note(f"captured for {length} tokens alone: {self.capture.one_length[fn]}")
        self.plans = list(dict.fromkeys(p.plan for p in pending))
        self.order = {where: i for i, (where, _) in enumerate(seams(self.gm))}
        touched = {where for plan in self.plans for where in plan.touches}
        missing = touched - self.order.keys()
        if missing:
            raise Mixed(f"`{'.'.join(map(str, min(missing)[:2]))}` is not in the captured graph")
        between = blocks(self.order)
        self.cuts = touched | between
        # Where the last block ends, if no trace touches that: no cut has to be there.
        self.end = {max(between, key=lambda where: self.order[where])} - touched if between else set()
        self.forks = {plan: fork_of(plan, self.order) for plan in self.plans}
        self.last = max(touched, key=lambda where: self.order[where])
        self.positions = self._positions()
        self.length = max(1, self.positions or length or 1)
        self.naive = cost(self.gm.graph.nodes, "flops", self.length) * self.size

    @contextlib.contextmanager
    def _for_any_length(self) -> Iterator[None]:
        """What fails here may do with a graph for one length."""
        try:
            yield
        except OneLength:
            raise
        except Mixed as why:
            if not self.any_length:
                raise
            raise OneLength(str(why), self.capture) from why

    @property
    def fits(self) -> int:
        """How many traces a forward has memory for."""
        largest, here = 0.0, 0.0
        for node in self.gm.graph.nodes:
            here += cost([node], "bytes", self.length)
            if node.target is site and (*marker_of(node).name, 0) in self.cuts:
                largest, here = max(largest, here), 0.0
        device = next((x.device for x in self.args if isinstance(x, torch.Tensor)), torch.device("cpu"))
        return max(1, int(free(device) / 4 / max(1.0, largest, here) / self.size))

    def run(self) -> None:
        for p in self.pending:
            p.tape.operands.resolve()
        cells = [self._cell(p, b) for b, group in enumerate(self.bases) for p in group]
        self.pending = [p for group in self.bases for p in group]
        leaving = sorted({c.leaves for c in cells if c.leaves is not None}, key=lambda where: self.order[where])
        joining, bases = [], list(range(self.base_rows))
        for where in leaving:
            joining.append([cell for cell in cells if cell.leaves == where])
            for cell in joining[-1]:
                cell.joins_at = len(bases)
                bases += range(cell.base, cell.base + self.size)
        chosen = None
        if "demand" not in self.capture.disable:
            chosen = positions(cells, self.last, len(bases), self.size, self._shape_at(self.last))
        if chosen is not None:  # then the last block, too, is computed at one position
            self.cuts -= self.end
        starts, at = self._starts(cells, bases)
        with self._for_any_length():
            made = self._prepared(chosen is not None, at, tuple(leaving))
        indices: list[object] = []
        if made.demanded:
            self.told.note(f"`{'.'.join(self.last[:2])}` was computed at one position of a row")
            indices.append(torch.tensor(chosen, dtype=torch.int64, device=self._device))
            for cell in cells:
                cell.constants = cell.ones
        layout = None
        if made.tokens:
            layout = Layout(self.positions, starts, bases, self._device)
            indices += [layout, self.base_rows * layout.positions]
            computed = 1 - sum(starts) / (layout.positions * len(bases))
            self.told.note(f"{computed:.0%} of the positions were computed: the others are before what a trace changes")
        elif made.why:
            self.told.note(f"every position was computed: {made.why}")
        for cell in cells:
            cell.layout = layout
        for some in joining:
            rows = [row for cell in some for row in range(cell.joins_at, cell.joins_at + self.size)]
            indices.append(self._joining(rows, bases, layout))
        walk = Walk(made.gm, lambda name, values: self._call(made.regions[name], values), cells, self.length)
        with torch.no_grad():
            walk.go(*self.args, *indices)
        if any(cell.unfinished() and not cell.stopping for cell in cells):
            raise Mixed("a site that was asked for was never reached")
        for p, cell in zip(self.pending, cells, strict=True):
            p.wave.run, p.done = cell, True
        self.told.forwards += 1
        self.told.flops = (self.told.flops or 0) + int(walk.flops)
        self.told.naive = (self.told.naive or 0) + int(self.naive * len(cells))

    def _joining(self, rows: list[int], bases: list[int], layout: Layout | None) -> torch.Tensor:
        """What rows begin as: of the clean run, or of its tokens."""
        if layout is None:
            found = [bases[row] for row in rows]
        else:
            count = layout.positions
            found = [bases[row] * count + t for row in rows for t in range(layout.starts[row], count)]
        return torch.tensor(found, dtype=torch.int64, device=self._device)

    def _starts(self, cells: list[Cell], bases: list[int]) -> tuple[list[int], frozenset | None]:
        """The first position that each row can change, and the leaves where traces do; `None` where that saves nothing."""
        count = self.positions
        starts, at = [0] * len(bases), set()
        if self.whole or count < 2 or "causal" in self.capture.disable:
            return starts, None
        for cell in cells:
            reached = reach(cell.plan, cell.constants, count)
            at |= reached.keys()
            cell.changed = frozenset(where for where, _ in reached)
            if cell.leaves is not None:
                first = min(reached.values(), default=0)
                starts[cell.joins_at : cell.joins_at + self.size] = [first] * self.size
        worth = sum(starts) >= (1 - WORTH) * count * len(bases)
        return starts, frozenset(at) if worth else None

    def _prepared(self, choose: bool, at: frozenset | None, leaving: tuple) -> Prepared:
        """The graph, cut and rewritten for traces that do the like; the same for all such groups."""
        known = _ready.setdefault(self.segment, {})
        key = (self.last, frozenset(self.cuts), choose, at, leaving)
        if key not in known:
            guards = compat.symbols.guard_count(self.segment.context)
            made = self._prepare(choose, at, leaving)
            if self.any_length and compat.symbols.guard_count(self.segment.context) > guards:
                raise Mixed("what is left out of it depends on the number of tokens")
            known[key] = made
        return known[key]

    def _prepare(self, choose: bool, at: frozenset | None, leaving: tuple) -> Prepared:
        self.gm = compat.graphs.copied(self.gm)
        keep_until(self.gm, self.last)
        unmark(self.gm, self.cuts)
        demanded, tokens, why = choose and self._demanded(), False, None
        if at is not None:
            copied = compat.graphs.copied(self.gm)
            try:
                facts = follow(copied, at)
                causal(copied, facts=facts)
                self.gm, tokens = copied, True
            except (Mixed, ValueError) as error:
                why = str(error).partition("\n")[0]
        if not outline(self.gm, at=self.cuts, apart=APART):
            raise Mixed("what lies between two sites gives more than tensors")
        try:
            fork(self.gm, at=leaving)
        except ValueError as error:
            raise Mixed(str(error)) from error
        self.gm.graph.lint()
        self.gm.recompile()
        return Prepared(self.gm, self._regions(), demanded, tokens, why)

    def _positions(self) -> int:
        """The size of dimension 1 of what is changed first."""
        found = [w for w in {f for f in self.forks.values() if f is not None} if w in self.order]
        shape = self._shape_at(min(found, key=lambda w: self.order[w])) if found else ()
        return shape[1] if len(shape) > 1 else 0

    def _shape_at(self, where: Site) -> list[int]:
        """The shape of a site's first leaf; 0 for a size that is not known."""
        value = marker_of(dict(seams(self.gm))[where][0]).value.meta.get("example_value")
        sizes = value.shape if isinstance(value, torch.Tensor) else ()
        return [compat.symbols.size_at(size, self.sizes) or 0 for size in sizes]

    def _demanded(self) -> bool:
        """Leave out all positions but one of each row, where no more is read at the last site.

        The positions are an input of the graph behind those that it has.
        """
        group = dict(seams(self.gm)).get(self.last, [])
        if len(group) != 1:
            return False
        marker = marker_of(group[0])
        leaf = marker.value
        if leaf.meta.get("rows") != 0 or marker.leaf != 0:
            return False
        sources = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        with self.gm.graph.inserting_after(sources[-1]):
            given = self.gm.graph.placeholder("positions")
        fake = leaf.meta["example_value"]
        with fake.fake_mode:
            given.meta["example_value"] = torch.empty(fake.shape[0], dtype=torch.int64, device=fake.device)
        with self.gm.graph.inserting_before(group[0]):
            taken = self.gm.graph.call_function(take, (leaf, given))
        taken.meta = {**leaf.meta, "flops": 0}
        pass_through(group[0], taken)
        if demand(self.gm):
            return True
        pass_through(group[0], leaf)  # nothing to gain
        self.gm.graph.erase_node(taken)
        self.gm.graph.erase_node(given)
        return False

    @property
    def _device(self) -> torch.device:
        return next(x.device for x in self.args if isinstance(x, torch.Tensor))

    def _cell(self, p: Pending, base: int) -> Cell:
        host = p.host
        cell = Cell(
            *(p.plan, p.tape.constants, p.tape.lines, host.markers, lambda: None, host.module.get_submodule, {})
        )
        cell.size, cell.start, cell.joins_at, cell.ones = self.size, base * self.size, base * self.size, cell.constants
        cell.base = cell.start
        if len(self.bases[base]) > 1:  # else nobody but it has these rows
            cell.leaves = self.forks[p.plan]
        return cell

    def _regions(self) -> dict[str, SizedRegion]:
        """The submodules, compiled: each distinct one once, for any number of rows."""
        known, keys, new = _compiled.setdefault(self.segment, {}), {}, {}
        for name, graph in self.gm.named_children():
            assert isinstance(graph, fx.GraphModule)
            if _changes_inputs(graph):
                raise Mixed("the model changes a value in place on which a site may be looked at")
            given = (n.meta.get("example_value") for n in graph.graph.nodes if n.op == "placeholder")
            keys[name] = key = (structure(graph), tuple(facts(x, {}) for x in given))
            if key not in known:
                new.setdefault(key, graph)
        for n, (key, graph) in enumerate(new.items(), 1):
            known[key] = region = SizedRegion(graph, self.segment)
            with clock.doing(f"compiling (region {n} of {len(new)})"):
                self._compile(region, ())
        return {name: known[key] for name, key in keys.items()}

    def _call(self, region: SizedRegion, values: Sequence) -> object:
        """Run a region; where what is compiled of it is not for these sizes, compile it for them."""
        call = region.call_for(self.segment, values)
        if call is None:
            with clock.doing("compiling (a region for other sizes)"):
                call = self._compile(region, values)
        return call(*values)

    def _compile(self, region: SizedRegion, values: Sequence) -> Callable:
        context, begun = self.segment.context, time.perf_counter()
        graph = fx.GraphModule(region.graph, copy.deepcopy(region.graph.graph))  # compilers rewrite what they get
        with (
            compat.symbols.own_sizes(context, region.fakes, values) as fakes,
            compat.graphs.tracing(context),
            torch.no_grad(),
        ):
            report: list[str] = []
            before = compat.symbols.guard_count(context)
            call = self.capture.builder.build(graph, lambda: fakes, report)
            guards = compat.symbols.guards_since(context, before)
        region.calls = [*region.calls[1 - KEPT :], (guards, call)]
        for why in report:
            self.told.note(why)
        self.capture.note_compile(self.segment, None)
        shape = self.capture.row_graphs[self.segment]
        self.capture.took(clock.COMPILE, time.perf_counter() - begun, shape, self.pending[0].line)
        return call


def _collated(host: Any, batches: list) -> Any:
    joined = host.inputs.collate(batches)
    if len(batches) > 1:
        return joined
    args, kwargs = tree.tree_map(
        lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (joined.args, joined.kwargs)
    )
    return type(joined)(args, kwargs, joined.rows, joined.text, joined.length)


def _changes_inputs(region: fx.GraphModule) -> bool:
    """Does a region change in place what it was given, or what shares its memory? The fakes that capture left tell."""
    given = {_storage(n) for n in region.graph.nodes if n.op == "placeholder"}
    targets = [n.kwargs.get("out") or n.args[0] for n in region.graph.nodes if changes(n)]
    return any(not isinstance(t, fx.Node) or _storage(t) in given for t in targets)


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("example_value")
    return compat.tensors.memory(value) if isinstance(value, torch.Tensor) else None
