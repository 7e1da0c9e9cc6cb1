"""Custom `autograd.Function`s in a body.

`Function.apply` reaches `__torch_function__` only through the operations of its `forward`, and recording those would
lose the custom `backward` in silence. The first of them finds the `apply` frame below it: the function is recorded as
one call, `forward` goes on over fakes, and what it returns are the results of that call.
"""

from __future__ import annotations

import sys
import weakref
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import NotRecordableError
from . import tree
from .encode import Identity
from .lazy import LazyTensor, user_line
from .plan import CALL

if TYPE_CHECKING:
    from .tape import Tape

_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
_applies: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()


class Inside(NamedTuple):
    """The answer to an operation inside a custom `forward`."""

    value: Any


class _Numbered(torch.overrides.TorchFunctionMode):
    """Numbers the tensors that the operations of a `forward` make."""

    def __init__(self):
        super().__init__()
        self.made: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.made.append(out)
        return out


class Scope:
    """One running `Function.apply` on recorded values."""

    def __init__(self, tape: Tape, frame: FrameType):
        self.frame, self.at = frame, -1
        cls, args, kwargs = frame.f_locals["cls"], frame.f_locals["args"], frame.f_locals.get("kwargs", {})
        outputs = self._outputs(tape, cls, args)
        apply = _applies.setdefault(cls, cls.apply)
        with torch.set_grad_enabled(tape.base.grad):
            result = tape.add(CALL, Identity(apply), args, kwargs, effect="random")
        results = list(result) if isinstance(result, tuple) else [result]
        self.results = dict(zip(outputs, results, strict=True))

    @staticmethod
    def _outputs(tape: Tape, cls: Any, args: tuple) -> list[int]:
        """Which of the tensors that `forward` makes it returns: `forward` run once ahead, on fakes."""
        fakes = tree.tree_map(lambda x: tape.fake(x) if isinstance(x, torch.Tensor) else x, args)
        context = torch.autograd.function.FunctionCtx()
        context.needs_input_grad = tuple(isinstance(a, torch.Tensor) for a in args)  # type: ignore[attr-defined]
        separate = torch.autograd.function._is_setup_context_defined(cls.setup_context)  # type: ignore[attr-defined]
        with tape.fakes, _Numbered() as numbered:
            out = cls.forward(*fakes) if separate else cls.forward(context, *fakes)
        places = {id(t): i for i, t in enumerate(numbered.made)}
        outs = list(out) if isinstance(out, tuple) else [out]
        if any(id(o) not in places for o in outs):
            raise NotRecordableError(
                f"{user_line()}: `{cls.__name__}.forward` returns a tensor that no operation of it made, so it cannot be "
                f"recorded. Run it on real values: `tracer.apply({cls.__name__}.apply, ...)`."
            )
        return [places[id(o)] for o in outs]

    def step(self, tape: Tape, func: Any, args: tuple, kwargs: dict) -> Inside:
        """The next operation of the running `forward`, over fakes."""
        fake = lambda x: tape.fake(x) if isinstance(x, torch.Tensor) else x  # noqa: E731
        with tape.fakes:
            out = func(*tree.tree_map(fake, args), **tree.tree_map(fake, kwargs))
        if not isinstance(out, torch.Tensor):
            return Inside(out)
        self.at += 1
        return Inside(
            self.results[self.at] if self.at in self.results else LazyTensor(tape, ("v", -1, self.at), out, user_line())
        )


def custom_function(tape: Tape, func: Any, args: tuple, kwargs: dict) -> Inside | None:
    """The result of an operation inside the `forward` of a custom function, or `None` elsewhere."""
    if torch.is_grad_enabled() or not tape.base.grad:
        return None  # `apply` runs `forward` without grad; under an ambient no_grad its backward is nobody's
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _APPLY:
        frame = frame.f_back
    if frame is None:
        return None
    if tape.scope is None or tape.scope.frame is not frame:
        tape.scope = Scope(tape, frame)
    return tape.scope.step(tape, func, args, kwargs)
