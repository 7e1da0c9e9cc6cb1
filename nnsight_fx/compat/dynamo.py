"""Dynamo: capturing a function, and finding again what was captured."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from .guards import TABLE, of_library, root


def cannot_trace(error: Exception) -> bool:
    """Did Dynamo refuse to trace something, as it does under `fullgraph=True`?"""
    from torch._dynamo.exc import Unsupported

    return isinstance(error, Unsupported)


def fails(error: Exception) -> bool:
    """Is it an error of Dynamo's own, or of its fake tensors, and not as the model would raise it?"""
    from torch._dynamo.exc import InternalTorchDynamoError, TorchRuntimeError

    return isinstance(error, InternalTorchDynamoError | TorchRuntimeError)


def register(*functions: Callable) -> None:
    """Make functions graph nodes of their own when Dynamo traces a call of them."""
    for function in functions:
        torch.compiler.allow_in_graph(function)


def backend(name: Any, mode: str | None, options: dict | None, dynamic: bool | None) -> Callable:
    """The compiler that `torch.compile(backend=name, ...)` would use: `(gm, inputs) -> callable`."""
    if name == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, dynamic)
    if not isinstance(name, str):
        return name
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(name)


def any_size(x: torch.Tensor, dim: int) -> None:
    """Let a capture hold for every size of a dimension, from 2 up."""
    torch._dynamo.mark_dynamic(x, dim)


RECOMPILES = 64  # captures of one entry; Dynamo's own default is 8


def patience(modules: int) -> int:
    """How many captures one frame may have: behind graph breaks, modules of one class share the frames of their code."""
    config: Any = torch._dynamo.config
    return max(RECOMPILES, config.recompile_limit, 4 * modules)


def recompiles(functions: list[Callable]) -> int:
    """How many captures the function with the most has."""
    count = torch._dynamo.eval_frame._debug_get_cache_entry_list
    return max((len(count(f.__code__)) for f in functions), default=0)


@contextlib.contextmanager
def capturing(modules: int) -> Iterator[None]:
    """Dynamo's settings while it captures a model for us: its floats are structure, since variants compile too late to ask
    Dynamo to look again; and a frame may have `patience` captures under each of its entries."""
    config: Any = torch._dynamo.config
    limit = patience(modules)
    old = config.specialize_float, config.recompile_limit, config.accumulated_recompile_limit
    config.specialize_float, config.recompile_limit = True, limit
    config.accumulated_recompile_limit = max(old[2], 128 * limit)
    try:
        yield
    finally:
        config.specialize_float, config.recompile_limit, config.accumulated_recompile_limit = old


class NotCaptured(Exception):
    """No capture holds for a call."""


def dynamo_compile(
    function: Callable, backend: Callable, dynamic: bool | None, fullgraph: bool
) -> tuple[Callable, Callable]:
    """`torch.compile`, without the guards on tables of hooks: whoever calls this asks for another function when the user's hooks
    change, and ours never do. What is in the closures of the user's hooks keeps its guards.

    Returns the compiled function, and one that runs what was captured and raises `NotCaptured`, before anything ran, where
    none of it holds.

    Behind a graph break Dynamo captures frames one by one, and modules of one class share a frame: there it looks at which
    module of the model a hook belongs to, and at how often it was called.
    """
    start = root(function)

    def tells(guard: Any) -> bool:
        path = guard.guard_type == "CONSTANT_MATCH" and guard.has_value and isinstance(guard.value, str)
        return (path or guard.name.endswith(".calls") or ".calls[" in guard.name) and not guard.name.startswith(start)

    def keep(guards: Any) -> list[bool]:
        user = tuple(
            guard.name
            for guard in guards
            if guard.guard_type == "CLOSURE_MATCH" and guard.has_value and not of_library(guard.value)
        )
        for guard in guards:  # built again, which asserts what a property makes at each look to be one object
            guard.orig_guard.obj_weakref = None
        return [guard.name.startswith(user) or not TABLE.search(guard.name) or tells(guard) for guard in guards]

    weakref.finalize(
        function, torch._dynamo.eval_frame.reset_code, function.__code__
    ).atexit = False  # what it holds knows it
    context: Any = torch._dynamo.optimize(backend=backend, nopython=fullgraph, dynamic=dynamic, guard_filter_fn=keep)
    return context(function), _cached_only(context, function)


def _cached_only(context: Any, function: Callable) -> Callable:
    from torch._dynamo.types import ConvertFrameReturn

    def refuse(frame: Any, *_: Any) -> ConvertFrameReturn:
        if frame.f_code is code:
            raise NotCaptured
        return ConvertFrameReturn()  # a finalizer, say, that happens to run now: as it is

    code, callback = function.__code__, cast(Any, refuse)
    callback._torchdynamo_orig_backend = context.callback  # the captures to look among
    frames, layers = torch._dynamo.eval_frame, torch._C._functorch  # type: ignore[attr-defined]

    def cached(*args: Any) -> Any:
        if frames._stance.stance == "force_eager":
            raise NotCaptured
        depth, outer = layers.get_dynamic_layer_stack_depth(), frames.set_eval_frame(callback)
        try:
            return function(*args)
        except BaseException:
            layers.pop_dynamic_layer_stack_and_undo_to_depth(depth)  # a graph that fails leaves its transforms there
            raise
        finally:
            frames.set_eval_frame(outer)

    return cached
