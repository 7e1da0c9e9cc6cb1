"""The tensor object itself: its implementation, its memory, who holds it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import (
    is_traceable_wrapper_subclass,
)


def shares_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch._C._is_alias_of(x, y)  # type: ignore[attr-defined]


def swap(lazy: torch.Tensor, real: torch.Tensor) -> None:
    """Make `lazy` the tensor that `real` is, wherever it is held. `real` must be held by nobody else."""
    torch._C._swap_tensor_impl(lazy, real)
    lazy.__class__ = torch.Tensor


def alone(held: list[torch.Tensor]) -> bool:
    """Does Python hold the one tensor in this list nowhere else?

    Measured against a new tensor in the same place, since a call may hold its arguments twice (it does while Dynamo
    evaluates frames). torch >= 2.10 adds one reference of its own while C++ (an autograd graph, say) holds the tensor too.
    """
    new = [torch.empty(0)]
    return sys.getrefcount(held[0]) == sys.getrefcount(new[0]) + (held[0]._use_count() > 1)  # type: ignore[attr-defined]


def wraps_tensors(x: torch.Tensor) -> bool:
    """Is it a tensor of a class that is made of other tensors: a `DTensor`, a jagged `NestedTensor`, a quantised weight?"""
    return is_traceable_wrapper_subclass(x)


def hook(tensor: torch.Tensor, function: Callable) -> Any:
    """`tensor.register_hook`, on a view too that was changed through an alias: torch <= 2.14 crashes there, unless somebody has
    looked at its `grad_fn` (pytorch/pytorch#196459)."""
    _ = tensor.grad_fn
    return tensor.register_hook(function)
