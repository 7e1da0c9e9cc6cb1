"""Which numbers of a recorded operation are lifted: what a sweep varies must not make a new plan.

Integers that index a tensor (`h[:, 3]`, `select(h, 1, 3)`) and numbers that are an operand of simple arithmetic with a
floating tensor are lifted. Everything else (dims, sizes, exponents, eps, p) is structure.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from .encode import Lifted

INDEXED = {"__getitem__", "__setitem__"}
SELECTS = {"select"}
FLOAT_OPERANDS = {
    *("add", "sub", "mul", "div", "true_divide", "rsub", "where", "fill", "masked_fill"),
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__"),
    *("__iadd__", "__isub__", "__imul__", "__itruediv__"),
}
FILLS = {"where", "fill", "masked_fill"}  # what they are given is mostly a 0, which stays


# A 0-d tensor that is written to chosen places must have the dtype of what it is written to; a number need not.
EXACT = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _gathers(index: object) -> bool:
    """Does an index choose places by a tensor or a list?"""
    return any(isinstance(i, torch.Tensor | list) for i in (index if type(index) is tuple else (index,)))


_PLAIN = frozenset({int, slice})  # entries of an index that each take one dimension


def _size_at(shape: torch.Size | tuple, index: tuple, at: int) -> object:
    """The size of the dimension that entry `at` of an index takes, or `None` when the index is not plain."""
    if any(isinstance(i, torch.Tensor | list | bool) for i in index):
        return None
    if Ellipsis in index and index.index(Ellipsis) < at:
        dim = -sum(i is not None for i in index[at:])
    else:
        dim = sum(i is not None for i in index[:at])
    return shape[dim] if -len(shape) <= dim < len(shape) else None


def _position(value: int, size: object) -> int | Lifted:
    """A lifted, non-negative position, or the number as it is where its range cannot be told."""
    if not isinstance(size, int) or not -size <= value < size:
        return value  # an unknown size: structure; out of range: torch raises at the user's line
    return Lifted("int", value % size, value if value < 0 else None)


def _lift_index(index: object, shape: torch.Size | tuple) -> object:
    if type(index) is int:
        return _position(index, _size_at(shape, (index,), 0))
    if type(index) is not tuple:
        return index
    if len(index) <= len(shape) and _PLAIN.issuperset(map(type, index)):
        return tuple([_position(v, n) if type(v) is int else v for v, n in zip(index, shape, strict=False)])
    return tuple(_position(v, _size_at(shape, index, at)) if type(v) is int else v for at, v in enumerate(index))


def lift(name: str, args: tuple, kwargs: dict, shape_of: Any) -> tuple[tuple, dict]:
    """`args` and `kwargs` with the numbers that are lifted wrapped as `Lifted`.

    `shape_of(tensor)` gives shape and dtype of a tensor argument without running anything.
    """
    base = name.rstrip("_") if not name.startswith("__") else name
    if name in INDEXED and isinstance(args[0], torch.Tensor):
        shape, dtype = shape_of(args[0])
        rest = args[2:]
        if rest and type(rest[0]) is float and dtype.is_floating_point:
            kind = EXACT.get(dtype) if _gathers(args[1]) else "float"
            rest = (Lifted(kind, rest[0]),) if kind is not None else rest
        return (args[0], _lift_index(args[1], shape), *rest), kwargs
    if base in SELECTS and len(args) == 3 and type(args[1]) is int and type(args[2]) is int:
        shape, _ = shape_of(args[0])
        if -len(shape) <= args[1] < len(shape):
            return (args[0], args[1], _position(args[2], shape[args[1]])), kwargs
    if base in FLOAT_OPERANDS and any(_scales(a, base) for a in args):
        kind = _kind([shape_of(a) for a in args if isinstance(a, torch.Tensor)])
        if kind is not None:
            return tuple(Lifted(kind, float(a)) if _scales(a, base) else a for a in args), kwargs
    return args, kwargs


def _scales(x: Any, base: str) -> bool:
    """Is it a number that arithmetic with a floating tensor takes as a float: a float, or an integer that is one exactly?"""
    return type(x) is float or (type(x) is int and base not in FILLS and abs(x) <= 2**53)


def _kind(operands: list) -> str | None:
    """The kind of a float beside these operands: a 0-d tensor that changes neither the result's dtype nor its rounding."""
    floating = [(len(shape), dtype) for shape, dtype in operands if dtype.is_floating_point]
    if any(dims for dims, _ in floating):
        return "float"
    widest = {dtype for _, dtype in floating}  # among 0-d tensors a wider one would win
    return {torch.float32: "float32", torch.float64: "float64"}.get(widest.pop()) if len(widest) == 1 else None


def name_of(func: object) -> str:
    """The name by which torch documents a function that reached `__torch_function__`."""
    if func is operator.getitem:
        return "__getitem__"
    return getattr(func, "__name__", type(func).__name__)
