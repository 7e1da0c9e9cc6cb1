"""The interventions of a trace as data: plain torch calls and a small dialect, in the user's order.

An `InterventionGraph` (the *plan*) is compared by structure: two recordings that differ only in lifted values, or in the
lines they were written on, share one, and with it everything compiled for it.
"""

from __future__ import annotations

import weakref
from functools import cached_property
from typing import Any, NamedTuple

import torch

from . import tree
from .encode import Key, objects, references, sizeless

Site = tuple[str, str, int]  # module path, "input" | "output" | "result", call index

# The dialect: operations that are not torch calls. Everything else is `call`.
READ, WRITE, SKIP, OBJECT, OBSERVE, STOP, SAVE, CALL, MODULE, APPLY, SYNC, BARRIER = (
    *("read", "write", "skip", "object", "observe", "stop", "save", "call", "module", "apply", "sync", "barrier"),
)
BACKWARD, GRAD, SET_GRAD = "backward", "grad", "set_grad"  # a gradient belongs to the backward that follows it
VISIT = "visit"  # a module that the body calls passes a site
REACH = "reach"  # does the run come by a site: data decides how often its module is called
AT_SITE = {READ, WRITE, SKIP, OBJECT, OBSERVE, REACH}  # take effect at a site of their own
EVERY = -1  # the call index of an observation of every call
LIVE = {APPLY, SYNC}  # need real values and Python: nothing compiled can hold them


class Op(NamedTuple):
    """One recorded operation. Hashes and compares by structure."""

    kind: str
    invoke: int
    target: Any  # a Site (read, write, skip), a module path (module), an Identity of a function (call)
    args: Key
    kwargs: Key
    ambient: tuple | None  # grad mode, autocast ... where they differ from those the trace was opened under
    effect: str  # "" pure, "inplace" changes an argument, "random" draws numbers
    extra: Any = None  # write, skip: the spec of the written tree; read: which leaves hold the batch in their rows
    when: tuple[Key, ...] = ()  # the values that must all be true for it to take effect: `tracer.cond`

    @property
    def needs(self) -> set[tuple[int, int]]:
        """The values that it uses."""
        return references((self.args, self.kwargs, self.when))

    @property
    def retains(self) -> bool:
        """Is it `value.retain_grad()`?"""
        return self.kind == APPLY and self.target.obj is torch.Tensor.retain_grad


class Observation(NamedTuple):
    """What an observation does to each tensor leaf: methods by name, with their keywords."""

    steps: tuple[tuple[str, tuple], ...]

    @property
    def to(self) -> dict[str, Any]:
        """Where values are moved, and what they are cast to."""
        return dict(dict(self.steps).get("to", ()))

    def leaves_gpu(self, x: torch.Tensor) -> bool:
        """Is a value taken from a GPU into memory, where it can arrive while the model goes on?"""
        device, plain = self.to.get("device"), "detach" in dict(self.steps) or not x.requires_grad
        return x.is_cuda and device is not None and device.type == "cpu" and plain and x.layout is torch.strided


class Groups(NamedTuple):
    """Each invoke's rows `(start, size)` of the batch; `None` for an invoke over the whole batch."""

    rows: tuple[tuple[int, int] | None, ...]
    total: int

    @property
    def inputs(self) -> set[tuple[int, int]]:
        """The rows of each input."""
        return {rows for rows in self.rows if rows is not None}


