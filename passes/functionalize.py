"""In-place operations in functional form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch.fx.traceback import annotate, preserve_node_meta

from nnsight_fx.capture.marker import Marker, marker_of, site, supply
from nnsight_fx.compat.graphs import make_fx

from .effects import changes
from .job import Job, constant, fetch, parameter, put_rows, rows

SOURCES = (constant, fetch, parameter)
UNLOWERED = (rows, put_rows, supply)


def recorded(node: fx.Node) -> object:
    """The fake that capture left on a node, if any."""
    return node.meta.get("example_value")


def functionalize(gm: fx.GraphModule, job: Job, *, example: Callable[[fx.Node], object] = recorded) -> int:
    """Rewrite the graph so that no tensor made in it is changed in place.

    ```
    h   = linear(x, w, b)                      h   = addmm(b, x, t(w))
    row = h[:, 1]                              row = select(h, 1, 1)
    add_ = row.add_(c)                   ->    new = add(row, c)
    out = relu(h)                              h1  = select_scatter(h, new, 1, 1)
    return (out,)                              out = relu(h1)
                                               return (out,)
    ```

    `torch.func.functionalize` traced by `make_fx` over the fakes of the inputs (`example` finds them), so the result is
    in aten operations and positions are the numbers they were traced with. A view that nothing is written through
    stays a view; an input that is changed is so by one `copy_` at the end. `constant`, `fetch` and `parameter` nodes
    stay, and so do markers, each at its place on its value; nothing reads a marker any more, so `splice` comes first.

    For passes that cannot take in-place operations (`vectorize`: `vmap` does not write in place into a value that is not
    mapped). Not in `PIPELINE`: AOTAutograd functionalises whatever is compiled, the `eager` backend is to stay bit-equal
    to the model, and lifted positions are integers read from 0-d tensors at which views stay views.

    Does not fire when: nothing is changed in place; an input has no fake; a mode is switched in the graph, which tracing
    would not keep; an operation of `splice` is not lowered yet (`narrow`); the graph has a `cut`.
    """
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder" or n.target in SOURCES]
    fakes = [example(n) for n in inputs]
    writes = sum(changes(n) for n in gm.graph.nodes)
    blocked = any(n.target in UNLOWERED or _switches_mode(n) for n in gm.graph.nodes)
    if not writes or blocked or job.cut is not None or any(fake is None for fake in fakes):
        return 0
    flow = GraphFunction(gm, inputs, list(job.exports.values()))
    with preserve_node_meta():
        traced = make_fx(torch.func.functionalize(flow.values, remove="mutations"))(*fakes)
    _finish(traced.graph, flow)
    exported = flow.split(traced.graph.output_node())
    job.exports = dict(zip(job.exports, exported, strict=True))
    job.emitted.clear()
    for name, value in [*traced.named_buffers(), *vars(traced).items()]:
        if name.startswith("_tensor_constant"):
            setattr(gm, name, value)
    gm.graph = traced.graph
    return writes


class GraphFunction(fx.Interpreter):
    """The graph as a function of its inputs and sources; it also returns the values that leave by `expose`."""

    def __init__(self, gm: fx.GraphModule, inputs: list[fx.Node], leaving: list[fx.Node]):
        super().__init__(gm, garbage_collect_values=False)
        self.inputs, self.leaving = inputs, leaving
        self.markers: list[Marker] = []
        self.own: list = list(gm.graph.output_node().args[0])  # type: ignore[arg-type]

    def values(self, *given: object) -> list:
        self.env = {}
        for node in self.module.graph.nodes:  # type: ignore[union-attr]
            if node in self.inputs:
                self.env[node] = given[self.inputs.index(node)]
            elif node.target is site:
                self.env[node] = self._mark(node)
            elif node.op != "output":
                self.env[node] = self.run_node(node)
        outputs = [n for n in [*self.own, *self.leaving] if isinstance(n, fx.Node)]
        return [self.env[n] for n in outputs]

    def _mark(self, node: fx.Node) -> object:
        """A marker as a copy that nobody reads: tracing keeps its place, and aliasing stays what it is."""
        marker = marker_of(node)
        value = self.env[marker.value]
        with annotate({"marker": len(self.markers)}):
            torch.clone(value)
        self.markers.append(marker)
        return value

    def split(self, output: fx.Node) -> list[fx.Node]:
        """Give the traced graph the outputs that the old one had; the rest are the values that leave."""
        made = iter(output.args[0])  # type: ignore[arg-type]
        own = tuple(next(made) if isinstance(n, fx.Node) else n for n in self.own)
        output.args = (own,)
        return list(made)  # type: ignore[arg-type]


def _finish(graph: fx.Graph, flow: GraphFunction) -> None:
    """Put back what tracing took for granted: sources, markers, and the fakes where other passes look for them."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    first = placeholders[-1].next if placeholders else next(iter(graph.nodes))
    for new, old in zip(placeholders, flow.inputs, strict=True):
        if old.op == "placeholder":
            continue
        with graph.inserting_before(first):
            source = graph.create_node(old.op, old.target, old.args, old.kwargs)
        new.replace_all_uses_with(source)
        graph.erase_node(new)
    for node in graph.nodes:
        at = node.meta.get("custom", {}).get("marker")
        if at is not None and node.op == "call_function":
            copied: Any = node.args[0]
            node.target, node.args, node.kwargs = site, flow.markers[at].arguments(copied), {}
        if "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]


def _switches_mode(node: fx.Node) -> bool:
    return "_grad_enabled" in str(node.target) or "autocast" in str(node.target)
