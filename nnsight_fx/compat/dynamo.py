"""Dynamo: capturing a function, and finding again what was captured."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, cast

import torch

from .frames import SET, forced_eager
from .guards import TABLE, captures, root
from .modules import comes_and_goes
from .probe import Name

_UNSUPPORTED = Name("torch._dynamo.exc.Unsupported", "Dynamo's errors are told by their names")
_INTERNAL = Name("torch._dynamo.exc.InternalTorchDynamoError", "Dynamo's errors are told by their names")
_RUNTIME = Name("torch._dynamo.exc.TorchRuntimeError", "Dynamo's errors are told by their names")
_INDUCTOR = Name(
    "torch._TorchCompileInductorWrapper", "graphs are compiled by `torch.compile`, which captures them once more"
)
_LOOKUP = Name(
    "torch._dynamo.backends.registry.lookup_backend",
    "graphs are compiled by `torch.compile`, which captures them once more",
)
_RESTART = Name(
    "torch._dynamo.exc.TensorifyScalarRestartAnalysis",
    "a graph in which a float has become a constant is compiled by `aot_eager`",
)
_FLOATS = Name("torch._dynamo.config.specialize_float", "a model's float that changes is captured again")
_LIMIT = Name("torch._dynamo.config.recompile_limit", "Dynamo gives up after as many captures as it is set to")
_TOTAL = Name(
    "torch._dynamo.config.accumulated_recompile_limit", "Dynamo gives up after as many captures as it is set to"
)
_OPTIMIZE = Name("torch._dynamo.optimize", "guards on our own hooks stay, and every run puts its hooks on")
_FORGET = Name("torch._dynamo.eval_frame.reset_code", "captures of a model that is gone stay in memory")
_ORIGINAL = Name(
    "torch._dynamo.types.GuardFilterEntry.orig_guard", "what a property makes anew at each look is captured anew"
)
_CALLBACK = Name(
    "torch._dynamo.eval_frame.OptimizeContext.callback", "every run puts its hooks on, also where all of it is captured"
)
_RETURN = Name(
    "torch._dynamo.types.ConvertFrameReturn", "every run puts its hooks on, also where all of it is captured"
)
_DEPTH = Name(
    "torch._C._functorch.get_dynamic_layer_stack_depth", "every run puts its hooks on, also where all of it is captured"
)
_UNDO = Name(
    "torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth",
    "every run puts its hooks on, also where all of it is captured",
)


def cannot_trace(error: Exception) -> bool:
    """Did Dynamo refuse to trace something, as it does under `fullgraph=True`?"""
    return _is(error, _UNSUPPORTED)


def restarts(error: BaseException) -> bool:
    """Does a compiler ask to be called once more: a float was a constant in the graph, which it knows from here on?"""
    found = _RESTART()
    return found is not None and isinstance(error, found)


def fails(error: Exception) -> bool:
    """Is it an error of Dynamo's own, or of its fake tensors, and not as the model would raise it?"""
    return _is(error, _INTERNAL) or _is(error, _RUNTIME)


def _is(error: Exception, name: Name) -> bool:
    """Is it an error of this class? By the class's name where there is none."""
    found = name()
    if found is not None:
        return isinstance(error, found)
    return name.path.rpartition(".")[2] in [cls.__name__ for cls in type(error).__mro__]


def register(*functions: Callable) -> None:
    """Make functions graph nodes of their own when Dynamo traces a call of them."""
    for function in functions:
        torch.compiler.allow_in_graph(function)


def backend(name: Any, mode: str | None, options: dict | None, dynamic: bool | None) -> Callable:
    """The compiler that `torch.compile(backend=name, ...)` would use: `(gm, inputs) -> callable`."""
    if not isinstance(name, str):
        return name
    if name == "inductor":
        made = _INDUCTOR()
        if made is not None:
            return made(mode, options, dynamic)
    elif _LOOKUP() is not None:
        return _LOOKUP()(name)
    return functools.partial(_compiled, backend=name, mode=mode, options=options, dynamic=dynamic)