class InterventionGraph:
    """All operations of one forward, with what can be asked of them without running anything."""

    _interned: weakref.WeakValueDictionary[tuple, InterventionGraph] = weakref.WeakValueDictionary()

    def __init__(self, ops: tuple[Op, ...], groups: Groups, recapture: str, specs: tuple):
        self.ops, self.groups, self.recapture = ops, groups, recapture
        self.specs = specs  # the structure of each operation's result

    @classmethod
    def of(cls, ops: tuple[Op, ...], groups: Groups, recapture: str, specs: tuple) -> InterventionGraph:
        """The one plan with this structure."""
        key = (ops, groups, recapture, specs)
        plan = cls._interned.get(key)
        if plan is None:
            plan = cls._interned[key] = cls(*key)
        return plan

    @cached_property
    def kin(self) -> InterventionGraph:
        """What all plans are alike in that differ from this one by the sizes of constants alone."""
        ops = tuple(
            op._replace(args=sizeless(op.args), kwargs=sizeless(op.kwargs), when=sizeless(op.when)) for op in self.ops
        )
        return InterventionGraph.of(ops, self.groups, self.recapture, self.specs)

    @cached_property
    def workers(self) -> list[list[int]]:
        """The operations of each invoke, in program order."""
        found: list[list[int]] = [[] for _ in range(max((op.invoke for op in self.ops), default=0) + 1)]
        for n, op in enumerate(self.ops):
            found[op.invoke].append(n)
        return found

    @cached_property
    def touches(self) -> dict[Site, list[int]]:
        """The operations that belong to each site."""
        found: dict[Site, list[int]] = {}
        for n, op in enumerate(self.ops):
            if op.kind in AT_SITE:
                found.setdefault(op.target, []).append(n)
        return found

    @cached_property
    def visits(self) -> frozenset[Site]:
        """The sites of modules that the body calls: the model's own calls are counted around them."""
        return frozenset(op.target for op in self.ops if op.kind == VISIT)

    @cached_property
    def observers(self) -> frozenset[int]:
        """The workers that only observe: what they do not get to is nothing that the run missed."""
        return frozenset(op.invoke for op in self.ops if op.kind == OBSERVE)

    @cached_property
    def followed(self) -> dict[tuple[str, str], list[int]]:
        """The observations of whatever a module does, as often as it is called."""
        found: dict[tuple[str, str], list[int]] = {}
        for n, op in enumerate(self.ops):
            if op.kind == OBSERVE and op.target[2] == EVERY:
                found.setdefault(op.target[:2], []).append(n)
        return found

    @cached_property
    def watched(self) -> frozenset[tuple[str, str]]:
        """`(path, kind)` of every site that is read, written or skipped."""
        return frozenset(
            (path, "input" if self.ops[ns[0]].kind == SKIP else kind) for (path, kind, _), ns in self.touches.items()
        )

    @cached_property
    def skips(self) -> dict[str, set[int]]:
        """The calls of each module that are skipped."""
        found: dict[str, set[int]] = {}
        for op in self.ops:
            if op.kind == SKIP:
                found.setdefault(op.target[0], set()).add(op.target[2])
        return found

    @cached_property
    def syncs(self) -> list[int]:
        """The operations at which the body looks at a value."""
        return [n for n, op in enumerate(self.ops) if op.kind == SYNC]

    @cached_property
    def stops(self) -> bool:
        return any(op.kind == STOP for op in self.ops)

    @cached_property
    def chooses(self) -> bool:
        """Does a value decide whether the model skips a call or stops?"""
        return any(op.when and op.kind in (SKIP, STOP) for op in self.ops)

    @cached_property
    def needs(self) -> list[set[tuple[int, int]]]:
        """The values that each operation uses."""
        return [op.needs for op in self.ops]

    @cached_property
    def binds(self) -> dict[int, int]:
        """The backward that each gradient belongs to: the next one in program order."""
        found: dict[int, int] = {}
        waiting: list[int] = []
        for n, op in enumerate(self.ops):
            if op.kind == GRAD:
                waiting.append(n)
            elif op.kind == BACKWARD:
                found.update(dict.fromkeys(waiting, n))
                waiting = []
        return found | dict.fromkeys(waiting, len(self.ops))  # still to come

    @cached_property
    def backs(self) -> frozenset[int]:
        """The backward passes of the body."""
        return frozenset(n for n, op in enumerate(self.ops) if op.kind == BACKWARD)

    @cached_property
    def tapped(self) -> frozenset[tuple[int, int]]:
        """The values whose gradients are asked for."""
        return frozenset(v for n, op in enumerate(self.ops) if op.kind == GRAD or op.retains for v in self.needs[n])

    @cached_property
    def holds_odd(self) -> bool:
        """Does an operation take an argument that no graph can hold?"""
        held = [x for op in self.ops if op.kind == CALL for x in objects((op.args, op.kwargs))]
        return any(isinstance(x, torch.ScriptObject) for x in held)

    @cached_property
    def retains_rows(self) -> bool:
        """Does an invoke retain the gradient of its own rows of a site?"""
        retained = [
            op for op in self.ops if op.retains and self.groups.rows[op.invoke : op.invoke + 1] not in ((), (None,))
        ]
        return any(self.ops[n].kind == READ for op in retained for n, _ in op.needs)

    @cached_property
    def deferred(self) -> dict[int, int]:
        """The operations on gradients whose backward comes after them, and that backward: they run while it does."""
        found: dict[int, int] = {}
        for n, op in enumerate(self.ops):
            if op.kind in (GRAD, BACKWARD):
                continue
            bounds = [b for m, _ in self.needs[n] if (b := self.binds.get(m, found.get(m, -1))) > n]
            if bounds:
                found[n] = max(bounds)
        return found

    @cached_property
    def changed(self) -> frozenset[tuple[int, int]]:
        """The values that a recorded call changes in place."""
        calls = [op.args[2][0] for op in self.ops if op.kind == CALL and op.effect == "inplace" and op.args[2]]
        return frozenset(key[1:3] for key in calls if key[0] == "v")

    @cached_property
    def changes_constants(self) -> bool:
        """Does a recorded call change a real tensor in place?"""
        calls = (op.args[2] for op in self.ops if op.kind == CALL and op.effect == "inplace")
        return any(args and args[0][0] == "c" for args in calls)

    @cached_property
    def users(self) -> dict[tuple[int, int], set[int]]:
        """The operations that use each value."""
        found: dict[tuple[int, int], set[int]] = {}
        for n, needed in enumerate(self.needs):
            for value in needed:
                found.setdefault(value, set()).add(n)
        return found

    @cached_property
    def saved(self) -> frozenset[tuple[int, int]]:
        """The values that leave the run."""
        return frozenset(v for n, op in enumerate(self.ops) if op.kind in (SAVE, SYNC) for v in self.needs[n])

    @cached_property
    def writes(self) -> bool:
        """Does a recorded call change something in place?"""
        return any(op.kind == CALL and op.effect == "inplace" for op in self.ops)

    @cached_property
    def sees_objects(self) -> bool:
        """Does it read what only a live site has: objects, a `dict` of a class of its own, a structure that no scan could tell?"""
        writes = [op for op in self.ops if op.kind in (WRITE, SKIP)]
        return (
            bool(self.followed)
            or any(
                (op.kind == READ and op.extra is None) or (op.kind == OBJECT and op.target[0]) or op.kind == REACH
                for op in self.ops
            )
            or any(tree.holds(spec, ("mapping",)) for spec in (*self.specs, *(op.extra[0] for op in writes)))
            or any(self.ops[n].kind == APPLY for op in writes for n, _ in op.needs)
        )


def fx_target(func: Any) -> tuple[str, Any, tuple]:
    """`(op, target, leading args)` by which `torch.fx` calls a function that reached `__torch_function__`.

    Method descriptors become `call_method`, property getters `getattr`.
    """
    import operator

    name = getattr(func, "__name__", "")
    operators = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}
    if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
        return "call_function", operators[name], ()
    if name == "__get__" and hasattr(func, "__self__"):
        return "call_function", getattr, (func.__self__.__name__,)
    if getattr(torch.Tensor, name, None) is func:
        return "call_method", name, ()
    return "call_function", func, ()


def name_of_site(site: Site) -> str:
    """A site as it is written in an error: `layers.3.output (call 1)`."""
    path, kind, call = site
    return ".".join(p for p in (path, kind) if p) + (f" (call {call})" if call else "")
