"""A session: several traces whose values flow from one to the next without `.save()`, as one program."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..engine.deliver import deliver
from ..errors import OutsideTraceError
from ..lines import user_line
from ..plan import tree
from ..report.runs import Report
from ..scan.watch import Setting
from ..tracing import saving
from ..tracing.contexts import Leaving, Tracer
from ..tracing.lazy import LazyTensor, held_by, hold, key_of, tape_of
from ..tracing.tape import Tape
from . import planner
from .pending import Copies, Pending, why_now

if TYPE_CHECKING:
    import torch

    from ..engine.wave import ForwardWave


class Session:
    """`with model.session() as session:`

    ```python
    with torch.no_grad(), model.session() as session:
        with model.trace(clean):
            cached = [layer.output for layer in model.transformer.h]  # no `.save()`
        for layer in range(12):
            for position in range(8):
                with model.trace(corrupted):
                    model.transformer.h[layer].output[:, position] = cached[layer][:, position]
                    scores[layer, position] = model.lm_head.output[:, -1].save()
    print(session.explain())
    ```

    A trace is recorded, and runs when the session ends or one of its values is needed (a number, a `print`, an
    operation outside of traces): then only what that depends on. Traces that wait run together where that gives each of
    them the numbers that it has alone (SEMANTICS D23). What does more than compute values (random draws, buffers,
    gradients, generation, functions of yours, tensors of yours changed in place) runs at once, after everything recorded
    before it; `explain()` says which did, and why. In the session a value can be used like the tensor that it is: in
    later traces, of any model, as their input, and between traces. After it only what was saved is there. A container
    that is saved in the session itself, `nnsight_fx.save([])`, is resolved when the session ends.

    An error of a trace that waited is raised where it runs, with a note that names the trace; what ran before it is
    there. The weights and hooks of a model, and tensors of more than 1 MiB, must not change while traces wait that use
    them: that is an `OutOfOrderError`.
    """

    def __init__(self):
        self.containers: list[object] = []
        self.tapes: list[Tape] = []
        self.line = user_line()
        self.waiting: list[Pending] = []
        self.by_tape: dict[int, Pending] = {}  # what waits, by the id of its tape
        self.settings: list[Setting] = []  # one for all traces that are alike, the latest first
        self.copies = Copies()
        self.report = Report()
        self.apart = False  # are its traces cells of a sweep, which see nothing of one another
        self.hosts: dict = {}  # the models that it ran

    def __enter__(self) -> Session:
        self.line = self.report.line = user_line()
        saving.opened(self)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        saving.closed(self)
        kept = [x for c in self.containers for x in saving.lazies(c) if tape_of(x).bridged]
        for lazy in kept:
            if type(lazy) is LazyTensor:
                lazy.save()
            else:
                tape_of(lazy).objects.asked.add(id(lazy))
        try:
            if error is None or isinstance(error, Exception | Leaving):
                self._flush(self.waiting, held=False)
        except Exception as failed:
            if not isinstance(error, Exception):
                raise
            error.add_note(f"nnsight_fx: and what the session had put off failed: {type(failed).__name__}: {failed}")
        finally:
            self._close()
            for host in self.hosts.values():
                host.told.ran = self.report
                if host.shared.verb is not None:
                    host.shared.verb.take(self.report)
        return isinstance(error, Leaving) and error.scope is self

    def _close(self) -> None:
        for tape in self.tapes:
            deliver(tape, lambda key, tape=tape: _held(tape, key), lambda: None)
            for lazy in list(tape.values.values()):
                vars(lazy).pop("_held", None)
        for tape in [*self.tapes, *(p.tape for p in self.waiting)]:
            tape.bridged, tape.pending = False, None
            tape.given.over()
        self.waiting, self.copies = [], Copies()

    def stop(self) -> None:
        """End the session here. A trace that is open runs with what was recorded so far."""
        if saving.session() is None:
            raise OutsideTraceError(f"{user_line()}: this session has ended; `session.stop()` belongs in its block.")
        raise Leaving(self)

    def explain(self) -> Report:
        """What ran together and how, and why anything ran alone or at once: text, and `.to_dict()`."""
        return self.report

    # -- what its traces ask of it ---------------------------------------------------------------------------------

    def run(self, tracer: Tracer) -> None:
        """A trace is recorded: put it off, or run it now, after everything that waits."""
        tracer.session = self
        tracer.host.told.ran = self.report
        self.hosts[id(tracer.host)] = tracer.host
        why = why_now(tracer)
        if why is None:
            return self._put_off(tracer)
        if not tracer.scan_only:
            self.catch_up()
        for wave in tracer.waves:
            wave.tape.told.append(self._hold)
        try:
            tracer.forwards.run()
        except Exception as error:
            planner.note(error, tracer.line, self.line)
            raise
        self.report.at_once(tracer.line, why, tracer.notes)

    def catch_up(self) -> None:
        """Run everything that waits."""
        self._flush(self.waiting)

    def _put_off(self, tracer: Tracer) -> None:
        tracer.forwards.put_off()
        wave = tracer.waves[-1]
        tape = wave.tape
        pending = Pending(tracer, self.line, self._setting(tracer.host))
        used = dict.fromkeys(id(tape_of(x)) for x in tape.constants if type(x) is LazyTensor)
        pending.needs = [self.by_tape[i] for i in used if i in self.by_tape]
        tape.constants[:] = [self._copied(x, pending, tape.operands.handed.holds(x)) for x in tape.constants]
        for i, batch in enumerate(wave.batches):
            copied = _batch(batch, lambda x: self._copied(x, pending))
            wave.batches[i] = copied
            if wave.alone:
                wave.batch = _batch(wave.batch, lambda x: self._copied(x, pending))
        tape.told.append(self._hold)
        tape.bridged, tape.pending = True, lambda: self._flush([pending])
        self.waiting.append(pending)
        self.by_tape[id(tape)] = pending

    def _setting(self, host: Any) -> Setting:
        now = host.scanner.watch.setting()
        for known in self.settings:
            if known == now:
                return known
        self.settings.insert(0, now)
        return now

    def _copied(self, x: object, pending: Pending, own: bool = False) -> object:
        import torch

        if not isinstance(x, torch.Tensor) or type(x) is LazyTensor or x.requires_grad:
            return x
        return self.copies.take(x, pending.watched, own)

    def _flush(self, wanted: Iterable[Pending], held: bool = True) -> None:
        """Run some of what waits, and what it needs. `held`: keep every value that somebody holds, not only what was saved."""
        todo: set[Pending] = set()
        left = list(wanted)
        while left:
            pending = left.pop()
            if pending not in todo and pending in self.waiting:
                todo.add(pending)
                left += pending.needs
        ordered = [p for p in self.waiting if p in todo]
        self.waiting = [p for p in self.waiting if p not in todo]
        if not ordered:
            return
        used = {id(x) for p in [*ordered, *self.waiting] for x in p.tape.constants if type(x) is LazyTensor}
        for p in ordered:
            del self.by_tape[id(p.tape)]
            p.keep(None if held else used)
            p.tape.pending = None
        if not self.waiting:
            self.copies = Copies()
        try:
            planner.run(ordered, self.report)
        except BaseException as error:
            for p in ordered:
                if not p.done:
                    p.tape.pending = _raiser(error)
                    self.tapes.append(p.tape)
            raise

    def _hold(self, wave: ForwardWave) -> None:
        """Leave the real tensor with each value that somebody still holds."""
        tape = wave.tape
        tape.bridged = True
        self.tapes.append(tape)
        for lazy in list(tape.values.values()):
            if type(lazy) is LazyTensor and id(lazy) not in tape.saved:
                with contextlib.suppress(KeyError):
                    if tape.conditions.hold(lazy, wave.value):
                        hold(lazy, wave.value(key_of(lazy)))


def _held(tape: Tape, key: Any) -> torch.Tensor | None:
    lazy = tape.values.get(key)
    if lazy is None or held_by(lazy) is None:
        raise KeyError(key)
    return held_by(lazy)


def _raiser(error: BaseException) -> Callable:
    def again() -> None:
        raise error

    return again


def _batch(batch: Any, copied: Any) -> Any:
    """A prepared input with its tensors copied."""
    args, kwargs = tree.tree_map(copied, (batch.args, batch.kwargs))
    return type(batch)(args, kwargs, batch.rows, batch.text, batch.length)
