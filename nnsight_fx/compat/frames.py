"""Dynamo's frame evaluation: its stance on a thread, and functions that `torch.compile` made."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .probe import Name

_STANCE = Name("torch._dynamo.eval_frame._stance", "a body makes all threads run eagerly what `torch.compile` made")
SET = Name("torch._dynamo.eval_frame.set_eval_frame", "every run puts its hooks on, also where all of it is captured")
_SKIP = Name("torch._dynamo.eval_frame.skip_code", "Dynamo looks at our own functions, and leaves them as they are")
_OPTIMIZED = Name(
    "torch._dynamo.eval_frame.OptimizedModule", "what `torch.compile(module)` made is captured as Dynamo does it"
)
_ORIGINAL, _DISABLED = (
    "_torchdynamo_orig_callable",
    "_torchdynamo_disable",
)  # attributes of what Dynamo made of a function


def _eval_frame() -> Any:
    """Dynamo's frame evaluation, if anything has loaded it yet."""
    return sys.modules.get("torch._dynamo.eval_frame")


class _Stance:
    """Dynamo's stance while bodies run: on their threads compiled functions run as written, on others as ever.

    The stance belongs to the process and bodies belong to threads, so one object stands for both, for as long as any
    thread has a body open.
    """

    bodies = threading.local()  # .open: is this thread in a body
    lock = threading.Lock()
    count = 0  # the threads that are

    def __init__(self, under: Any):
        self.under = under

    @property
    def stance(self) -> str:
        return "force_eager" if getattr(_Stance.bodies, "open", False) else self.under.stance

    def __getattr__(self, name: str) -> Any:
        return getattr(self.under, name)


def stance() -> Any:
    """The thread's stance: the one that the user has set, and whether a body is open."""
    module = _eval_frame()
    if module is None:
        return None
    now = module._stance if _STANCE() is not None else None
    return (now.under if isinstance(now, _Stance) else now), getattr(_Stance.bodies, "open", False)


def set_stance(value: Any) -> None:
    module = _eval_frame()
    if module is not None and value is not None:
        under, body = value
        with _Stance.lock:
            _Stance.count += body - getattr(_Stance.bodies, "open", False)
            _Stance.bodies.open = body
            if _STANCE() is not None:
                module._stance = _Stance(under) if _Stance.count else under
            else:
                torch.compiler.set_stance("force_eager" if _Stance.count else "default")


def forced_eager() -> bool:
    """Does Dynamo's stance, or a body of this thread, ask for everything as written?"""
    found = _STANCE() and _eval_frame()._stance  # it changes
    return getattr(_Stance.bodies, "open", False) if found is None else found.stance == "force_eager"


def body_stance(body: bool = True) -> tuple | None:
    """The stance under which compiled functions run as written; or, for a model that runs inside a body, as compiled."""
    now = stance()
    return now and (now[0], body)


def as_compiled() -> contextlib.AbstractContextManager:
    """Compiled functions run as such in the block, also where it runs inside the body of another trace."""
    return _out_of_body() if getattr(_Stance.bodies, "open", False) else contextlib.nullcontext()


@contextlib.contextmanager
def _out_of_body() -> Iterator[None]:
    old = stance()
    set_stance(body_stance(False))
    try:
        yield
    finally:
        set_stance(old)


def frame_callback(value: object = None) -> object:
    """Set the thread's frame evaluation callback; returns the one that was set."""
    put = None if _eval_frame() is None else SET()
    return None if put is None else put(value)


def never_compile(function: Callable) -> None:
    """Run this function's frames as they are when called directly; Dynamo still traces through calls to it."""
    skip = _SKIP()
    if skip is not None:
        skip(function.__code__)


def compiled_from(function: object) -> Any:
    """What `torch.compile` made this from, if it did."""
    disabled = getattr(function, _DISABLED, False)
    return None if disabled else getattr(function, _ORIGINAL, None)


@functools.cache
def _seen_by_dynamo() -> type:
    class Seen(_OPTIMIZED()):  # type: ignore[misc]
        """What `torch.compile(module)` returns, while we run it: of that very class Dynamo looks at the module inside only, and
        passes neither its hooks nor its `forward` (torch 2.13, `VariableBuilder.wrap_module`)."""

        __call__ = torch.nn.Module.__call__

    return Seen


def seen_by_dynamo(module: torch.nn.Module) -> Callable[[], None] | None:
    """Have Dynamo look at what `torch.compile(module)` returned as at any module; returns what undoes it, where it was one."""
    old = type(module)
    if old.__name__ != "OptimizedModule" or old is not _OPTIMIZED():
        return None
    object.__setattr__(module, "__class__", _seen_by_dynamo())
    return lambda: object.__setattr__(module, "__class__", old)


def undisturbed(function: Callable) -> Callable:
    """`function` run as it is, also when compiled code calls it."""
    return torch.compiler.disable(function)


def inside(function: Callable) -> Callable:
    """What `undisturbed` made a function from, for a caller that is undisturbed itself."""
    return getattr(function, _ORIGINAL, function) if hasattr(function, _DISABLED) else function
