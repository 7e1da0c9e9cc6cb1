"""`with model.encode(x):` traces a method of the model; `model.encode(x)` alone runs it."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn as nn

if TYPE_CHECKING:
    from .envoy import Envoy


def traceable(envoy: Envoy, name: str, found: object) -> object:
    """A method that the model's own class has, as one that opens a trace where a `with` statement calls it."""
    if not isinstance(found, types.MethodType) or hasattr(nn.Module, name):
        return found

    @functools.wraps(found)
    def method(*args: object, **kwargs: object) -> Callable:
        caller = sys._getframe(1)
        if _is_entered(caller.f_code, caller.f_lasti):
            return envoy.trace(*args, fn=name, **kwargs)
        return found(*args, **kwargs)

    return method


@functools.lru_cache(maxsize=256)
def _is_entered(code: types.CodeType, call: int) -> bool:
    """Does a `with` statement enter the result of the call at this instruction? (3.11 to 3.13 by one opcode, 3.14 by two)"""
    after = [i.opname for i in dis.get_instructions(code) if i.offset > call][:2]
    return after[:1] == ["BEFORE_WITH"] or after == ["COPY", "LOAD_SPECIAL"]
