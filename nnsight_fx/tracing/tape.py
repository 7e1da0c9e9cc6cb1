"""The tape: what a body does, recorded as it runs.

Every operation is one step down a tree of steps that all recordings of one signature share. A step is found by the
operation's structure and remembers the fake result, so that a body recorded again costs look-ups: no fake tensors, no
graph. Sizes and dtypes are known at once, and what torch would refuse is refused at the user's line.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import operator
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch.utils.hooks import RemovableHandle

from ..compat.fakes import FakeTensor, FakeTensorMode
from ..compat.modes import NoTorchFunction, transforms
from ..compat.tensors import memory, shares_memory, wraps_tensors
from ..config import CONFIG
from ..errors import NNsightFXError, NotRecordableError, OutOfOrderError, PaddedLengthUnknown, UnsavedValueError
from ..lines import Line, user_line
from ..plan import ambient, tree
from ..plan.encode import Identity, Keep, Key, Lifted, decode, encode, facts
from ..plan.interleave import observed
from ..plan.lifting import lift, name_of
from ..plan.names import ASKS_NOTHING, LIVE_CALLS, NEEDS_DATA, NEEDS_MEMORY, draws, effect_of, needs_data
from ..plan.names import RANDOM as RANDOM  # passes look there
from ..plan.names import RANDOM_IN_PLACE as RANDOM_IN_PLACE
from ..plan.plan import (
    APPLY,
    BARRIER,
    CALL,
    EVERY,
    GRAD,
    MODULE,
    OBSERVE,
    REACH,
    READ,
    SAVE,
    SKIP,
    STOP,
    SYNC,
    VISIT,
    WRITE,
    Groups,
    InterventionGraph,
    Observed,
    Op,
    Site,
)
from .conditions import Conditions
from .functions import INSIDE, custom_function
from .gradients import LATE, Gradients
from .handed import Handed
from .lazy import Given, LazyTensor
from .nested import refuse_nested
from .objects import LazyObject, Objects
from .steps import (
    ANY,
    NO_ARGS,
    NO_KWARGS,
    Beaten,
    DeclaredCache,
    Invoke,
    Living,
    Missing,
    Opaque,
    SiteMeta,
    Sites,
    Step,
)

BEATEN = 256  # lines that a step knows to follow it
_FAKES_LOG = logging.getLogger("torch._subclasses.fake_tensor")


class Tape:
    """One recording: the body of one trace, or of one wave of it."""

    def __init__(
        self,
        root: Step,
        fakes: FakeTensorMode,
        sites: Sites,
        run_until: Callable[[Tape], Callable[[Key], Any]],
    ):
        self.step, self.fakes, self.sites, self.run_until = root, fakes, sites, run_until
        self.fixed = sites is not None and sites.fixed  # an edit has no sites
        self.ops: list[Op] = []
        self.specs: list[tree.Spec] = []
        self.lines: list[Line] = []
        self.constants: list[Any] = []  # real tensors and lifted numbers, by slot
        self.negative: dict[int, int] = {}  # lifted positions that the user counted from the end, by slot
        self.slots: dict[int, Key] = {}  # id of a real tensor -> its key
        self.const_fakes: dict[int, torch.Tensor] = {}
        self.changed: dict[int, torch.Tensor] = {}  # real tensors that a recorded operation changes in place
        self.handed = Handed(self.constants, self.slots, self.watch)
        self.assumed: list[tuple[str, tuple, tuple]] = []  # writes that fit if the padded length is theirs
        self.values = Living()
        self.order: dict[
            int, tuple[float, Site, int]
        ] = {}  # the latest site an operation depends on, and whose invoke's
        self.splits: set[int] = (
            set()
        )  # invokes that need another forward: they use early what an earlier invoke has late
        self.saved: dict[int, LazyTensor] = {}
        self.delivered: dict[int, weakref.ref[torch.Tensor]] = {}  # by id: an id may be another tensor's later
        self.kept: dict[int, Key] = {}  # id of a saved value -> its key, which it loses when it becomes real
        self.objects = Objects(self)
        self.containers: list[Any] = []  # what `nnsight_fx.save(container)` got
        self.caches: list[DeclaredCache] = []
        self.told: list[Callable[[Any], None]] = []  # told of the run when it is over: caches, a session
        self.recapture = (
            ""  # does the plan change what the model's Python sees ("changes"), or leave parts out ("removes")
        )
        self.reshaped = False  # does it change the metadata of later sites
        self.open = True
        self.bridged = False  # its trace is over and its session is not: values that somebody holds are there
        self.pending: Callable[[], None] | None = None  # runs its trace, which its session has put off
        self.awaited: dict[int, tuple] = {}  # what each slot expects that holds a value of a trace which is put off
        self.begun = False  # has the model begun to run, at a sync point
        self.base = ambient.current()
        self.casts = self.base.casts
        self.grad = self.base.grad  # the grad mode of the body, whatever `Function.apply` makes of it
        self.transforms, self.thread = transforms(), threading.get_ident()
        self.closed = False  # has the forward run that this recording is of, while the trace goes on
        self.deciding = False  # is a sync point looking at conditions
        self.busy = False  # is the model running? Then nothing is recorded
        self.invoke = Invoke(0)
        self.passed: tuple[Site, Line] | None = None  # how far a sync point has run the model
        self.over: tuple[Site, Line] | None = (
            None  # the site that never came, and the line that ran the model to its end for it
        )
        self.given = Given()
        self.drew = False  # has the body drawn from a generator of the user's
        self.reals: dict[Key, torch.Tensor] = {}  # values that a later wave of the trace used
        self.refusal: Exception | None = None  # what an operation below the Python API was told
        self.gradients = Gradients(self)
        self.conditions = Conditions(self)
        self.visits: dict[
            Site, tuple[SiteMeta, int, Line]
        ] = {}  # sites of modules called in the body; by whom, and where
        self.scope: Any = None  # the custom autograd function whose forward is running

    # -- operations ---------------------------------------------------------------------------------------------

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Record `func(*args, **kwargs)`, or answer it where it needs no data, or sync where it needs Python numbers."""
        if self.bridged:
            return self.given.saveable(func(*held(args), **held(kwargs)))
        self.check_open(args, kwargs)
        if transforms() != self.transforms:
            raise NotRecordableError(
                f"{user_line()}: `{name_of(func)}` on a recorded value inside a torch.func transform (grad, vmap, ...) cannot be "
                "recorded. Call the transformed function on real values: `tracer.apply(fn, value)`."
            )
        if CONFIG.APP.DEBUG:
            self._note_first_row(func, args)
        inside = custom_function(self, func, args, kwargs)
        if inside is not None:
            return inside.value
        written = self._written(func, args) if not kwargs and type(func) in _FUNCTIONS else None
        again = self._beaten(written) if written is not None else None
        if again is not None:
            self.settle()
            for number in again.numbers:
                self._number_key(number)
            return self._advance(again.step, again.op)
        name = name_of(func)
        if name in ("__get__", "__set__"):
            return self._attribute(func, name, args)
        if name in ASKS_NOTHING:
            known = func(*_fake_args(self, args), **_fake_args(self, kwargs))
            if not isinstance(known, torch.Tensor):  # `h.type(dtype)` converts
                return known
        if name in NEEDS_MEMORY:
            raise NotRecordableError(
                f"{user_line()}: `.{name}` works on a tensor's memory, and a recorded value has none yet. "
                "Call it on the real value: `tracer.apply(fn, value)`."
            )
        if name in NEEDS_DATA:
            return func(*self.real_args(args), **self.real_args(kwargs))
        if name == "__len__":
            return len(args[0])
        if name == "__hash__":
            return id(args[0])
        if name == "__deepcopy__":
            return self.call(torch.Tensor.clone, args[:1], {})
        if func is torch.Tensor.backward:
            return self.gradients.backward(*args, **kwargs)
        if func is torch.autograd.grad:
            return self.gradients.grad(*args, **kwargs)
        if name in LIVE_CALLS:
            n = self.number(APPLY, Identity(func), args, kwargs, effect="inplace")
            return None if self.ops[n].retains else self.objects.returned(n, RemovableHandle)
        if kwargs.get("generator") is not None and draws(name, args, kwargs):
            return self._drawn(func, name, args, kwargs)
        effect = effect_of(name, kwargs, args)
        if effect == "inplace" and args:
            self._check_late(args[0])
            self.handed.changes(args[0], self._read_at(args[0]))
            args = (held(args[0]), *args[1:])  # what is changed must be there
        args, kwargs = lift(name, args, kwargs, lambda t: (self.fake(t).shape, self.fake(t).dtype))
        try:
            self.settle()
            before, slots = self.step, len(self.constants)
            result = self.add(CALL, Identity(func), args, kwargs, effect=effect)
            if written is not None and not effect and type(result) is LazyTensor:
                values, at = self.constants[slots:], itertools.count(slots)
                self._beat(before, written, None, tuple(Lifted("int", v, self.negative.get(next(at))) for v in values))
            return result
        except RuntimeError as e:  # the parent of all that fakes refuse
            if isinstance(e, NNsightFXError) or not needs_data(e):
                raise
        return self.given.saveable(func(*self.real_args(args), **self.real_args(kwargs)))

    def _drawn(self, func: Any, name: str, args: tuple, kwargs: dict) -> Any:
        """A draw from a generator of the user's: made now, since the model has no part in it."""
        self.drew = True
        if name not in RANDOM_IN_PLACE:
            return self.given.saveable(func(*self.real_args(args), **self.real_args(kwargs)))
        fake = self.fake(args[0])
        with NoTorchFunction():
            made = torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)
            made = func(made, *self.real_args(args[1:]), **self.real_args(kwargs))
        return self.call(torch.Tensor.copy_, (args[0], made), {})

    def _written(self, func: Any, args: tuple) -> tuple | None:
        """A call by what the user wrote, where that is this recording's values, positions and slices."""
        parts: list = [func, self.invoke.index, len(self.constants)]
        for x in args:
            cls = type(x)
            if cls is LazyTensor:
                part = x._key if x._tape is self and x._key[1] != INSIDE else None
            elif cls is tuple:
                part = tuple(map(_position, x))
                part = None if None in part else part
            else:
                part = _position(x)
            if part is None:
                return None
            parts.append(part)
        return tuple(parts)

    def _attribute(self, func: Any, name: str, args: tuple) -> Any:
        attr = func.__self__.__name__
        if attr == "grad":
            if not isinstance(args[0], LazyTensor):
                return self.gradients.of_parameter(args[0]) if name == "__get__" else func(*args)
            return self.gradients.get(args[0]) if name == "__get__" else self.gradients.set(*args)
        if name == "__set__":
            if attr == "requires_grad":
                return args[0].requires_grad_(args[1])
            raise NotRecordableError(
                f"{user_line()}: `.{attr} = ...` on a recorded value cannot be recorded. Write the site (`module.output = ...`) "
                "or change the value in place (`value[:] = ...`)."
            )
        if attr in ("grad_fn", "_grad_fn") and not self.fake(args[0]).is_leaf:
            raise NotRecordableError(
                f"{user_line()}: `.{attr}` of a recorded value is not known before the run. `.save()` the value and use "
                "`torch.autograd.grad` after the trace."
            )
        got = func(self.fake(args[0]))
        return self.add(CALL, Identity(func), args, {}) if isinstance(got, torch.Tensor) else got

    def add(
        self,
        kind: str,
        target: Any,
        args: tuple,
        kwargs: dict,
        *,
        effect: str = "",
        extra: Any = None,
        result: Any = None,
        sizes: tuple = (),
    ) -> Any:
        """Record one operation and return its result with lazy tensors for new values.

        `result()` computes the fake result where calling the function on fakes does not; `sizes` is what it depends on
        beside the operation.
        """
        self.settle()
        marks = len(self.constants)
        keys = self.encode(args) if args else NO_ARGS, self.encode(kwargs) if kwargs else NO_KWARGS
        when = self.conditions.of(kind, keys)
        op = Op(kind, self.invoke.index, target, *keys, self.modes(), effect, extra, when)
        key = (op, sizes) if sizes else op
        step = self.step.children.get(key)
        if step is None:
            try:
                step = self._evaluate(op, result)
            except BaseException as error:
                ours = isinstance(error, NNsightFXError) or not isinstance(error, Exception) or needs_data(error)
                if kind in (CALL, MODULE) and not ours:
                    self._say_where(
                        error, f"`{name_of(target.obj)}`" if kind == CALL else f"module `{target}`", args, kwargs
                    )
                self._forget(marks)
                raise
            if kind == CALL and not effect and not any(isinstance(x, torch.Tensor | tuple) for x in step.leaves):
                self._forget(marks)
                return tree.unflatten(step.leaves, step.spec)
            self.step.children[key] = step
        return self._advance(step, op)

    def _say_where(self, error: BaseException, name: str, args: tuple, kwargs: dict) -> None:
        """A recorded operation does not fit its values: the user's line and the shapes are what helps."""
        shapes = [tuple(self.fake(x).shape) for x in tree.flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        of = f" of shapes {', '.join(map(str, shapes))}" if shapes else ""
        error.add_note(f"nnsight_fx: at {user_line()}: {name}{of}.")
        error.of_the_body = True  # type: ignore[attr-defined]

    def number(self, *args: Any, **kwargs: Any) -> int:
        """Record one operation, and return its number: changed containers and objects among its arguments are recorded before it."""
        self.add(*args, **kwargs)
        return len(self.ops) - 1

    def _forget(self, marks: int) -> None:
        for slot in range(marks, len(self.constants)):
            if isinstance(self.constants[slot], torch.Tensor):
                self.slots.pop(id(self.constants[slot]), None)
            self.const_fakes.pop(slot, None)
            self.negative.pop(slot, None)
        del self.constants[marks:]

    def _evaluate(self, op: Op, result: Any) -> Step:
        """Run an operation on fakes."""
        step = Step(self.step, op)
        aliases: dict[int, Key] = {}
        fresh: dict[Key, torch.Tensor] = {}
        target = _changed_key(op) if op.effect == "inplace" and op.kind == CALL else None

        def lookup(key: Key) -> Any:
            if key[0] == "s":
                return self.sites.symbol(key[1])
            if key[0] == "n":
                return self.constants[key[1]]
            fake = self.fake_of(key)
            if key == target:  # another recording shares this fake: let it keep its own
                fake = fresh.setdefault(key, _own(fake))
            aliases[id(fake)] = key
            return fake

        with NoTorchFunction(), self.fakes, quiet_fakes():  # what a module does on fakes is nobody's to record
            args, kwargs = decode(op.args, lookup), decode(op.kwargs, lookup)
            got = result() if result is not None else None if op.kind != CALL else op.target.obj(*args, **kwargs)
        leaves, step.spec = tree.flatten(got)
        step.like = got if tree.holds(step.spec, tree.LIKE) else None
        step.leaves = [aliases.get(id(x), x) if isinstance(x, torch.Tensor) else x for x in leaves]
        step.rebound = list(fresh.items())
        return step

    def _advance(self, step: Step, op: Op) -> Any:
        """Go on to `step`: number the operation, make its lazy tensors."""
        n, line = len(self.ops), user_line()
        self.ops.append(op)
        self.specs.append(step.spec)
        self.lines.append(line)
        self.step = step
        if op.when:
            self.conditions.used = True
        if op.kind == SAVE:  # nothing uses what it returns
            return None
        for key, fake in step.rebound:
            grew = fake.requires_grad and not self.fake_of(key).requires_grad
            if grew and op.effect == "inplace":  # from here on the model's own values require grad
                self.recapture, self.reshaped = "changes", True
                self.invoke.metas = {s: m for s, m in self.invoke.metas.items() if m.order <= self.invoke.order}
            self._rebind(key, fake)
        self._order(n, op)
        if step.spec is None:
            return self._value(step.leaves[0], ("v", n, 0), line)
        return tree.unflatten(
            [self._value(x, ("v", n, j), line) for j, x in enumerate(step.leaves)], step.spec, step.like
        )

    def _value(self, leaf: Any, key: Key, line: Line) -> Any:
        if type(leaf) is FakeTensor:
            return self._lazy(key, leaf, line)
        if type(leaf) is Opaque:
            return self.objects.stand_in(key, leaf.type)
        if isinstance(leaf, tuple) and leaf and leaf[0] in ("v", "c") and not isinstance(leaf, torch.Size):
            if leaf[0] == "c":
                return self.changed.setdefault(id(self.constants[leaf[1]]), self.constants[leaf[1]])
            living = self.values.get(leaf)
            return living if living is not None else self._lazy(leaf, self.fake_of(leaf), line)
        return leaf

    def _lazy(self, key: Key, fake: torch.Tensor, line: Line) -> LazyTensor:
        with NoTorchFunction():
            made = self.values[key] = LazyTensor.__new__(LazyTensor, self, key, fake, line)
        return made

    def _rebind(self, key: Key, fake: torch.Tensor) -> None:
        if key[0] == "c":
            self.const_fakes[key[1]] = fake
            self.changed[id(self.constants[key[1]])] = self.constants[key[1]]
        else:
            living = self.values.get(key)
            if living is not None:
                living._fake = fake

    def undo(self) -> None:
        """Take back the last operation, which nothing has used."""
        assert self.step.parent is not None
        self.step = self.step.parent
        for record in (self.ops, self.specs, self.lines):
            record.pop()

    def _order(self, n: int, op: Op) -> None:
        """Where in the model's order the results of an operation exist."""
        if op.kind == GRAD:
            self.order[n] = (LATE, ("the gradient", "", 0), self.invoke.index)
            return
        if op.kind == READ:
            meta = self.invoke.metas.get(op.target)
            self.order[n] = (meta.order if meta is not None else -1, op.target, self.invoke.index)
            return
        found = [self.order[v] for v, _ in self.step.needs if v in self.order]
        if found:
            at = self.order[n] = max(found, key=_place) if len(found) > 1 else found[0]
            if op.effect == "inplace" and op.kind == CALL and at[0] > self.invoke.order and at[2] != self.invoke.index:
                self.splits.add(self.invoke.index)

    # -- arguments ----------------------------------------------------------------------------------------------

    def encode(self, value: Any) -> Key:
        return encode(value, self._tensor_key, self._number_key, self.objects.key)

    def _tensor_key(self, tensor: torch.Tensor) -> Key:
        if isinstance(tensor, LazyTensor):
            if tensor._tape is self:
                return tensor._key
            if tensor._tape.pending is None or self.begun:
                tensor = tensor._tape.earlier(tensor)
            elif id(tensor) not in self.slots:
                self.awaited[len(self.constants)] = facts(tensor)
        key = self.slots.get(id(tensor))
        if key is None:
            key = self.slots[id(tensor)] = ("c", len(self.constants), facts(tensor))
            self.constants.append(self.handed.own(tensor, len(self.constants)) if self.handed.copies else tensor)
        return key

    def lend(self, tensor: torch.Tensor) -> LazyTensor:
        """A real tensor as a recorded value of its own: all that the body does with it is recorded."""
        key = ("c", len(self.constants), facts(tensor))
        self.constants.append(tensor)
        return self._lazy(key, self.fake_of(key), user_line())

    def _number_key(self, number: Lifted) -> Key:
        if number.written is not None:
            self.negative[len(self.constants)] = number.written
        self.constants.append(number.value)
        return ("n", len(self.constants) - 1, number.kind)

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake of a tensor, recorded or real."""
        if isinstance(tensor, LazyTensor):
            return tensor._fake if tensor._tape is self else self.fake_of(self._tensor_key(tensor))
        key = self.slots.get(id(tensor))
        return self.fake_of(key) if key is not None else tensor

    def fake_of(self, key: Key) -> torch.Tensor:
        if key[0] == "v":
            lazy = self.values.get(key)
            return lazy._fake if lazy is not None else self._fake_in_history(key)
        slot = key[1]
        if slot not in self.const_fakes:
            value = self.constants[slot]
            if type(value) is LazyTensor and value._tape.fakes is self.fakes:  # of a trace that its session has put off
                self.const_fakes[slot] = value._fake
            elif type(value) is LazyTensor:
                shape, stride, dtype, device, *_ = facts(value)
                with NoTorchFunction(), self.fakes:
                    self.const_fakes[slot] = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            else:
                self.const_fakes[slot] = self.fakes.from_tensor(value, static_shapes=True)
        return self.const_fakes[slot]

    def _fake_in_history(self, key: Key) -> torch.Tensor:
        """The fake of a value whose lazy tensor is gone."""
        step: Step | None = self.step
        for _ in range(len(self.ops) - 1 - key[1]):
            step = step.parent if step is not None else None
        leaf = step.leaves[key[2]] if step is not None else None
        return self.fake_of(leaf) if isinstance(leaf, tuple) else leaf  # type: ignore[return-value]

    def earlier(self, lazy: LazyTensor) -> torch.Tensor:
        """The real tensor of a value of an earlier wave of the same trace, or of an earlier trace of the session."""
        if lazy._held is None and self.pending is not None:
            self.pending()
            if type(lazy) is not LazyTensor:
                return lazy  # it was saved
        if lazy._held is not None:
            return lazy._held
        self.check_open((lazy,), {})
        key = lazy._key
        if key not in self.reals:
            value = self.run_until(self)
            if not self.conditions.hold(lazy, value):
                raise self.conditions.error(lazy)
            self.reals[key] = value(key)
        return self.reals[key]

    def resolve(self) -> None:
        """The values of earlier traces that this recording uses, as the real tensors: the model is about to run."""
        for slot, (shape, stride, dtype, device, *_) in self.awaited.items():
            value = self.constants[slot]
            real = value._tape.earlier(value) if type(value) is LazyTensor else value
            if facts(real)[:4] != (shape, stride, dtype, device):  # the scan saw other strides
                real = torch.empty_strided(shape, stride, dtype=dtype, device=device).copy_(real)
            self.constants[slot] = real
        self.awaited = {}

    def unsettled(self, x: Any) -> bool:
        """Is an argument a recorded value, or a real tensor (or a view of one) that recorded operations change?"""
        if not isinstance(x, torch.Tensor):
            return False
        return isinstance(x, LazyTensor) or id(x) in self.changed or _aliases(x, self.changed.values())

    def holds(self, x: Any) -> bool:
        """Does the recording hold the memory of a real tensor? Then changes of it must keep their place among the uses."""
        return isinstance(x, torch.Tensor) and _aliases(x, self.constants)

    def watch(self, x: torch.Tensor) -> torch.Tensor:
        """Treat a real tensor as recorded: its value is the one that it has when the model gets there."""
        return self.changed.setdefault(id(x), x)

    def modes(self) -> ambient.Ambient | None:
        if not self.casts and ambient.plain(self.base):
            return None
        now = ambient.current()
        return None if now == self.base else now

    def check_open(self, args: Any, kwargs: dict) -> None:
        if (self.open and not self.busy) or self.bridged:
            return
        lazy = next((x for x in tree.flatten((args, kwargs))[0] if isinstance(x, LazyTensor | LazyObject)), None)
        if self.open:
            raise NotRecordableError(
                f"{user_line()}: {self._made(lazy)} was used by a function that runs on real values (`tracer.apply`, a checkpoint, a custom "
                "autograd.Function, a hook). Pass it as an argument, so that the function gets the real value."
            )
        if isinstance(lazy, LazyTensor) and self.conditions.undefined(lazy):
            raise self.conditions.error(lazy)
        raise self.unsaved(lazy)

    def unsaved(self, lazy: LazyTensor | LazyObject | None) -> UnsavedValueError:
        if lazy is not None and "_real_object" in lazy.__dict__:
            return UnsavedValueError(
                f"{user_line()}: {self._made(lazy)} is no tensor in this run: the model gave {lazy.__dict__['_real_object']!r}, and a scan "
                "on tensors without data took it for one. Save it in a container (`kept = nnsight_fx.save([value])`), which gets what "
                "the model gave."
            )
        return UnsavedValueError(
            f"{user_line()}: {self._made(lazy)} was used after its trace, but not saved: it has no data. "
            "Add `.save()` to it inside the trace (or `nnsight_fx.save(container)`), or put both traces into one "
            "`with model.session():`, in which values flow from trace to trace."
        )

    def _made(self, lazy: LazyTensor | LazyObject | None) -> str:
        return f"`{self.describe(lazy._key)}`, made at {lazy._line}," if lazy is not None else "a value"

    def describe(self, key: Key) -> str:
        op = self.ops[key[1]] if key[0] == "v" and key[1] < len(self.ops) else None
        if op is None:
            return "value"
        if op.kind == READ:
            return ".".join(p for p in op.target[:2] if p) + (f"[{key[2]}]" if key[2] > 0 else "")
        return repr(op.target) if isinstance(op.target, Identity) else f"{op.kind} {op.target}"

    # -- sites --------------------------------------------------------------------------------------------------

    def meta(self, site: Site) -> SiteMeta | Missing:
        """What is known of a site, given what was recorded so far."""
        if site in self.visits:
            return self.invoke.metas.setdefault(site, self.visits[site][0])
        if site not in self.invoke.metas:
            with NoTorchFunction():  # the scan's own work is nobody's to record
                found = self.sites.lookup(self, site)
            if isinstance(found, Missing):
                return found
            self.invoke.metas[site] = found
        return self.invoke.metas[site]

    def read(self, site: Site) -> Any:
        """The value of a site: its tree, with lazy tensors, and what stands for objects (a KV cache)."""
        invoke = self.invoke
        if invoke.containers:
            self.settle()
        if site in invoke.values:
            self._touch(site)
            return invoke.values[site]
        again = self._beaten((site, invoke.index))
        if again is not None:
            return self._read_again(site, again)
        self._check_passed(site, "read")
        meta = self.meta(site)
        opaque = isinstance(meta, SiteMeta) and meta.opaque
        if not isinstance(meta, SiteMeta) or meta.guesses_numbers(site[1]):
            value = self._read_live(site)
        else:

            def result() -> Any:
                _check_plain(site, meta.leaves)
                return tree.unflatten(list(meta.leaves), meta.spec, meta.like)

            before = self.step
            value = self.add(
                *(READ, site, (), {}), extra=(meta.batched, _expected(meta)), result=result, sizes=meta.sizes
            )
            if not opaque:
                self._beat(before, (site, self.invoke.index), meta)
        self.invoke.values[site] = value
        self._touch(site)
        self._watch(site, value)
        return value

    def _read_again(self, site: Site, again: Beaten) -> Any:
        """A read that other recordings have made behind the same lines."""
        invoke, meta = self.invoke, again.meta
        assert meta is not None
        invoke.metas[site] = meta
        value = invoke.values[site] = self._advance(again.step, again.op)
        self._touch(site)
        if again.step.spec is not None:
            self._watch(site, value)
        return value

    def _beaten(self, written: tuple) -> Beaten | None:
        """What follows here, by what the user wrote, if a recording has come by."""
        found = self.step.beaten.get(written)
        return found if found is not None and self._ordinary() else None

    def _beat(
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
            and self.passed is None
            and not (conditions.used or conditions.blocks)
            and not self.casts
            and ambient.plain(self.base)
        )

    def reaches(self, site: Site) -> bool:
        """Does the run come by a site? A sync point: the model runs up to there, or to its end."""
        n, line = self.number(REACH, site, (), {}, result=lambda: None), user_line()
        found = self.values_of([("v", n, 0)])[0]
        if not found:
            self.over = (site, line)
        return found

    def observe(self, site: Site, how: Observed) -> tuple[int, Any]:
        """A saved read of a site as everybody leaves it; the operation's number and the value."""
        meta = self.meta(site)
        assert isinstance(meta, SiteMeta)
        value = self.add(
            *(OBSERVE, site, (), {}),
            extra=(meta.batched, how),
            result=lambda: tree.unflatten([observed(x, how) for x in meta.leaves], meta.spec),
        )
        n = len(self.ops) - 1
        kept = [x for x in tree.flatten(value)[0] if isinstance(x, LazyTensor)]
        self.saved.update((id(x), x) for x in kept)
        self.add(SAVE, None, tuple(kept), {}, result=lambda: None)
        return n, value

    def follow(self, path: str, kind: str, how: Observed) -> int:
        """An observation of every call of a module, of which nothing is known before the run."""
        return self.number(OBSERVE, (path, kind, EVERY), (), {}, extra=(None, how), result=lambda: None)

    def _read_live(self, site: Site) -> Any:
        """A read whose value must be looked at: the model runs up to it."""
        n = self.number(READ, site, (), {}, extra=None, result=lambda: None)
        real = self.values_of([("v", n, -1)])[0]
        leaves, spec = tree.flatten(real)
        refuse_nested(user_line(), site, leaves)
        _check_plain(site, leaves)
        fakes = [self.fakes.from_tensor(x, static_shapes=True) if isinstance(x, torch.Tensor) else x for x in leaves]
        line = user_line()
        values = [
            self._lazy(("v", n, j), x, line) if isinstance(x, FakeTensor) else self.objects.given(x)
            for j, x in enumerate(fakes)
        ]
        self.invoke.metas[site] = SiteMeta(spec, tuple(fakes), (False,) * len(fakes), -1)
        return tree.unflatten(values, spec, real)

    def write(self, site: Site, value: Any) -> None:
        """Set a site to `value`, a tree that may hold `Keep(i)` for what stays."""
        if value is None and site[1] == "output":
            raise NotRecordableError(
                f"{user_line()}: `{_name(site)} = None` cannot be recorded: to a module hook, None means no change. Do not run the "
                "module instead (`.skip(None)`), or write a tensor."
            )
        self.settle()
        meta = self.meta(site)
        if type(value) is list and isinstance(meta, SiteMeta) and tree.is_tuple(meta.spec, len(value)):
            value = tuple(value)  # the model goes on with the structure that it made
        leaves, spec = tree.flatten(value)
        leaves = [self.objects.written(x, site) for x in leaves]
        order = self._written_order([*leaves, *(block.predicate for block in self.conditions.blocks)])
        if (
            order is not None
            and isinstance(meta, SiteMeta)
            and meta.order >= 0
            and order[0] > meta.order
            and order[2] != self.invoke.index
        ):
            self.splits.add(self.invoke.index)
        elif order is not None and isinstance(meta, SiteMeta) and meta.order >= 0 and order[0] > meta.order:
            raise OutOfOrderError(
                f"{user_line()}: `{_name(site)}` is written with a value that depends on `{_name(order[1])}`, which the model "
                "computes later. Write it to a later site, or run two traces."
            )
        self._check_passed(site, "written")
        if isinstance(meta, SiteMeta):
            leaves = [self._to_device(x, meta, i) for i, x in enumerate(leaves)]
        fits = isinstance(meta, SiteMeta) and self._fits(site, leaves, spec, meta)
        self._check_visited(site, fits)
        self._check_conditional(site, leaves, spec, meta, fits)
        self.recapture = self.recapture if fits else "changes"
        self.reshaped = self.reshaped or not fits
        batched: tuple[bool | None, ...] | None = None
        if isinstance(meta, SiteMeta):  # another structure has no rows of other invokes
            batched = meta.batched if spec == meta.spec else (False,) * len(leaves)
        stays = [fits and not isinstance(x, torch.Tensor) for x in leaves]  # what fits and is no tensor is what it was
        self.add(
            WRITE,
            site,
            (tuple(Keep(i) if same else x for i, (x, same) in enumerate(zip(leaves, stays, strict=True))),),
            {},
            effect="inplace",
            extra=(spec, batched, fits),
            result=lambda: None,
        )
        self._touch(site)
        self.handed.take(site, _name(site), leaves)
        tree_value = tree.unflatten(leaves, spec, value)
        self.invoke.values.pop(site, None)
        self.invoke.containers.pop(site, None)
        if not self.conditions.blocks and not any(isinstance(x, Keep) for x in leaves):
            self.invoke.values[site] = tree_value
            self._watch(site, tree_value)
        self.invoke.metas = {
            s: m for s, m in self.invoke.metas.items() if not self.reshaped or m.order <= getattr(meta, "order", -1)
        }
        self.invoke.metas.pop(site, None)

    def _check_conditional(
        self, site: Site, leaves: list, spec: tree.Spec, meta: SiteMeta | Missing, fits: bool
    ) -> None:
        """What is written in a `tracer.cond` can be there or not, and the model goes on alike."""
        if fits or not self.conditions.blocks:
            return

        def like(new: Any, old: Any) -> bool:
            if not isinstance(new, torch.Tensor) or not isinstance(old, torch.Tensor):
                return new is old
            fake = self.fake(new)
            return fake.shape == old.shape and fake.dtype == old.dtype

        if not isinstance(meta, SiteMeta) or spec != meta.spec or not all(map(like, leaves, meta.leaves)):
            raise NotRecordableError(
                f"{user_line()}: `{_name(site)}` is written in a `tracer.cond` with another shape, dtype or structure than it has. "
                "Decide in Python, `if value:`, which runs the model up to there."
            )

    def read_input(self, site: Site) -> Any:
        """The first argument at an input: positional, else by keyword."""
        args, kwargs = self.read(site)
        return args[0] if args else next(iter(kwargs.values()), None)

    def write_input(self, site: Site, value: Any) -> None:
        """Set the first argument, and leave the others."""
        meta = self.meta(site)
        if isinstance(meta, SiteMeta):
            args, kwargs = tree.unflatten([Keep(i) for i in range(len(meta.leaves))], meta.spec)
        else:
            args, kwargs = self.read(site)
        if args:
            args = (value, *args[1:])
        elif kwargs:
            kwargs = {**kwargs, next(iter(kwargs)): value}
        else:
            raise ValueError(f"{user_line()}: `{site[0]}` is called without arguments: there is no input to write")
        self.write(site, (args, kwargs))

    def _read_at(self, x: Any) -> Site | None:
        """The site that a recorded value was read at."""
        own = isinstance(x, LazyTensor) and x._tape is self and x._key[0] == "v" and x._key[1] != INSIDE
        return self.ops[x._key[1]].target if own and self.ops[x._key[1]].kind == READ else None

    def _note_first_row(self, func: Any, args: tuple) -> None:
        """`output[0]` was a block's tensor while a block gave a tuple; of a tensor it is the first prompt alone."""
        if func not in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) or type(args[1]) is not int or args[1] != 0:
            return
        site = self._read_at(args[0])
        if site is None or site[1] != "output" or self.fake(args[0]).dim() < 3:
            return
        if getattr(self.meta(site), "spec", None) is not None:  # it is one of a tuple
            return
        here = user_line()
        warnings.warn_explicit(
            f"nnsight_fx: {here}: `{_name(site)}` is a tensor, so its `[0]` is the first prompt alone. Tutorials for transformers 4 "
            "write it where a block gave a tuple; the whole value is `.output`. (A note of `CONFIG.APP.DEBUG`.)",
            UserWarning,
            *here,
        )

    def _written_order(self, leaves: list) -> tuple[float, Site, int] | None:
        own = [x._key[1] for x in leaves if isinstance(x, LazyTensor) and x._tape is self and x._key[0] == "v"]
        found = [self.order[n] for n in own if n in self.order]
        return max(found, key=_place) if found else None

    def _to_device(self, leaf: Any, meta: SiteMeta, i: int) -> Any:
        if isinstance(leaf, torch.Tensor) and i < len(meta.leaves) and isinstance(meta.leaves[i], torch.Tensor):
            device = meta.leaves[i].device
            if self.device_of(leaf) != device:
                return leaf.to(device)
        return leaf

    def device_of(self, tensor: torch.Tensor) -> torch.device:
        return self.fake(tensor).device

    def _fits(self, site: Site, leaves: list, spec: tree.Spec, meta: SiteMeta) -> bool:
        """Can the written tree take the place of the old one with nothing in the model's Python noticing?"""
        if spec != meta.spec or self._parts_one(site, leaves, meta):
            return False
        for i, (new, old) in enumerate(zip(leaves, meta.leaves, strict=True)):
            if isinstance(new, Keep) and new.index == i:
                continue
            if isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor):
                if not isinstance(new, LazyTensor):
                    self._tensor_key(new)
                fake = self.fake(new)
                if meta.batched[i] and not _alike(fake.shape[1:], old.shape[1:]):
                    raise RuntimeError(
                        f"{user_line()}: `{_name(site)}` holds the rows of several invokes: the written rows have shape "
                        f"{tuple(fake.shape)}, the site {tuple(old.shape)}. Only dimension 0 may differ."
                    )
                if not _alike(_meta_of(fake), _meta_of(old)):
                    return False
                if any(isinstance(n, torch.SymInt) for n in old.shape):
                    told = f"{user_line()}: `{_name(site)}` is written with a value"
                    self.assumed.append((told, tuple(fake.shape), tuple(old.shape)))
            elif type(new) is not type(old) or (new is not old and new != old):
                return False
        return True

    def _parts_one(self, site: Site, leaves: list, meta: SiteMeta) -> bool:
        """Are leaves that are one tensor, as attention's query and key, written apart? The model's Python can see that."""

        def now(i: int) -> Any:
            x = leaves[i]
            if isinstance(x, Keep):
                return "kept", meta.same[x.index]
            key: tuple = x._key if isinstance(x, LazyTensor) and x._tape is self else ("", 0)
            own = key[0] == "v" and self.ops[key[1]].kind == READ and self.ops[key[1]].target == site
            return ("kept", meta.same[key[2]]) if own else id(x)

        return any(now(i) != now(first) for i, first in enumerate(meta.same))

    def skip(self, path: str, call: int, value: Any) -> None:
        """The module's `forward` is not run; its output is `value`."""
        site = (path, "input", call)
        self._check_passed(site, "skipped")
        self._check_visited(site, False)
        leaves, spec = tree.flatten(value)
        leaves = [self.objects.written(x, site) for x in leaves]
        out = self.meta((path, "output", call))
        batched = out.batched if isinstance(out, SiteMeta) and len(out.batched) == len(leaves) else None
        fits = isinstance(out, SiteMeta) and self._fits((path, "output", call), leaves, spec, out)
        self.recapture = self.recapture or "removes" if fits else "changes"
        self.reshaped = self.reshaped or not fits
        self.add(
            SKIP,
            (path, "output", call),
            (tuple(leaves),),
            {},
            effect="inplace",
            extra=(spec, batched),
            result=lambda: None,
        )
        self._touch(site)
        self.handed.take((path, "output", call), f"{path}.output", leaves)
        if self.reshaped:
            self.invoke.metas = {s: m for s, m in self.invoke.metas.items() if m.order <= self.invoke.order}

    def stop(self) -> None:
        self.recapture = self.recapture or "removes"
        self.add(STOP, None, (), {}, effect="inplace", result=lambda: None)

    def barrier(self) -> None:
        self.add(BARRIER, None, (), {}, effect="inplace", result=lambda: None)

    def module(self, path: str, args: tuple, kwargs: dict) -> Any:
        """Call a module of the model on values, unobserved; one that values decide about looks at them."""

        def result() -> Any:
            return self.sites.module(path)(*_fake_args(self, args), **_fake_args(self, kwargs))

        try:
            return self.add(MODULE, path, args, kwargs, effect="random", result=result)
        except Exception as refusal:
            looks = needs_data(refusal) and not isinstance(refusal, NNsightFXError)
            if not self.sites.odd(path) and not looks:
                raise
        got = self.apply(self.sites.real(path).forward, args, kwargs)
        return tree.tree_map(
            lambda x: self.call(torch.Tensor.view_as, (x, x), {}) if isinstance(x, torch.Tensor) else x, got
        )

    def hooked(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Call a module of the model on values in sight of the trace: it and all in it pass their sites."""
        handles = []
        for name, m in module.named_modules():
            where = ".".join(p for p in (path, name) if p)
            enter, leave = functools.partial(self._enter, where), functools.partial(self._leave, where)
            handles.append(m.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(m.register_forward_hook(leave, with_kwargs=True))
        try:
            return module(*args, **kwargs)
        except NNsightFXError:
            raise
        except Exception as error:
            why = self.sites.odd(path)
            if why is None:
                raise
            raise NotRecordableError(
                f"{user_line()}: `{path}` cannot be called with `hook=True`: it holds {why}, which takes real values, and no site of "
                f"it can be passed with recorded ones ({type(error).__name__}: {error}). Call it without `hook=True`."
            ) from error
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        return self.visit(path, "input", (args, kwargs))

    def _leave(self, path: str, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        return self.visit(path, "output", out)

    def visit(self, path: str, kind: str, value: Any) -> Any:
        """Pass a site of a called module: earlier and later invokes may act there."""
        site = (path, kind, self._call_now(path, kind))
        if any(op.kind == SKIP and op.target == (path, "output", site[2]) for op in self.ops):
            raise NotRecordableError(
                f"{user_line()}: `{path}` is called with `hook=True`; such a call cannot be skipped."
            )
        leaves, spec = tree.flatten(value)

        def result() -> Any:
            fakes = [self.fake(x).view_as(self.fake(x)) if isinstance(x, torch.Tensor) else x for x in leaves]
            return tree.unflatten(fakes, spec, value)

        made = self.add(VISIT, site, (tuple(leaves),), {}, effect="inplace", extra=spec, result=result)
        passed = tree.flatten(made)[0]
        fakes = tuple(self.fake(x) if isinstance(x, torch.Tensor) else x for x in passed)
        meta = SiteMeta(spec, fakes, (None,) * len(fakes), self.invoke.order)  # type: ignore[arg-type]
        self.visits[site] = (meta, self.invoke.index, user_line())
        self.invoke.values[site] = made
        return made

    def _call_now(self, path: str, kind: str) -> int:
        """The call index that a call has here: behind the model's own calls up to here, and those of the body."""
        call = 0
        while (path, kind, call) in self.visits or self._came(path, kind, call):
            call += 1
        return call

    def _came(self, path: str, kind: str, call: int) -> bool:
        taken = sum(site[:2] == (path, kind) and site[2] < call for site in self.visits)
        with NoTorchFunction():
            found = self.sites.lookup(self, (path, kind, call - taken))
        return isinstance(found, SiteMeta) and found.order <= self.invoke.order

    def _check_visited(self, site: Site, fits: bool) -> None:
        """A call in the body has passed a site for its own invoke; others may change what it holds, not how."""
        if site not in self.visits:
            return
        _, invoke, line = self.visits[site]
        if invoke == self.invoke.index:
            raise OutOfOrderError(
                f"{user_line()}: `{_name(site)}` was passed by the call at {line}; change its arguments or its result instead."
            )
        if not fits:
            raise NotRecordableError(
                f"{user_line()}: `{_name(site)}` is in a call with `hook=True`, at {line}: it can only be written with a value of "
                "the same shape, dtype and structure, and not be skipped."
            )

    def later(self, fn: Callable, args: tuple) -> None:
        """Call `fn` on the real values when the model gets there; nobody waits for it."""
        self.add(APPLY, Identity(fn), args, {}, effect="inplace", result=lambda: None)

    def update(self, lazy: LazyTensor, value: Any) -> None:
        """From here on `lazy` stands for `value`."""
        self.check_open((lazy,), {})
        tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
        now = self.call(torch.Tensor.view_as, (tensor, tensor), {})
        lazy._key, lazy._fake, lazy._line = now._key, now._fake, user_line()
        self.values[lazy._key] = lazy
        if self.saved.pop(id(lazy), None) is not None:
            self.save(lazy)

    def apply(self, fn: Callable, args: tuple, kwargs: dict) -> Any:
        """Call `fn` on the real values when the model gets there; what it returns is looked at, so this syncs."""
        n = self.number(APPLY, Identity(fn), args, kwargs, effect="inplace", result=lambda: None)
        got = self.values_of([("v", n, -1)])[0]
        leaves, spec = tree.flatten(got)
        return tree.unflatten(leaves, spec, got)

    def _touch(self, site: Site) -> None:
        meta, invoke = self.invoke.metas.get(site), self.invoke
        if meta is None:
            return
        if meta.order > invoke.order:
            invoke.order, invoke.latest = meta.order, site
        elif 0 <= meta.order < invoke.order and invoke.latest is not None:  # asked for behind a later one
            invoke.late |= dict.fromkeys(
                _memory(invoke.values.get(site)) - _memory(invoke.values.get(invoke.latest)), site
            )

    def _check_late(self, changed: Any) -> None:
        """A value that was asked for behind a later site cannot be changed in place: the model may have used it by then."""
        if not self.invoke.late or not isinstance(changed, LazyTensor):
            return
        site = next((self.invoke.late[m] for m in _memory(changed) if m in self.invoke.late), None)
        latest = self.invoke.latest
        if site is not None and latest is not None:
            n = next((n for n, op in enumerate(self.ops) if op.kind in (READ, WRITE) and op.target == latest), None)
            raise OutOfOrderError(
                f"{user_line()}: `{_name(site)}` is changed in place behind `{_name(latest)}`"
                f"{f', which {self.lines[n]} has asked for,' if n is not None else ''} and the model computes it later: the change "
                f"would come too late. Change `{_name(site)}` before that line."
            )

    def _watch(self, site: Site, value: Any) -> None:
        """Remember a container that the user can change in place."""
        if isinstance(value, torch.Tensor):
            return
        leaves, spec = tree.flatten(value)
        if tree.holds(spec, tree.MUTABLE):
            self.invoke.containers[site] = (value, leaves, spec)

    def forget_reads(self) -> None:
        """Hold no value that the body does not hold."""
        self.invoke = Invoke(self.invoke.index)

    def settle(self) -> None:
        """Record as writes what the user did to the containers he was given."""
        if not self.invoke.containers:
            return
        for site, (value, leaves, spec) in list(self.invoke.containers.items()):
            now, now_spec = tree.flatten(value)
            if now_spec != spec or any(a is not b for a, b in zip(now, leaves, strict=True)):
                del self.invoke.containers[site]
                self.write(site, value)

    def _check_passed(self, site: Site, done: str) -> None:
        if self.over is not None:
            asked, line = self.over
            raise OutOfOrderError(
                f"{user_line()}: `{_name(site)}` was passed when {line} ran the model to its end: values decide how often `{_name(asked[:2] + (0,))}` "
                f"comes, and the loop asks for one more. It can only be {done} before the loop, or with an end that is known (`tracer.iter[:3]`)."
            )
        if self.passed is None:
            return
        at, line = self.passed
        meta, here = self.invoke.metas.get(at), self.meta(site)
        if isinstance(here, SiteMeta) and meta is not None and -1 < here.order < meta.order:
            raise OutOfOrderError(
                f"{user_line()}: `{_name(site)}` was passed when {line} ran the model to `{_name(at)}`; it can only be "
                f"{done} before that line."
            )

    # -- leaving the recording ----------------------------------------------------------------------------------

    def save(self, lazy: LazyTensor) -> None:
        self.check_open((lazy,), {})
        if self.conditions.blocks or self.conditions.saves:
            self.conditions.save(lazy)
        if id(lazy) not in self.saved:
            self.saved[id(lazy)], self.kept[id(lazy)] = lazy, lazy._key
            self.keep(lazy)

    def keep(self, lazy: LazyTensor) -> None:
        """The run shall give a value, whether or not it is delivered."""
        if not self.open or self.closed:  # a forward that has run has kept what was held then
            return
        if self.invoke.containers:
            self.settle()
        again = self._beaten(lazy._key)
        if again is not None:
            self._advance(again.step, again.op)
            return
        before = self.step
        with self.within(self.ops[lazy._key[1]].invoke):  # who waits for nobody
            self.add(SAVE, None, (lazy,), {}, result=lambda: None)
        self._beat(before, lazy._key)

    @contextlib.contextmanager
    def within(self, invoke: int) -> Iterator[None]:
        """Record for an invoke that is not the open one."""
        mine = self.invoke
        if invoke != mine.index:
            self.invoke = Invoke(invoke)
        try:
            yield
        finally:
            self.invoke = mine

    def close_step(self) -> None:
        """Nothing is recorded here any more: keep, for what comes later, the values that the body still holds."""
        self.settle()
        self.invoke = Invoke(self.invoke.index)
        for lazy in sorted(self.values.values(), key=lambda x: x._key):
            if id(lazy) not in self.saved and lazy._key[1] != INSIDE:
                self.add(SAVE, None, (lazy,), {}, result=lambda: None)
        for stand_in in self.objects.held:
            self.objects.keep(stand_in, asked=False)
        self.closed = True

    def sync(self, lazies: list[LazyTensor]) -> list[torch.Tensor]:
        """The real tensors of recorded values; the model runs as far as they need."""
        if self.bridged:
            return [self.earlier(x) for x in lazies]
        self.check_open(lazies, {})
        if any(x._key[1] == INSIDE for x in lazies):
            raise NotRecordableError(
                f"{user_line()}: a value inside a custom `forward` has no numbers while it is recorded."
            )
        return self.values_of([x._key for x in lazies])

    def values_of(self, keys: list[Key]) -> list[Any]:
        """What the run gives for keys; the model runs as far as they need."""
        if threading.get_ident() != self.thread:
            raise NotRecordableError(
                f"{user_line()}: a recorded value is looked at in another thread than its trace's, where the model cannot run. "
                "Look at it in the body itself, and hand the number over."
            )
        self.settle()
        self.objects.keep_saved()
        if not self.deciding:
            self.deciding = True
            try:
                self.conditions.decide(keys, lambda key: self.values_of([key])[0])
            finally:
                self.deciding = False
        for key in keys:
            op = Op(SYNC, self.invoke.index, None, ("t", tuple, (key,)), NO_KWARGS, None, "inplace")
            self.ops.append(op)
            self.specs.append(None)
            self.lines.append(user_line())
            step = self.step.children.get(op)
            if step is None:
                step = self.step.children[op] = Step(self.step, op)
            self.step = step
        line, self.begun = user_line(), True
        with self.running():
            value = self.run_until(self)
        if self.invoke.latest is not None and (self.passed is None or self.passed[0] != self.invoke.latest):
            self.passed = (self.invoke.latest, line)  # the line that ran the model there, not one that looked again
        return [value(k) for k in keys]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The model runs: what now uses a recorded value is a function that was meant to get the real one."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def real_args(self, args: Any) -> Any:
        """Arguments with every recorded value, and what stands for an object, replaced by the real one."""
        if any(isinstance(x, LazyObject) for x in tree.flatten(args)[0]):
            args = tree.tree_map(lambda x: x._look() if isinstance(x, LazyObject) else x, args)
        lazies = [x for x in tree.flatten(args)[0] if self.unsettled(x)]
        if not lazies:
            return args
        real = dict(zip(map(id, lazies), self.values_of([self._tensor_key(x) for x in lazies]), strict=True))
        return tree.tree_map(
            lambda x: real.get(id(x), getattr(x, "value", x) if type(x).__name__ == "Lifted" else x), args
        )

    def found(self) -> list[list | None]:
        """Shape and dtype of the leaves of each read; `None` for other operations, leaves and sizes not known."""
        steps: list[list | None] = []
        step: Step | None = self.step
        while step is not None and step.op is not None:
            steps.append([_facts_of(leaf) for leaf in step.leaves] if step.op.kind == READ else None)
            step = step.parent
        return steps[::-1]

    def plan(self, groups: Groups) -> InterventionGraph:
        """The recorded plan, shared by all recordings of this structure."""
        known = self.step.plans.get((groups, self.recapture))
        if known is None:
            known = InterventionGraph.of(tuple(self.ops), groups, self.recapture, tuple(self.specs))
            self.step.plans[(groups, self.recapture)] = known
        return known


_place = operator.itemgetter(0)
_FUNCTIONS = {types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType}


def _position(x: Any) -> Any:
    """A position or slice as something to look up by; `None` for anything else."""
    cls = type(x)
    if cls is int:
        return x
    if cls is slice:
        ends = x.start, x.stop, x.step
        return ("k", *ends) if all(i is None or type(i) is int for i in ends) else None
    return "None" if x is None else "..." if x is Ellipsis else None


def _facts_of(leaf: Any) -> list | None:
    if not isinstance(leaf, torch.Tensor):
        return None
    return [[n if isinstance(n, int) else None for n in leaf.shape], str(leaf.dtype)]


def held(args: Any) -> Any:
    """Arguments with the values of earlier traces as the real tensors and objects that they are by now."""
    leaves, spec = tree.flatten(args)
    real = [_held(x) for x in leaves]
    if all(a is b for a, b in zip(leaves, real, strict=True)):
        return args  # containers, and whoever holds them, stay what they are
    return tree.unflatten(real, spec, args)


def _held(x: Any) -> Any:
    if isinstance(x, LazyObject):
        return x._look()
    return x._tape.earlier(x) if type(x) is LazyTensor and x._tape.bridged else x


def _fake_args(tape: Tape, args: Any) -> Any:
    return tree.tree_map(lambda x: tape.fake(x) if isinstance(x, torch.Tensor) else x, args)


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Fakes log what they refuse, with a page of their own traceback; the user gets the exception."""
    _FAKES_LOG.disabled, old = True, _FAKES_LOG.disabled
    try:
        yield
    finally:
        _FAKES_LOG.disabled = old


def _own(fake: torch.Tensor) -> torch.Tensor:
    """A copy that an in-place operation may change; a leaf stays one, so that torch refuses what it would refuse."""
    with torch.inference_mode(fake.is_inference()), torch.enable_grad():
        return fake.detach().clone().requires_grad_(fake.requires_grad) if fake.is_leaf else fake.clone()


def _aliases(x: torch.Tensor, others: Iterable) -> bool:
    return any(isinstance(t, torch.Tensor) and type(t) is not LazyTensor and shares_memory(x, t) for t in others)


def _memory(value: Any) -> set[int]:
    """The storages that the recorded tensors in a value lie in."""
    with NoTorchFunction():
        return {memory(x._fake) for x in tree.flatten(value)[0] if type(x) is LazyTensor}


def _changed_key(op: Op) -> Key | None:
    """The argument that an in-place call changes."""
    if op.kwargs[0] == "d" and "out" in op.kwargs[1]:
        return op.kwargs[2][op.kwargs[1].index("out")]
    first = op.args[2][0] if op.args[0] == "t" and op.args[2] else None
    return first if first is not None and first[0] in ("v", "c") else None


def _meta_of(t: torch.Tensor) -> tuple:
    return (tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad)


def _alike(new: Any, old: Any) -> bool:
    """Are they equal? A padded length that is not known yet is taken to be the one that was written; the run compares."""
    if isinstance(new, tuple) and isinstance(old, tuple):
        return len(new) == len(old) and all(map(_alike, new, old))
    try:
        return bool(new == old)
    except PaddedLengthUnknown:
        return True


def _expected(meta: SiteMeta) -> tuple | None:
    """What a read must find at a site whose metadata is a guess."""
    if not meta.unsure:
        return None
    return tuple(
        (_known_sizes(x), x.dtype) if isinstance(x, torch.Tensor) else x if isinstance(x, bool | str | None) else ANY
        for x in meta.leaves
    )


def _known_sizes(x: torch.Tensor) -> tuple[int | None, ...]:
    """The sizes of a tensor; `None` for one that depends on a padded length."""
    return tuple(n if isinstance(n, int) else None for n in x.shape)


def _check_plain(site: Site, leaves: Iterable) -> None:
    """What is recorded is a plain tensor's operations; a class of its own (`DTensor`, `NestedTensor`) has others."""
    own = next((x for x in leaves if isinstance(x, torch.Tensor) and (wraps_tensors(x) or x.is_quantized)), None)
    if own is not None:
        kind = f"quantised tensor ({own.dtype})" if own.is_quantized else type(own).__name__
        raise NotRecordableError(
            f"{user_line()}: `{_name(site)}` holds a {kind}, a tensor of a class of its own, whose operations cannot be "
            "recorded. Read it where it is a plain tensor (behind `.to_local()`, `.full_tensor()` or `.dequantize()` in the model), or "
            "take it with `register_forward_hook` on the module."
        )


def _name(site: Site) -> str:
    path, kind, call = site
    return ".".join(p for p in (path, kind) if p) + (f" (call {call})" if call else "")
