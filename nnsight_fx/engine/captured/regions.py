"""Regions: the equal blocks of a model, each compiled once, for all variants of a segment."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from ... import compat
from ...passes.effects import changes
from ...passes.job import Job
from ...passes.outline import outline, sink_views
from .. import clock

if TYPE_CHECKING:
    from ...capture.segment import Segment

KEPT = 256  # compiled regions a segment
SMALL = 8  # operations a block, below which its calls cost more than its compiling


class Whole(Exception):
    """Why a graph is compiled in one piece. Never reaches the user."""


@dataclass
class Region:
    """A compiled region, and what it takes its sizes to be: those of one block's inputs, under names of their own elsewhere."""

    call: Callable
    taken: compat.symbols.Sizes
    gives: list[torch.Tensor]


def regional(
    gm: fx.GraphModule,
    job: Job,
    segment: Segment,
    fakes: tuple[list, list],
    args: list,
    build: Callable[[fx.GraphModule, Callable[[], list]], Callable],
) -> Callable:
    """A variant as calls of compiled regions; `Whole` where it cannot be, or is not worth it.

    `fakes` are those of the segment's inputs, and those of all the graph's; `args` the values of the former.
    """
    if not job.blocks:
        raise Whole("no equal blocks")
    own, given = fakes
    constants = _constants(gm, given)
    sink_views(gm, job.blocks)
    computed = sum(n.op in ("call_function", "call_method") for n in gm.graph.nodes)
    still = not torch.is_grad_enabled()  # else what is not used would have a gradient of zero, which is not none
    calls = outline(gm, before=job.blocks, alike=lambda n: None, spare=still)  # `facts` tells, below
    kinds = {n.target for n in gm.graph.nodes if n.op == "call_module"}
    if computed < SMALL * calls:
        raise Whole(f"its blocks are small: {computed / calls:.0f} operations each")
    if 3 * len(kinds) > 2 * calls:
        raise Whole("fewer than a third of its blocks are copies of another")
    values: dict[fx.Node, Any] = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), given, strict=True))
    values |= constants
    made = _Regions(gm, segment, own, args, build, len(kinds))
    for node in list(gm.graph.nodes):
        if node.op == "call_module":
            values[node] = made.place(node, values)
        elif node.op == "call_function":  # of a region's outputs
            gives = values.get(node.args[0]) if node.target is operator.getitem else None  # type: ignore[arg-type]
            if not isinstance(gives, list):
                raise Whole("it computes numbers between its blocks")
            values[node] = gives[node.args[1]]  # type: ignore[index]
    job.report.append(("outline", calls, len(gm.graph.nodes)))
    gm.delete_all_unused_submodules()
    gm.graph.lint()
    gm.recompile()
    return gm.forward


def _constants(gm: fx.GraphModule, given: list) -> dict[fx.Node, torch.Tensor]:
    """The fakes of a graph's own tensors, which come first in it from here on: regions take them as they take inputs."""
    first = next(n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))
    found = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value, mode = getattr(gm, str(node.target), None), compat.fakes.detect_fake_mode(given)
        if not isinstance(value, torch.Tensor) or mode is None:
            raise Whole("it has graphs of its own")
        first.prepend(node)
        found[node] = (
            value if isinstance(value, compat.fakes.FakeTensor) else mode.from_tensor(value, static_shapes=True)
        )
    return found


