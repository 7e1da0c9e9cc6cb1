"""Symbolic capture: a module's Python runs once, on tensors without data, and what it calls becomes a graph.

As `torch.fx.symbolic_trace` does it: no bytecode is analysed, nothing is guarded but what a module holds (`capture.state`), and
what cannot be followed is refused, with its line, so that the model runs on hooks. Other than there, what flows are fake
tensors in place of `fx.Proxy`s. So `isinstance(x, torch.Tensor)` is true, sizes are numbers (a graph is for one shape of its
inputs), and modules are seen by hooks on a copy, in place of a patch of `nn.Module.__call__` that all threads would meet.
"""

from __future__ import annotations

import operator
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from .. import compat
from ..plan import ambient, tree
from ..plan.names import LIVE_CALLS, NEEDS_DATA, NEEDS_MEMORY
from ..plan.plan import fx_target
from ..plan.tree import PLAIN
from .hook_tables import override, put, take
from .marker import active, anchor, site, supply
from .markers import Markers

_LIBRARIES = os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__))
_NN = os.path.join("torch", "nn", "modules", "")
_VALUES = NEEDS_DATA | {"__bool__", "__int__", "__float__", "__index__", "__complex__"}
_LOST = LIVE_CALLS | NEEDS_MEMORY | {"backward", "__set__"}


class Untraceable(Exception):
    """What symbolic tracing cannot take. The hook engine runs it; never reaches the user, except under `fullgraph=True`."""


class SymbolicTracer(fx.Tracer):
    """Makes a graph of the operations that are called on its fake tensors."""

    def __init__(self):
        super().__init__()
        self.graph = fx.Graph(tracer_cls=fx.Tracer)
        self.ambient = ambient.current()
        self.grad = self.ambient.grad  # as the model's Python has set it
        self.known: dict[int, tuple[torch.Tensor, fx.Node]] = {}  # each tensor, and the node that gave it last
        self.given: list[fx.Node] = []
        self.marked: dict[int, torch.Tensor] = {}  # what a marker returned, and what for

    def give(self, fake: torch.Tensor, name: str) -> fx.Node:
        """An input of the graph."""
        node = self.create_node("placeholder", name, (), {})
        self.given.append(node)
        self._keep(node, fake)
        return node

    def unmarked(self, x: object) -> Any:
        """What a value was before its markers."""
        while id(x) in self.marked:
            x = self.marked[id(x)]
        return x

    def create_arg(self, a: object) -> Any:
        if isinstance(a, torch.Tensor):
            return self.node_of(a)
        try:
            return super().create_arg(a)
        except (NotImplementedError, AttributeError) as error:
            raise Untraceable(f"an operation is called with a {type(a).__name__}, which no graph holds") from error

    def node_of(self, x: torch.Tensor) -> fx.Node:
        if id(x) not in self.known:
            raise Untraceable(
                "it uses a tensor that is neither an argument, nor the module's, nor made by its operations"
            )
        return self.known[id(x)][1]

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """An operation: its result on fakes, and a node where there is a tensor in it, or it changes one."""
        name = getattr(func, "__name__", str(func))
        if name in _VALUES:
            raise Untraceable(f"`{name}` needs the values of a tensor")
        if name in _LOST:
            raise Untraceable(f"`{name}` on a tensor is more than an operation")
        if name == "__iter__":
            return iter(self.call(torch.Tensor.unbind, args, kwargs))
        for x in tree.flatten((args, kwargs))[0]:
            if isinstance(x, torch.Tensor):
                self.node_of(x)
        value = func(*args, **kwargs)
        if func is compat.modes.SET_GRAD:
            self.grad = torch.is_grad_enabled()  # a node is made for the next operation
            return value
        leaves = tree.flatten(value)[0]
        if not any(isinstance(x, torch.Tensor) for x in leaves) and func is not torch.Tensor.__setitem__:
            if (value is None and name != "__get__") or not all(isinstance(x, PLAIN) for x in leaves):
                raise Untraceable(f"`{name}` is more than an operation on tensors")
            return value
        self.follow_modes()
        op, target, args = _target(func, args)
        node = self.create_node(op, target, self.create_arg(args), self.create_arg(kwargs))
        self._keep(node, value)
        return value

    def follow_modes(self) -> None:
        """The grad mode is switched in the graph; other modes are the trace's."""
        now = ambient.current()
        if now._replace(grad=self.ambient.grad) != self.ambient:
            raise Untraceable("it switches autocast or inference mode")
        if now.grad != self.grad:
            raise Untraceable("it calls an `autograd.Function`, whose backward would be lost")
        if now.grad != self.ambient.grad:
            self.create_node("call_function", compat.modes.SET_GRAD, (now.grad,), {})
        self.ambient = now

    def alias(self, fake: torch.Tensor, target: Callable, args: tuple) -> torch.Tensor:
        """What a marker returns: from here on another tensor, of the same memory."""
        self.follow_modes()
        node = self.create_node("call_function", target, self.create_arg(args), {})
        made = fake.view_as(fake)
        self._keep(node, made)
        return made

    def _keep(self, node: fx.Node, value: object) -> None:
        node.meta["example_value"] = value
        if isinstance(value, torch.Tensor):
            self.known[id(value)] = (value, node)
            return
        for i, item in enumerate(value if isinstance(value, tuple | list) else ()):
            if isinstance(item, torch.Tensor | tuple | list):
                self._keep(self.create_node("call_function", operator.getitem, (node, i), {}), item)