def _compiled(gm: torch.fx.GraphModule, inputs: list, **options: Any) -> Callable:
    """A graph compiled as a model is: `torch.compile` captures it once more. It takes a mode or options, not both."""
    if options.get("mode") and options.get("options"):
        chosen = torch._inductor.list_mode_options(options.pop("mode"))
        options["options"] = {**chosen, **options["options"]}
    return torch.compile(gm, **options)


def any_size(x: torch.Tensor, dim: int) -> None:
    """Let a capture hold for every size of a dimension, from 2 up."""
    torch._dynamo.mark_dynamic(x, dim)


def may_vary(x: torch.Tensor, *dims: int) -> None:
    """Let a capture hold for other sizes of these dimensions, where it can: those of size 1 stay what they are."""
    for dim in dims:
        if x.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(x, dim)


RECOMPILES = 64  # captures of one entry; Dynamo's own default is 8


def patience(modules: int) -> int:
    """How many captures one frame may have: behind graph breaks, modules of one class share the frames of their code."""
    return max(RECOMPILES, _LIMIT() or 0, 4 * modules)


def recompiles(functions: list[Callable]) -> int:
    """How many captures the function with the most has."""
    return max((len(captures(f)) for f in functions), default=0)


@contextlib.contextmanager
def capturing(modules: int) -> Iterator[None]:
    """Dynamo's settings while it captures a model for us: its floats are structure, since variants compile too late to ask
    Dynamo to look again; and a frame may have `patience` captures under each of its entries."""
    config: object = torch._dynamo.config
    limit = patience(modules)
    wanted = {_FLOATS: True, _LIMIT: limit, _TOTAL: max(128 * limit, _TOTAL.of(config, 0))}
    wanted = {name.path.rpartition(".")[2]: value for name, value in wanted.items() if name.of(config) is not None}
    old = {name: getattr(config, name) for name in wanted}
    for name, value in wanted.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(config, name, value)


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
            if guard.guard_type == "CLOSURE_MATCH" and guard.has_value and not comes_and_goes(guard.value)
        )
        for guard in guards:  # built again, which asserts what a property makes at each look to be one object
            if _ORIGINAL.of(guard) is not None:
                guard.orig_guard.obj_weakref = None
        return [guard.name.startswith(user) or not TABLE.search(guard.name) or tells(guard) for guard in guards]

    forget = _FORGET()
    if forget is not None:
        weakref.finalize(function, forget, function.__code__).atexit = False  # what it holds knows it
    optimize = _OPTIMIZE()
    if optimize is None:
        return torch.compile(function, backend=backend, fullgraph=fullgraph, dynamic=dynamic), _never
    context: Any = optimize(backend=backend, nopython=fullgraph, dynamic=dynamic, guard_filter_fn=keep)
    return context(function), _cached_only(context, function)


def _never(*_: object) -> NoReturn:
    raise NotCaptured


def _cached_only(context: object, function: Callable) -> Callable:
    found, put, callback, depth_of, undo = _RETURN(), SET(), _CALLBACK.of(context), _DEPTH(), _UNDO()
    if None in (found, put, callback, depth_of, undo):
        return _never

    def refuse(frame: Any, *_: object) -> Any:
        if frame.f_code is code:
            raise NotCaptured
        return found()  # a finalizer, say, that happens to run now: as it is

    code, refusal = function.__code__, cast(Any, refuse)
    refusal._torchdynamo_orig_backend = callback  # the captures to look among

    def cached(*args: object) -> object:
        if forced_eager():
            raise NotCaptured
        depth, outer = depth_of(), put(refusal)
        try:
            return function(*args)
        except BaseException:
            undo(depth)  # a graph that fails leaves its transforms there
            raise
        finally:
            put(outer)

    return cached
