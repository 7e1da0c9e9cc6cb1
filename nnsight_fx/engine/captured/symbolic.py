"""Running a model on graphs that were captured symbolically: which graph holds for a call, and what it takes and gives."""

from __future__ import annotations

import contextvars
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.fx as fx
import torch.nn as nn

from ... import compat
from ...capture import streams
from ...capture.hook_tables import KEY
from ...capture.marker import active, close
from ...capture.markers import Markers, Stop
from ...capture.marking import mark
from ...capture.segment import Segment
from ...capture.state import ModuleState, changed, described, snapshot
from ...capture.symbolic import SymbolicTracer, TracingMode, Untraceable, observed, why_not
from ...compat.modules import comes_and_goes
from ...plan import ambient, tree
from ...plan.tree import PLAIN
from ...scan.scan import callee, skeleton

GRAPHS = 64  # kept an entry


class Graphed(NamedTuple):
    """A traced graph, which of its entry's tensors it takes, and the structure of what it returns."""

    segment: Segment
    takes: list[int]
    spec: tree.Spec
    leaves: list  # numbers stand as they are; for a tensor its place in the outputs

    def result(self, outputs: list) -> Any:
        leaves = [outputs[x.index] if isinstance(x, Place) else x for x in self.leaves]
        return tree.unflatten(leaves, self.spec)


class Place(NamedTuple):
    index: int


class Symbolic:
    """A function of a module as it is called on traced graphs: one for each signature of its input and state of the module."""

    def __init__(
        self,
        module: nn.Module,
        fn: str | None,
        markers: Markers,
        keep: Callable[[Segment], None],
        drop: Callable[[Segment], None],
    ):
        self.module, self.fn, self.markers, self.keep, self.drop = module, fn, markers, keep, drop
        self.graphs: OrderedDict[tuple, Graphed | str] = OrderedDict()

    def __call__(self, args: tuple, kwargs: dict) -> object:
        leaves, spec = tree.flatten((args, kwargs))
        own = ModuleState(self.module, self.markers.forward_of)
        tensors = [*(x for x in leaves if isinstance(x, torch.Tensor)), *own.tensors]
        _refuse_modules(own.modules, self.markers)
        key = (
            spec,
            _signature(leaves),
            _shared(tensors),
            ambient.current(),
            compat.modes.process_flags(),
            tuple(own.facts),
        )
        if key not in self.graphs:
            try:
                self.graphs[key] = self._trace(leaves, spec, tensors, len(own.tensors))
            except Exception as error:
                self.graphs[key] = why_not(error)
            if len(self.graphs) > GRAPHS:
                _, old = self.graphs.popitem(last=False)
                if isinstance(old, Graphed):
                    self.drop(old.segment)
        self.graphs.move_to_end(key)
        found = self.graphs[key]
        if isinstance(found, str):
            raise Untraceable(found)
        return found.result(active.run.run_segment(found.segment, tuple(tensors[i] for i in found.takes)))

    def _trace(self, leaves: list, spec: tree.Spec, tensors: list[torch.Tensor], held: int) -> Graphed:
        _refuse(leaves, tensors)
        mode = compat.fakes.FakeTensorMode(shape_env=compat.symbols.ShapeEnv())
        copied = skeleton(self.module, mode)
        for real, copy in zip(self.module.modules(), copied.modules(), strict=True):
            if "forward" in vars(copy) and vars(copy)["forward"] is vars(real).get("forward"):
                was = self.markers.forward_of(real)
                if getattr(was, "__func__", None) is not type(real).forward:
                    raise Untraceable(f"the `forward` of a {type(real).__name__} was replaced")
                del copy.forward
        parts = ModuleState(copied).tensors
        if len(parts) != held:
            raise Untraceable("the module cannot be copied as it is")
        made = {id(x): mode.from_tensor(x, static_shapes=True) for x in leaves if isinstance(x, torch.Tensor)}
        fakes = [made.get(id(x), x) for x in leaves]
        tracer = SymbolicTracer()
        context, compiles = compat.graphs.new_context(mode)
        for i, fake in enumerate(x for x in fakes if isinstance(x, torch.Tensor)):
            tracer.give(fake, f"x{i}")
        for i, fake in enumerate(parts):
            tracer.give(fake, f"p{i}").meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        args, kwargs = tree.unflatten(fakes, spec)
        before = snapshot(copied)
        with (
            streams.untouched(_moved),
            compiles,
            mode,
            observed(copied, self.markers, tracer),
            TracingMode(tracer),
        ):
            try:
                called = contextvars.copy_context().run(callee(copied, self.fn), *args, **kwargs)
                out = mark(called, "", "result", True)
            except Stop:
                out = None
        again, spec_again = tree.flatten((args, kwargs))
        if spec_again != spec or any(tracer.unmarked(a) is not b for a, b in zip(again, fakes, strict=True)):
            raise Untraceable("it changes a list, dict or object that it was called with")
        name = changed(before, snapshot(copied))
        if name is not None:
            raise Untraceable(f"it sets `{name}`, which a traced graph would not do again")
        return self._graphed(tracer, context, out)

    def _graphed(self, tracer: SymbolicTracer, context: object, out: object) -> Graphed:
        leaves, spec = tree.flatten(out)
        outputs: list[fx.Node] = []
        described_leaves: list[object] = []
        for x in leaves:
            if isinstance(x, torch.Tensor):
                described_leaves.append(Place(len(outputs)))
                outputs.append(tracer.create_arg(x))
            elif isinstance(x, PLAIN):
                described_leaves.append(x)
            else:
                cure = (
                    " (`use_cache=False` among the keywords of the trace or sweep leaves it out)"
                    if "Cache" in type(x).__name__
                    else ""
                )
                raise Untraceable(f"it returns a {type(x).__name__}, an object that a traced graph cannot make{cure}")
        tracer.follow_modes()
        tracer.create_node("output", "output", (tuple(outputs),), {})
        takes = [i for i, node in enumerate(tracer.given) if node.users]
        fakes = [tracer.given[i].meta["example_value"] for i in takes]
        for node in tracer.given:
            if not node.users:
                tracer.graph.erase_node(node)
        close(tracer.graph)
        segment = Segment(fx.GraphModule({}, tracer.graph), fakes, context, 0, pure=True)
        self.keep(segment)
        return Graphed(segment, takes, spec, described_leaves)


