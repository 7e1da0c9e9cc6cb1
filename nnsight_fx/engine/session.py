"""A session: several traces whose values flow from one to the next without `.save()`."""

from __future__ import annotations

import contextlib
from typing import Any

from ..errors import OutsideTraceError
from ..tracing import saving
from ..tracing.contexts import Leaving, Tracer
from ..tracing.lazy import LazyTensor, user_line
from ..tracing.tape import Tape
from .deliver import deliver


class Session:
    """`with model.session() as session:`

    ```python
    with model.session():
        with model.trace(clean):
            h = model.transformer.h[3].output  # no `.save()`
        with model.trace(corrupted):
            model.transformer.h[3].output = h
            logits = model.lm_head.output.save()
    ```

    In the session a value of a trace that has run can be used like the tensor that it is: in later traces, of any
    model, as their input, and between traces. After it only what was saved is there. A container that is saved in the
    session itself, `nnsight_fx.save([])`, is resolved when the session ends.
    """

    def __init__(self):
        self.containers: list[Any] = []
        self.tapes: list[Tape] = []
        self.line = user_line()

    def __enter__(self) -> Session:
        self.line = user_line()
        saving.opened(self)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        saving.closed(self)
        for container in self.containers:
            for lazy in saving.lazies(container):
                if isinstance(lazy, LazyTensor) and lazy._tape.bridged:
                    lazy.save()
        for tape in self.tapes:
            deliver(tape, lambda key, tape=tape: _held(tape, key), lambda: None)
            tape.bridged = False
            for lazy in list(tape.values.values()):
                vars(lazy).pop("_held", None)
        return isinstance(error, Leaving) and error.scope is self

    def stop(self) -> None:
        """End the session here. A trace that is open runs with what was recorded so far."""
        if saving.session() is None:
            raise OutsideTraceError(f"{user_line()}: this session has ended; `session.stop()` belongs in its block.")
        raise Leaving(self)

    def run(self, tracer: Tracer) -> None:
        """Run a trace whose body is done; its values stay until the session ends.

        This is where traces could be put off, merged and shared: all that a session knows of them goes through here.
        """
        for wave in tracer.waves:
            wave.tape.told.append(self._hold)
        try:
            tracer.run()
        except Exception as error:
            error.add_note(f"nnsight_fx: in the trace at {tracer.line}, in the session at {self.line}")
            raise

    def _hold(self, wave: Any) -> None:
        """Leave the real tensor with each value that somebody still holds."""
        tape = wave.tape
        tape.bridged = True
        self.tapes.append(tape)
        for lazy in list(tape.values.values()):
            if type(lazy) is LazyTensor and id(lazy) not in tape.saved:
                with contextlib.suppress(KeyError):
                    if tape.conditions.hold(lazy, wave.value):
                        lazy._held = wave.value(lazy._key)


def _held(tape: Tape, key: Any) -> Any:
    lazy = tape.values[key]
    if lazy._held is None:
        raise KeyError(key)
    return lazy._held
