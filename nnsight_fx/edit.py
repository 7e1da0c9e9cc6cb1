"""`model.edit()`: interventions that stay."""

from __future__ import annotations

from typing import Any, NoReturn

from .errors import InvokeError, NestedTraceError, NotRecordableError, own_error
from .tracing.contexts import Stopping
from .tracing.draft import Draft
from .tracing.lazy import user_line
from .tracing.recorder import Recorder


class Editor:
    """An open edit: `with model.edit() as (tracer, edited)`, or `as edited`; with `inplace=True`, `as tracer`."""

    def __init__(self, host: Any, inplace: bool):
        self.host, self.inplace = host if inplace else host._copy(), inplace
        self.tape = Draft()
        self.recorder = Recorder(self.tape)
        self.cursor = Every()
        self.waves = [self]  # as a trace has them: of each, the tape
        self.line = user_line()

    def __enter__(self) -> Any:
        self.line = user_line()
        if self.host.tracer is not None:
            raise NestedTraceError(
                f"{self.line}: this model has an open trace, from {self.host.tracer.line}. An edit is made before the trace in "
                "which it is to hold."
            )
        self.host.tracer = self
        self.resume_body = self.host._suspend()
        self.recorder.__enter__()
        if self.inplace:
            return self
        self.host._unpacks = (self.line, self)
        return self.host

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self.recorder.__exit__(None, None, None)
        self.resume_body()
        self.tape.open = False
        self.host.tracer = None
        self.host._unpacks = None
        if error is None or type(error) is Stopping:
            self.host._edits = [*self.host._edits, self.tape]
        return type(error) is Stopping

    @own_error
    def result(self) -> Any:
        """What the model returns."""
        return self.tape.read(("", "result", 0))

    def stop(self) -> NoReturn:
        """End every forward here."""
        self.tape.stop()
        raise Stopping

    def _not_here(self, *_: Any, **__: Any) -> NoReturn:
        raise InvokeError(
            f"{user_line()}: an edit has no inputs and runs nothing, so it has no invokes, caches, `apply` or `cond`. Use them in a "
            "trace of the edited model."
        )

    invoke = batch = cache = apply = log = barrier = cond = _not_here

    def __getattr__(self, name: str) -> Any:
        own_error.reraise(self)
        if name.startswith("_") or "host" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.host, name)


class Every:
    """Where an edit stands among the occurrences: at the first of every forward."""

    def call(self, path: str, kind: str) -> int:
        return 0

    def next(self, step: int, path: str | None = None) -> NoReturn:
        raise NotRecordableError(f"{user_line()}: an edit counts no occurrences. Use `.next()` in a trace.")
