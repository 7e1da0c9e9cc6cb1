"""Custom `autograd.Function`s in a body.

`Function.apply` reaches `__torch_function__` only through the operations of its `forward`, and recording those would
lose the custom `backward` in silence. The first of them finds the frame of the call below it (`compat.autograd`): the
function is recorded as one call, `forward` goes on over fakes, and what it returns are the results of that call.
"""

from __future__ import annotations

import weakref
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from ..compat.autograd import Untold, applied, applying, call_of, separate
from ..compat.fakes import FakeTensor
from ..errors import NNsightFXError, NotRecordableError
from ..lines import user_line
from ..plan import tree
from ..plan.keys import Identity, Recorded, Value
from ..plan.lifting import name_of
from ..plan.names import draws, needs_data
from ..plan.verbs import Call
from .lazy import LazyTensor, first_lazy

if TYPE_CHECKING:
    from .tape import Tape

INSIDE = -1  # the "operation" of a value that exists only while a custom `forward` is recorded


def inside(key: Recorded) -> bool:
    """Is it such a value?"""
    return isinstance(key, Value) and key.op == INSIDE


_applies: weakref.WeakKeyDictionary[type, object] = weakref.WeakKeyDictionary()


class Inside(NamedTuple):
    """The answer to an operation inside a custom `forward`."""

    value: Any


def _made(out: object, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The tensors in a result that are not arguments themselves (an in-place operation returns one)."""
    given = {id(x) for x in tree.flatten((args, kwargs))[0]}
    return [x for x in tree.flatten(out)[0] if isinstance(x, torch.Tensor) and id(x) not in given]


def _run(tape: Tape, func: Any, args: tuple, kwargs: dict) -> tuple[Any, list[torch.Tensor]]:
    """An operation on fakes, and the tensors that it makes of them; real tensors alone stay what they are."""
    given = tree.flatten((args, kwargs))[0]
    faked = any(isinstance(x, FakeTensor) for x in given)
    if not faked and (draws(name_of(func), args, kwargs) or any(isinstance(x, torch.SymInt) for x in given)):
        with tape.fakes:
            out = func(*args, **kwargs)
    else:
        out = func(*args, **kwargs)
    ids = {id(x) for x in given}  # what an in-place operation returns is not new
    return out, [x for x in tree.flatten(out)[0] if isinstance(x, FakeTensor) and id(x) not in ids]


def _fake(tape: Tape, x: Any) -> Any:
    return tape.operands.fake(x) if tape.operands.unsettled(x) else x


class _Numbered(TorchFunctionMode):
    """Lists the fakes that a `forward` makes, in the order in which the recording will."""

    def __init__(self, tape: Tape):
        super().__init__()
        self.tape, self.made = tape, []

    def __torch_function__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        out, made = _run(self.tape, func, args, kwargs or {})
        self.made += made
        return out


class Scope:
    """One running `Function.apply` on recorded values."""

    def __init__(self, tape: Tape, frame: FrameType):
        self.frame, self.at = frame, 0
        try:
            cls, args, kwargs = applied(frame)
        except Untold as e:
            raise _not_recordable(frame.f_code.co_qualname, str(e)) from None
        outputs = self._outputs(tape, cls, args)
        apply = _applies.setdefault(cls, call_of(cls))
        with torch.set_grad_enabled(True):
            result = tape.add(Call(Identity(apply), "random"), args, kwargs)
        results = list(result) if isinstance(result, tuple) else [result]
        self.results = {n: r for n, r in zip(outputs, results, strict=True) if n is not None}

    @staticmethod
    def _outputs(tape: Tape, cls: Any, args: tuple) -> list[int | None]:
        """Which of the tensors that `forward` makes it returns: `forward` run once ahead, on fakes."""
        context = torch.autograd.function.FunctionCtx()
        context.needs_input_grad = tuple(isinstance(a, torch.Tensor) for a in args)  # type: ignore[attr-defined]
        fakes = tree.tree_map(lambda x: _fake(tape, x), args)
        try:
            with tape.syncs.running(), _Numbered(tape) as numbered:
                out = cls.forward(*fakes) if separate(cls) else cls.forward(context, *fakes)
        except RuntimeError as e:
            if isinstance(e, NNsightFXError) or not needs_data(e):
                raise
            raise _not_recordable(f"{cls.__name__}.forward", "needs the numbers of a recorded value") from e
        places = {id(t): n for n, t in reversed([*enumerate(numbered.made)])}
        outs = out if isinstance(out, tuple) else (out,)
        if any(isinstance(o, torch.Tensor) and id(o) not in places for o in outs):
            raise _not_recordable(f"{cls.__name__}.forward", "returns a tensor that no operation of it made")
        return [places.get(id(o)) for o in outs]

    def step(self, tape: Tape, func: object, args: tuple, kwargs: dict) -> Inside:
        """The next operation of the running `forward`, over fakes."""
        lazies: dict[int, object] = {}

        def fake(x: object) -> Any:
            known = _fake(tape, x)
            lazies[id(known)] = x
            return known

        out, made = _run(tape, func, tree.tree_map(fake, args), tree.tree_map(fake, kwargs))
        lazies.update({id(x): self._number(tape, x) for x in made})
        return Inside(tree.tree_map(lambda x: lazies.get(id(x), x) if isinstance(x, torch.Tensor) else x, out))

    def _number(self, tape: Tape, made: torch.Tensor) -> LazyTensor:
        n, self.at = self.at, self.at + 1
        return self.results[n] if n in self.results else LazyTensor(tape, Value(INSIDE, n), made, user_line())


def _not_recordable(forward: str, why: str) -> NotRecordableError:
    return NotRecordableError(
        f"{user_line()}: `{forward}` {why}, so it cannot be recorded. "
        f"Run it on real values: `tracer.apply({forward.rpartition('.')[0] or forward}.apply, ...)`."
    )


def _running(tape: Tape) -> FrameType | None:
    """The frame of the outermost `Function.apply` that runs."""
    return applying(tape.grad, tape.scope and tape.scope.frame)


def custom_function(tape: Tape, func: object, args: tuple, kwargs: dict) -> Inside | None:
    """The result of an operation inside the `forward` of a custom function, or `None` elsewhere."""
    if tape.scope is None and (torch.is_grad_enabled() or not tape.grad):
        return None  # `apply` runs `forward` without grad; under the user's own no_grad its backward is nobody's
    frame = _running(tape)
    if frame is None or (not tape.grad and (tape.scope is None or tape.scope.frame is not frame)):
        tape.scope = None
        return None
    if tape.scope is None or tape.scope.frame is not frame:
        tape.scope = Scope(tape, frame)
    return tape.scope.step(tape, func, args, kwargs)


def _lazy_args(frame: FrameType) -> bool:
    _, args, kwargs = applied(frame)
    return first_lazy(args, kwargs) is not None


def set_grad(tape: Tape, enabled: bool) -> None:
    """The body sets the grad mode; a custom `forward` may, too, which is its own affair."""
    frame = _running(tape)
    if frame is None:
        tape.grad = enabled
    elif tape.grad and (tape.scope is None or tape.scope.frame is not frame) and _lazy_args(frame):
        tape.scope = Scope(tape, frame)
