"""The function mode that is active while a body runs.

Operations on recorded values would reach the tape anyway; the mode catches what names none: random draws (which happen
when the model gets there) and work on real tensors that a recorded operation has changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from . import tree
from .lazy import LazyTensor
from .lifting import name_of
from .tape import RANDOM, RANDOM_IN_PLACE, Tape

_RANDOM = RANDOM | RANDOM_IN_PLACE


class Recorder(TorchFunctionMode):
    """Sends the body's operations to `tape`."""

    def __init__(self, tape: Tape | None = None):
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tape = self.tape
        if tape is None or not tape.open:
            return func(*args, **kwargs)
        if any(issubclass(t, LazyTensor) for t in types) or self._concerns(tape, func, args, kwargs):
            return tape.call(func, args, kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _concerns(tape: Tape, func: Any, args: tuple, kwargs: dict) -> bool:
        name = name_of(func)
        if name in _RANDOM:
            return True
        leaves = tree.flatten((args, kwargs))[0] if tape.changed or types_hidden(args) else ()
        return any(_recorded(x, tape) for x in leaves)


def _recorded(x: Any, tape: Tape) -> bool:
    """Does an argument stand for something that only the run knows: a value, a changed tensor, the padded length?"""
    if isinstance(x, torch.Tensor):
        return isinstance(x, LazyTensor) or id(x) in tape.changed
    return isinstance(x, torch.SymInt) or (type(x) is torch.Size and any(isinstance(n, torch.SymInt) for n in x))


def types_hidden(args: tuple) -> bool:
    """Could a list among the arguments hold recorded values that `types` does not name?"""
    return any(isinstance(a, list | tuple | dict | torch.SymInt) for a in args)
