"""What Dynamo reads at a site: markers for the tensors of a value, and what the capture half puts in its place.

Plain recursion over the container types of `plan.tree`. A call is dear in Dynamo, so leaves are looked at where they are found.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from ..plan import tree
from ..plan.keys import Keep
from .marker import anchor, site, supply


class Replacement:
    """The capture half of a plan at one site: the tree that the model's Python gets to see."""

    def __init__(self, spec: tree.Spec, leaves: list):
        self.spec, self.leaves = spec, leaves  # a leaf: SUPPLIED, Keep(i), or the object itself


class Supplied:
    """A leaf that the spliced graph computes."""


SUPPLIED = Supplied()

PLAIN = (bool, int, float, str)  # leaves that need no look inside
CONSTANT = (
    type(None),
    *PLAIN,
    complex,
    bytes,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    FunctionType,
)


def _children(value: object) -> Any:
    """What a container has in it; None of a leaf."""
    if isinstance(value, ModelOutput) or type(value) is dict or type(value) is OrderedDict:
        return list(value.values())
    if type(value) is tuple or type(value) is list:
        return value
    # Types are asked nothing before here: torch 2.11's Dynamo refuses `hasattr` of those it has not seen in a variable.
    if isinstance(value, CONSTANT):
        return None
    if isinstance(value, tuple):
        return list(value) if hasattr(value, "_fields") or hasattr(value, "n_sequence_fields") else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, f.name) for f in dataclasses.fields(value)]
    return None


def mark_inside(value: object, path: str, kind: str, leaf: int, left: int) -> tuple[Any, int, int]:
    """A value that is no tensor, with each tensor in it passed through `site`; the next leaf index; the tensors left.

    Leaves are looked at where they are found: a call is dear in Dynamo."""
    children = value if type(value) is tuple else _children(value)
    if children is None:
        return value, leaf + 1, left
    fresh, before = [], left
    for child in children:
        if isinstance(child, Tensor):
            child, leaf, left = site(child, path, kind, leaf, left), leaf + 1, left - 1
        elif child is None or isinstance(child, PLAIN):
            leaf = leaf + 1
        else:
            child, leaf, left = mark_inside(child, path, kind, leaf, left)
        fresh.append(child)
    if left == before:
        return value, leaf, left
    return tuple(fresh) if type(value) is tuple else _with(value, fresh), leaf, left


def _with(value: Any, fresh: list) -> object:
    """A container with other children: a list, dict or dataclass itself, since its owner holds it; else a new one."""
    if isinstance(value, ModelOutput):
        return type(value)(**dict(zip(value.keys(), fresh, strict=True)))
    if isinstance(value, tuple):
        named = hasattr(value, "_fields") and not hasattr(value, "n_sequence_fields")
        return type(value)(*fresh) if named else type(value)(fresh)
    if type(value) is list:
        value[:] = fresh
    elif type(value) is dict or type(value) is OrderedDict:
        value.update(zip(list(value), fresh, strict=True))
    else:
        for f, child in zip(dataclasses.fields(value), fresh, strict=True):
            if child is not None and not isinstance(child, PLAIN):
                setattr(value, f.name, child)
    return value


def mark(value: object, path: str, kind: str, counted: bool = False) -> Any:
    """`value` with markers, while Dynamo traces: one at least, also where it has no tensor. Its tensors are counted for a
    capture half, which wants to know of the last one when it comes by; else `marker.close` does it."""
    if isinstance(value, Tensor):
        return site(value, path, kind, 0, True)
    left = sum([isinstance(x, Tensor) for x in _leaves(value)]) if counted else 0
    value, _, now = mark_inside(value, path, kind, 0, left)
    if now == left:
        site(anchor(), path, kind, 0, 1)
    return value


def _leaves(value: object) -> list:
    if not isinstance(value, Tensor):
        kids = _children(value)
        if kids is not None:
            found = []
            for child in kids:
                found.extend(_leaves(child))
            return found
    return [value]


def _build(spec: tree.Spec, leaves: list, at: int) -> tuple[object, int]:
    if spec is None:
        return leaves[at], at + 1
    values = []
    for s in spec.children:
        value, at = _build(s, leaves, at)
        values.append(value)
    return _made(spec.kind, spec.cls, spec.keys, values), at


def _made(kind: str, cls: type, keys: tuple, values: list) -> Any:
    """A new container, as Dynamo can trace it (`tree.construct`)."""
    if kind == "tuple":
        return tuple(values)
    if kind == "list":
        return values
    if kind == "namedtuple":
        return cls(*values)
    if kind == "structseq":
        return cls(values)
    if kind == "dict" and (cls is dict or cls is OrderedDict):
        return cls(zip(keys, values, strict=True))
    return cls(**dict(zip(keys, values, strict=True)))


def _alike(value: Any, spec: tree.Spec) -> bool:
    """Has `value` the structure of `spec`?"""
    kids = None if isinstance(value, Tensor) else _children(value)
    if kids is None:
        return spec is None
    if spec is None or spec.cls is not type(value) or len(spec.children) != len(kids):
        return False
    if spec.kind == "dict" and list(spec.keys) != list(value):
        return False
    return all([_alike(child, of) for child, of in zip(kids, spec.children, strict=True)])


def _filled(value: Any, spec: tree.Spec, leaves: list, at: int) -> tuple[object, int]:
    """`value` with other leaves: lists, dicts and dataclasses in place, since their owner holds them (`tree.replace`)."""
    if spec is None:
        return leaves[at], at + 1
    if isinstance(value, tuple | ModelOutput):
        items = []
        for child, of in zip(_children(value), spec.children, strict=True):
            item, at = _filled(child, of, leaves, at)
            items.append(item)
        return _made(spec.kind, spec.cls, spec.keys, items), at
    if spec.kind == "list":
        for i in range(len(value)):
            value[i], at = _filled(value[i], spec.children[i], leaves, at)
        return value, at
    for key, of in zip(spec.keys, spec.children, strict=True):
        if spec.kind == "dict":
            value[key], at = _filled(value[key], of, leaves, at)
        else:
            new, at = _filled(getattr(value, key), of, leaves, at)
            setattr(value, key, new)
    return value, at


def replaced(value: object, path: str, kind: str, call: int, half: Replacement) -> object:
    """The capture half, as Dynamo traces it."""
    old = _leaves(value)
    new = []
    for i in range(len(half.leaves)):
        leaf = half.leaves[i]
        if isinstance(leaf, Keep):
            leaf = SUPPLIED if isinstance(old[leaf.index], torch.Tensor) else old[leaf.index]
        new.append(supply(path, kind, call, i) if leaf is SUPPLIED else leaf)
    return (_filled(value, half.spec, new, 0) if _alike(value, half.spec) else _build(half.spec, new, 0))[0]


def skipped_output(path: str, call: int, half: Replacement) -> object:
    """A skipped module's output, while Dynamo traces."""
    new = []
    for i in range(len(half.leaves)):
        leaf = half.leaves[i]
        new.append(supply(path, "skip", call, i) if leaf is SUPPLIED else leaf)
    return _build(half.spec, new, 0)[0]
