"""The tensor object itself: its implementation, its memory, who holds it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only

from .modes import NoTorchFunction
from .probe import Name, needed

_ALIAS = Name("torch._C._is_alias_of", "whether tensors share memory is told by their storages")
_CDATA = Name("torch._C.StorageBase._cdata", "a storage is known by its Python object")
_USES = Name(
    "torch.Tensor._use_count", "a saved value is an alias, so `torch.autograd.grad` after the trace does not find it"
)
_WRAPPER = Name("torch.Tensor._make_wrapper_subclass", "recorded values are made by `as_subclass`")
_WRAPS = Name(
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass",
    "tensors made of tensors are told by `__tensor_flatten__`",
)
_swap = needed("torch._C._swap_tensor_impl")  # `torch.utils.swap_tensors` takes no tensor with weak references
_version = needed("torch.Tensor._version").__get__


def shares_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    found = _ALIAS()
    return found(x, y) if found is not None else x.untyped_storage() is y.untyped_storage()


def memory(x: torch.Tensor) -> int:
    """Which memory a tensor lies in: the same number for all views of it, for as long as one of them lives."""
    storage = x.untyped_storage()
    return storage._cdata if _CDATA() is not None else id(storage)  # torch keeps the object as long as the storage


def whole(x: torch.Tensor) -> torch.Tensor:
    """All of the memory that a tensor lies in, on one dimension: `x` is a view of it, and so is what shares it."""
    with NoTorchFunction(), torch.no_grad():
        return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())  # type: ignore[call-overload]


def version(x: torch.Tensor) -> int:
    """How often a tensor was changed in place."""
    return _version(x)


def versions(tensors: list[torch.Tensor]) -> list[int]:
    """How often each was changed in place; -1 for an inference tensor, which does not count that."""
    try:
        return list(map(_version, tensors))
    except RuntimeError:
        return [-1 if t.is_inference() else _version(t) for t in tensors]


def wrapper(cls: type, size: tuple = ()) -> Any:
    """A tensor without data of a class that answers for all operations on it."""
    make = _WRAPPER()
    return make(cls, size) if make is not None else torch.empty(size).as_subclass(cls)


def swap(lazy: torch.Tensor, real: torch.Tensor) -> None:
    """Make `lazy` the tensor that `real` is, wherever it is held. `real` must be held by nobody else."""
    _swap(lazy, real)
    lazy.__class__ = torch.Tensor


def alone(held: list[torch.Tensor]) -> bool:
    """Does Python hold the one tensor in this list nowhere else?

    Measured against a new tensor in the same place, since a call may hold its arguments twice (it does while Dynamo
    evaluates frames). torch >= 2.10 adds one reference of its own while C++ (an autograd graph, say) holds the tensor too.
    """
    uses = _USES()
    if uses is None:
        return False
    new = [torch.empty(0)]
    return sys.getrefcount(held[0]) == sys.getrefcount(new[0]) + (uses(held[0]) > 1)


def wraps_tensors(x: torch.Tensor) -> bool:
    """Is it a tensor of a class that is made of other tensors: a `DTensor`, a jagged `NestedTensor`, a quantised weight?"""
    found = _WRAPS()
    return found(x) if found is not None else hasattr(x, "__tensor_flatten__")


def hook(tensor: torch.Tensor, function: Callable) -> Any:
    """`tensor.register_hook`, on a view too that was changed through an alias: torch <= 2.14 crashes there, unless somebody has
    looked at its `grad_fn` (pytorch/pytorch#196459)."""
    _ = tensor.grad_fn
    return tensor.register_hook(function)
