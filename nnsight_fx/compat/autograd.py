"""Custom `autograd.Function`s while they run: which one it is, and with which arguments.

Up to torch 2.13 `Function.apply` is Python, and its frame tells. From torch 2.14 on it is C: the frame that it calls, the
`forward`, tells.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import BuiltinMethodType, CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch.autograd.function import Function, FunctionCtx


class Applied(NamedTuple):
    """A running `cls.apply(*args, **kwargs)`."""

    cls: type
    args: tuple
    kwargs: dict


class Untold(Exception):
    """It cannot be told what a running `apply` was given. The text says why, and begins with a verb."""


def _apply_code() -> CodeType | None:
    """The code of `Function.apply` where it is written in Python."""
    return getattr(getattr(Function.apply, "__func__", None), "__code__", None)


def separate(cls: type) -> bool:
    """Has a function a `setup_context`, and a `forward` that takes no `ctx`?"""
    return cls.setup_context is not Function.setup_context


def call_of(cls: type) -> Callable:
    """`cls.apply` as a function written in Python: the text of a graph names the module of each function that it calls."""
    apply = cls.apply
    if not isinstance(apply, BuiltinMethodType):
        return apply

    def call(*args: object, **kwargs: object) -> Any:
        return apply(*args, **kwargs)

    call.__name__, call.__qualname__, call.__module__ = "apply", apply.__qualname__, cls.__module__
    return call


def applying(grad: bool, known: FrameType | None = None) -> FrameType | None:
    """The frame of the outermost `Function.apply` that runs. `grad` is the grad mode of the code around it.

    `known` is a frame that was found before. It is the answer for as long as it runs.
    """
    frames = list(_frames(sys._getframe(1)))
    if known is not None and known in frames:
        return known
    code = _apply_code()
    if code is not None:
        return next((f for f in reversed(frames) if f.f_code is code), None)
    entries = _forwards()
    for frame in reversed(frames):
        if frame.f_code in entries and (_ctx(frame) is not None or torch.is_grad_enabled() is not grad):
            return frame  # a `forward` without a `ctx` may also be called by hand: `apply` turns the grad mode off
    return None


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def applied(frame: FrameType) -> Applied:
    """Which function an `applying` frame runs, and what it was given."""
    if frame.f_code is _apply_code():
        given = frame.f_locals
        return Applied(given["cls"], given["args"], given.get("kwargs", {}))
    args, kwargs = _given(frame)
    ctx = _ctx(frame)
    if ctx is not None:
        return Applied(type(ctx)._forward_cls, args[1:], kwargs)
    classes = _forwards()[frame.f_code]
    if len(classes) > 1:  # one decorator on several: the function inside tells
        running = {id(f.f_code) for f in _frames(sys._getframe(1))}
        classes = [c for c in classes if id(getattr(inspect.unwrap(c.forward), "__code__", None)) in running]
    if len(classes) != 1:
        raise Untold(
            f"shares its code with {len(classes)} classes, so torch {torch.__version__} does not tell which one runs"
        )
    return Applied(classes[0], args, kwargs)


def _forwards() -> dict[CodeType, list]:
    """The functions whose `forward` has some code."""
    found: dict[CodeType, list[object]] = {}
    classes: list = Function.__subclasses__()
    for cls in classes:
        classes += cls.__subclasses__()
    for cls in dict.fromkeys(classes):
        code = _code_of(cls.forward)
        if code is not None:
            found.setdefault(code, []).append(cls)
    return found


def _code_of(function: object) -> CodeType | None:
    while isinstance(function, functools.partial):
        function = function.func
    if not hasattr(function, "__code__"):
        function = type(function).__call__
    return getattr(function, "__code__", None)


def _ctx(frame: FrameType) -> Any:
    """The `ctx` that a `forward` was given, if it takes one."""
    args, _ = _locals(frame)
    return args[0] if args and isinstance(args[0], FunctionCtx) and hasattr(type(args[0]), "_forward_cls") else None


def _parameters(code: CodeType) -> tuple[list[str], str | None, str | None, list[str]]:
    """The names of a function's parameters: by position, `*args`, `**kwargs`, by keyword only."""
    names, positional, last = code.co_varnames, code.co_argcount, code.co_argcount + code.co_kwonlyargcount
    more = list(names[last : last + 2])
    star = more.pop(0) if code.co_flags & inspect.CO_VARARGS else None
    stars = more.pop(0) if code.co_flags & inspect.CO_VARKEYWORDS else None
    return list(names[:positional]), star, stars, list(names[positional:last])


def _locals(frame: FrameType) -> tuple[tuple, dict]:
    """What the parameters of a running call are now."""
    held, (named, star, stars, keywords) = frame.f_locals, _parameters(frame.f_code)
    args = (*(held.get(name) for name in named), *(held.get(star, ()) if star else ()))
    return args, {**{name: held.get(name) for name in keywords}, **(held.get(stars, {}) if stars else {})}


def _given(frame: FrameType) -> tuple[tuple, dict]:
    """What a running call was given: its parameters, unless it has assigned to one of them."""
    named, star, stars, keywords = _parameters(frame.f_code)
    assigned = _assigned(frame).intersection(filter(None, (*named, star, stars, *keywords)))
    if assigned:
        raise Untold(
            f"assigns to its argument `{min(assigned)}` before its first operation (give the new value a name of its own: torch "
            f"{torch.__version__} does not tell what the argument was)"
        )
    return _locals(frame)


def _assigned(frame: FrameType) -> set[str]:
    """The names that a frame may have assigned to until now."""
    steps = dis.get_instructions(frame.f_code)
    stores = ("STORE_FAST", "STORE_DEREF", "DELETE_FAST", "DELETE_DEREF")
    values = [s.argval for s in steps if s.offset < frame.f_lasti and s.opname.startswith(stores)]
    return {name for value in values for name in (value if isinstance(value, tuple) else (value,))}
