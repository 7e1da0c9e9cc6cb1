"""The tape: what a body does, recorded as it runs.

Every operation is one step down a tree of steps that all recordings of one signature share. A step is found by the
operation's structure and remembers the fake result, so that a body recorded again costs look-ups: no fake tensors, no
graph. Sizes and dtypes are known at once, and what torch would refuse is refused at the user's line.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn

from ..compat.fakes import FakeTensor, FakeTensorMode
from ..compat.modes import NoTorchFunction
from ..errors import NNsightFXError
from ..lines import Line, user_line
from ..plan import ambient, tree
from ..plan.encode import Lifted
from ..plan.keys import (
    NumberSlot,
    Outside,
    Recorded,
    SizeExpr,
    TensorSlot,
    Value,
    decode,
    facts,
    made_at,
)
from ..plan.lifting import name_of
from ..plan.names import needs_data
from ..plan.plan import Groups, InterventionGraph, Op
from ..plan.verbs import Call, CallModule, Read, Save, Site, Verb
from .accesses import Accesses
from .called import CalledModules
from .calls import TorchCalls
from .functions import inside, set_grad
from .lazy import LazyTensor, fake_in, key_of, rebind, stand_for
from .recording import Recording
from .steps import Beaten, Invoke, Living, Missing, Opaque, SiteMeta, Sites, Step, nothing
from .sync import SyncPoints
from .writes import Writes

BEATEN = 256  # lines that a step knows to follow it
_FAKES_LOG = logging.getLogger("torch._subclasses.fake_tensor")


class Tape(Recording):
    """One recording: the body of one trace, or of one wave of it."""

    def __init__(
        self,
        root: Step,
        fakes: FakeTensorMode,
        sites: Sites,
        run_until: Callable[[Tape], Callable[[Recorded], Any]],
    ):
        super().__init__()
        self.step, self.fakes, self.sites, self.fixed = root, fakes, sites, sites.fixed
        self.values = Living()
        self.calls, self.accesses, self.writes = TorchCalls(self), Accesses(self), Writes(self)
        self.modules, self.syncs = CalledModules(self), SyncPoints(self, run_until)

    # What envoys and recorded values ask of a recording.

    def call(self, func: object, args: tuple, kwargs: dict) -> Any:
        return self.calls.call(func, args, kwargs)

    def meta(self, site: Site) -> SiteMeta | Missing:
        return self.accesses.meta(site)

    def read(self, site: Site) -> Any:
        return self.accesses.read(site)

    def read_input(self, site: Site) -> object:
        return self.accesses.read_input(site)

    def write(self, site: Site, value: object) -> None:
        self.writes.write(site, value)

    def write_input(self, site: Site, value: object) -> None:
        self.writes.write_input(site, value)

    def skip(self, path: str, call: int, value: object) -> None:
        self.writes.skip(path, call, value)

    def module(self, path: str, args: tuple, kwargs: dict) -> object:
        return self.modules.module(path, args, kwargs)

    def hooked(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> object:
        return self.modules.hooked(path, module, args, kwargs)

    def settle(self) -> None:
        self.accesses.settle()

    def set_grad(self, enabled: bool) -> None:
        set_grad(self, enabled)

    def sync(self, lazies: list[LazyTensor]) -> list[torch.Tensor]:
        return self.syncs.sync(lazies)

    # Recording.

    def add(
        self,
        verb: Verb,
        args: tuple = (),
        kwargs: dict | None = None,
        *,
        result: Callable[[], object] | None = None,
        sizes: tuple = (),
    ) -> Any:
        """Record one operation and return its result with lazy tensors for new values.

        `result()` computes the fake result where calling the function on fakes does not; `sizes` is what it depends on
        beside the operation.
        """
        self.accesses.settle()
        marks = len(self.constants)
        keys = self.operands.arguments(args, kwargs or {})
        when = self.conditions.of(verb, keys)
        op = Op(verb, self.invoke.index, *keys, self.modes(), when)
        key = (op, sizes) if sizes else op
        step = self.step.children.get(key)
        if step is None:
            try:
                step = self._evaluate(op, result)
            except BaseException as error:
                ours = isinstance(error, NNsightFXError) or not isinstance(error, Exception) or needs_data(error)
                if isinstance(verb, Call | CallModule) and not ours:
                    name = f"`{name_of(verb.fn.obj)}`" if isinstance(verb, Call) else f"module `{verb.path}`"
                    self._say_where(error, name, args, kwargs)
                self.operands.forget(marks)
                raise
            if (
                isinstance(verb, Call)
                and not verb.effect
                and not any(isinstance(x, torch.Tensor | tuple) for x in step.leaves)
            ):
                self.operands.forget(marks)
                return tree.unflatten(step.leaves, step.spec)
            self.step.children[key] = step
        return self.advance(step, op)

    def _say_where(self, error: BaseException, name: str, args: tuple, kwargs: dict | None) -> None:
        """A recorded operation does not fit its values: the user's line and the shapes are what helps."""
        shapes = [
            tuple(self.operands.fake(x).shape) for x in tree.flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)
        ]
        of = f" of shapes {', '.join(map(str, shapes))}" if shapes else ""
        error.add_note(f"nnsight_fx: at {user_line()}: {name}{of}.")
        error.of_the_body = True  # type: ignore[attr-defined]

    def _evaluate(self, op: Op, result: Callable[[], object] | None) -> Step:
        """Run an operation on fakes."""
        step = Step(self.step, op)
        aliases: dict[int, Recorded] = {}
        fresh: dict[Recorded, torch.Tensor] = {}
        call = op.verb if isinstance(op.verb, Call) else None
        target = _changed_key(op) if call is not None and call.effect == "inplace" else None

        def lookup(key: Value | Outside) -> Any:
            if isinstance(key, SizeExpr):
                return self.sites.symbol(key.expr)
            if isinstance(key, NumberSlot):
                return self.constants[key.slot]
            fake = self.operands.fake_of(key)
            if key == target:  # another recording shares this fake: let it keep its own
                fake = fresh.setdefault(key, _own(fake))
            aliases[id(fake)] = key
            return fake

        with NoTorchFunction(), self.fakes, quiet_fakes():  # what a module does on fakes is nobody's to record
            args, kwargs = decode(op.args, lookup), decode(op.kwargs, lookup)
            got = result() if result is not None else None if call is None else call.fn.obj(*args, **kwargs)
        leaves, step.spec = tree.flatten(got)
        step.like = got if tree.holds(step.spec, tree.LIKE) else None
        step.leaves = [aliases.get(id(x), x) if isinstance(x, torch.Tensor) else x for x in leaves]
        step.rebound = list(fresh.items())
        return step

    def advance(self, step: Step, op: Op) -> object:
        """Go on to `step`: number the operation, make its lazy tensors."""
        n, line = len(self.ops), user_line()
        self.ops.append(op)
        self.specs.append(step.spec)
        self.lines.append(line)
        self.step = step
        if op.when:
            self.conditions.used = True
        if type(op.verb) is Save:  # nothing uses what it returns
            return None
        for key, fake in step.rebound:
            grew = fake.requires_grad and not self.operands.fake_of(key).requires_grad
            if grew and op.effect == "inplace":  # from here on the model's own values require grad
                self.recapture, self.reshaped = "changes", True
                self.invoke.metas = {s: m for s, m in self.invoke.metas.items() if m.order <= self.invoke.order}
            self._rebind(key, fake)
        self.accesses.place(n, op)
        if step.spec is None:
            return self._value(step.leaves[0], Value(n, 0), line)
        return tree.unflatten(
            [self._value(x, Value(n, j), line) for j, x in enumerate(step.leaves)], step.spec, step.like
        )

    def _value(self, leaf: object, key: Value, line: Line) -> object:
        if type(leaf) is FakeTensor:
            return self.lazy(key, leaf, line)
        if type(leaf) is Opaque:
            return self.objects.stand_in(key, leaf.type)
        if isinstance(leaf, TensorSlot):
            return self.operands.changed.setdefault(id(self.constants[leaf.slot]), self.constants[leaf.slot])
        if isinstance(leaf, Value):
            living = self.values.get(leaf)
            return living if living is not None else self.lazy(leaf, self.operands.fake_of(leaf), line)
        return leaf

    def lazy(self, key: Recorded, fake: torch.Tensor, line: Line) -> LazyTensor:
        with NoTorchFunction():
            made = self.values[key] = LazyTensor.__new__(LazyTensor, self, key, fake, line)
        return made

    def fake_of_result(self, key: Value) -> torch.Tensor:
        lazy = self.values.get(key)
        if lazy is not None:
            return fake_in(lazy)
        step: Step | None = self.step
        for _ in range(len(self.ops) - 1 - key.op):
            step = step.parent if step is not None else None
        leaf = step.leaves[key.leaf] if step is not None else None
        return self.operands.fake_of(leaf) if isinstance(leaf, Value | TensorSlot) else leaf  # type: ignore[return-value]

    def lend(self, tensor: torch.Tensor) -> LazyTensor:
        """A real tensor as a recorded value of its own: all that the body does with it is recorded."""
        key = TensorSlot(len(self.constants), facts(tensor))
        self.constants.append(tensor)
        return self.lazy(key, self.operands.fake_of(key), user_line())

    def _rebind(self, key: Recorded, fake: torch.Tensor) -> None:
        if isinstance(key, TensorSlot):
            self.operands.const_fakes[key.slot] = fake
            self.operands.changed[id(self.constants[key.slot])] = self.constants[key.slot]
        else:
            living = self.values.get(key)
            if living is not None:
                rebind(living, fake)

    def undo(self) -> None:
        """Take back the last operation, which nothing has used."""
        assert self.step.parent is not None
        self.step = self.step.parent
        for record in (self.ops, self.specs, self.lines):
            record.pop()

    def beaten(self, written: tuple) -> Beaten | None:
        """What follows here, by what the user wrote, if a recording has come by."""
        found = self.step.beaten.get(written)
        return found if found is not None and self._ordinary() else None

    def beat(
        self, before: Step, written: tuple, meta: SiteMeta | None = None, numbers: tuple[Lifted, ...] = ()
    ) -> None:
        """From `before` on, what was written leads to this step."""
        step = self.step
        if self._ordinary() and step.parent is before and step.op is not None and len(before.beaten) < BEATEN:
            before.beaten[written] = Beaten(step, step.op, meta, numbers)

    def _ordinary(self) -> bool:
        """Does nothing but the lines so far decide what a line records?"""
        conditions = self.conditions
        return (
            self.fixed
            and self.accesses.passed is None
            and not (conditions.used or conditions.blocks)
            and not self.casts
            and ambient.plain(self.base)
        )

    def update(self, lazy: LazyTensor, value: object) -> None:
        """From here on `lazy` stands for `value`."""
        self.check_open((lazy,), {})
        tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
        now = self.calls.call(torch.Tensor.view_as, (tensor, tensor), {})
        stand_for(lazy, now)
        self.values[key_of(lazy)] = lazy
        if self.saved.pop(id(lazy), None) is not None:
            self.save(lazy)

    def forget_reads(self) -> None:
        """Hold no value that the body does not hold."""
        self.invoke = Invoke(self.invoke.index)

    def save(self, lazy: LazyTensor) -> None:
        self.check_open((lazy,), {})
        if self.conditions.blocks or self.conditions.saves:
            self.conditions.save(lazy)
        if id(lazy) not in self.saved:
            self.saved[id(lazy)], self.kept[id(lazy)] = lazy, key_of(lazy)
            self.keep(lazy)

    def keep(self, lazy: LazyTensor) -> None:
        """The run shall give a value, whether or not it is delivered."""
        if not self.open or self.closed:  # a forward that has run has kept what was held then
            return
        if self.invoke.containers:
            self.accesses.settle()
        key = key_of(lazy)
        again = self.beaten(key)
        if again is not None:
            self.advance(again.step, again.op)
            return
        before = self.step
        own = self.ops[key.op].invoke if isinstance(key, Value) else self.invoke.index  # who waits for nobody
        with self.within(own):
            self.add(Save(), (lazy,), result=nothing)
        self.beat(before, key)

    def close_step(self) -> None:
        """Nothing is recorded here any more: keep, for what comes later, the values that the body still holds."""
        self.accesses.settle()
        self.invoke = Invoke(self.invoke.index)
        for lazy in sorted(self.values.values(), key=lambda x: made_at(key_of(x))):
            if id(lazy) not in self.saved and not inside(key_of(lazy)):
                self.add(Save(), (lazy,), result=nothing)
        for stand_in in self.objects.held:
            self.objects.keep(stand_in, asked=False)
        self.closed = True

    def found(self) -> list[list | None]:
        """Shape and dtype of the leaves of each read; `None` for other operations, leaves and sizes not known."""
        steps: list[list | None] = []
        step: Step | None = self.step
        while step is not None and step.op is not None:
            steps.append([_facts_of(leaf) for leaf in step.leaves] if isinstance(step.op.verb, Read) else None)
            step = step.parent
        return steps[::-1]

    def plan(self, groups: Groups) -> InterventionGraph:
        """The recorded plan, shared by all recordings of this structure."""
        known = self.step.plans.get((groups, self.recapture))
        if known is None:
            known = InterventionGraph.of(tuple(self.ops), groups, self.recapture, tuple(self.specs))
            self.step.plans[(groups, self.recapture)] = known
        return known


def _facts_of(leaf: object) -> list | None:
    if not isinstance(leaf, torch.Tensor):
        return None
    return [[n if isinstance(n, int) else None for n in leaf.shape], str(leaf.dtype)]


def _own(fake: torch.Tensor) -> torch.Tensor:
    """A copy that an in-place operation may change; a leaf stays one, so that torch refuses what it would refuse."""
    with torch.inference_mode(fake.is_inference()), torch.enable_grad():
        return fake.detach().clone().requires_grad_(fake.requires_grad) if fake.is_leaf else fake.clone()


def _changed_key(op: Op) -> Recorded | None:
    """The argument that an in-place call changes."""
    found = op.kwargs.get("out") if "out" in op.kwargs else next(iter(op.args.items), None)
    return found if isinstance(found, Value | TensorSlot) else None


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Fakes log what they refuse, with a page of their own traceback; the user gets the exception."""
    _FAKES_LOG.disabled, old = True, _FAKES_LOG.disabled
    try:
        yield
    finally:
        _FAKES_LOG.disabled = old
