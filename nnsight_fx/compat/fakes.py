"""Fake tensors: shapes and dtypes without data."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree

from .modes import dispatch_modes
from .probe import Name, needed

if TYPE_CHECKING:
    from torch._guards import TracingContext
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
else:
    FakeTensor = needed("torch._subclasses.fake_tensor.FakeTensor")
    FakeTensorMode = needed("torch._subclasses.fake_tensor.FakeTensorMode")
    FakeCopyMode = needed("torch._subclasses.fake_tensor.FakeCopyMode")
_DETECT = Name("torch._guards.detect_fake_mode", "the mode of fakes is their own, or the one that runs")
_CONTEXT = Name("torch._guards.TracingContext", "variants are compiled without Dynamo's context")
_DISPATCHER = Name(
    "torch._dispatch.python.enable_python_dispatcher", "operations on sizes that are symbols take torch's own way"
)
_NO_DISPATCHER = Name(
    "torch._dispatch.python.no_python_dispatcher", "operations on sizes that are symbols take torch's own way"
)
_FRESH = Name(
    "torch.fx.experimental.symbolic_shapes.ShapeEnv.ignore_fresh_unbacked_symbols",
    "a region with sizes of its own is not made",
)


_PACKAGE = __name__.partition(".")[0] + "."
_TORCHS = {
    "_specialize_on",
    "_is_inductor_static",
    "_is_frozen_param",
    "_is_param",
}  # what torch puts on a tensor for itself


@functools.cache
def _own() -> frozenset[str]:
    """What torch itself keeps on a fake tensor."""
    with FakeTensorMode():
        return frozenset(vars(torch.empty(0)))


def attributes(x: torch.Tensor) -> list[str]:
    """The attributes that somebody has put on a tensor, a fake one or not."""
    found = vars(x)
    if not found or isinstance(x, torch.nn.Parameter) or _ours(x):
        return []
    names = [name for name, value in found.items() if not _ours(value)]
    return [name for name in names if name not in _own() and "dynamo" not in name and name not in _TORCHS]


def _ours(thing: object) -> bool:
    """Is it of a class of this package: a recorded value, or the `save` that a tensor of a body has?"""
    return type(thing).__module__.startswith(_PACKAGE)


def with_attributes(leaves: list) -> str | None:
    """The name of an attribute on one of the tensors among some values, if there is one."""
    return next((name for x in leaves if isinstance(x, torch.Tensor) for name in attributes(x)), None)


class _Never(RuntimeError):
    """An error that this torch does not raise."""


def _error(path: str) -> Any:
    return Name(path, "an operation that needs a value's numbers is told by torch's other errors")() or _Never


DataDependentOutputException = _error("torch._subclasses.fake_tensor.DataDependentOutputException")
DynamicOutputShapeException = _error("torch._subclasses.fake_tensor.DynamicOutputShapeException")
UnsupportedOperatorException = _error("torch._subclasses.fake_tensor.UnsupportedOperatorException")
GuardOnDataDependentSymNode = _error("torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode")

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeCopyMode",
    "FakeTensor",
    "FakeTensorMode",
    "GuardOnDataDependentSymNode",
    "UnsupportedOperatorException",
    "as_input",
    "as_leaf",
    "attributes",
    "with_attributes",
    "detect_fake_mode",
    "enable_python_dispatcher",
    "fake_like",
    "no_python_dispatcher",
    "on_fakes",
    "on_symbols",
    "placeholder_fakes",
    "unchanged",
]


def detect_fake_mode(values: object = None) -> Any:
    """The mode that fakes among some values belong to, or else the one that runs."""
    found = _DETECT()
    if found is not None:
        return found(values)
    context = _CONTEXT() and _CONTEXT().try_get()
    given = (x.fake_mode for x in pytree.tree_leaves(values) if isinstance(x, FakeTensor))
    running = (mode for mode in reversed(dispatch_modes()) if isinstance(mode, FakeTensorMode))
    return next(given, None) or (context and context.fake_mode) or next(running, None)


def enable_python_dispatcher() -> contextlib.AbstractContextManager:
    found = _DISPATCHER()
    return contextlib.nullcontext() if found is None else found()


def no_python_dispatcher() -> contextlib.AbstractContextManager:
    found = _NO_DISPATCHER()
    return contextlib.nullcontext() if found is None else found()


def placeholder_fakes(gm: torch.fx.GraphModule) -> list:
    """The fake inputs that Dynamo left on a graph's placeholders."""
    return [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]


@contextlib.contextmanager
def on_fakes(mode: FakeTensorMode) -> Iterator[None]:
    """Run operations on the fakes of a mode, of which nothing is kept but what they look like: sizes that are known only when
    the graph runs are of no interest to a compilation that has its own."""
    env = mode.shape_env
    ignore = None if env is None else _FRESH.of(env)
    quiet = contextlib.nullcontext() if ignore is None else ignore()
    with mode, quiet, on_symbols():
        yield


def on_symbols() -> contextlib.AbstractContextManager:
    """The block in which operations take sizes that are symbols: `linear` of torch 2.11 wants Python's dispatcher for them."""
    return enable_python_dispatcher() if torch.__version__ < (2, 13) else contextlib.nullcontext()  # type: ignore[operator]


def fake_like(context: Any, facts: tuple) -> torch.Tensor:
    """A fake input of a variant, from what a plan knows of a real tensor."""
    shape, stride, dtype, device, requires_grad = facts
    with context.fake_mode, torch.no_grad():
        made = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return made.requires_grad_(requires_grad)


def unchanged(context: TracingContext, fake: Any, value: object) -> object:
    """A fake input that requires grad as its value does: written in place while Dynamo traced, it may have come to."""
    if not isinstance(value, torch.Tensor) or fake.requires_grad == value.requires_grad:
        return fake
    return fake_like(context, (fake.shape, fake.stride(), fake.dtype, fake.device, value.requires_grad))


def as_leaf(context: object, fake: object) -> Any:
    """A fake input in the mode that compilation uses: Dynamo makes a new one when it has captured a graph."""
    if not isinstance(fake, torch.Tensor):
        return fake
    return fake_like(context, (fake.shape, fake.stride(), fake.dtype, fake.device, fake.requires_grad))


def as_input(context: object, fake: object) -> object:
    """A fake from inside a graph as the input of another: a leaf."""
    if not isinstance(fake, torch.Tensor) or fake.is_leaf:
        return fake
    return fake_like(context, (fake.shape, fake.stride(), fake.dtype, fake.device, fake.requires_grad))
