"""From an argument to its key (`plan.keys`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from . import tree
from .keys import ALL, Container, Identity, Items, Keep, Key, Named, Plain, SizeExpr, Span


class Lifted:
    """A number that the lifting rule takes out of the structure. `written` is a position as the user counted it."""

    __slots__ = ("kind", "value", "written")

    def __init__(self, kind: str, value: int | float, written: int | None = None):
        self.kind, self.value, self.written = kind, value, written


LITERALS = frozenset(
    {int, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(Ellipsis), Keep}
)


def encode(
    value: Any,
    tensor: Callable[[torch.Tensor], Key],
    number: Callable[[Lifted], Key],
    other: Callable[[object], Key] = Identity,
) -> Key:
    """The key of an argument; `tensor` gives that of a tensor, `number` that of a lifted number and `other` that of an object."""
    cls = type(value)
    if cls in LITERALS:
        return Plain(cls, value)
    if cls is float:
        return Plain(float, value.hex())
    if isinstance(value, torch.Tensor):
        return tensor(value)
    if cls is Lifted:
        return number(value)
    if cls is tuple or cls is list or cls is torch.Size:
        return Items(tuple if cls is torch.Size else cls, tuple([encode(v, tensor, number, other) for v in value]))
    if cls is dict:
        return Named(tuple(value), tuple([encode(v, tensor, number, other) for v in value.values()]))
    if cls is slice:
        if value.start is None and value.stop is None and value.step is None:
            return ALL
        return Span(*[encode(v, tensor, number, other) for v in (value.start, value.stop, value.step)])
    if isinstance(value, torch.SymInt):
        return SizeExpr(value.node.expr)
    if isinstance(value, np.generic):
        return encode(value.item(), tensor, number, other)
    parts = tree.children(value)
    if parts is not None:
        kind, names, values = parts
        return Container(kind, cls, names, tuple([encode(v, tensor, number, other) for v in values]))
    return other(value)
