"""The torch operations that a saved plan may name: an explicit table, so that loading never looks up a name in a module.

It is built from what torch itself lists as overridable, and from the factories that a body records. What runs Python,
touches memory or the file system, or needs numbers is not in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.overrides import get_overridable_functions, resolve_name

from .names import IN_PLACE_DUNDERS, LIVE_CALLS, NEEDS_DATA, NEEDS_MEMORY

_NAMESPACES = ("torch.Tensor.", "torch.nn.functional.", "torch.linalg.", "torch.fft.", "torch.special.", "torch.")
_BINARY = (
    *(
        [
            "add",
            "sub",
            "mul",
            "matmul",
            "truediv",
            "floordiv",
            "mod",
            "pow",
            "and",
            "or",
            "xor",
            "lshift",
            "rshift",
            "radd",
            "rsub",
            "rmul",
            "rmatmul",
            "rtruediv",
            "rfloordiv",
        ]
    ),
    *(
        [
            "rmod",
            "rpow",
            "rand",
            "ror",
            "rxor",
            "rlshift",
            "rrshift",
            "div",
            "rdiv",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "neg",
            "pos",
            "abs",
            "invert",
            "getitem",
            "setitem",
            "get",
        ]
    ),
)
_DUNDERS = IN_PLACE_DUNDERS | {f"__{name}__" for name in _BINARY}
_FACTORIES = "rand_like randn_like randint_like rand randn randint randperm normal zeros ones full empty arange linspace eye bernoulli multinomial poisson"  # what torch does not list: most have no tensor argument
_REFUSED = (
    NEEDS_DATA
    | NEEDS_MEMORY
    | LIVE_CALLS
    | frozenset(
        [
            "backward",
            "detach_data",
            "module_load",
            "new",
            "new_tensor",
            "as_subclass",
            "from_file",
            "frombuffer",
            "save",
            "load",
            "lobpcg",  # this and the next call what they are given
            "triplet_margin_with_distance_loss",
        ]
    )
)


@functools.cache
def table() -> dict[str, Callable]:
    """Qualified name -> function."""
    found: dict[str, Callable] = {}
    for functions in get_overridable_functions().values():
        for function in functions:
            name = resolve_name(function)
            if name is not None and _allowed(name):
                found.setdefault(name, function)
    for name in _FACTORIES.split():
        found.setdefault(f"torch.{name}", getattr(torch, name))
    for name in ("new_zeros", "new_ones", "new_full", "new_empty"):
        found.setdefault(f"torch.Tensor.{name}", getattr(torch.Tensor, name))
    return found


def _allowed(name: str) -> bool:
    if not name.startswith(_NAMESPACES) or name.endswith("__set__"):
        return False
    last = name.removesuffix(".__get__").rpartition(".")[2]
    return last not in _REFUSED and (not last.startswith("_") or last in _DUNDERS) and ".grad." not in name


@functools.cache
def _names() -> dict[object, str]:
    return {function: name for name, function in reversed(table().items())}


def name_of_operator(function: object) -> str | None:
    """The name of a function in the table, or `None` when it is not there."""
    try:
        return _names().get(function)
    except TypeError:  # unhashable: nothing of torch's
        return None
