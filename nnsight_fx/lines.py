"""The line of the user's code that a call came from: errors, warnings and plans name it."""

from __future__ import annotations

import functools
import os
import sys
from types import FrameType
from typing import NamedTuple

import greenlet
import torch

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
OURS = (_PACKAGE + os.sep, os.path.realpath(os.path.join(_PACKAGE, "passes")) + os.sep)
BELOW = (*OURS, os.path.dirname(torch.__file__) + os.sep)  # what lies below the user's line in a traceback


class Line(NamedTuple):
    """A line of the user's code."""

    filename: str
    lineno: int

    def __str__(self) -> str:
        return f"{self.filename}:{self.lineno}"


_new_line = tuple.__new__  # `Line(...)` without a call in Python: there is one a recorded operation


@functools.cache
def _internal(filename: str) -> bool:
    return filename.startswith(BELOW)


def _outside() -> FrameType | None:
    """Where the line of work waits that made this greenlet."""
    parent = greenlet.getcurrent().parent
    return None if parent is None else parent.gr_frame


def user_line() -> Line:
    """The innermost line that is neither this package's nor torch's; in a greenlet also of who made that."""
    frame = sys._getframe(1)
    while _internal(frame.f_code.co_filename):
        outer = frame.f_back or _outside()
        if outer is None:
            break
        frame = outer
    return _new_line(Line, (frame.f_code.co_filename, frame.f_lineno))
