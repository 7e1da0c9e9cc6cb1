"""Symbolic capture: a module's Python runs once, on tensors without data, and what it calls becomes a graph.

As `torch.fx.symbolic_trace` does it: no bytecode is analysed, nothing is guarded but what a module holds (`State`), and what
cannot be followed is refused, with its line, so that the model runs on hooks. Other than there, what flows are fake
tensors in place of `fx.Proxy`s. So `isinstance(x, torch.Tensor)` is true, sizes are numbers (a graph is for one shape of its
inputs), and modules are seen by hooks on a copy, in place of a patch of `nn.Module.__call__` that all threads would meet.
"""

from __future__ import annotations

import contextvars
import operator
import os
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.fx as fx
import torch.nn as nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode

from ..tracing import ambient, tree
from ..tracing.names import LIVE_CALLS, NEEDS_DATA, NEEDS_MEMORY
from ..tracing.plan import fx_target
from . import _torch, streams
from .markers import KEY, Markers, Stop, active, anchor, mark, override, put, site, supply, take
from .scan import PLAIN, callee, skeleton
from .segment import Segment
from .state import State, changed, described, snapshot

GRAPHS = 64  # kept an entry
_LIBRARIES = os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__))
_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
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

    def give(self, fake: torch.Tensor, name: str) -> None:
        """An input of the graph."""
        node = self.create_node("placeholder", name, (), {})
        self.given.append(node)
        self._keep(node, fake)

    def unmarked(self, x: Any) -> Any:
        """What a value was before its markers."""
        while id(x) in self.marked:
            x = self.marked[id(x)]
        return x

    def create_arg(self, a: Any) -> Any:
        return self.node_of(a) if isinstance(a, torch.Tensor) else super().create_arg(a)

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
        if func is _torch.SET_GRAD:
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
            self.create_node("call_function", _torch.SET_GRAD, (now.grad,), {})
        self.ambient = now

    def alias(self, fake: torch.Tensor, target: Callable, args: tuple) -> torch.Tensor:
        """What a marker returns: from here on another tensor, of the same memory."""
        self.follow_modes()
        node = self.create_node("call_function", target, self.create_arg(args), {})
        made = fake.view_as(fake)
        self._keep(node, made)
        return made

    def _keep(self, node: fx.Node, value: Any) -> None:
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


class Recorder(TorchFunctionMode):
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

    def fake_site(self, x: torch.Tensor, path: str, kind: str, leaf: int, last: bool) -> torch.Tensor:
        with _torch.NoTorchFunction():
            if self.half is not None:
                self.half.fake_site(x, path, kind, leaf, last)
            made = self.tracer.alias(x, site, (x, path, kind, leaf, last))
            self.tracer.marked[id(made)] = x
            return made

    def fake_anchor(self) -> torch.Tensor:
        with _torch.NoTorchFunction():
            made = torch.empty(0)
            self.tracer._keep(self.tracer.create_node("call_function", anchor, (), {}), made)
            return made

    def fake_supply(self, *at: Any) -> torch.Tensor:
        with _torch.NoTorchFunction():
            return self.tracer.alias(self.half.fake_supply(*at), supply, at)

    def taken(self, at: tuple) -> bool:
        with _torch.NoTorchFunction():
            return self.half.taken(at)


class Graphed(NamedTuple):
    """A traced graph, which of its entry's tensors it takes, and the structure of what it returns."""

    segment: Segment
    takes: list[int]
    spec: tree.Spec
    leaves: list  # numbers stand as they are; for a tensor its place in the outputs

    def result(self, outputs: Any) -> Any:
        leaves = [outputs[x.index] if isinstance(x, Place) else x for x in self.leaves]
        return tree.unflatten(leaves, self.spec)


class Place(NamedTuple):
    index: int


