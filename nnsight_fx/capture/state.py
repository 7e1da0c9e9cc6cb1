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

TABLES = ("_parameters", "_buffers", "_modules")
OWN = frozenset((*vars(nn.Module()), "_compiled_call_impl")) - {
    "training",
    *TABLES,
}  # hooks among them, looked at apart
SCALARS = frozenset(
    (
        bool,
        int,
        str,
        bytes,
        complex,
        type(None),
        torch.dtype,
        torch.device,
        torch.Size,
        torch.layout,
        torch.memory_format,
    )
)
FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, type)
CONTAINERS = (dict, list, tuple, set, frozenset)
LONG = 1000  # a container with more items than that counts as one thing


class ModuleState:
    """The facts of a module, in the order of a walk through it, and the tensors and modules that it holds.

    Two modules with equal `facts` compute the same with equal tensors, unless their code looks elsewhere: at globals, closures
    and files. `forward_of` gives the `forward` that a module has when no run stands in for it.
    """

    def __init__(self, module: nn.Module, forward_of: Callable[[nn.Module], object] | None = None):
        self.facts: list = []
        self.tensors: list[torch.Tensor] = []
        self.modules: list[nn.Module] = []
        self.forward_of = forward_of
        self._seen: dict[int, int] = {}
        self._walk(module)

    def _walk(self, x: Any) -> None:
        kind = type(x)
        if kind in SCALARS:
            self.facts.append(x if kind is str else (kind, x))
        elif kind is float:
            self.facts.append(x.hex())
        elif isinstance(x, FUNCTIONS):
            self.facts.append(id(getattr(x, "__func__", x)))
        elif id(x) in self._seen:
            self.facts.append(self._seen[id(x)])
        else:
            self._seen[id(x)] = len(self._seen)
            self._inside(x, kind)

    def _inside(self, x: object, kind: type) -> None:
        if isinstance(x, torch.Tensor):
            self.tensors.append(x)
            self.facts.append(described(x))
            return
        self.facts.append(kind)
        if isinstance(x, nn.Module):
            self.modules.append(x)
        if isinstance(x, CONTAINERS) and len(x) > LONG:
            self.facts.append((len(x), id(x)))
        elif isinstance(x, CONTAINERS):
            self.facts.append(len(x))
            for key, value in x.items() if isinstance(x, dict) else enumerate(x):
                self._walk(key)
                self._walk(value)
        else:
            for name, value in attributes(x, self.forward_of):
                self.facts.append(name)
                self._walk(value)


def attributes(x: object, forward_of: Callable[[nn.Module], object] | None = None) -> list[tuple[str, Any]]:
    """What an object has of its own; of a module what is not torch's bookkeeping, and no table that is empty."""
    own = getattr(x, "__dict__", {})
    if not isinstance(x, nn.Module):
        return list(own.items())
    found = [(k, v) for k, v in own.items() if k not in OWN and not (k in TABLES and not v)]
    if forward_of is None or "forward" not in own:
        return found
    forward = forward_of(x)
    plain = getattr(forward, "__func__", None) is type(x).forward
    return [(k, v) for k, v in found if k != "forward"] + ([] if plain else [("forward", forward)])


def described(x: torch.Tensor) -> tuple:
    """What a graph depends on of a tensor beside its values."""
    strides = x.stride() if x.layout is torch.strided else None
    return (type(x), x.shape, strides, x.dtype, x.device, x.requires_grad, x.is_inference(), x.is_leaf)


def snapshot(module: nn.Module) -> dict[str, object]:
    """Each attribute of each module, by its path: the tensors that it holds, and its facts."""
    found = {}
    for path, m in module.named_modules():
        for name, value in attributes(m):
            for key, part in value.items() if name in TABLES else ((name, value),):
                if not isinstance(part, nn.Module):
                    state = ModuleState(part)
                    found[".".join(p for p in (path, key) if p)] = (state.facts, [id(t) for t in state.tensors])
    return found


def changed(before: dict[str, object], after: dict[str, object]) -> str | None:
    """The first attribute that two snapshots of one module differ in."""
    return next((k for k in {**before, **after} if before.get(k) != after.get(k)), None)
