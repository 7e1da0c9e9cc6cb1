"""Dynamo's own variables: a handler that takes the place of Dynamo's reading of a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from .probe import Name

if TYPE_CHECKING:
    from torch._dynamo.variables.base import VariableTracker


_HANDLERS = Name(
    "torch._dynamo.variables.TorchInGraphFunctionVariable._get_handlers", "Dynamo reads the instructions of our markers"
)
_USED = [
    Name(f"torch._dynamo.variables.{name}", "Dynamo reads the instructions of our markers")
    for name in (
        "TensorVariable",
        "TupleVariable",
        "ConstantVariable",
        "UserFunctionVariable.call_function",
        "VariableTracker.build",
        "VariableTracker.realize",
        "TorchInGraphFunctionVariable.call_function",
    )
]
_LAZY = Name(
    "torch._dynamo.variables.lazy.LazyConstantVariable", "the value of each constant that a module gets is guarded"
)


def traced_by(function: Callable, handler: Callable) -> None:
    """Have Dynamo call `handler(tx, *args, **kwargs)` on its variables where it would read the instructions of `function`."""
    handlers = _HANDLERS()
    if handlers is None or any(name() is None for name in _USED):
        return
    torch.compiler.allow_in_graph(function)
    handlers()[function] = lambda _, tx, /, *args, **kwargs: handler(tx, *args, **kwargs)


def is_tensor(value: object) -> bool:
    return type(value) is _vt().TensorVariable


def _vt() -> ModuleType:
    """Their classes: importing them loads Dynamo."""
    from torch._dynamo import variables

    return variables


def _unread() -> type | None:
    """The class of a constant of which Dynamo guards no more than the type, until something depends on its value."""
    return _LAZY()


def looked_at(value: VariableTracker) -> VariableTracker:
    """A variable as an `isinstance` leaves it."""
    return value if type(value) is _unread() and not value.is_realized() else value.realize()


def is_plain(value: object, types: tuple[type, ...]) -> bool:
    """Is it `None`, or a constant of one of these types?"""
    constant = type(value) in (_vt().ConstantVariable, _unread())
    return constant and issubclass(_type_of(value), (type(None), *types))


def _type_of(value: Any) -> type:
    """Of a constant: its type is guarded, and its value is not. torch 2.11's `python_type` would guard the value."""
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import is_constant_source

    if type(value) is not _unread() or value.is_realized() or hasattr(_unread(), "_ensure_type_guard"):
        return value.python_type()
    if is_constant_source(value.source):  # nothing to guard
        return value.python_type()
    install_guard(value.source.make_guard(GuardBuilder.TYPE_MATCH))
    return value.peek_type()


def items(value: Any) -> Any:
    """What is in a tuple, if it is one and no named one."""
    return list(value.items) if type(value) is _vt().TupleVariable else None


def tuple_of(values: list) -> VariableTracker:
    return _vt().TupleVariable(values)


def attribute(tx: object, value: object, name: str) -> Any:
    variable = _vt().VariableTracker.build
    return variable(tx, getattr).call_function(tx, [value, variable(tx, name)], {})


def length(tx: Any, module: object, name: str) -> int:
    """Of a table among a module's attributes: as it is, where the code that Dynamo has read so far did not look at it."""
    table = getattr(getattr(module, "value", None), name, None)
    if table is None or table in tx.output.side_effects:
        return attribute(tx, module, name).realize().len()
    return len(table)


def node(tx: object, function: Callable, *args: object) -> VariableTracker:
    """A call of a function that is `register`ed."""
    return _vt().TorchInGraphFunctionVariable(function).call_function(tx, _variables(tx, args), {})


def inlined(tx: object, function: Callable, /, *args: object, **kwargs: object) -> VariableTracker:
    """A call of a function whose instructions Dynamo reads."""
    return _vt().UserFunctionVariable(function).call_function(tx, _variables(tx, args), kwargs)


def _variables(tx: object, args: Sequence) -> list:
    of = _vt().VariableTracker
    return [x if isinstance(x, of) else of.build(tx, x) for x in args]
