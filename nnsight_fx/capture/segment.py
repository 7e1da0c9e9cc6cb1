"""A segment: one graph that Dynamo captured, kept pristine with all it takes to compile variants of it later."""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.fx as fx

from .. import compat
from ..compat.transformers import restored
from .checkpoints import unfold
from .marker import close, marker_of, site, supply
from .repeats import repeats_of


class Break(NamedTuple):
    """Where Dynamo could not go on in one graph."""

    reason: str
    line: str  # file:line of the model's


class Segment:
    """A captured graph with its markers, fake inputs and tracing context. It holds no model and no run."""

    def __init__(self, gm: fx.GraphModule, fakes: list, context: Any, guards: int, pure: bool = False):
        self.gm, self.fakes, self.context, self.guards = gm, fakes, context, guards
        self.pure = pure  # does the frame change no object that existed before it
        self.repeated = 0  # blocks that were not traced, since they repeat others
        self.ended: Break | None = None
        self.plan: object = None  # whose capture half it was captured for
        self.variants: OrderedDict[tuple, list] = OrderedDict()  # the latest used last
        self.following: OrderedDict[tuple, list] = OrderedDict()  # those that serve constants of other sizes, too
        self.regions: dict = {}  # compiled blocks, by structure
        self.tails: dict[tuple[int, int], tuple[Segment, list[int], list[int]]] = {}

    @classmethod
    def captured(cls, gm: fx.GraphModule) -> Segment:
        """Made inside Dynamo's callback: afterwards the fakes are gone from the graph."""
        context = compat.graphs.tracing_context(gm)
        kept = compat.graphs.copied(gm)
        unfold(kept)
        close(kept.graph)
        pure = compat.graphs.replays_nothing(restored)
        made = cls(kept, compat.fakes.placeholder_fakes(gm), context, compat.symbols.guard_count(context), pure)
        made.repeated = repeats_of(context)
        found = compat.graphs.break_of(gm)
        made.ended = None if found is None else Break(*found)
        return made

    @functools.cached_property
    def varying(self) -> list[tuple[int | None, ...]]:
        """The shapes of those of its inputs that have sizes for which it is not captured alone: `None` in their place."""
        shapes = (x.shape for x in self.fakes if isinstance(x, torch.Tensor))
        sizes = [tuple(compat.symbols.size_at(n, {}) for n in shape) for shape in shapes]
        return list(dict.fromkeys(size for size in sizes if None in size))

    def copy(self) -> fx.GraphModule:
        """The graph, to be rewritten."""
        return compat.graphs.copied(self.gm)

    @property
    def sites(self) -> list[tuple[str, str]]:
        """`(path, kind)` of its sites, in order."""
        return list(dict.fromkeys(marker_of(n).name for n in self.gm.graph.nodes if n.target in (site, supply)))

    @functools.cached_property
    def whole(self) -> bool:
        """Is all of the model in it?"""
        return {("", "input"), ("", "result")} <= set(self.sites)

    def tail(self, last: int, call: int) -> tuple[Segment, list[int], list[int]]:
        """What comes after node `last`, a marker of that call of its site: a segment of its own, and the nodes whose values it takes.

        Returns `(segment, taken, moved)`: `taken` are indices of pristine nodes that become the tail's inputs, in order;
        `moved` are getters behind `last` that belong to the head, since their containers are made there. What the site
        is written with is among the tail's inputs, too: it is there when the tail begins.
        """
        if (last, call) not in self.tails:
            self.tails[last, call] = self._cut(last, call)
        return self.tails[last, call]

    def _cut(self, last: int, call: int) -> tuple[Segment, list[int], list[int]]:
        nodes = list(self.gm.graph.nodes)
        here = (*marker_of(nodes[last]).name, call)
        head = {*nodes[: last + 1], *(n for n in nodes[last + 1 :] if n.target is supply and marker_of(n).site == here)}
        moved = []
        for index in range(last + 1, len(nodes)):
            node = nodes[index]
            if node.args[:1] and node.args[0] in head and _takes_apart(node):
                head.add(node)
                moved.append(index)
        rest = [n for n in nodes[last + 1 :] if n not in head]
        used = {a for n in rest for a in n.all_input_nodes if a in head}
        used |= _sizes(nodes, used)
        taken = [i for i, n in enumerate(nodes) if n in used]
        graph = fx.Graph()
        mapped: dict[fx.Node, fx.Node] = {}
        for i in taken:
            mapped[nodes[i]] = graph.placeholder(nodes[i].name)
            kept = ("example_value", "tensor_dict") if nodes[i].op == "placeholder" else ("example_value",)
            mapped[nodes[i]].meta = {name: nodes[i].meta[name] for name in kept if name in nodes[i].meta}
        for node in rest:
            mapped[node] = graph.node_copy(node, lambda n: mapped[n])
        gm = fx.GraphModule(self.gm, graph)
        fakes = [compat.fakes.as_input(self.context, nodes[i].meta.get("example_value")) for i in taken]
        return Segment(gm, fakes, self.context, self.guards, self.pure), taken, moved


def _takes_apart(node: fx.Node) -> bool:
    """Does a node take an element of a tuple? An index on a tensor is an operation, on the values that it has there and then."""
    whole: Any = node.args[0]
    return (
        node.op == "call_function"
        and node.target is operator.getitem
        and not isinstance(whole.meta.get("example_value"), torch.Tensor)
    )


def _sizes(nodes: list[fx.Node], used: set[fx.Node]) -> set[fx.Node]:
    """The inputs that are the sizes of used tensors: compilers look for each size among the inputs, as Dynamo gives them."""
    shapes = [n.meta["example_value"].shape for n in used if isinstance(n.meta.get("example_value"), torch.Tensor)]
    free = {s for shape in shapes for n in shape if isinstance(n, torch.SymInt) for s in n.node.expr.free_symbols}
    sizes = [n for n in nodes if n.op == "placeholder" and isinstance(n.meta.get("example_value"), torch.SymInt)]
    return {n for n in sizes if n.meta["example_value"].node.expr in free}
