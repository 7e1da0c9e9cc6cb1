"""The ordering contract, once, for every engine.

An `Interleaver` steps through a plan while something walks past the model's sites: the running model (values are
tensors), a scan (fakes), or the splice pass (values are `fx` nodes). A recorded operation takes effect at the latest
site its invoke has touched so far; at one site invokes act in the order in which they were opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import tree
from .keys import Keep, Outside, SizeExpr, Value, decode
from .plan import InterventionGraph, Op
from .skips import check_skip, in_force
from .verbs import (
    EVERY,
    AtSite,
    Barrier,
    Batched,
    Grad,
    Linearize,
    Live,
    Observation,
    Observe,
    Reach,
    Read,
    ReadObject,
    RunBackward,
    Save,
    SetGrad,
    Site,
    Skip,
    StopRun,
    Sync,
    Visit,
    Write,
)


class Stopped(Exception):
    """Ends the model's forward: `tracer.stop()`. Never reaches the user."""


class Cut(Exception):
    """The next operation needs real values, and this interleaver has none."""


class Firing(NamedTuple):
    """A site that the model is passing: its leaves may be replaced in place."""

    site: Site
    leaves: list
    spec: tree.Spec
    own: bool = False  # are the leaves one invoke's rows, of a call that it makes itself
    whole: bool = False  # is its one leaf the value itself, where no spec is known

    def batched(self, leaf: int, batched: Batched | None) -> bool | None:
        """Does a leaf hold the rows of all invokes? `None`: its size tells."""
        return False if self.own else batched[leaf] if batched else None


class ValueKind:
    """What a value is in a pass over a plan: a tensor, a fake, a node of a graph."""

    def constant(self, key: Outside) -> Any:
        """What a slot of the constants, or a size, stands for."""
        raise NotImplementedError

    def execute(self, n: int, op: Op) -> object:
        """Run one `call`, `module`, `apply` or `sync` operation and return its result."""
        raise NotImplementedError

    def rows(self, leaf: object, invoke: int, batched: bool | None) -> Any:
        """An invoke's rows of a leaf."""
        raise NotImplementedError

    def put_rows(self, leaf: object, new: object, invoke: int, batched: bool | None) -> Any:
        """A leaf with an invoke's rows replaced."""
        raise NotImplementedError

    def observed(self, leaf: object, how: Observation) -> object:
        """A leaf as an observation keeps it."""
        raise NotImplementedError

    def check(self, n: int, leaves: list, expected: tuple, spec: tree.Spec) -> None:
        """Is a site what the scan guessed it to be?"""


