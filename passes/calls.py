"""Recorded functions, modules and results in the form that `fx` nodes take."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.fx as fx

if TYPE_CHECKING:
    from ..plan.tree import Spec


class LeafOf:
    """A leaf of an operation's result, taken out when something uses it."""

    def __init__(self, emit: Callable[..., fx.Node], node: fx.Node, path: tuple):
        self.emit, self.node, self.path = emit, node, path

    def __call__(self) -> fx.Node:
        node = self.node
        for step in self.path:
            node = self.emit("call_function", operator.getitem, (node, step))
        return node


def paths(spec: Spec | None) -> list[tuple]:
    """The indices that lead to each leaf of a result."""
    if spec is None:
        return [()]
    kind, _, keys, specs = spec
    steps = keys if kind in ("dict", "dataclass", "mapping") else range(len(specs))
    return [(step, *rest) for step, s in zip(steps, specs, strict=True) for rest in paths(s)]


def printable(fn: Callable) -> bool:
    """Does `fx`'s generated code find this function by its name?"""
    module = sys.modules.get(getattr(fn, "__module__", None) or "")
    return module is None or getattr(module, getattr(fn, "__name__", ""), None) is fn


class FunctionCall:
    """A function that has no importable name: a bound method, a local function."""

    def __init__(self, fn: Callable):
        self.fn = fn
        self.__name__ = self.__qualname__ = f"call_{getattr(fn, '__name__', 'function')}"
        self.__module__ = __name__

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.fn(*args, **kwargs)


class ModuleCall:
    """A module as a function of its parameters. Holds structure only, on fake tensors. Calls of one module are equal."""

    def __init__(self, path: str, module: torch.nn.Module):
        self.module = module
        self.__name__ = self.__qualname__ = "module_" + (path.replace(".", "_") or "root")
        self.__module__ = __name__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModuleCall) and self.module is other.module

    def __hash__(self) -> int:
        return id(self.module)

    def __call__(self, tensors: dict, args: tuple, kwargs: dict) -> object:
        return torch.func.functional_call(self.module, dict(tensors), args, dict(kwargs))  # fx gives immutable ones
