"""What a recording is, of a trace or of an edit: its operations with their lines, and whether it is still open."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch

from ..compat.fakes import FakeTensorMode
from ..errors import NotRecordableError, UnsavedValueError
from ..lines import Line, user_line
from ..plan import ambient, tree
from ..plan.keys import Identity, Key, Recorded, Value
from ..plan.plan import Op
from ..plan.verbs import Apply, Barrier, Read, StopRun, Verb
from .conditions import Conditions
from .gradients import Gradients
from .lazy import Given, LazyTensor, key_of, line_of
from .objects import LazyObject, Objects
from .operands import Operands
from .steps import DeclaredCache, Invoke, Sites, nothing

if TYPE_CHECKING:
    from .tape import Tape


class Recording:
    """The operations of a body, in order. A `Tape` evaluates each on fakes; a `Draft`, of an edit, only writes it down."""

    fakes: FakeTensorMode
    sites: Sites

    def __init__(self):
        self.ops: list[Op] = []
        self.specs: list[tree.Spec] = []
        self.lines: list[Line] = []
        self.operands = Operands(self)
        self.constants = self.operands.constants
        tape = cast("Tape", self)  # of an edit they are not asked what a run gives
        self.objects, self.gradients, self.conditions = Objects(tape), Gradients(tape), Conditions(tape)
        self.saved: dict[int, LazyTensor] = {}
        self.delivered: dict[int, weakref.ref[torch.Tensor]] = {}  # by id: an id may be another tensor's later
        self.kept: dict[int, Recorded] = {}  # id of a saved value -> its key, which it loses when it becomes real
        self.containers: list[object] = []  # what `nnsight_fx.save(container)` got
        self.caches: list[DeclaredCache] = []
        self.told: list[Callable[[Any], None]] = []  # told of the run when it is over: caches, a session
        self.given = Given()
        self.invoke = Invoke(0)

        # What the plan does to the model's Python: "removes" parts of it, or "changes" what it sees. Else nothing.
        self.recapture = ""
        self.reshaped = False  # does it change the metadata of later sites

        self.open = True
        self.bridged = False  # its trace is over and its session is not: values that somebody holds are there
        self.pending: Callable[[], None] | None = None  # runs its trace, which its session has put off
        self.begun = False  # has the model begun to run, at a sync point
        self.closed = False  # has the forward run that this recording is of, while the trace goes on
        self.busy = False  # is the model running? Then nothing is recorded
        self.drew = False  # has the body drawn from a generator of the user's
        self.refusal: Exception | None = None  # what an operation below the Python API was told

        self.base = ambient.current()
        self.casts = self.base.casts
        self.grad = self.base.grad  # the grad mode of the body, whatever `Function.apply` makes of it
        self.scope: Any = None  # the custom autograd function whose forward is running

    def call(self, func: object, args: tuple, kwargs: dict) -> Any:
        """Record `func(*args, **kwargs)`."""
        raise NotImplementedError

    def add(
        self,
        verb: Verb,
        args: tuple = (),
        kwargs: dict | None = None,
        *,
        result: Callable[[], object] | None = None,
        sizes: tuple = (),
    ) -> object:
        """Record one operation, and return its result with recorded values for the new ones."""
        raise NotImplementedError

    def fake_of_result(self, key: Value) -> torch.Tensor:
        """The fake of what an operation has given."""
        raise NotImplementedError

    def set_grad(self, enabled: bool) -> None:
        """The body sets the grad mode."""
        self.grad = enabled

    def number(self, verb: Verb, *args: Any, **kwargs: object) -> int:
        """Record one operation, and return its number: changed containers and objects among its arguments are recorded before it."""
        self.add(verb, *args, **kwargs)
        return len(self.ops) - 1

    def stop(self) -> None:
        self.recapture = self.recapture or "removes"
        self.add(StopRun(), result=nothing)

    def barrier(self) -> None:
        self.add(Barrier(), result=nothing)

    def later(self, fn: Callable, args: tuple) -> None:
        """Call `fn` on the real values when the model gets there; nobody waits for it."""
        self.add(Apply(Identity(fn)), args, result=nothing)

    def modes(self) -> ambient.Ambient | None:
        if not self.casts and ambient.plain(self.base):
            return None
        now = ambient.current()
        return None if now == self.base else now

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

    def check_open(self, args: object, kwargs: dict) -> None:
        if (self.open and not self.busy) or self.bridged:
            return
        lazy = next((x for x in tree.flatten((args, kwargs))[0] if isinstance(x, LazyTensor | LazyObject)), None)
        if self.open:
            raise NotRecordableError(
                f"{user_line()}: {self.made(lazy)} was used by a function that runs on real values (`tracer.apply`, a checkpoint, a custom "
                "autograd.Function, a hook). Pass it as an argument, so that the function gets the real value."
            )
        if isinstance(lazy, LazyTensor) and self.conditions.undefined(lazy):
            raise self.conditions.error(lazy)
        raise self.unsaved(lazy)

    def unsaved(self, lazy: LazyTensor | LazyObject | None) -> UnsavedValueError:
        if lazy is not None and "_real_object" in lazy.__dict__:
            return UnsavedValueError(
                f"{user_line()}: {self.made(lazy)} is no tensor in this run: the model gave {lazy.__dict__['_real_object']!r}, and a scan "
                "on tensors without data took it for one. Save it in a container (`kept = nnsight_fx.save([value])`), which gets what "
                "the model gave."
            )
        return UnsavedValueError(
            f"{user_line()}: {self.made(lazy)} was used after its trace, but not saved: it has no data. "
            "Add `.save()` to it inside the trace (or `nnsight_fx.save(container)`), or put both traces into one "
            "`with model.session():`, in which values flow from trace to trace."
        )

    def made(self, lazy: LazyTensor | LazyObject | None) -> str:
        return f"`{self.describe(key_of(lazy))}`, made at {line_of(lazy)}," if lazy is not None else "a value"

    def describe(self, key: Key | None) -> str:
        if not isinstance(key, Value) or key.op >= len(self.ops):
            return "value"
        verb = self.ops[key.op].verb
        if isinstance(verb, Read):
            return ".".join(p for p in verb.site[:2] if p) + (f"[{key.leaf}]" if key.leaf > 0 else "")
        return repr(verb.subject) if isinstance(verb.subject, Identity) else f"{verb.name} {verb.subject}"