class Interleaver(ValueKind):
    """One pass over a plan: when each operation takes place. Subclasses say what a value is."""

    def __init__(self, plan: InterventionGraph):
        self.plan = plan
        self.env: dict[Value, Any] = {}
        self.done: set[int] = set()
        self.at: list[int] = [0] * len(plan.workers)  # how far each invoke has come
        self.counts: dict[tuple[str, str], int] = {}
        self.skipped: dict[Site, dict[int, tuple]] = {}  # site -> invoke -> (spec, leaves, batched)
        self.stopping = False
        self.bases: dict[
            Value, tuple
        ] = {}  # the leaf, invoke and rows that a value is a part of: its gradient is that leaf's
        self.replaced: dict[int, object] = {}  # gradients that the plan sets, until the backward comes by
        self.marked: set[Value] = set()  # the sources of a derivative that are there
        self.visiting: set[int] = set()  # invokes at a site inside a module that they call themselves

    # The schedule.
    def fire(self, firing: Firing) -> None:
        """The model passes a site: everything that can happen here happens."""
        self.work(firing)
        for n in self.plan.touches.get(firing.site, ()):
            # behind an operation that waits for a later site: what needs nothing of it is served now
            served = isinstance(self.plan.ops[n].verb, Read | Write | ReadObject | Reach)
            if served and n not in self.done and self.ready(n):
                self.perform(n, firing)
        for n in (*self.plan.touches.get(firing.site, ()), *self.plan.followed.get(firing.site[:2], ())):
            if isinstance(self.plan.ops[n].verb, Observe):  # when everybody is done with the site
                self.perform(n, firing)
        for value in (
            self.plan.sources - self.marked if self.plan.sources else ()
        ):  # when everybody has changed it who will
            if value in self.env:
                self.marked.add(value)
                self.source(value)

    def work(self, firing: Firing | None) -> None:
        """Advance every invoke as far as it can go."""
        for worker in range(len(self.plan.workers)):
            while worker not in self.visiting and self.at[worker] < len(self.plan.workers[worker]):
                n = self.plan.workers[worker][self.at[worker]]
                if n not in self.done:
                    verb = self.plan.ops[n].verb
                    if isinstance(verb, AtSite) and not self._here(verb, firing):
                        break
                    if self.ready(n):
                        self.perform(n, firing)
                    elif n not in self.plan.deferred:
                        break
                self.at[worker] += 1

    def flow(self) -> None:
        """Gradients have come: what was waiting for them can happen."""
        for worker, at in zip(self.plan.workers, self.at, strict=True):
            for n in worker[:at]:
                if n not in self.done and self.ready(n):
                    self.perform(n, None)

    def arrive(self, n: int, gradient: object) -> Any:
        """The gradient that operation `n` asked for, as the backward has it; returned as it shall be."""
        if (n, 0) in self.plan.users or not self.closed:
            self.env[Value(n, 0)] = gradient
        self.flow()
        return self.replaced.pop(n, gradient)

    def tap(self, n: int, op: Op) -> None:
        """Ask for a value's gradient: `arrive` when the backward has it."""
        raise NotImplementedError

    def differentiate(self, n: int, op: Op, verb: RunBackward) -> None:
        """Run a backward."""
        raise NotImplementedError

    def source(self, value: Value) -> None:
        """A value by which the forward is differentiated is there, and the model goes on with it."""

    def linearize(self, n: int, op: Op, verb: Linearize) -> None:
        """Keep the derivative of the forward so far."""

    @staticmethod
    def _here(verb: AtSite, firing: Firing | None) -> bool:
        if firing is None or isinstance(verb, Observe):
            return False
        return firing.site == (verb.entrance if isinstance(verb, Skip) else verb.site)

    def has(self, value: Value) -> bool:
        return value in self.env

    def ready(self, n: int) -> bool:
        """Are all values that operation `n` needs there, or left out for good?"""
        return all(map(self.has, self.plan.needs[n])) or self._left_out(n)

    def _left_out(self, n: int) -> bool:
        """Does an operation need something made in a block that did not take effect?"""
        lost = [v for v in self.plan.needs[n] if not self.has(v)] if self.plan.ops[n].when else []
        return any(v[0] in self.done for v in lost)

    def holds(self, op: Op) -> bool:
        """Do an operation's conditions hold?"""
        return all(bool(self.lookup(key)) for key in op.when)

    def select(self, op: Op, new: object, old: object) -> object:
        """What a conditional operation makes of a leaf, where `holds` cannot tell."""
        return new

    def perform(self, n: int, firing: Firing | None) -> None:
        op = self.plan.ops[n]
        if op.when and (self._left_out(n) or not self.holds(op)):
            self.done.add(n)
            self._release(n)
            return
        match op.verb:
            case Read() as verb:
                assert firing is not None
                self._read(n, op, verb, firing)
            case Write() as verb:
                assert firing is not None
                self._write(op, verb, firing)
            case Skip(site, spec, batched):
                self.skipped.setdefault(site, {})[op.invoke] = (spec, list(self.arguments(op)[0][0]), batched)
            case Observe() as verb:
                assert firing is not None
                self._observe(n, op, verb, firing)
            case ReadObject(_, leaf):
                assert firing is not None
                self.env[Value(n, 0)] = firing.leaves[leaf] if leaf < len(firing.leaves) else None
            case Reach():
                if not self.live:
                    raise Cut
                self.env[Value(n, 0)] = True
            case StopRun():
                self.stopping = True
            case Grad():
                self.tap(n, op)
            case SetGrad():
                gradient = op.first
                assert isinstance(gradient, Value)
                self.replaced[gradient.op] = self.arguments(op)[0][1]
            case RunBackward() as verb:
                self.differentiate(n, op, verb)
                self.flow()
            case Linearize() as verb:
                self.linearize(n, op, verb)
            case Visit() as verb:
                self._visit(n, op, verb)
            case Save() | Barrier():
                pass
            case verb:
                if isinstance(verb, Live) and not self.live:
                    raise Cut
                self._store(n, op, self.execute(n, op))
        self.done.add(n)
        self._release(n)

    def _read(self, n: int, op: Op, verb: Read, firing: Firing) -> None:
        leaves = [self.rows(x, op.invoke, firing.batched(i, verb.batched)) for i, x in enumerate(firing.leaves)]
        if verb.expected is not None:
            self.check(n, leaves, verb.expected, firing.spec)
        for i, (base, own) in enumerate(zip(firing.leaves, leaves, strict=True)):
            if base is not own and ((n, i) in self.plan.tapped or not self.closed):
                self.bases[Value(n, i)] = (base, op.invoke, firing.batched(i, verb.batched))
        self._keep(n, leaves, firing.spec)

    def _visit(self, n: int, op: Op, verb: Visit) -> None:
        """A module that an invoke calls passes a site, and the other invokes act there."""
        leaves = list(self.arguments(op)[0][0])
        groups = self.plan.groups.rows
        own = op.invoke < len(groups) and groups[op.invoke] is not None
        self.visiting.add(op.invoke)
        try:
            self.fire(Firing(verb.site, leaves, verb.spec, own))
        finally:
            self.visiting.discard(op.invoke)
        self._keep(n, leaves, verb.spec)

    def _observe(self, n: int, op: Op, verb: Observe, firing: Firing) -> None:
        """Keep what everybody has made of a site, detached, moved and cast."""
        leaves = [
            self.observed(self.rows(x, op.invoke, firing.batched(i, verb.batched)), verb.how)
            for i, x in enumerate(firing.leaves)
        ]
        if verb.site[2] == EVERY:  # a list of all visits
            before, spec = self.env.get(Value(n, -1), ([], tree.Branch("list", list, (), ())))
            self.env[Value(n, -1)] = ([*before, *leaves], spec._replace(children=(*spec.children, firing.spec)))
        else:
            self._keep(n, leaves, firing.spec)

    live = True  # can this interleaver run Python on real values?
    closed = True  # is the plan whole? Not while a sync point may still add to it

    def _store(self, n: int, op: Op, result: object) -> None:
        if isinstance(op.verb, Sync):
            return
        self._keep(n, *self.split(result))

    def _keep(self, n: int, leaves: list, spec: tree.Spec) -> None:
        """Hold what a later operation uses, and nothing else."""
        for j, leaf in enumerate(leaves):
            if (n, j) in self.plan.users or not self.closed:
                self.env[Value(n, j)] = leaf
        if (n, -1) in self.plan.users:
            self.env[Value(n, -1)] = (leaves, spec)

    def split(self, result: object) -> tuple[list, tree.Spec]:
        return tree.flatten(result)

    def _write(self, op: Op, verb: Write, firing: Firing) -> None:
        new = list(self.arguments(op)[0][0])
        if verb.spec == firing.spec or (verb.fits and firing.spec is None):  # captured code has the tensors alone
            for i, value in enumerate(new):
                if not (isinstance(value, Keep) and value.index == i):
                    value = firing.leaves[value.index] if isinstance(value, Keep) else value
                    new_leaf = self.put_rows(firing.leaves[i], value, op.invoke, firing.batched(i, verb.batched))
                    firing.leaves[i] = self.select(op, new_leaf, firing.leaves[i])
        else:
            old = list(firing.leaves)
            firing.leaves[:] = [
                (old[v.index] if v.index < len(old) else None) if isinstance(v, Keep) else v for v in new
            ]
            self.restructured[firing.site] = verb.spec

    def merged(self, op: Op, verb: Write, firing: Firing, new: list) -> list:
        """A captured site's leaves, written with other metadata; of the same structure, the rows of other invokes stay."""
        old = list(firing.leaves)

        def leaf(i: int, value: object) -> Any:
            if isinstance(value, Keep):
                return old[value.index] if value.index < len(old) else None
            return self.put_rows(old[i], value, op.invoke, firing.batched(i, verb.batched)) if i < len(old) else value

        firing.leaves[:] = [leaf(i, value) for i, value in enumerate(new)]
        if op.when:
            firing.leaves[:] = [self.select(op, v, x) for v, x in zip(firing.leaves, old, strict=True)]
        return firing.leaves

    @property
    def restructured(self) -> dict[Site, tree.Spec]:
        return self.__dict__.setdefault("_restructured", {})

    def arguments(self, op: Op) -> tuple[tuple, dict]:
        return decode(op.args, self.lookup), decode(op.kwargs, self.lookup)

    def lookup(self, key: Value | Outside) -> Any:
        if not isinstance(key, Value):
            return self.constant(key)
        value = self.env[key]
        return value if key.leaf >= 0 else tree.unflatten(*value)

    def release(self) -> None:
        """The values now belong to whoever saved them."""
        self.env.clear()
        self.skipped.clear()

    def _release(self, n: int) -> None:
        """Free what nothing will use any more."""
        if not self.closed:
            return
        for value in self.plan.needs[n]:
            if value not in self.plan.saved and self.plan.users[value] <= self.done:  # invokes overtake one another
                self.env.pop(value, None)

    def count(self, path: str, kind: str) -> int:
        """The call index of a site that is passed now."""
        n = self.counts.get((path, kind), 0)
        while (path, kind, n) in self.plan.visits:
            n += 1
        self.counts[(path, kind)] = n + 1
        return n

    def never(self) -> None:
        """The forward is over: what was asked for by `REACH` has not come."""
        for n, _, _ in self.plan.of_kind(Reach):
            if n not in self.done:
                self.env[Value(n, 0)] = False
                self.done.add(n)

    def unfinished(self) -> list[int]:
        """The operations that the run did not get to."""
        return [
            n
            for i, worker in enumerate(self.plan.workers)
            for n in worker
            if n not in self.done and i not in self.plan.observers
        ]

    def skip_parts(self, at: Site, lines: Sequence) -> dict[int, tuple] | None:
        """What each invoke gives for a skipped call, or `None` where none does."""
        parts = in_force(self.skipped.get(at), self.plan.groups)
        if parts is not None:
            check_skip(self.plan, at, set(parts), lines)
        return parts

    def extend(self, plan: InterventionGraph) -> None:
        """Go on with a plan that this one is the beginning of."""
        self.plan = plan
        self.at += [0] * (len(plan.workers) - len(self.at))