class _Regions:
    def __init__(self, gm: fx.GraphModule, segment: Segment, own: list, args: list, build: Callable, kinds: int):
        self.gm, self.segment, self.build = gm, segment, build
        self.kinds, self.begun = kinds, dict[str, int]()  # how many regions there are, and those that were come to
        self.known: dict[Hashable, list[Region]] = segment.regions
        self.values = compat.symbols.sizes_of(own, args)

    def place(self, node: fx.Node, values: dict[fx.Node, object]) -> list[torch.Tensor]:
        """Put a compiled region where a submodule is called; returns the fakes of what it gives."""
        graph, context = self.gm.get_submodule(str(node.target)), self.segment.context
        number = self.begun.setdefault(str(node.target), len(self.begun) + 1)
        assert isinstance(graph, fx.GraphModule)
        inputs = [values[a] for a in node.args]  # type: ignore[index]
        if any(isinstance(x, torch.Tensor) and compat.symbols.unbacked(x) for x in inputs):
            raise Whole("a size that is known only when it runs crosses from block to block")
        if not compat.symbols.named(inputs):
            raise Whole("what crosses from block to block is laid out by a size that does not cross")
        symbols = compat.symbols.symbols_among(inputs)
        names = compat.symbols.numbered(symbols)
        key = (structure(graph), tuple(facts(x, names) for x in inputs), torch.is_grad_enabled())
        for found in self.known.get(key, ()):
            guards = found.taken.among(symbols, self.values)
            if guards is not None:
                break
        else:
            with clock.doing(f"compiling (region {number} of {max(number, self.kinds)})"):
                found, guards = self._compile(graph, inputs, symbols), []
            self.known.setdefault(key, []).append(found)
            if len(self.known) > KEPT:
                self.known.pop(next(iter(self.known)))
        compat.symbols.add_guards(context, guards)
        node.op, node.target = "call_function", found.call
        if found.taken.symbols != symbols:
            return _Checked(graph, inputs).gives(context)
        return compat.symbols.of_now(context, found.gives)

    def _compile(self, graph: fx.GraphModule, inputs: list, symbols: tuple) -> Region:
        context = self.segment.context
        taken, gives = compat.symbols.Sizes(context, symbols), _Checked(graph, inputs).gives(context)
        graph.recompile()
        compiled = compat.frames.inside(self.build(graph, lambda: [compat.fakes.as_leaf(context, x) for x in inputs]))

        def region(*args: object) -> object:
            return compiled(*args)

        taken.compiled()
        return Region(region, taken, gives)


class _Checked(fx.Interpreter):
    """A region on fakes: what it gives, and that it changes nothing it is given. Its nodes get their fakes."""

    def __init__(self, graph: fx.GraphModule, inputs: list):
        super().__init__(graph)
        self.inputs = inputs
        self.given = {_storage(x) for x in inputs if isinstance(x, torch.Tensor)}

    def gives(self, context: Any) -> list[torch.Tensor]:
        with compat.fakes.on_fakes(context.fake_mode):
            found = self.run(*self.inputs)
        if not all(isinstance(x, torch.Tensor) for x in found):
            raise Whole("a number crosses from block to block")
        return [x if compat.symbols.unbacked(x) else compat.fakes.as_leaf(context, x) for x in found]

    def run_node(self, n: fx.Node) -> object:
        if changes(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            target = kwargs["out"] if kwargs.get("out") is not None else args[0]
            if not isinstance(target, torch.Tensor) or _storage(target) in self.given:
                raise Whole("a block changes in place what another made")
        made = super().run_node(n)
        if isinstance(made, torch.Tensor):  # Inductor's cache on disk asks for it: it knows methods of tensors alone
            n.meta.setdefault("example_value", made)
        return made


def _storage(x: torch.Tensor) -> int:
    return compat.tensors.memory(x)


def facts(x: object, names: dict) -> Hashable:
    """Of what kind an input of a graph is, from its fake, with names for what its sizes are of."""
    if not isinstance(x, torch.Tensor):
        return compat.symbols.renamed(x, names)
    sizes = (
        *(compat.symbols.renamed(n, names) for n in x.shape),
        "|",
        *(compat.symbols.renamed(n, names) for n in x.stride()),
    )
    return sizes, x.dtype, x.device, x.requires_grad


def structure(graph: fx.GraphModule) -> Hashable:
    """What a graph computes, but for the kinds of its inputs."""
    numbers = {n: i for i, n in enumerate(graph.graph.nodes)}

    def walk(arg: object) -> Any:
        return fx.map_arg(arg, lambda n: f"%{numbers[n]}")  # type: ignore[arg-type, return-value]

    return tuple(
        (n.op, "" if n.op == "placeholder" else n.target, repr((walk(n.args), walk(n.kwargs))))
        for n in graph.graph.nodes
    )
