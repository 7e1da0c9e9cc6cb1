"""Arguments of recorded operations as hashable data: what a plan is compared by, and what it is run from.

The classes are tuples, which compare and hash in C. No two of them can be equal: their first fields are of different types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from . import tree

_BOUND = type(object().__str__)  # of `Tensor.T.__get__` too: made anew each time it is looked up, and equal each time


class Value(NamedTuple):
    """Leaf `leaf` of the result of operation `op`; -1 is the whole result."""

    op: int
    leaf: int


class TensorSlot(NamedTuple):
    """A real tensor, lifted: a slot of the recording's constants, with its shape, dtype, ... (`encode.facts`)."""

    slot: int
    facts: tuple


class NumberSlot(NamedTuple):
    """A number, lifted (`plan.lifting` has the rule): a slot of the recording's constants, and "int" or "float"."""

    slot: int
    kind: str


class Plain(NamedTuple):
    """Any other literal. A float is held as its hexadecimal text: `nan` is equal to itself there, and 0.0 is not -0.0."""

    cls: type
    held: Any

    @property
    def value(self) -> Any:
        """The literal itself."""
        return float.fromhex(self.held) if self.cls is float else self.held


class SizeExpr(NamedTuple):
    """A size that is not known yet, as an expression over symbols."""

    expr: object


class Identity:
    """An object compared by identity (a function, a module, a generator), and kept alive by whoever holds the key."""

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


class Items(NamedTuple):
    """A tuple or list."""

    cls: type
    items: tuple[Key, ...]


class Named(NamedTuple):
    """A dict."""

    names: tuple
    items: tuple[Key, ...]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def get(self, name: str) -> Key | None:
        """The key of an entry."""
        return self.items[self.names.index(name)] if name in self.names else None


class Span(NamedTuple):
    """A slice."""

    start: Key
    stop: Key
    step: Key


class Container(NamedTuple):
    """A container of another class (`tree.children` has the kinds)."""

    kind: str
    cls: type
    names: tuple
    items: tuple[Key, ...]


Leaf = Value | TensorSlot | NumberSlot | Plain | SizeExpr | Identity
Key = Leaf | Items | Named | Span | Container
Outside = TensorSlot | NumberSlot | SizeExpr  # what a plan is given from outside
Recorded = Value | TensorSlot  # what stands for a tensor
K = TypeVar("K", bound=Key)

NOTHING = Plain(type(None), None)
ALL = Span(NOTHING, NOTHING, NOTHING)  # `:`
NO_ARGS, NO_KWARGS = Items(tuple, ()), Named((), ())


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


def decode(key: Key, lookup: Callable[[Value | Outside], Any]) -> Any:
    """The argument of a key; `lookup` gives what values, slots and sizes stand for."""
    if isinstance(key, Value | TensorSlot | NumberSlot | SizeExpr):
        return lookup(key)
    if isinstance(key, Plain):
        return key.value
    if isinstance(key, Items):
        return key.cls([decode(k, lookup) for k in key.items])
    if isinstance(key, Named):
        return {name: decode(k, lookup) for name, k in zip(key.names, key.items, strict=True)}
    if isinstance(key, Span):
        return slice(*[decode(k, lookup) for k in key])
    if isinstance(key, Container):
        return tree.construct(key.kind, key.cls, key.names, [decode(k, lookup) for k in key.items])
    assert isinstance(key, Identity)
    return key.obj


def leaves(*keys: Key) -> list[Leaf]:
    """The leaves of keys, left to right."""
    found: list[Leaf] = []
    for key in keys:
        _collect(key, found)
    return found


def _collect(key: Key, found: list[Leaf]) -> None:
    if isinstance(key, Items | Named | Container):
        for k in key.items:
            _collect(k, found)
    elif isinstance(key, Span):
        for k in key:
            _collect(k, found)
    else:
        found.append(key)


def mapped(key: K, leaf: Callable[[Leaf], Key]) -> K:
    """A key with `leaf` applied to each of its leaves."""
    made: Any
    if isinstance(key, Items | Named | Container):
        made = key._replace(items=tuple([mapped(k, leaf) for k in key.items]))
    elif isinstance(key, Span):
        made = Span(*[mapped(k, leaf) for k in key])
    else:
        made = leaf(key)
    return made


def references(*keys: Key) -> set[Value]:
    """The values in keys."""
    return {k for k in leaves(*keys) if type(k) is Value}  # type: ignore[misc]


def slots(*keys: Key) -> list[int]:
    """The slots of the constants in keys, in order."""
    return [k.slot for k in leaves(*keys) if isinstance(k, TensorSlot | NumberSlot)]


def objects(*keys: Key) -> list[object]:
    """The objects in keys that are compared by identity."""
    return [k.obj for k in leaves(*keys) if isinstance(k, Identity)]


def made_at(key: Recorded) -> tuple[bool, int, int]:
    """What to sort the keys of recorded values by: real tensors first."""
    return (True, key.op, key.leaf) if isinstance(key, Value) else (False, key.slot, 0)


def sizeless(key: K) -> K:
    """A key in which contiguous constants have no sizes, but as many dimensions."""
    return mapped(key, _without_sizes)


def _without_sizes(key: Leaf) -> Leaf:
    if not isinstance(key, TensorSlot):
        return key
    shape, stride, *rest = key.facts
    return TensorSlot(key.slot, (len(shape), None, *rest)) if _contiguous(shape, stride) else key


def _contiguous(shape: tuple, stride: tuple | None) -> bool:
    step = 1
    for size, between in zip(reversed(shape), reversed(stride or ()), strict=False):
        if size != 1 and between != step:
            return False
        step *= size
    return stride is not None


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
