"""Arguments of recorded operations as hashable data: what a plan is compared by, and what it is run from.

| form | stands for |
| --- | --- |
| `("v", op, leaf)` | a value: leaf `leaf` of operation `op`'s result |
| `("c", slot, facts)` | a real tensor, lifted: slot of the recording's constants, with its shape, dtype, ... |
| `("n", slot, kind)` | a number, lifted (`tracing.lifting` has the rule) |
| `("l", type, value)` | any other literal |
| `("s", expr)` | a size that is not known yet, as an expression over symbols |
| `("o", Identity)` | an object compared by identity: a function, a module, a generator |
| `("t", type, items)`, `("d", keys, items)`, `("k", start, stop, step)` | sequences, dicts, slices |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from . import tree

Key = tuple


_BOUND = type(object().__str__)  # of `Tensor.T.__get__` too: made anew each time it is looked up, and equal each time


class Identity:
    """An object compared by identity and kept alive by whoever holds the key."""

    __slots__ = ("obj",)

    def __init__(self, obj: Any):
        self.obj = obj

    def __hash__(self) -> int:
        return hash(self.obj) if type(self.obj) is _BOUND else id(self.obj)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Identity):
            return False
        return self.obj is other.obj or (type(self.obj) is _BOUND and self.obj == other.obj)

    def __repr__(self) -> str:
        return getattr(self.obj, "__name__", None) or type(self.obj).__name__


class Keep:
    """In a written tree: leaf `index` of what was there. A leaf itself, so no kind of container."""

    def __init__(self, index: int):
        self.index = index

    def __hash__(self) -> int:
        return hash((Keep, self.index))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keep) and self.index == other.index

    def __repr__(self) -> str:
        return f"Keep({self.index})"


class Lifted:
    """A number that the lifting rule takes out of the structure. `written` is a position as the user counted it."""

    __slots__ = ("kind", "value", "written")

    def __init__(self, kind: str, value: int | float, written: int | None = None):
        self.kind, self.value, self.written = kind, value, written


ALL = ("k", *(("l", type(None), None),) * 3)  # `:`
LITERALS = frozenset(
    {int, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(Ellipsis), Keep}
)


def facts(tensor: torch.Tensor) -> tuple:
    """What a plan depends on in a real tensor, or in one that an earlier trace will give: everything but its numbers."""
    fake = getattr(tensor, "_fake", None)
    if fake is not None:
        return (tuple(fake.shape), fake.stride(), fake.dtype, fake.device, False, True, torch.Tensor)
    return (
        tuple(tensor.shape),
        tensor.stride() if tensor.layout is torch.strided else None,
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
        tensor.is_leaf,
        type(tensor),
    )


def encode(
    value: Any,
    tensor: Callable[[torch.Tensor], Key],
    number: Callable[[Lifted], Key],
    other: Callable[[Any], Key] = lambda value: ("o", Identity(value)),
) -> Key:
    """The key of an argument; `tensor` gives that of a tensor, `number` that of a lifted number and `other` that of an object."""
    cls = type(value)
    if cls in LITERALS:
        return ("l", cls, value)
    if cls is float:
        return ("l", float, value.hex())
    if isinstance(value, torch.Tensor):
        return tensor(value)
    if cls is Lifted:
        return number(value)
    if cls is tuple or cls is list or cls is torch.Size:
        return ("t", tuple if cls is torch.Size else cls, tuple([encode(v, tensor, number, other) for v in value]))
    if cls is dict:
        return ("d", tuple(value), tuple(encode(v, tensor, number, other) for v in value.values()))
    if cls is slice:
        if value.start is None and value.stop is None and value.step is None:
            return ALL
        return ("k", *(encode(v, tensor, number, other) for v in (value.start, value.stop, value.step)))
    if isinstance(value, torch.SymInt):
        return ("s", value.node.expr)
    if isinstance(value, np.generic):
        return encode(value.item(), tensor, number, other)
    parts = tree.children(value)
    if parts is not None:
        kind, keys, values = parts
        return ("x", kind, cls, keys, tuple(encode(v, tensor, number, other) for v in values))
    return other(value)


def decode(key: Key, lookup: Callable[[Key], Any]) -> Any:
    """The argument of a key; `lookup` gives what `("v", ...)`, `("c", ...)`, `("n", ...)` and `("s", ...)` stand for."""
    tag = key[0]
    if tag in "vcns":
        return lookup(key)
    if tag == "l":
        return float.fromhex(key[2]) if key[1] is float else key[2]
    if tag == "t":
        return key[1](decode(k, lookup) for k in key[2])
    if tag == "d":
        return {name: decode(k, lookup) for name, k in zip(key[1], key[2], strict=True)}
    if tag == "k":
        return slice(*(decode(k, lookup) for k in key[1:]))
    if tag == "x":
        return tree.construct(key[1], key[2], key[3], [decode(k, lookup) for k in key[4]])
    return key[1].obj


def references(key: object) -> set[tuple[int, int]]:
    """The `(op, leaf)` of every value in a key."""
    found: set[tuple[int, int]] = set()

    def walk(k: object) -> None:
        if not isinstance(k, tuple) or not k:
            return
        if k[0] == "v":
            found.add((k[1], k[2]))
        elif k[0] not in ("c", "n", "l", "s", "o"):
            for item in k:
                walk(item)

    walk(key)
    return found


def sizeless(key: object) -> Any:
    """A key in which contiguous constants have no sizes, but as many dimensions."""
    if not isinstance(key, tuple) or not key or key[0] in ("v", "n", "l", "s", "o"):
        return key
    if key[0] == "c":
        shape, stride, *rest = key[2]
        return (*key[:2], (len(shape), None, *rest)) if _contiguous(shape, stride) else key
    return tuple(map(sizeless, key))


def _contiguous(shape: tuple, stride: tuple | None) -> bool:
    step = 1
    for size, between in zip(reversed(shape), reversed(stride or ()), strict=False):
        if size != 1 and between != step:
            return False
        step *= size
    return stride is not None


def objects(key: object) -> list[Any]:
    """The objects in a key that are compared by identity."""
    if not isinstance(key, tuple) or not key or key[0] in ("v", "c", "n", "l", "s"):
        return []
    return [key[1].obj] if key[0] == "o" else [x for item in key for x in objects(item)]