def _refuse_modules(modules: list[nn.Module], markers: Markers) -> None:
    """What is looked for at each call: the user's hooks, which a traced graph would not call, and kernels that see the tracer."""
    for m in modules:
        if isinstance(m, nn.MultiheadAttention) and not m.training and torch.backends.mha.get_fastpath_enabled():
            raise Untraceable(
                f"`{markers.paths.get(m)}` has a fast path that it does not take while it is traced "
                "(`torch.backends.mha.set_fastpath_enabled(False)` turns it off)"
            )
        for table in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks):
            if table and any(key != KEY and not comes_and_goes(hook) for key, hook in table.items()):
                name = markers.paths.get(m) or "the model"
                raise Untraceable(f"`{name}` has hooks, which a traced graph would not call")
    if compat.modules.hooked_everywhere():
        raise Untraceable("there are hooks on all modules, which a traced graph would not call")


def _refuse(leaves: list, tensors: list[torch.Tensor]) -> None:
    """What is known beforehand to be lost in a traced graph."""
    for x in leaves:
        if not isinstance(x, (torch.Tensor, *PLAIN)):
            raise Untraceable(f"it is called with a {type(x).__name__}, and objects can change from call to call")
    for x in tensors:
        if type(x) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            raise Untraceable(f"it uses a {type(x).__name__}, which is more than a plain tensor")
    places = {id(x): place for x, place in zip(tensors, _shared(tensors), strict=True) if place >= 0}
    if len(set(places.values())) < len(places):
        raise Untraceable("two of its tensors lie in the same memory")


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
        first.setdefault(compat.tensors.memory(x), i) if x.layout is torch.strided else -1
        for i, x in enumerate(tensors)
    )


def _moved() -> None:
    raise Untraceable("it draws random numbers, or sets a seed, by other than operations on tensors")
