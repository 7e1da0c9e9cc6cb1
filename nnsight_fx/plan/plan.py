"""The interventions of a trace as data: plain torch calls and a few verbs, in the user's order.

An `InterventionGraph` (the *plan*) is compared by structure: two recordings that differ only in lifted values, or in the
lines they were written on, share one, and with it everything compiled for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch

from . import tree
from .ambient import Ambient
from .keys import Items, Key, Named, Recorded, TensorSlot, Value, objects, references, sizeless
from .verbs import (
    EVERY,
    Apply,
    AtSite,
    Call,
    Grad,
    Linearize,
    Observe,
    Reach,
    Read,
    ReadObject,
    RunBackward,
    Save,
    Site,
    Skip,
    StopRun,
    Sync,
    Verb,
    Visit,
    Write,
)

V = TypeVar("V", bound=Verb)


class Op(NamedTuple):
    """One recorded operation. Hashes and compares by structure."""

    verb: Verb
    invoke: int
    args: Items
    kwargs: Named
    ambient: Ambient | None = None  # grad mode, autocast ... where they differ from those the trace was opened under
    when: tuple[Recorded, ...] = ()  # the values that must all be true for it to take effect: `tracer.cond`

    @property
    def effect(self) -> str:
        """`""` is pure; "inplace" changes something, "random" draws numbers, "gradient" waits for a backward."""
        return self.verb.effect

    @property
    def needs(self) -> set[Value]:
        """The values that it uses."""
        return references(self.args, self.kwargs, *self.when)

    @property
    def first(self) -> Key:
        """Its first argument."""
        return self.args.items[0]

    @property
    def tree(self) -> tuple[Key, ...]:
        """The leaves of the tree that a write, a skip or a visit gives to its site."""
        assert isinstance(self.first, Items)
        return self.first.items

    @property
    def retains(self) -> bool:
        """Is it `value.retain_grad()`?"""
        return isinstance(self.verb, Apply) and self.verb.retains


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
            op._replace(args=sizeless(op.args), kwargs=sizeless(op.kwargs), when=tuple(map(sizeless, op.when)))
            for op in self.ops
        )
        return InterventionGraph.of(ops, self.groups, self.recapture, self.specs)

    def of_kind(self, kind: type[V]) -> Iterator[tuple[int, Op, V]]:
        """The operations of a kind: their numbers, themselves, and their verbs."""
        for n, op in enumerate(self.ops):
            if isinstance(op.verb, kind):
                yield n, op, op.verb

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
        for n, _, verb in self.of_kind(AtSite):
            found.setdefault(verb.site, []).append(n)
        return found

    @cached_property
    def visits(self) -> frozenset[Site]:
        """The sites of modules that the body calls: the model's own calls are counted around them."""
        return frozenset(verb.site for _, _, verb in self.of_kind(Visit))

    @cached_property
    def observers(self) -> frozenset[int]:
        """The workers that only observe: what they do not get to is nothing that the run missed."""
        return frozenset(op.invoke for _, op, _ in self.of_kind(Observe))

    @cached_property
    def followed(self) -> dict[tuple[str, str], list[int]]:
        """The observations of whatever a module does, as often as it is called."""
        found: dict[tuple[str, str], list[int]] = {}
        for n, _, verb in self.of_kind(Observe):
            path, kind, call = verb.site
            if call == EVERY:
                found.setdefault((path, kind), []).append(n)
        return found

    @cached_property
    def watched(self) -> frozenset[tuple[str, str]]:
        """`(path, kind)` of every site that is read, written or skipped."""
        found = set()
        for (path, kind, _), ns in self.touches.items():
            found.add((path, "input" if isinstance(self.ops[ns[0]].verb, Skip) else kind))
        return frozenset(found)

    @cached_property
    def skips(self) -> dict[str, set[int]]:
        """The calls of each module that are skipped."""
        found: dict[str, set[int]] = {}
        for _, _, verb in self.of_kind(Skip):
            path, _, call = verb.site
            found.setdefault(path, set()).add(call)
        return found

    @cached_property
    def syncs(self) -> list[int]:
        """The operations at which the body looks at a value."""
        return [n for n, _, _ in self.of_kind(Sync)]

    @cached_property
    def stops(self) -> bool:
        """Does it stop the model?"""
        return any(self.of_kind(StopRun))

    @cached_property
    def chooses(self) -> bool:
        """Does a value decide whether the model skips a call or stops?"""
        return any(op.when and isinstance(op.verb, Skip | StopRun) for op in self.ops)

    @cached_property
    def needs(self) -> list[set[Value]]:
        """The values that each operation uses."""
        return [op.needs for op in self.ops]

    @cached_property
    def binds(self) -> dict[int, int]:
        """The backward that each gradient belongs to: the next one in program order."""
        found: dict[int, int] = {}
        waiting: list[int] = []
        for n, op in enumerate(self.ops):
            if isinstance(op.verb, Grad):
                waiting.append(n)
            elif isinstance(op.verb, RunBackward):
                found.update(dict.fromkeys(waiting, n))
                waiting = []
        return found | dict.fromkeys(waiting, len(self.ops))  # still to come

    @cached_property
    def backs(self) -> frozenset[int]:
        """The backward passes of the body."""
        return frozenset(n for n, _, _ in self.of_kind(RunBackward))

    @cached_property
    def linear(self) -> int | None:
        """The operation that keeps the derivative of the forward."""
        return next((n for n, _, _ in self.of_kind(Linearize)), None)

    @cached_property
    def sources(self) -> frozenset[Value]:
        """The values by which the forward is differentiated: autograd follows them from their site on."""
        return frozenset(v for _, op, _ in self.of_kind(Linearize) for v in references(op.args.items[1]))

    @cached_property
    def tapped(self) -> frozenset[Value]:
        """The values whose gradients are asked for."""
        return frozenset(
            v for n, op in enumerate(self.ops) if isinstance(op.verb, Grad) or op.retains for v in self.needs[n]
        )

    @cached_property
    def holds_odd(self) -> bool:
        """Does an operation take an argument that no graph can hold?"""
        held = [x for _, op, _ in self.of_kind(Call) for x in objects(op.args, op.kwargs)]
        return any(isinstance(x, torch.ScriptObject) for x in held)

    @cached_property
    def retains_rows(self) -> bool:
        """Does an invoke retain the gradient of its own rows of a site?"""
        retained = [
            op for op in self.ops if op.retains and self.groups.rows[op.invoke : op.invoke + 1] not in ((), (None,))
        ]
        return any(isinstance(self.ops[n].verb, Read) for op in retained for n, _ in op.needs)

    @cached_property
    def deferred(self) -> dict[int, int]:
        """The operations on gradients whose backward comes after them, and that backward: they run while it does."""
        found: dict[int, int] = {}
        for n, op in enumerate(self.ops):
            if isinstance(op.verb, Grad | RunBackward):
                continue
            bounds = [b for m, _ in self.needs[n] if (b := self.binds.get(m, found.get(m, -1))) > n]
            if bounds:
                found[n] = max(bounds)
        return found

    @cached_property
    def changing(self) -> list[Op]:
        """The recorded calls that change something in place."""
        return [op for _, op, verb in self.of_kind(Call) if verb.effect == "inplace"]

    @cached_property
    def changed(self) -> frozenset[Value]:
        """The values that a recorded call changes in place."""
        return frozenset(key for op in self.changing for key in op.args.items[:1] if isinstance(key, Value))

    @cached_property
    def may_change(self) -> frozenset[Value]:
        """The values that a recorded call changes in place, and all that these may be views of."""
        found: set[Value] = set()
        left = list(self.changed)
        while left:
            value = left.pop()
            if value not in found:
                found.add(value)
                left += self.needs[value.op]
        return frozenset(found)

    @cached_property
    def changes_constants(self) -> bool:
        """Does a recorded call change a real tensor in place?"""
        return any(isinstance(key, TensorSlot) for op in self.changing for key in op.args.items[:1])

    @cached_property
    def users(self) -> dict[Value, set[int]]:
        """The operations that use each value."""
        found: dict[Value, set[int]] = {}
        for n, needed in enumerate(self.needs):
            for value in needed:
                found.setdefault(value, set()).add(n)
        return found

    @cached_property
    def saved(self) -> frozenset[Value]:
        """The values that leave the run."""
        return frozenset(v for n, op in enumerate(self.ops) if isinstance(op.verb, Save | Sync) for v in self.needs[n])

    @cached_property
    def writes(self) -> bool:
        """Does a recorded call change something in place?"""
        return bool(self.changing)

    @cached_property
    def sees_objects(self) -> bool:
        """Does it read what only a live site has: objects, a `dict` of a class of its own, a structure that no scan could tell?"""
        if self.followed or any(self.of_kind(Reach)):
            return True
        if any(verb.live for _, _, verb in self.of_kind(Read)) or any(
            verb.site[0] for _, _, verb in self.of_kind(ReadObject)
        ):
            return True
        writes = [(op, op.verb.spec) for op in self.ops if isinstance(op.verb, Write | Skip)]
        if any(tree.holds(spec, ("mapping",)) for spec in (*self.specs, *(spec for _, spec in writes))):
            return True
        return any(isinstance(self.ops[n].verb, Apply) for op, _ in writes for n, _ in op.needs)


def fx_target(func: Any) -> tuple[str, object, tuple]:
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
