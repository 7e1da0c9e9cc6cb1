"""A body's own backward: forward, backward and gradient interventions as one graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.fx as fx

from nnsight_fx.compat.fakes import detect_fake_mode, enable_python_dispatcher, no_python_dispatcher
from nnsight_fx.compat.graphs import get_proxy_mode, make_fx
from nnsight_fx.compat.tensors import hook

from .job import Job, NotDifferentiable, backward, gradient, set_gradient, settled, tap


def differentiate(gm: fx.GraphModule, job: Job) -> int:
    """Trace the graph with its backward passes, so that gradients are values like any other.

    ```
    h   = linear(x, w, b)                        h    = addmm(b, x, t(w))
    t   = tap(h, 1)                              loss = sum(h)
    l   = h.sum()                         ->     g    = expand(ones_like(loss), ...)
    b   = backward(l, None, (t,), ...)           gw   = mm(t(g), x)
    g   = gradient(b, t)                         gb   = sum(g, 0)
    return (h, g)                                return (h, g, gw, gb)
    ```

    The graph is interpreted over the fakes of its inputs, with tensor hooks where gradients are read or set, and
    `torch.autograd.grad` where the body says `backward`; `make_fx` records what that does, in aten operations. What lies
    between `backward` and its `settled` runs when the gradients that it needs have come. Gradients of leaves are further
    outputs: `job.accumulates` says of which input each is. `job.requires` says which outputs require grad in eager. Blocks of
    the graph become blocks of the forward and of the backward.

    Comes last: inputs and outputs are final. Does not fire when: there is no `backward`.
    """
    passes = [n for n in gm.graph.nodes if n.target is backward]
    if not passes:
        return 0
    assert job.inputs is not None
    flow = Flow(gm, job.blocks)
    traced = traced_by(flow.values, job.inputs())
    job.requires = flow.requires
    job.accumulates = flow.accumulates
    if job.keeps_graph(passes[-1]) and any(flow.requires[job.own :]):
        raise NotDifferentiable("`retain_graph=True`, and a saved value can still be differentiated")
    become(gm, traced)
    job.blocks = flow.begin(traced.graph)
    return len(passes)


def traced_by(function: Callable[..., list], fakes: list) -> fx.GraphModule:
    """What a function does with fakes, in aten operations."""
    # As AOTAutograd traces: without the Python dispatcher C++ expands to no symbolic size.
    with detect_fake_mode(fakes) or contextlib.nullcontext(), torch.enable_grad(), enable_python_dispatcher():
        return make_fx(function)(*fakes)


def become(gm: fx.GraphModule, traced: fx.GraphModule) -> None:
    """Put a traced graph, of the same inputs, in the place of a graph."""
    for name, value in [*traced.named_buffers(), *vars(traced).items()]:
        if name.startswith("_tensor_constant"):
            setattr(gm, name, value)
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = (
            torch.ops.aten.reshape.default
        )  # the same, but where fakes are wrong about strides (pytorch/pytorch#192668)
    for old, new in zip(gm.graph.find_nodes(op="placeholder"), traced.graph.find_nodes(op="placeholder"), strict=True):
        if "tensor_dict" in old.meta:  # of a parameter, say, which stays where it is
            new.meta["tensor_dict"] = old.meta["tensor_dict"]
    gm.graph = traced.graph


def _leaf(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


class Flow(fx.Interpreter):
    """The graph as a function of its inputs, with its backward passes run."""

    def __init__(self, gm: fx.GraphModule, blocks: list[fx.Node]):
        super().__init__(gm, garbage_collect_values=False)
        self.blocks = set(blocks)
        self.ends: list[fx.Node] = []  # of what is traced, the nodes behind which a block begins
        self.nodes: list[fx.Node] = list(gm.graph.nodes)
        self.running: fx.Node | None = None  # the backward that runs
        self.requires: list[bool] = []
        self.accumulates: list[int] = []

    def values(self, *given: object) -> list:
        mode = get_proxy_mode()
        assert mode is not None
        self.traced, self.env = mode.tracer.graph, {}
        self.taps: dict[fx.Node, torch.Tensor] = {}
        self.leaves = [i for i, x in enumerate(given) if _leaf(x)]
        self.given, self.filled = given, []
        self.made: list[torch.Tensor] = []  # leaves that the body makes
        inputs = iter(given)
        for node in self.nodes:
            if node.op == "placeholder":
                self.env[node] = next(inputs)
            elif node.op == "output":
                outputs = [self.env[n] if isinstance(n, fx.Node) else n for n in node.args[0]]  # type: ignore[union-attr]
            elif node not in self.env:
                self.env[node] = self.step(node)
        if any(_leaf(x) and i not in self.leaves for i, x in enumerate(given)):
            raise NotDifferentiable("an input was changed in place, and requires grad since")
        self.requires = [_leaf(x) for x in outputs]
        self.accumulates = [i for i, _ in self.filled]
        return [*outputs, *(g for _, g in self.filled)]

    def step(self, node: fx.Node) -> Any:
        if node.target is tap:
            value = self.taps[node] = self.env[node.args[0]]  # type: ignore[index]
            hook(value, partial(self.arrived, node))
            return value
        if node.target is backward:
            return self.back(node)
        if node.target is gradient:
            raise NotDifferentiable("a gradient was asked for that the backward does not pass")
        if node in self.blocks:
            self.cut()
            for n in node.all_input_nodes:  # and where its gradient is whole, in the backward
                if isinstance(x := self.env[n], torch.Tensor) and x.requires_grad and not x.is_leaf:
                    hook(x, self.cut)
                    break
        made = None if node.target in (set_gradient, settled) else self.run_node(node)
        if node.op == "call_method" and node.target == "requires_grad_" and made.is_leaf and made.requires_grad:
            self.made.append(made)
        return made

    def cut(self, _: object = None) -> None:
        self.ends.append(next(iter(reversed(self.traced.nodes))))

    def begin(self, graph: fx.Graph) -> list[fx.Node]:
        """The nodes of the traced graph, which has lost its dead ones since, with which blocks begin."""
        alive, found = set(graph.nodes), []
        for node in self.ends:
            node = node.next
            while node not in alive and node.op != "root":
                node = node.next
            if node.op not in ("root", "output"):
                found.append(node)
        return found

    def back(self, node: fx.Node) -> None:
        args: Any = self.map_nodes_to_values(node.args, node)  # type: ignore[arg-type]
        loss, weight, taps, options, only = args
        chosen = options["inputs"]
        into = [i for i in self.leaves if chosen is None or any(self.given[i] is x for x in chosen)]
        self.running = node
        inputs = list(taps) if only else [*(self.given[i] for i in into), *(self.made if chosen is None else ())]
        if not inputs:
            raise NotDifferentiable("the loss does not depend on an input or a parameter of the captured graph")
        try:
            found = torch.autograd.grad(loss, inputs, weight, retain_graph=options["retain_graph"], allow_unused=True)
        except (
            RuntimeError
        ) as error:  # eager has the last word: fakes can be wrong about strides, so about what is a copy
            if "modified by an inplace operation" not in str(error):
                raise
            raise NotDifferentiable("on fake tensors, what the backward needs was changed in place") from error
        self.running = None
        if not only:
            self.filled += [(i, g) for i, g in zip(into, found, strict=False) if g is not None]

    def arrived(self, node: fx.Node, value: torch.Tensor) -> torch.Tensor | None:
        """A gradient has come: what waits for it, and what shall flow on in its place."""
        mine = next((n for n in node.users if n.target is gradient and n.args[0] is self.running), None)
        if mine is None:
            return None
        self.env[mine] = value
        assert self.running is not None
        at = self.running.next
        while at.target is not settled:
            if at not in self.env and at.target not in (gradient, set_gradient) and self.ready(at):
                self.env[at] = self.run_node(at)
            at = at.next
        new: object = next((n.args[1] for n in mine.users if n.target is set_gradient), None)
        if new is not None and new not in self.env:
            raise NotDifferentiable("a gradient is set with one that comes after it")
        return None if new is None else self.env[new]

    def run_node(self, n: fx.Node) -> object:
        # Written in Python, dropout draws otherwise, and one that drops nothing copies, where eager's gives back its input.
        dropout = getattr(n.target, "__name__", "") in ("dropout", "dropout_")
        with no_python_dispatcher() if dropout else contextlib.nullcontext():
            return super().run_node(n)

    def ready(self, node: fx.Node) -> bool:
        return all(n in self.env for n in node.all_input_nodes)
