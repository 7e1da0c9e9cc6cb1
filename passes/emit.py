"""Recorded operations as `fx` nodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx
import torch.nn as nn

from nnsight_fx.compat.modes import SET_GRAD, enter_autocast, exit_autocast
from nnsight_fx.plan.interleave import Cut, Firing, Interleaver
from nnsight_fx.plan.keys import NumberSlot, Outside, Recorded, SizeExpr, TensorSlot, Value
from nnsight_fx.plan.plan import Op, fx_target
from nnsight_fx.plan.verbs import (
    Call,
    CallModule,
    Linearize,
    Observation,
    Read,
    RunBackward,
    Site,
    Skip,
    StopRun,
    Visit,
)

from ..plan.skips import skip_of
from .calls import FunctionCall, LeafOf, ModuleCall, paths, printable
from .job import (
    Job,
    backward,
    constant,
    fetch,
    gradient,
    linear,
    parameter,
    put_rows,
    rows,
    select,
    set_gradient,
    settled,
    source,
    tap,
)

if TYPE_CHECKING:
    from ..plan.ambient import Ambient
    from ..plan.tree import Spec


STILL = {  # modules that only compute in train mode, too
    *(
        getattr(nn, name)
        for name in ("Linear", "Identity", "Embedding", "LayerNorm", "RMSNorm", "GroupNorm", "Sequential")
    ),
    *(
        getattr(nn, name)
        for name in ("ReLU", "GELU", "SiLU", "Tanh", "Sigmoid", "Softmax", "Flatten", "Conv1d", "Conv2d")
    ),
}


class Emitter(Interleaver):
    """A plan whose values are nodes and whose operations emit nodes, where the graph's insertion point is."""

    live = False

    def __init__(self, gm: fx.GraphModule, job: Job):
        super().__init__(job.plan)
        self.gm, self.job, self.graph = gm, job, gm.graph
        self.at, self.done, self.counts = list(job.entry.at), set(job.entry.done), dict(job.entry.counts)
        self.at += [0] * (len(job.plan.workers) - len(self.at))
        self.skipped = dict(job.entry.skipped)
        self.closed = job.closed
        self.fetched: dict[tuple, fx.Node] = {}
        self.made: set[Value] = set()
        self.predicates: dict[tuple[Recorded, ...], fx.Node] = {}
        self.taps: dict[int, tuple] = {}  # gradient -> its tap, the node that has it, the rows that a value has of that
        self.supplied: dict[Site, list] = {}  # what the model's Python sees replaced
        self.written: dict[fx.Node, object] = {}  # marker -> what the model goes on with

    # -- values --------------------------------------------------------------------------------------------------

    def has(self, value: Value) -> bool:
        return value in self.env or value in self.job.entry.known

    def lookup(self, key: Value | Outside) -> Any:
        if not isinstance(key, Value):
            return self.constant(key)
        if key in self.env:
            return self.env[key]
        return self._source(("fetch", key), fetch, (key.op, key.leaf))

    def constant(self, key: Outside) -> Any:
        if isinstance(key, SizeExpr):
            raise Cut  # a size that only the call knows: the operation runs live
        kind = key.kind if isinstance(key, NumberSlot) else "tensor"
        return self._source(("constant", key.slot), constant, (key.slot, kind))

    def _source(self, key: tuple, target: Callable, args: tuple) -> fx.Node:
        """A node for something from outside, made once, in front of everything."""
        if key not in self.fetched:
            first = next(n for n in self.graph.nodes if n.op != "placeholder")
            with self.graph.inserting_before(first):
                self.fetched[key] = self._emit("call_function", target, args)
        return self.fetched[key]

    def _emit(self, op: str, target: object, args: tuple = (), kwargs: dict | None = None) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs or {})
        self.job.emitted.add(node)
        return node

    def rows(self, leaf: Any, invoke: int, batched: bool | None) -> Any:
        group = self._group(leaf, invoke, batched)
        return (
            leaf
            if group is None
            else self._emit("call_function", rows, (leaf, *group, self.plan.groups.total, batched))
        )

    def put_rows(self, leaf: object, new: object, invoke: int, batched: bool | None) -> Any:
        group = self._group(leaf, invoke, batched)
        if group is None:
            return new
        return self._emit("call_function", put_rows, (leaf, new, *group, self.plan.groups.total, batched))

    def observed(self, leaf: object, how: Observation) -> object:
        of = leaf.args[0] if isinstance(leaf, fx.Node) and leaf.target is rows else leaf
        fake = of.meta.get("example_value") if isinstance(of, fx.Node) else None
        moved = isinstance(fake, torch.Tensor) and how.leaves_gpu(fake)  # by the run, behind the graph
        for name, kwargs in how.steps if isinstance(leaf, fx.Node) else ():
            given = dict(kwargs)
            if moved and name == "to":  # as it is here, whatever changes it later
                given["device"], given["copy"] = fake.device, True  # type: ignore[union-attr]
            leaf = self._emit("call_method", name, (leaf,), given)
        return leaf

    def _group(self, leaf: object, invoke: int, batched: bool | None) -> tuple[int, int] | None:
        groups = self.plan.groups.rows
        return groups[invoke] if invoke < len(groups) and isinstance(leaf, fx.Node) and batched is not False else None

    # -- operations ----------------------------------------------------------------------------------------------

    def check(self, n: int, leaves: list, expected: tuple, spec: Spec) -> None:
        for leaf, want in zip(leaves, expected, strict=False):
            leaf = leaf.args[0] if isinstance(leaf, fx.Node) and leaf.target is rows else leaf
            fake = leaf.meta.get("example_value") if isinstance(leaf, fx.Node) else None
            if fake is not None and want is not None and (fake.dtype != want[1] or fake.dim() != len(want[0])):
                raise Cut  # not what was guessed: the live read says so

    def perform(self, n: int, firing: Firing | None) -> None:
        if isinstance(self.plan.ops[n].verb, Read) and (n, -1) in self.plan.users:
            raise Cut
        super().perform(n, firing)
        op = self.plan.ops[n]
        parts = self.skipped.get(op.verb.site, {}) if isinstance(op.verb, Skip) else {}
        if op.invoke in parts:
            for j, leaf in enumerate(parts[op.invoke][1]):
                if isinstance(leaf, fx.Node):
                    self._make(Value(n, j), leaf)

    def tap(self, n: int, op: Op) -> None:
        if not self.job.differentiates:
            raise Cut
        key = op.first
        assert isinstance(key, Value | TensorSlot)
        leaf, *part = self.bases.get(key, (None,)) if isinstance(key, Value) else (None,)
        node = self.lookup(key) if leaf is None else leaf
        self.taps[n] = (self._emit("call_function", tap, (node, n)), node, part)

    def differentiate(self, n: int, op: Op, verb: RunBackward) -> None:
        if not self.job.differentiates:
            raise Cut
        (loss, weight), options = self.arguments(op)
        mine = [m for m, b in self.plan.binds.items() if b == n]
        taps = tuple(self.taps[m][0] for m in mine)
        back = self._emit("call_function", backward, (loss, weight, taps, options, verb.returns))
        flows: dict[int, tuple] = {}
        for m in mine:
            tapped, base, part = self.taps[m]
            got = self._emit("call_function", gradient, (back, tapped))
            got.meta.update(base.meta)
            own = self.rows(got, *part) if part else got
            if (m, 0) in self.plan.changed:
                own = self._emit("call_method", "clone", (own,))
            flows[m] = (got, own, part)
            self._make(Value(m, 0), own)
        self.flow()
        for m, (got, own, part) in flows.items():
            new = self.replaced.pop(m, own)
            if new is not own or (m, 0) in self.plan.changed:
                self._emit("call_function", set_gradient, (got, self.put_rows(got, new, *part) if part else new))
        self._emit("call_function", settled, (back,))

    def source(self, value: Value) -> None:
        self._emit("call_function", source, (self.env[value], *value))

    def linearize(self, n: int, op: Op, verb: Linearize) -> None:
        (targets, sources), _ = self.arguments(op)
        self._emit("call_function", linear, (targets, sources, verb.freeze))

    def _make(self, value: Value, node: object) -> None:
        """A value is there, as a node."""
        self.env[value] = node
        self.made.add(value)

    def _visit(self, n: int, op: Op, verb: Visit) -> None:
        """All of a visit or nothing: what others wrote there would be lost in a graph that is cut inside."""
        done, at, env, made = set(self.done), list(self.at), dict(self.env), set(self.made)
        before = set(self.graph.nodes)
        try:
            super()._visit(n, op, verb)
        except Cut:
            self.done, self.at, self.env, self.made = done, at, env, made
            sources = set(self.fetched.values())
            for node in reversed(list(self.graph.nodes)):
                if node not in before and node not in sources:
                    self.job.emitted.discard(node)
                    self.graph.erase_node(node)
            raise

    # -- conditions ----------------------------------------------------------------------------------------------

    def holds(self, op: Op) -> bool:
        """What only computes is computed in any case, and what changes something selects; the rest runs live."""
        verb = op.verb
        random = self._moves(verb.path) if isinstance(verb, CallModule) else op.effect == "random"
        if isinstance(verb, Skip | StopRun) or random or "out" in op.kwargs:
            raise Cut
        return True

    def _moves(self, path: str) -> bool:
        """Can a call of a module draw numbers or move buffers?"""
        return self.job.skeleton is None or any(
            m.training and type(m) not in STILL for m in self.job.skeleton(path).modules()
        )

    def select(self, op: Op, new: object, old: object) -> object:
        if not op.when or new is old:
            return new
        return self._emit("call_function", select, (self._predicate(op.when), new, old))

    def _predicate(self, when: tuple[Recorded, ...]) -> fx.Node:
        if when not in self.predicates:
            last, *rest = map(self.lookup, reversed(when))
            for other in rest:
                last = self._emit("call_function", torch.logical_and, (other, last))
            self.predicates[when] = last
        return self.predicates[when]

    def _changed(self, op: Op, kind: str, target: object, args: tuple, kwargs: dict) -> fx.Node:
        """A conditional in-place operation: on a copy, which is copied back where the condition holds."""
        old, *rest = args
        new = self._emit("call_method", "clone", (old,))
        made = self._emit(kind, target, (new, *rest), kwargs)
        self._emit("call_method", "copy_", (old, self.select(op, new, old)))
        return made

    def execute(self, n: int, op: Op) -> object:
        args, kwargs = self.arguments(op)
        leave = self._enter(op.ambient)
        if isinstance(op.verb, CallModule):
            node = self._module(op.verb.path, args, kwargs)
        else:
            assert isinstance(op.verb, Call)
            kind, target, lead = fx_target(op.verb.fn.obj)
            target = target if kind == "call_method" or printable(target) else FunctionCall(target)
            emit = functools.partial(self._changed, op) if op.when and op.effect == "inplace" else self._emit
            node = emit(kind, target, (*args, *lead), kwargs)
        leave()
        return n, node

    def _enter(self, ambient: Ambient | None) -> Callable[[], None]:
        """Emit the switch to an operation's own modes; the return emits the way back."""
        if ambient is None:
            return lambda: None
        base, undo = self.job.modes, []
        grad = ambient.grad and not ambient.inference
        if grad != base.grad:
            self._emit("call_function", SET_GRAD, (grad,))
            undo.append(lambda: self._emit("call_function", SET_GRAD, (base.grad,)))
        for (device, enabled, dtype), was in zip(ambient.autocast, base.autocast, strict=True):
            if (device, enabled, dtype) != was:
                token = self._emit("call_function", enter_autocast(), (device, dtype, enabled, True))
                undo.append(lambda t=token: self._emit("call_function", exit_autocast(), (t,)))

        def leave() -> None:
            for step in reversed(undo):
                step()

        return leave

    def _module(self, path: str, args: tuple, kwargs: dict) -> fx.Node:
        """A module of the model called on values: its structure, on the model's own parameters."""
        assert self.job.skeleton is not None
        module = self.job.skeleton(path)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        given = {name: self._source(("parameter", path, name), parameter, (path, name)) for name in tensors}
        return self._emit("call_function", ModuleCall(path, module), (given, args, kwargs))

    def split(self, result: object) -> tuple[list, object]:
        n, node = result
        return [LeafOf(self._emit, node, path) for path in paths(self.plan.specs[n])], None

    def _keep(self, n: int, leaves: list, spec: Spec | None) -> None:
        for j, leaf in enumerate(leaves):
            if (n, j) in self.plan.users or not self.closed:
                self._make(Value(n, j), leaf() if isinstance(leaf, LeafOf) else leaf)

    def wanted(self) -> list[Value]:
        """The values made here that leave the segment: saved, used by what is still to come, or, while the plan may grow, any."""
        used = {v for n, needed in enumerate(self.plan.needs) if n not in self.done for v in needed}
        ahead = {
            skip_of(self.plan, at, i) for at, parts in self.skipped.items() for i in parts if at not in self.supplied
        }
        used |= {v for v in self.made if v.op in ahead}
        return sorted(v for v in self.made if v in self.plan.saved or v in used or not self.closed)

    def _release(self, n: int) -> None:
        pass
