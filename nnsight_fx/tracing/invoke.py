"""Invokes: the inputs of one batch, each with interventions of its own on its own rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InvokeError
from ..lines import user_line
from . import saving
from .calls import held
from .conditions import Stopping
from .recorder import unrecorded
from .steps import Invoke

if TYPE_CHECKING:
    from .contexts import Tracer


class Invoker:
    """An open invoke."""

    def __init__(self, tracer: Tracer, args: tuple, kwargs: dict):
        self.tracer, self.args, self.kwargs = tracer, args, kwargs
        self.batch: Any = None
        self.prepared = False

    @property
    def inputs(self) -> Any:
        """The prepared input: `(args, kwargs)`."""
        return (self.batch.args, self.batch.kwargs) if self.batch is not None else None

    def __enter__(self) -> Invoker:
        tracer = self.tracer
        if tracer.host.tracer is not tracer:
            raise InvokeError(
                f"{user_line()}: this trace is not open. Use `invoke` inside `with model.trace() as tracer:`."
            )
        if tracer.args or tracer.host.inputs.has_input(tracer.kwargs):
            raise InvokeError(
                f"{user_line()}: the trace at {tracer.line} already has an input, so it takes no invokes. Give every input by "
                "invoke: `with model.trace() as tracer:`."
            )
        if tracer.invoker is not None:
            raise InvokeError(
                f"{user_line()}: cannot open an invoke with one already open. Leave the other `with` block first."
            )
        self.args, self.kwargs = held(self.args), held(self.kwargs)
        tracer.host.check_keywords(tracer.fn, self.kwargs, "invoke")
        if self.batch is None and (self.args or self.kwargs):
            with unrecorded():
                self.batch = tracer.host.inputs.prepare(self.args, {**tracer.kwargs, **self.kwargs})
        if tracer.generates:
            return self._generate()
        if not tracer.waves or (tracer.waves[-1].started and not self.prepared):
            if tracer.waves:
                self._check_second_wave()
                tracer.waves[-1].tape.settle()
                saving.collect(tracer.waves[-1].tape)
                with tracer.waves[-1].tape.syncs.running():
                    tracer.waves[-1].finish()
            if self.batch is None:
                raise InvokeError(
                    f"{user_line()}: an invoke without input works on the whole batch, and there is none yet"
                    + (" (a sync point has closed the last one)" if tracer.waves else "")
                    + ". Open an invoke with an input first."
                )
            tracer.forwards.begin(self.batch, alone=False)
        wave = tracer.waves[-1]
        wave.add(self)
        wave.tape.invoke = Invoke(wave.index_of(self))
        tracer.cursor.reset()
        if not self.prepared:
            tracer.given.append(self)
        tracer.invoker, tracer.recorder.inside = self, True
        return self

    def _generate(self) -> Invoker:
        """In `generate`: a generation of its own, in step with the body; without input, what follows those before it."""
        tracer = self.tracer
        if self.batch is not None:
            with unrecorded():
                tracer.forwards.begin_alone(self.batch)
            tracer.recorder.tape = tracer.waves[-1].tape
        elif not tracer.forwards.generations:
            raise InvokeError(
                f"{user_line()}: an invoke without input has the results of all those before it, and there is none yet. Open an "
                "invoke with an input first."
            )
        tracer.cursor.reset()
        tracer.given.append(self)
        tracer.invoker, tracer.recorder.inside = self, True
        return self

    def _check_second_wave(self) -> None:
        """A second forward that would move state twice is an error (SEMANTICS D12)."""
        why = self.tracer.host.moves_state(self.tracer.waves[-1])
        if why:
            raise InvokeError(
                f"{user_line()}: an earlier invoke looked at a value, which ran the model, so this invoke would be a second forward; "
                f"{why}, which a second forward would move twice. Give the prompts first: `a, b = tracer.batch(p1, p2)`, then "
                "`with a: ...`."
            )

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.tracer.invoker, self.tracer.recorder.inside = None, False
        if error is None or isinstance(error, Stopping):
            self.tracer.waves[-1].tape.settle()
            if self.tracer.generates:
                self.tracer.forwards.end_generation() if self.batch is not None else self.tracer.forwards.run_open()
        return type(error) is Stopping
