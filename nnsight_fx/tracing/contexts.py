"""The contexts a user opens: a trace, and the invokes inside it."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
from collections.abc import Callable
from typing import Any

import torch

from ..config import quiet
from ..errors import InvokeError, MissedSiteError, NestedTraceError, OutsideTraceError, nearest, own_error
from ..lines import Line, user_line
from ..plan import tree
from ..plan.graph import Graph
from ..signatures import exact
from . import saving
from .calls import held
from .conditions import Condition, Stopping
from .forwards import Forwards
from .invoke import Invoker
from .iteration import Cursor, Iterations, Never
from .lazy import LazyTensor
from .recorder import Recorder, unrecorded
from .tape import Tape


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
        self.forwards = Forwards(self)
        self.waves = self.forwards.waves
        self.invoker: Invoker | None = None
        self.given: list[Invoker] = []
        self.recorder = Recorder()
        self.barriers: list[tuple[int, list[int], Line]] = []
        self.cursor = Cursor(self)
        self.conditions: list[Condition] = []
        self.early = saving.Early()  # what is saved before there is an input
        self.session: Any = None  # which tells of it, where it is one of several traces
        self.withheld: Any = None  # the text about attention weights that a module read here does not give

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
                    self.forwards.begin_alone(self.host.inputs.prepare(self.args, self.kwargs))
            self.resume_body = self.host.suspend()
            self.recorder.__enter__()
        except BaseException:
            self.forwards.abort()
            self.forwards.modes.__exit__(None, None, None)
            saving.closed(self.early)
            self.host.tracer = None
            raise
        return self

    @quiet
    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.recorder.__exit__(None, None, None)
        self.forwards.modes.__exit__(None, None, None)
        self.resume_body()
        with unrecorded():
            return leave(self, error)

    @property
    def generates(self) -> bool:
        """Does it run the model many times?"""
        return self.fn == "generate" and not self.scan_only

    def check_barriers(self) -> None:
        for n, (reached,), line in self.barriers:
            if reached % n:
                raise InvokeError(
                    f"{line}: a barrier was never reached by every block: `barrier({n})` was called {reached} times. Call it "
                    "in each of the invokes, or give it their number."
                )

    @property
    def notes(self) -> list:
        """Of each forward that has run."""
        return self.forwards.notes

    @property
    def generation(self) -> Any:
        """The generation that is open: a function that runs the model many times, forward by forward."""
        return self.forwards.generation

    # -- invokes -------------------------------------------------------------------------------------------------

    def invoke(self, *args: object, **kwargs: object) -> Invoker:
        """An input of the batch, with interventions of its own on its own rows; without input: the whole batch.

        In `model.generate` each invoke is a generation of its own, in step with its body; without input there is
        `tracer.result`, the tokens of all, padded.
        """
        return Invoker(self, args, kwargs)

    def batch(self, *prompts: object) -> list[Invoker]:
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
            self.forwards.begin([i.batch for i in invokers], alone=False)
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
        if self.forwards.generation is None:
            return self.tape.read(("", "result", 0))
        if self.invoker is not None and self.invoker.batch is None:
            return self.known(self.host.inputs.results(self.forwards.generations))
        self.forwards.to_the_end()
        return self.known(self.forwards.generation.result)

    def known(self, value: object) -> Any:
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

    def cond(self, value: object) -> Condition:
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

    @exact
    def cache(
        self,
        modules: list | None = None,
        device: object = "cpu",
        dtype: object = None,
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

    def apply(self, fn: Callable, *args: object, **kwargs: object) -> Any:
        """`fn(*args, **kwargs)` on the real values, when the model gets there; a sync point."""
        return self.tape.syncs.apply(fn, args, kwargs)

    def log(self, *values: object) -> None:
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

    def constant(self, value: object) -> torch.Tensor:
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


def leave(tracer: Tracer, error: BaseException | None) -> bool:
    """The body is over: run what is left of it, or give up. Is the error that left the body the trace's own?"""
    try:
        if isinstance(error, Never):  # found out before the run, told after it
            with contextlib.suppress(MissedSiteError):
                tracer.forwards.run()
            return False
        if error is not None and not isinstance(error, Stopping):
            tracer.forwards.abort()
            if isinstance(error, MissedSiteError):
                tracer.forwards.hand_over()
            tell_more(tracer, error)
            return False
        if not tracer.waves and not tracer.given:
            raise InvokeError(
                f"{tracer.line}: `trace()` has neither an input nor an invoke. Give it one: `model.trace(prompt)`, or "
                "`with model.trace() as tracer:` and in it `with tracer.invoke(prompt):`."
            )
        try:
            session = saving.session()
            if session is None:
                tracer.forwards.run()
            else:
                session.run(tracer)
        except BaseException:
            tracer.forwards.abort()
            raise
    finally:
        for wave in tracer.waves:
            wave.tape.open = False
            wave.tape.given.over()
            saving.closed(wave.tape)
        saving.closed(tracer.early)
        tracer.host.tracer = None
    return type(error) is Stopping


_TENSOR = [*(n for n in dir(torch.Tensor) if n[0] != "_"), "save", "update"]  # what a recorded value has


def tell_more(tracer: Tracer, error: BaseException) -> None:
    """What is known of an error of the body beside its text."""
    refusal = tracer.waves[-1].tape.refusal if tracer.waves else None
    if refusal is not None and "TorchScript" in str(error):
        raise refusal from error
    if tracer.withheld is not None and "'NoneType'" in str(error):  # unpacked: `attention, weights = ...`
        error.add_note(f"nnsight_fx: {tracer.withheld()}")
    if isinstance(error, AttributeError) and error.name == "save" and tree.children(error.obj) is not None:
        error.add_note(
            "nnsight_fx: `.save()` is a method of tensors; a container is saved with `nnsight_fx.save(value)`."
        )
    elif isinstance(error, AttributeError) and isinstance(error.obj, tuple) and hasattr(torch.Tensor, str(error.name)):
        at = next((i for i, item in enumerate(error.obj) if isinstance(item, torch.Tensor)), None)
        if at is not None:
            use = "" if str(error.name).startswith("__") else f": `value[{at}].{error.name}`"
            error.add_note(f"nnsight_fx: it is a tuple of {len(error.obj)}; its item `[{at}]` is a tensor{use}.")
    elif isinstance(error, AttributeError) and isinstance(error.obj, LazyTensor):
        error.add_note(f"nnsight_fx: it is a tensor of this trace; {nearest(str(error.name), _TENSOR)}")


class Leaving(Stopping):
    """Leaves a session at `session.stop()`: the blocks in it, and the session's own."""

    def __init__(self, scope: Any):
        self.scope = scope
