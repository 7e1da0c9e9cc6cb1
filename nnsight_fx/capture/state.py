"""The Python state of a module: what a graph that was traced once takes for granted, to be looked at before it is used again.

Dynamo guards on what a forward has looked at. A symbolic tracer does not know what that was, so all of it is compared: the tree
of modules, their plain attributes and those of the objects that they hold, and every tensor's metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
import torch.nn as nn

OWN = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}  # hooks are looked at apart
SCALARS = (bool, int, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, torch.layout)
FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, type)
LONG = 1000  # a container with more items than that counts as one thing


class State:
    """The facts of a module, in the order of a walk through it, and the tensors that it holds.

    Two modules with equal `facts` compute the same with equal tensors, unless their code looks elsewhere: at globals, closures
    and files. `names` and `held` have the attribute that each fact and each tensor is of, for messages.
    """

    def __init__(self, module: nn.Module, forward_of: Callable[[nn.Module], Any] | None = None):
        self.facts: list[Any] = []
        self.tensors: list[torch.Tensor] = []
        self.names: list[str] = []
        self.held: list[str] = []
        self.forward_of = forward_of
        self._seen: dict[int, int] = {}
        self._name = ""
        self._walk(module)

    def changed(self, other: State) -> str | None:
        """The first attribute that is not as it was in another walk of the same module, or holds another tensor."""
        for mine, theirs, name in zip(self.facts, other.facts, other.names, strict=False):
            if mine != theirs:
                return name
        for mine, theirs, name in zip(self.tensors, other.tensors, other.held, strict=False):
            if mine is not theirs:
                return name
        longer, n = max(self.names, other.names, key=len), min(len(self.names), len(other.names))
        return longer[n] if len(longer) > n else None

    def _note(self, fact: Any) -> None:
        self.facts.append(fact)
        self.names.append(self._name)

    def _walk(self, x: Any) -> None:
        kind = type(x)
        if kind in SCALARS:
            self._note((kind, x))
        elif kind is float:
            self._note(x.hex())
        elif id(x) in self._seen:
            self._note(self._seen[id(x)])
        elif isinstance(x, FUNCTIONS):
            self._note(id(getattr(x, "__func__", x)))
        else:
            self._seen[id(x)] = len(self._seen)
            self._inside(x)

    def _inside(self, x: Any) -> None:
        kind = type(x)
        if isinstance(x, torch.Tensor):
            self.tensors.append(x)
            self.held.append(self._name)
            self._note(described(x))
        elif isinstance(x, nn.Module):
            self._note(kind)
            for name, value in vars(x).items():
                if name == "forward" and self.forward_of is not None:
                    value = self.forward_of(x)
                    if getattr(value, "__func__", None) is kind.forward:
                        continue
                if name not in OWN:
                    self._under(name, value)
        elif isinstance(x, dict) and len(x) < LONG:
            self._note((kind, len(x)))
            for key, value in x.items():
                self._walk(key)
                self._under(str(key), value)
        elif isinstance(x, list | tuple | set | frozenset) and len(x) < LONG:
            self._note((kind, len(x)))
            for value in x:
                self._walk(value)
        elif isinstance(x, dict | list | tuple | set | frozenset | str):
            self._note((kind, len(x), id(x)))
        else:
            self._note(kind)
            for name, value in getattr(x, "__dict__", {}).items():
                self._under(name, value)

    def _under(self, name: str, value: Any) -> None:
        outer = self._name
        if name not in ("_parameters", "_buffers", "_modules"):
            self._name = f"{outer}.{name}" if outer else name
        self._walk(value)
        self._name = outer


def described(x: torch.Tensor) -> tuple:
    """What a graph depends on of a tensor beside its values."""
    strides = x.stride() if x.layout is torch.strided else None
    return (type(x), x.shape, strides, x.dtype, x.device, x.requires_grad, x.is_inference(), x.is_leaf)
