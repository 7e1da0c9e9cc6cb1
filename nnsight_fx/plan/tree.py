"""Site values as trees: tuples, lists, dicts and dataclasses are containers, everything else is a leaf.

Not `torch.utils._pytree`: there a registered class (a KV cache, say) is taken apart and rebuilt, and here its identity
matters, while plain dataclasses are leaves there and must be containers here.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from transformers.utils.generic import ModelOutput

MUTABLE = ("list", "dict", "dataclass", "mapping")  # kinds of containers that are changed in place
LIKE = ("dataclass", "mapping")  # those that have more to them than their children
PLAIN: tuple = (  # leaves that are what they are, on fakes as in a run
    torch.SymInt,
    torch.SymFloat,
    torch.SymBool,
    int,
    float,
    bool,
    str,
    bytes,
    complex,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    torch.memory_format,
    type,
)


class Branch(NamedTuple):
    """The structure of a container: hashable, and without its leaves."""

    kind: str  # as `children` says it
    cls: type
    keys: tuple
    children: tuple[Spec, ...]


Spec: TypeAlias = Branch | None  # the structure of a tree; of a leaf, `None`


class Explained(tuple):
    """A tuple that a module returned, some of whose items are `None` for a reason: `why` has the error that asking for one raises."""

    why: dict[int, Callable[[], Exception]]

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if found is None and not isinstance(index, slice) and index % len(self) in self.why:
            raise self.why[index % len(self)]()
        return found

    def __reduce__(self) -> tuple:
        return tuple, (list(self),)


Explained.__name__ = Explained.__qualname__ = "tuple"  # what Python's and torch's own errors call it


def children(value: Any) -> tuple[str, tuple, list] | None:
    """`(kind, keys, values)` of a container, or `None` for a leaf."""
    cls = type(value)
    if cls is tuple or cls is list:
        return cls.__name__, (), list(value)
    if cls is Explained:
        return "tuple", (), list(value)
    if isinstance(value, tuple):
        if hasattr(cls, "_fields"):
            return "namedtuple", (), list(value)
        return ("structseq", (), list(value)) if hasattr(cls, "n_sequence_fields") else None
    if cls is dict or cls is OrderedDict or isinstance(value, ModelOutput):
        return "dict", tuple(value.keys()), list(value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        keys = tuple(f.name for f in dataclasses.fields(value) if hasattr(value, f.name))
        return "dataclass", keys, [getattr(value, k) for k in keys]
    held: Any = value
    if issubclass(cls, dict) and all(dict.get(held, k) is v or isinstance(v, _STATE) for k, v in _state(value).items()):
        return "mapping", tuple(dict.keys(held)), list(dict.values(held))
    return None


_STATE = (bool, int, float, complex, str, bytes, type(None), type)  # attributes that hold no data


def _state(value: object) -> dict:
    return getattr(value, "__dict__", {})


_LEAVES = frozenset({torch.Tensor, torch.nn.Parameter, int, float, bool, str, type(None)})


def flatten(value: object) -> tuple[list, Spec]:
    """The leaves of `value`, left to right, and the spec that `unflatten` takes."""
    leaves: list = []
    return leaves, _walk(value, leaves)


# These recurse at the top level: a recursive closure is a reference cycle, and would keep its tensors until the next gc.
def _walk(value: Any, leaves: list) -> Spec:
    cls = type(value)
    if cls is tuple or cls is list:  # the most there is: without a look at what else it could be
        kind, keys, values = cls.__name__, (), value
    elif cls is dict:
        kind, keys, values = "dict", tuple(value), value.values()
    else:
        parts = None if cls in _LEAVES or isinstance(value, torch.Tensor) else children(value)
        if parts is None:
            leaves.append(value)
            return None
        kind, keys, values = parts
    specs = []
    for x in values:
        if type(x) in _LEAVES:
            leaves.append(x)
            specs.append(None)
        else:
            specs.append(_walk(x, leaves))
    return Branch(kind, tuple if kind == "tuple" else cls, keys, tuple(specs))


def depths(spec: Spec, depth: int = 0) -> Iterator[int]:
    """In how many containers each leaf lies."""
    if spec is None:
        yield depth
    else:
        for child in spec.children:
            yield from depths(child, depth + 1)


def is_tuple(spec: Spec, length: int) -> bool:
    """Is it the structure of a plain tuple of so many values?"""
    return spec is not None and spec.kind == "tuple" and len(spec.children) == length


def unflatten(leaves: list, spec: Spec, like: object = None) -> Any:
    """A new tree of `spec` holding `leaves`. `like` gives a dataclass its fields that are not part of the tree."""
    return _build(spec, iter(leaves), like)


def _build(spec: Spec, leaves: Iterator, old: object) -> object:
    if spec is None:
        return next(leaves)
    kind, cls, keys, specs = spec
    olds = children(old)
    old_values = olds[2] if olds is not None and len(olds[2]) == len(specs) else [None] * len(specs)
    values = [_build(x, leaves, o) for x, o in zip(specs, old_values, strict=True)]
    return construct(kind, cls, keys, values, old)


def construct(kind: str, cls: type, keys: tuple, values: list, like: object = None) -> object:
    """One container of type `cls` from its children."""
    if kind in ("tuple", "list", "structseq"):
        return cls(values)
    if kind == "namedtuple":
        return cls(*values)
    if kind == "dict":
        return (
            cls(**dict(zip(keys, values, strict=True)))
            if issubclass(cls, ModelOutput)
            else cls(zip(keys, values, strict=True))
        )
    base = next((b for b in (OrderedDict, defaultdict, dict) if issubclass(cls, b)), object)
    made: Any = base.__new__(cls)
    if type(like) is cls:
        _state(made).update(_state(like))
        if isinstance(like, defaultdict):
            made.default_factory = like.default_factory
        for name in _slots(cls):
            if hasattr(like, name):
                object.__setattr__(made, name, getattr(like, name))
    for key, value in zip(keys, values, strict=True):
        put(made, kind, key, value)
    return made


def _slots(cls: type) -> list[str]:
    declared = [vars(base).get("__slots__", ()) for base in cls.__mro__]
    return [name for names in declared for name in ([names] if isinstance(names, str) else names)]


def put(container: Any, kind: str, key: Any, value: object) -> None:
    """Set one child of a list, dict or dataclass. A class that is two of these (diffusers' outputs), or keeps its items as
    attributes too, has the child in both places."""
    if kind in ("list", "dict"):
        container[key] = value
        return
    is_dict = isinstance(container, dict)
    if kind == "dataclass" or (key in _state(container) and _state(container)[key] is dict.get(container, key)):
        object.__setattr__(container, key, value)
    if kind == "mapping" or (is_dict and (value is not None or key in container)):
        put: Any = OrderedDict if isinstance(container, OrderedDict) else dict
        put.__setitem__(container, key, value)


def parts(spec: Spec) -> tuple[Spec, ...]:
    """The structures of the parts of a container; a leaf has none."""
    return () if spec is None else spec.children


def leaf_count(spec: Spec) -> int:
    return 1 if spec is None else sum(leaf_count(s) for s in spec.children)


def tree_map(fn: Callable[[object], object], value: object) -> Any:
    """`value` with `fn` applied to each leaf; containers are new."""
    leaves, spec = flatten(value)
    return unflatten([fn(x) for x in leaves], spec, value)


def replace(value: object, old: list, new: list) -> object:
    """`value` with leaf `old[i]` replaced by `new[i]` where they differ.

    A container in which nothing changed stays the object it was; lists, dicts and dataclasses are changed in place,
    since their owner holds them; tuples are rebuilt.
    """
    return _replace(value, zip(old, new, strict=True))


def _replace(value: object, pairs: Iterator) -> object:
    parts = children(value)
    if parts is None:
        old, new = next(pairs)
        return value if new is old else new
    kind, keys, values = parts
    fresh = [_replace(x, pairs) for x in values]
    changed = [i for i, (a, b) in enumerate(zip(values, fresh, strict=True)) if a is not b]
    if changed and kind in MUTABLE:
        for i in changed:
            put(value, kind, keys[i] if keys else i, fresh[i])
    elif changed:
        return construct(kind, type(value), keys, fresh)
    return value


def holds(spec: Spec, kinds: Collection[str]) -> bool:
    """Is a container of one of these kinds in a tree?"""
    return spec is not None and (spec.kind in kinds or any(holds(s, kinds) for s in spec.children))


def first(value: Any) -> torch.Tensor:
    """The hidden states of a module that returns a tuple."""
    return value[0] if isinstance(value, tuple) else value
