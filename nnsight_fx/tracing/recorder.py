"""The function mode that is active while a body runs.

Operations on recorded values would reach the tape anyway; the mode catches what names none: random draws (which happen
when the model gets there) and work on real tensors that a recorded operation has changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..compat.modes import SET_GRAD, function_modes
from ..plan import tree
from ..plan.lifting import name_of
from ..plan.names import draws, effect_of
from .lazy import LazyTensor
from .recording import Recording

_GET_GRAD = torch.Tensor.grad.__get__  # type: ignore[attr-defined]


class Recorder(TorchFunctionMode):
    """Sends the body's operations to `tape`."""

    def __init__(self, tape: Recording | None = None):
        super().__init__()
        self.tape = tape
        self.inside = True  # not between two invokes, where what names no recorded value is the user's own

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        tape = self.tape
        if tape is None or not tape.open:
            return func(*args, **kwargs)
        if func is SET_GRAD:
            tape.set_grad(args[0])
        if (
            LazyTensor in types
            or any(issubclass(t, LazyTensor) for t in types)
            or self._concerns(tape, func, args, kwargs)
        ):
            return tape.call(func, args, kwargs)
        result = func(*args, **kwargs)
        tape.operands.handed.note(result)
        return tape.given.saveable(result) if tape.begun else result  # behind a look

    def _concerns(self, tape: Recording, func: object, args: tuple, kwargs: dict) -> bool:
        name = name_of(func)
        if name == "__get__" and not tape.operands.changed and not tape.gradients.backwards:
            return False
        if self.inside and draws(name, args, kwargs):
            if kwargs.get("generator") is None or tape.fakes is None:  # an edit draws in each trace
                return True
            tape.drew = True
        if tape.gradients.backwards and func == _GET_GRAD:
            return True
        leaves: list | None = None
        if tape.operands.changed or _hidden(args) or _hidden(kwargs.values()):
            leaves = tree.flatten((args, kwargs))[0]
            if any(tape.operands.unsettled(x) or _unsized(x) for x in leaves):
                return True
        if tape.constants and effect_of(name, kwargs, args) == "inplace":
            return any(tape.operands.holds(x) for x in leaves or tree.flatten((args, kwargs))[0])
        return False


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """The block is no part of a body that is open on this thread: another model's trace runs in it."""
    open_ = [(mode, mode.tape) for mode in function_modes() if isinstance(mode, Recorder)]
    for recorder, _ in open_:
        recorder.tape = None
    try:
        yield
    finally:
        for recorder, tape in open_:
            recorder.tape = tape


def _unsized(x: object) -> bool:
    """A size that only the run knows."""
    return isinstance(x, torch.SymInt) or (type(x) is torch.Size and any(isinstance(n, torch.SymInt) for n in x))


def _hidden(args: Iterable) -> bool:
    """Could arguments hold recorded values that `types` does not name: in lists, or where a number is meant?"""
    return any(isinstance(a, list | tuple | dict | torch.SymInt | LazyTensor) for a in args)