_DUNDERS = {f: name for name, f in vars(torch.Tensor).items() if callable(f) and name.startswith("__")}


def _target(func: Any, args: tuple) -> tuple[str, Any, tuple]:
    """`(op, target, args)` by which a graph calls a function that reached `__torch_function__`."""
    dunder = _DUNDERS.get(func, "").strip("_")
    if hasattr(operator, f"__{dunder}__"):
        return "call_function", getattr(operator, dunder, None) or getattr(operator, f"{dunder}_"), args
    if dunder.startswith("r") and len(args) == 2 and hasattr(operator, f"__{dunder[1:]}__"):
        return "call_function", getattr(operator, f"__{dunder[1:]}__"), args[::-1]
    op, target, lead = fx_target(func)
    return op, target, (*args, *lead)


class TracingMode(TorchFunctionMode):
    """Sends every operation to the tracer."""

    def __init__(self, tracer: SymbolicTracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.tracer.call(func, args, kwargs or {})


class Seam:
    """What the markers talk to while this tracer runs, as they talk to Dynamo's fakes: `active.capture`."""

    def __init__(self, tracer: SymbolicTracer, half: Any):
        self.tracer, self.half = tracer, half

    def fake_site(self, x: torch.Tensor, path: str, kind: str, leaf: int, left: int) -> torch.Tensor:
        with compat.modes.NoTorchFunction():
            if self.half is not None:
                self.half.fake_site(x, path, kind, leaf, left)
            made = self.tracer.alias(x, site, (x, path, kind, leaf, left))
            self.tracer.marked[id(made)] = x
            return made

    def fake_anchor(self) -> torch.Tensor:
        with compat.modes.NoTorchFunction():
            made = torch.empty(0)
            self.tracer._keep(self.tracer.create_node("call_function", anchor, (), {}), made)
            return made

    def fake_supply(self, *at: object) -> torch.Tensor:
        with compat.modes.NoTorchFunction():
            return self.tracer.alias(self.half.fake_supply(*at), supply, at)

    def taken(self, at: tuple) -> bool:
        with compat.modes.NoTorchFunction():
            return self.half.taken(at)


@contextmanager
def observed(copied: nn.Module, markers: Markers, tracer: SymbolicTracer) -> Iterator[None]:
    """Markers on the copy, and skips; the plan in force is asked by them as it is when Dynamo traces."""
    traced, skip = markers.traced, markers.skip_traced
    undo = []
    for path, module in copied.named_modules():

        def before(m: nn.Module, args: tuple, kwargs: dict, path: str = path) -> Any:
            return traced((args, kwargs), path, "input")

        def after(m: nn.Module, args: tuple, kwargs: dict, out: object, path: str = path) -> Any:
            return traced(out, path, "output")

        put(module, before, after)
        if markers.half is not None and (path, "skip") in markers.calls:

            def forward(*args: object, path: str = path, original: Callable = module.forward, **kwargs: object) -> Any:
                skipped, out = skip(path)
                return out if skipped else original(*args, **kwargs)

            undo.append(override(module, forward))
    half = getattr(active, "capture", None)
    run, active.run, active.capture = getattr(active, "run", None), None, Seam(tracer, half)
    try:
        yield
    finally:
        active.run, active.capture = run, half
        for restore in reversed(undo):
            restore()
        for module in copied.modules():
            take(module)


def why_not(error: Exception) -> str:
    """The refusal in words, with the model's line; that of torch's own module where the model is one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(_LIBRARIES)] or [f for f in frames if _NN in f.filename]
    at = f" (at {own[-1].filename}:{own[-1].lineno})" if own else ""
    text = (str(error).strip().splitlines() or [""])[0]
    return (text if isinstance(error, Untraceable) else f"{type(error).__name__}: {text}") + at