class Symbolic:
    """A function of a module as it is called on traced graphs: one for each signature of its input and state of the module."""

    def __init__(self, module: nn.Module, fn: str | None, markers: Markers, keep: Callable[[Segment], None]):
        self.module, self.fn, self.markers, self.keep = module, fn, markers, keep
        self.graphs: OrderedDict[tuple, Graphed | str] = OrderedDict()

    def __call__(self, args: tuple, kwargs: dict) -> Any:
        leaves, spec = tree.flatten((args, kwargs))
        own = State(self.module, self.markers.forward_of)
        tensors = [*(x for x in leaves if isinstance(x, torch.Tensor)), *own.tensors]
        key = (spec, _signature(leaves), _shared(tensors), ambient.current(), tuple(own.facts))
        if key not in self.graphs:
            try:
                self.graphs[key] = self._trace(leaves, spec, tensors, len(own.tensors))
            except Exception as error:
                self.graphs[key] = _why(error)
            if len(self.graphs) > GRAPHS:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        found = self.graphs[key]
        if isinstance(found, str):
            raise Untraceable(found)
        return found.result(active.run.run_segment(found.segment, tuple(tensors[i] for i in found.takes)))

    def _trace(self, leaves: list, spec: tree.Spec, tensors: list[torch.Tensor], held: int) -> Graphed:
        _refuse(self.module, leaves, tensors)
        mode = _torch.FakeTensorMode(shape_env=ShapeEnv())
        copied = skeleton(self.module, mode)
        for real, copy in zip(self.module.modules(), copied.modules(), strict=True):
            if "forward" in vars(copy) and vars(copy)["forward"] is vars(real).get("forward"):
                was = self.markers.forward_of(real)
                if getattr(was, "__func__", None) is not type(real).forward:
                    raise Untraceable(f"the `forward` of a {type(real).__name__} was replaced")
                del copy.forward
        parts = State(copied).tensors
        if len(parts) != held:
            raise Untraceable("the module cannot be copied as it is")
        made = {id(x): mode.from_tensor(x, static_shapes=True) for x in leaves if isinstance(x, torch.Tensor)}
        fakes = [made.get(id(x), x) for x in leaves]
        tracer = SymbolicTracer()
        context = torch._guards.TracingContext(mode)
        for i, fake in enumerate([*(x for x in fakes if isinstance(x, torch.Tensor)), *parts]):
            tracer.give(fake, f"x{i}")
        args, kwargs = tree.unflatten(fakes, spec)
        before = snapshot(copied)
        with (
            streams.untouched(_moved),
            torch._guards.tracing(context),
            mode,
            self._observed(copied, tracer),
            Recorder(tracer),
        ):
            try:
                called = contextvars.copy_context().run(callee(copied, self.fn), *args, **kwargs)
                out = mark(called, "", "result")
            except Stop:
                out = None
        again, spec_again = tree.flatten((args, kwargs))
        if spec_again != spec or any(tracer.unmarked(a) is not b for a, b in zip(again, fakes, strict=True)):
            raise Untraceable("it changes a list, dict or object that it was called with")
        name = changed(before, snapshot(copied))
        if name is not None:
            raise Untraceable(f"it sets `{name}`, which a traced graph would not do again")
        return self._graphed(tracer, context, out)

    def _graphed(self, tracer: SymbolicTracer, context: Any, out: Any) -> Graphed:
        leaves, spec = tree.flatten(out)
        outputs: list[fx.Node] = []
        described_leaves: list[Any] = []
        for x in leaves:
            if isinstance(x, torch.Tensor):
                described_leaves.append(Place(len(outputs)))
                outputs.append(tracer.create_arg(x))
            elif isinstance(x, PLAIN):
                described_leaves.append(x)
            else:
                raise Untraceable(f"it returns a {type(x).__name__}, an object that a traced graph cannot make")
        tracer.follow_modes()
        tracer.create_node("output", "output", (tuple(outputs),), {})
        takes = [i for i, node in enumerate(tracer.given) if node.users]
        fakes = [tracer.given[i].meta["example_value"] for i in takes]
        for node in tracer.given:
            if not node.users:
                tracer.graph.erase_node(node)
        segment = Segment(fx.GraphModule({}, tracer.graph), fakes, context, 0, pure=True)
        self.keep(segment)
        return Graphed(segment, takes, spec, described_leaves)

    @contextmanager
    def _observed(self, copied: nn.Module, tracer: SymbolicTracer) -> Iterator[None]:
        """Markers on the copy, and skips; the plan in force is asked by them as it is when Dynamo traces."""
        traced, skip = self.markers.traced, self.markers.skip_traced
        undo = []
        for path, module in copied.named_modules():

            def before(m: nn.Module, args: tuple, kwargs: dict, path: str = path) -> Any:
                return traced((args, kwargs), path, "input")

            def after(m: nn.Module, args: tuple, kwargs: dict, out: Any, path: str = path) -> Any:
                return traced(out, path, "output")

            put(module, before, after)
            if self.markers.half is not None and (path, "skip") in self.markers.calls:

                def forward(*args: Any, path: str = path, original: Callable = module.forward, **kwargs: Any) -> Any:
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


def _refuse(module: nn.Module, leaves: list, tensors: list[torch.Tensor]) -> None:
    """What is known beforehand to be lost in a traced graph."""
    for path, m in module.named_modules():
        if any(key != KEY and not _collects(hook) for table in _TABLES for key, hook in getattr(m, table).items()):
            raise Untraceable(f"`{path or 'the model'}` has hooks, which a traced graph would not call again")
    if _has_any_global_hook():
        raise Untraceable("all modules have hooks, which a traced graph would not call again")
    for x in leaves:
        if not isinstance(x, (torch.Tensor, *PLAIN)):
            raise Untraceable(f"it is called with a {type(x).__name__}, and objects can change from call to call")
    for x in tensors:
        if type(x) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            raise Untraceable(f"it uses a {type(x).__name__}, which is more than a plain tensor")
    places = {id(x): place for x, place in zip(tensors, _shared(tensors), strict=True) if place >= 0}
    if len(set(places.values())) < len(places):
        raise Untraceable("two of its tensors lie in the same memory")


def _collects(hook: Any) -> bool:
    """Is it a hook by which transformers collects outputs? It runs at each forward, and while one is traced."""
    return (getattr(hook, "__module__", "") or "").startswith("transformers.")


def _signature(leaves: list) -> tuple:
    first: dict[int, int] = {}
    return tuple(
        (first.setdefault(id(x), i), described(x)) if isinstance(x, torch.Tensor) else (type(x), repr(x))
        for i, x in enumerate(leaves)
    )


def _shared(tensors: list[torch.Tensor]) -> tuple:
    """Which tensors lie in the same memory."""
    first: dict[int, int] = {}
    return tuple(
        first.setdefault(x.untyped_storage()._cdata, i) if x.layout is torch.strided else -1
        for i, x in enumerate(tensors)
    )


def _moved() -> None:
    raise Untraceable("it draws random numbers, or sets a seed, by other than operations on tensors")


def _why(error: Exception) -> str:
    """The refusal in words, with the model's line."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_LIBRARIES)]
    at = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
    text = (str(error).strip().splitlines() or [""])[0]
    return (
        f"symbolic tracing ended{at}: {text if isinstance(error, Untraceable) else f'{type(error).__name__}: {text}'}"
    )