class TensorInterleaver(Interleaver):
    """Values are tensors: the running model's, or a scan's fakes."""

    calling = False  # does an operation call a module now, whose sites are not the run's

    def __init__(self, plan: InterventionGraph, constants: list):
        super().__init__(plan)
        self.constants = constants

    def constant(self, key: Outside) -> Any:
        assert not isinstance(key, SizeExpr)  # a run and a scan know the sizes
        return self.constants[key.slot]

    def observed(self, leaf: object, how: Observation) -> object:
        return observed(leaf, how)

    def _batched(self, leaf: object, invoke: int, batched: bool | None) -> tuple[int, int] | None:
        groups = self.plan.groups
        group = groups.rows[invoke] if invoke < len(groups.rows) else None
        if group is None or not isinstance(leaf, torch.Tensor) or leaf.dim() == 0 or batched is False:
            return None
        return group if leaf.shape[0] == groups.total else None

    def rows(self, leaf: Any, invoke: int, batched: bool | None) -> Any:
        group = self._batched(leaf, invoke, batched)
        return leaf if group is None else leaf.narrow(0, *group)

    def put_rows(self, leaf: Any, new: Any, invoke: int, batched: bool | None) -> Any:
        group = self._batched(leaf, invoke, batched)
        if group is None:
            return new
        start, size = group
        end = start + size
        before = [leaf.narrow(0, 0, start)] if start else []
        behind = [leaf.narrow(0, end, leaf.shape[0] - end)] if end < leaf.shape[0] else []
        return torch.cat([*before, new, *behind])  # no empty parts: they would hang the old leaf's graph on it


def observed(leaf: object, how: Observation) -> object:
    """A leaf as an observation keeps it."""
    for name, kwargs in how.steps if isinstance(leaf, torch.Tensor) else ():
        leaf = getattr(leaf, name)(**dict(kwargs))
    return leaf
