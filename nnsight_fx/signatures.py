"""Keywords that a function of ours does not have: refused at the user's line, with the nearest that there are."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from .errors import nearest
from .lines import user_line

P = ParamSpec("P")
T = TypeVar("T")


def exact(function: Callable[P, T]) -> Callable[P, T]:
    """A function that refuses keywords which it does not have, under its own name."""
    return named(f"`{function.__name__}`")(function)


def named(what: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """The same, under another name."""

    def wrap(function: Callable[P, T]) -> Callable[P, T]:
        known = [name for name in inspect.signature(function).parameters if name != "self"]

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            for name in kwargs:
                if name not in known:
                    raise TypeError(f"{user_line()}: `{name}=` is no keyword of {what}; {nearest(name, known)}")
            return function(*args, **kwargs)

        return checked

    return wrap
