"""The contexts a user opens: a trace, and the invokes inside it."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from ..config import quiet
from ..errors import InvokeError, MissedSiteError, NestedTraceError, OutsideTraceError, own_error
from ..lines import Line, user_line
from ..plan import ambient, tree
from ..plan.graph import Graph
from . import saving
from .calls import held
from .conditions import Condition, Stopping
from .iteration import Cursor, Iterations, Never
from .recorder import Recorder, unrecorded
from .steps import Invoke
from .tape import Tape


class Wave(Protocol):
    """One forward in the making, as a trace sees it."""

    tape: Tape
    notes: Any

    def calls(self, path: str, kind: str) -> int: ...

    def came(self, path: str, kind: str) -> int: ...

    def open_ended(self, path: str | None) -> bool: ...

    def finish(self) -> None: ...

    def abandon(self) -> None: ...

    def deliver(self) -> None: ...

    def graph(self) -> Graph: ...


class Host(Protocol):
    """What a trace needs of its model."""

    tracer: Tracer | None

    def _prepare(self, args: tuple, kwargs: dict) -> Any: ...

    def _wave(self, tracer: Tracer, first: Any, alone: bool) -> Any: ...

    def _suspend(self) -> Callable[[], None]: ...

    def _check_keywords(self, fn: str | None, names: Iterable[str], verb: str) -> None: ...


class Tracer:
    """An open trace: `with model.trace(...) as tracer`."""

    def __init__(
        self,
        host: Any,
        args: tuple,
        kwargs: dict,
        *,
        compile: Any,
        fn: str | None,
        pad_to: int | None,
        scan_only: bool = False,
    ):
        self.host, self.args, self.kwargs = host, args, kwargs
        self.compile, self.fn, self.pad_to, self.scan_only = compile, fn, pad_to, scan_only
        self.waves: list[Any] = []
        self.invoker: Invoker | None = None
        self.given: list[Invoker] = []
        self.recorder = Recorder()
        self.barriers: list[tuple[int, list[int], Line]] = []
        self.cursor = Cursor(self)
        self.conditions: list[Condition] = []
        self.early = saving.Early()  # what is saved before there is an input
        self.generation: Any = None  # a function that runs the model many times, forward by forward
        self.generations: list[Any] = []  # those that have run, each of an invoke
        self.session: Any = None  # which tells of it, where it is one of several traces
        self.start = 0  # the first wave of the open generation
        self.modes: Any = contextlib.nullcontext()  # those that a generation runs under
        self.missed: MissedSiteError | None = None
        self.withheld: Any = None  # the text about attention weights that a module read here does not give
        self.counted: dict[tuple[str, str], tuple[int, int]] = {}

    # -- the context ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Tracer:
        if self.host.tracer is not None:
            raise NestedTraceError(
                f"{user_line()}: this model already has an open trace, from {self.host.tracer.line}. "
                "Leave it first, or open an invoke in it (`with tracer.invoke(...)`)."
            )
        self.host.tracer, self.line = self, user_line()
        saving.opened(self.early)
        try:
            self.args, self.kwargs = held(self.args), held(self.kwargs)
            self.state = self.host.state()
            if self.args or self.host.inputs.has_input(self.kwargs):
                with unrecorded():
                    self._begin_alone(self.host.inputs.prepare(self.args, self.kwargs))
            self.resume_body = self.host.suspend()
            self.recorder.__enter__()
        except BaseException:
            self._abort()
            self.modes.__exit__(None, None, None)
            saving.closed(self.early)
            self.host.tracer = None
            raise
        return self

    @quiet
    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self.recorder.__exit__(None, None, None)
        self.modes.__exit__(None, None, None)
        self.resume_body()
        with unrecorded():
            return self._leave(error)

    def _leave(self, error: BaseException | None) -> bool:
        try:
            if isinstance(error, Never):  # found out before the run, told after it
                with contextlib.suppress(MissedSiteError):
                    self.run()
                return False
            if error is not None and not isinstance(error, Stopping):
                self._abort()
                if isinstance(error, MissedSiteError):
                    self._deliver()
                refusal = self.waves[-1].tape.refusal if self.waves else None
                if refusal is not None and "TorchScript" in str(error):
                    raise refusal from error
                if self.withheld is not None and "'NoneType'" in str(error):  # unpacked: `attention, weights = ...`
                    error.add_note(f"nnsight_fx: {self.withheld()}")
                if isinstance(error, AttributeError) and error.name == "save" and tree.children(error.obj) is not None:
                    error.add_note(
                        "nnsight_fx: `.save()` is a method of tensors; a container is saved with `nnsight_fx.save(value)`."
                    )
                return False
            if not self.waves and not self.given:
                raise InvokeError(
                    f"{self.line}: `trace()` has neither an input nor an invoke. Give it one: `model.trace(prompt)`, or "
                    "`with model.trace() as tracer:` and in it `with tracer.invoke(prompt):`."
                )
            try:
                session = saving.session()
                if session is None:
                    self.run()
                else:
                    session.run(self)
            except BaseException:
                self._abort()
                raise
        finally:
            for wave in self.waves:
                wave.tape.open = False
                wave.tape.given.over()
                saving.closed(wave.tape)
            saving.closed(self.early)
            self.host.tracer = None
        return type(error) is Stopping

    @property
    def generates(self) -> bool:
        """Does it run the model many times?"""
        return self.fn == "generate" and not self.scan_only

    def _begin_alone(self, first: Any) -> None:
        """Begin with the one input of a forward, or of a generation."""
        if self.fn == "generate":
            saving.catch_up()
        self.generation = self.host.generation(self, first)
        if self.generation is not None:
            self.modes = contextlib.ExitStack()
            self.modes.enter_context(ambient.under(self.generation.modes))
        self.start, self.counted = len(self.waves), {}
        self._begin(first, alone=True)

    def _end_generation(self) -> None:
        """The body is done: the generation runs to its end."""
        self._to_the_end()
        self._run_open()
        self.missed = self.missed or self.generation.missed()
        self.generations.append(self.generation)
        self.modes.__exit__(None, None, None)
        self.modes = contextlib.nullcontext()

    def _to_the_end(self) -> None:
        self.generation.to_the_end()
        while self.can_advance:
            self.advance()

    def _begin(self, first: Any, alone: bool) -> None:
        wave = self.host.wave(self, first, alone)
        if not self.waves:
            wave.tape.containers = self.early.containers
        self.waves.append(wave)
        self.recorder.tape, self.recorder.inside = wave.tape, alone
        wave.tape.conditions.blocks = self.conditions
        saving.opened(wave.tape)

    def run(self) -> None:
        """The body is done: run what is left of it, and deliver what was saved."""
        self._check_barriers()
        if self.generation is None:
            self._run_open()
        elif self.generation not in self.generations:
            self._end_generation()
        self.deliver()

    def put_off(self) -> None:
        """The body is done, and nothing runs yet: a session does that later, by `run_recorded`."""
        self._check_barriers()
        tape = self.waves[-1].tape
        tape.settle()
        saving.collect(tape, held=False)
        tape.forget_reads()

    def run_recorded(self) -> None:
        """Run what was put off, and deliver what was saved."""
        self._finish(self.waves[-1])
        self.deliver()

    def _check_barriers(self) -> None:
        for n, (reached,), line in self.barriers:
            if reached % n:
                raise InvokeError(
                    f"{line}: a barrier was never reached by every block: `barrier({n})` was called {reached} times. Call it "
                    "in each of the invokes, or give it their number."
                )

    def _run_open(self) -> None:
        """Run what is recorded of the open wave. A site that it never reaches is told when everything else is delivered."""
        wave = self.waves[-1]
        wave.tape.settle()
        for each in self.waves:
            saving.collect(each.tape)
        if self.can_advance:
            wave.tape.close_step()
        self._finish(wave)

    def _finish(self, wave: Any) -> None:
        wave.tape.busy = True  # as in `running`
        try:
            wave.finish()
        except MissedSiteError as e:
            self.missed = self.missed or e
        finally:
            wave.tape.busy = False

    def deliver(self) -> None:
        """What was saved is there; then a site that was never reached is told."""
        self._deliver()
        if self.missed is not None:
            raise self.missed

    def _deliver(self) -> None:
        for wave in self.waves:
            wave.deliver()
        self.host.note(self)

    def _abort(self) -> None:
        for wave in self.waves:
            wave.abandon()
        if self.generation is not None:
            self.generation.abandon()
        self.host.scanner.forget_failed()

    # -- the forwards of a generation ------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The forward that is open."""
        return len(self.waves) - 1 - self.start if self.generation is not None else 0

    @property
    def can_advance(self) -> bool:
        """Does anything come after the open forward?"""
        return self.generation is not None and self.waves[-1].forward

    def advance(self) -> None:
        """Run the open forward. The next one is open then, or, after the last, what follows the generation."""
        with unrecorded():
            self._run_open()
            self._begin(None, alone=True)
            tape = self.recorder.tape
        self.recorder.tape = tape
        for wave in self.waves[:-2]:
            wave.forget()

    def calls(self, path: str, kind: str, step: int) -> int:
        """How often a forward passes a site."""
        return self.waves[self.start + step if self.generation is not None else -1].calls(path, kind)

    def before(self, path: str, kind: str, step: int) -> int:
        """How often the forwards before one have passed a site."""
        at, total = self.counted.get((path, kind), (0, 0))
        if at > step:
            at, total = 0, 0
        total += sum(self.waves[self.start + i].came(path, kind) for i in range(at, step))
        self.counted[(path, kind)] = (step, total)
        return total

    def open_ended(self, path: str, kind: str, step: int) -> bool:
        """Is it only known from the run how often a forward passes a site? In a generation one call is taken for the only one."""
        if self.generation is None:
            return self.waves[-1].open_ended(path)
        wave = self.waves[self.start + step]
        return wave.open_ended(path) and wave.calls(path, kind) != 1

    def decides(self) -> bool:
        """Do values decide how often any module is called, in the one forward of a trace?"""
        return self.generation is None and self.waves[-1].open_ended(None)

    def most_calls(self, step: int) -> int:
        """How often a forward passes the site that it passes most."""
        return self.waves[self.start + step if self.generation is not None else -1].most_calls()

    def containers(self) -> list:
        """What `nnsight_fx.save(container)` got."""
        return [c for wave in self.waves for c in wave.tape.containers]

    # -- invokes -------------------------------------------------------------------------------------------------

    def invoke(self, *args: Any, **kwargs: Any) -> Invoker:
        """An input of the batch, with interventions of its own on its own rows; without input: the whole batch.

        In `model.generate` each invoke is a generation of its own, in step with its body; without input there is
        `tracer.result`, the tokens of all, padded.
        """
        return Invoker(self, args, kwargs)

    def batch(self, *prompts: Any) -> list[Invoker]:
        """The invokes of one batch, all inputs given first, so that shapes are plain numbers and bodies can sync in one forward.

        ```python
        with model.trace() as tracer:
            a, b = tracer.batch("one prompt", "another, longer one")
            with a:
                h = model.transformer.h[3].output   # h.shape[1] is an int
            with b:
                ...
        ```
        """
        if self.waves or self.args:
            raise InvokeError(f"{user_line()}: `tracer.batch` comes first in a trace without input, before any invoke.")
        invokers = [Invoker(self, (p,), {}) for p in prompts]
        with unrecorded():
            for invoker in invokers:
                invoker.batch, invoker.prepared = self.host.inputs.prepare(invoker.args, dict(self.kwargs)), True
            if self.generates:
                return invokers
            self._begin([i.batch for i in invokers], alone=False)
        self.recorder.tape = self.waves[-1].tape
        for invoker in invokers:
            self.waves[-1].add(invoker)
            self.given.append(invoker)
        return invokers

    @property
    def tape(self) -> Tape:
        """The open recording."""
        if self.host.tracer is not self:
            self.check_open()
        if not self.waves or (self.given and self.invoker is None):
            raise OutsideTraceError(
                f"{user_line()}: no input is open here: this trace takes its inputs by invoke. Move the line into a "
                "`with tracer.invoke(...):` block."
            )
        return self.waves[-1].tape

    def check_open(self) -> None:
        """Verbs are for the body."""
        if self.host.tracer is not self:
            raise OutsideTraceError(
                f"{user_line()}: this trace is not open. Move the line into its `with model.trace(...) as tracer:` block."
            )

    # -- verbs ---------------------------------------------------------------------------------------------------

    @own_error
    def result(self) -> Any:
        """What the traced function returns, after every intervention. A generation runs to its end for it."""
        if self.generation is None:
            return self.tape.read(("", "result", 0))
        if self.invoker is not None and self.invoker.batch is None:
            return self.known(self.host.inputs.results(self.generations))
        self._to_the_end()
        return self.known(self.generation.result)

    def known(self, value: Any) -> Any:
        """A real value as a recorded one, to be saved like any other."""
        tape = self.tape
        return tree.tree_map(
            lambda x: tape.call(torch.Tensor.view_as, (x, x), {}) if isinstance(x, torch.Tensor) else x, value
        )

    @property
    def iter(self) -> Iterations:
        """Chosen occurrences: `for step in tracer.iter[:]`, `tracer.iter[2]`, `tracer.iter[1:3]`, `tracer.iter[[0, 4]]`."""
        return Iterations(self)

    def all(self) -> Iterations:
        """Every occurrence: `tracer.iter[:]`."""
        return Iterations(self)

    def next(self, step: int = 1) -> Tracer:
        """From here on, the next occurrence of every site."""
        self.cursor.next(step)
        return self

    def stop(self) -> None:
        """End the model's forward here: nothing after the latest site runs, no buffer moves, no cache fills."""
        self.tape.stop()
        raise Stopping

    def cond(self, value: Any) -> Condition:
        """A block that takes effect only where `value` is true (a recorded value of one element, or a Python one).

        ```python
        with model.trace(prompt) as tracer:
            h = model.transformer.h[5].output
            with tracer.cond(h.norm() > 40):
                model.transformer.h[5].output = h * 0.5
                scaled = model.transformer.h[6].output.save()
        ```

        The run decides: one compiled program has both outcomes, and nothing syncs. The lines of the block are recorded in any
        case; where the condition does not hold, they change nothing, what is saved in the block stays undefined, and so does
        whatever uses a value made in it. Blocks nest. For an `else` open a second block, `tracer.cond(~c)`.

        Raises:
            RuntimeError: `value` is a tensor with more than one element.
            NotRecordableError: a write in the block has another shape or dtype than its site, or a backward depends on it.
        """
        return Condition(self, value)

    def barrier(self, n: int) -> Callable[[], None]:
        """A point that `n` invokes share. Values flow between invokes anyway; it only asserts the order."""
        if n < 1:
            raise ValueError(f"{user_line()}: a barrier is for one invoke or more, and got {n}")
        reached = [0]

        def barrier() -> None:
            reached[0] += 1
            self.tape.barrier()

        self.barriers.append((n, reached, user_line()))
        return barrier

    def cache(
        self,
        modules: list | None = None,
        device: Any = "cpu",
        dtype: Any = None,
        detach: bool = True,
        include_output: bool = True,
        include_inputs: bool = False,
    ) -> Any:
        """Keep what many modules return (`include_output`) or get (`include_inputs`), after every intervention.

        ```python
        with model.trace(prompt) as tracer:
            cache = tracer.cache()
        cache["model.transformer.h.0"].output  # or cache.model.transformer.h[0].output
        ```

        `modules` are envoys or paths, all by default. Each tensor is detached, moved to `device` (`None`: left where it
        is) and cast to `dtype`. It holds the rows of the invoke in which it is declared. Objects (a KV cache) are not kept.

        Raises:
            InvokeError: a value was read or changed before (a `ValueError`).
            UnknownModuleError: `modules` names one that there is not.
        """
        return self.host.cache(self, modules, device, dtype, detach, include_output, include_inputs)

    def apply(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        """`fn(*args, **kwargs)` on the real values, when the model gets there; a sync point."""
        return self.tape.syncs.apply(fn, args, kwargs)

    def log(self, *values: Any) -> None:
        """`print` values, in lists and dicts too, when the model gets there; no sync point, the body goes on at once."""
        self.tape.later(print, values)

    def explain(self) -> Any:
        """What this trace did, once it has run: its engine, compiles, sync points with their lines, what it saved, and why
        anything ran outside captured code. `model.explain()` has the model's captures, too."""
        if not self.notes:
            raise OutsideTraceError(
                f"{user_line()}: this trace has not run, so there is nothing to explain yet. Ask behind its block; what is "
                "recorded so far is `print(tracer.graph)`."
            )
        return functools.reduce(operator.add, self.notes)

    def bug_report(self, path: str | os.PathLike, inputs: bool = False) -> None:
        """Write what happened to a zip archive: plan, segments, guards, versions and `explain()`. No weights and no prompts;
        with `inputs=True` the tensors that the model was given."""
        self.host.bug_report(self, path, inputs)

    @property
    def notes(self) -> list:
        """Of each forward that has run."""
        behind = [generation.freed for generation in self.generations if generation.freed is not None]
        return [*(wave.notes for wave in self.waves if wave.notes is not None), *behind]

    def constant(self, value: Any) -> torch.Tensor:
        """`value` (a number, a nested list, an array) as a tensor on the model's device.

        A number that operations take as an argument is part of a plan's structure, and another one compiles again
        (`h.pow(2.5)`); a tensor never is: `h.pow(tracer.constant(2.5))` compiles once for all exponents.
        """
        return torch.as_tensor(value, device=self.host.device)

    @own_error
    def graph(self) -> Graph:
        """What is recorded so far, as data: it prints as code, draws, compares and saves. Of several forwards, the last."""
        if not self.waves:
            raise OutsideTraceError(
                f"{user_line()}: nothing is recorded yet: this trace has no input. Open an invoke first."
            )
        return self.waves[-1].graph()

    plan = graph  # the same by its other name

    def __getattr__(self, name: str) -> Any:
        own_error.reraise(self)
        if name.startswith("_") or "host" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.host.model, name)


class Leaving(Stopping):
    """Leaves a session at `session.stop()`: the blocks in it, and the session's own."""

    def __init__(self, scope: Any):
        self.scope = scope


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
            tracer._begin(self.batch, alone=False)
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
                tracer._begin_alone(self.batch)
            tracer.recorder.tape = tracer.waves[-1].tape
        elif not tracer.generations:
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

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self.tracer.invoker, self.tracer.recorder.inside = None, False
        if error is None or isinstance(error, Stopping):
            self.tracer.waves[-1].tape.settle()
            if self.tracer.generates:
                self.tracer._end_generation() if self.batch is not None else self.tracer._run_open()
        return type(error) is Stopping
