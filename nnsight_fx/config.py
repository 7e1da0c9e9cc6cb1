"""`CONFIG`: settings of the process, and tracebacks that show the user's code and the model's, not this package's."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from .lines import BELOW, OURS


@dataclass
class App:
    """How the library behaves.

    `DEBUG` keeps this package's own frames in the tracebacks of errors that leave a trace; it is read when an error
    leaves. It also warns of a `[0]` on a module's output that is a tensor: the first prompt alone, where tutorials for
    transformers 4 meant a tuple's first value. The environment variable `NNSIGHT_FX_DEBUG=1` sets it.

    `PROGRESS` shows on a terminal what a trace is about while it captures or compiles for more than a second. The
    environment variable `NNSIGHT_FX_PROGRESS=0` turns it off.
    """

    DEBUG: bool = field(default_factory=lambda: os.environ.get("NNSIGHT_FX_DEBUG", "0") not in ("", "0"))
    PROGRESS: bool = field(default_factory=lambda: os.environ.get("NNSIGHT_FX_PROGRESS", "1") not in ("", "0"))


@dataclass
class Config:
    """The type of `nnsight_fx.CONFIG`."""

    APP: App = field(default_factory=App)


CONFIG = Config()


def own_frames_out(trace: TracebackType | None) -> TracebackType | None:
    """A traceback without this package's frames, unless `CONFIG.APP.DEBUG`."""
    if CONFIG.APP.DEBUG or trace is None:
        return trace
    rest = own_frames_out(trace.tb_next)
    if trace.tb_frame.f_code.co_filename.startswith(OURS):
        return rest
    return TracebackType(rest, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)


def _to_the_user(trace: TracebackType | None) -> TracebackType | None:
    """A traceback that ends at the user's line, where torch's own frames below it say nothing."""
    rest = _to_the_user(trace.tb_next) if trace is not None else None
    if trace is None or (rest is None and trace.tb_frame.f_code.co_filename.startswith(BELOW)):
        return None
    return TracebackType(rest, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)


def quiet(leave: Callable[..., bool]) -> Callable[..., bool]:
    """For `__exit__`: errors that pass through it or arise in it lose this package's frames.

    Those of a recorded operation, on values without numbers, lose torch's frames, too: `of_the_body` marks them.
    """

    @functools.wraps(leave)
    def wrapped(self: object, kind: object, error: BaseException | None, trace: object) -> bool:
        try:
            swallowed = leave(self, kind, error, trace)
        except BaseException as arisen:
            raise arisen.with_traceback(own_frames_out(arisen.__traceback__)) from arisen.__cause__
        if error is not None and not swallowed:
            error.__traceback__ = own_frames_out(error.__traceback__)
            if getattr(error, "of_the_body", False) and not CONFIG.APP.DEBUG:
                error.__traceback__, error.__cause__, error.__suppress_context__ = (
                    _to_the_user(error.__traceback__),
                    None,
                    True,
                )
        return swallowed

    return wrapped
