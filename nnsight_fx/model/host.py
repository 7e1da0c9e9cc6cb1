"""The wrapped model as traces, sessions and engines see it: what they may ask of it, and nothing else."""

from __future__ import annotations

import copy
import functools
import operator
import os
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from .. import compat
from ..capture.markers import Markers
from ..engine.captured.capture import Capture
from ..engine.captured.entries import EntryPoint
from ..engine.captured.options import Options
from ..engine.captured.run import SplicedRun
from ..engine.choose import choose
from ..engine.how import How
from ..engine.request import Compile, Request
from ..engine.run import Run
from ..engine.switch import ThreadState
from ..engine.wave import ForwardWave
from ..engine.worth import waits
from ..envoys import attention
from ..envoys.envoy import tree_of
from ..errors import nearest
from ..generation.generation import Generation
from ..lines import user_line
from ..passes import OPTIONAL, PIPELINE, pipeline
from ..plan import tree
from ..plan.plan import InterventionGraph
from ..plan.tree import PLAIN
from ..report import bug_report
from ..scan.scan import callee
from ..scan.scanner import Scanner
from ..signatures import named
from ..tracing.contexts import Tracer
from ..tracing.steps import Invoke
from ..tracing.tape import Tape
from . import keywords
from .cache import CacheView, cache, observed
from .inputs import Batch, ModuleInputs

if TYPE_CHECKING:
    from .edit import Editor
    from .model import NNsight


BACKENDS = ("inductor", "eager", "aot_eager")  # those that are there before torch has looked for any


class Shared:
    """What a wrapped model and its edited copies have in common."""

    def __init__(self, model: NNsight, module: nn.Module):
        self.module = module
        self.tracer: Any = None
        self.captures: dict[Options, Capture] = {}
        self.verb: Any = None  # what gathers the notes of several traces that are one verb's
        self.family = weakref.WeakSet([model])

    def renew(self, module: nn.Module) -> None:
        """Learn the module tree."""
        self.markers, self.scanner = Markers(module), Scanner(module)
        for capture in self.captures.values():
            capture.markers = self.markers
            capture.reset()


class Latest:
    """What ran last: `Notes`, a session's or sweep's `Report`, or what gives notes when it is asked."""

    def __init__(self) -> None:
        self.ran: Any = None


class ModelHost:
    """One wrapped model. Its edited copies have hosts of their own, which share what is known of the module."""

    def __init__(self, model: NNsight, module: nn.Module):
        self.model = model
        self.shared = Shared(model, module)
        self.inputs: ModuleInputs = model._inputs(self)
        self.compiled: Capture | None = None
        self.auto = False  # is it compiled once that pays
        self.edits: list = []  # each can `replay(tape)`
        self.told = Latest()
        self.caller: Callable | None = None  # who runs the calls of the model outside of traces
        self.unpacks: Editor | None = None  # the edit that has just been opened

    def copy(self, model: NNsight) -> ModelHost:
        """The host of an edited copy of the model."""
        made = copy.copy(self)
        made.model, made.edits, made.told = model, list(self.edits), Latest()
        made.told.ran = self.told.ran
        made.inputs = model._inputs(made)
        self.shared.family.add(model)
        return made

    def of_part(self) -> ModelHost:
        """The host of a trace of one module: its inputs are no prompts, and edits are at sites that it may not have."""
        made = copy.copy(self)
        made.inputs, made.edits = ModuleInputs(made), []
        return made

    @property
    def tracer(self) -> Any:
        """The trace or edit that is open."""
        return self.shared.tracer

    @tracer.setter
    def tracer(self, tracer: object) -> None:
        self.shared.tracer = tracer

    @property
    def module(self) -> nn.Module:
        return self.shared.module

    @property
    def markers(self) -> Markers:
        return self.shared.markers

    @property
    def scanner(self) -> Scanner:
        return self.shared.scanner

    @property
    def captures(self) -> dict[Options, Capture]:
        return self.shared.captures

    @property
    def device(self) -> torch.device | None:
        return self.model.device

    @property
    def devices(self) -> set[torch.device]:
        return self.model.devices

    def replay_edits(self, tape: Tape) -> None:
        """The operations of the edits, each in a worker of its own, in front of the trace's."""
        if not self.edits:
            return
        for n, edit in enumerate(self.edits):
            tape.invoke = Invoke(n)
            edit.replay(tape)
        tape.invoke = Invoke(len(self.edits))

    def check_keywords(self, fn: str | None, names: Iterable[str], verb: str, *functions: Callable) -> None:
        keywords.check(self.module, fn, names, verb, *functions)
        attention.warn_of_none(self.module, names)

    def suspend(self) -> Callable[[], None]:
        """While a body runs, functions that the user compiled run as written; the return undoes it."""
        old = compat.frames.stance()
        compat.frames.set_stance(old and (old[0], True))
        return lambda: compat.frames.set_stance(old)

    def state(self) -> ThreadState:
        return ThreadState()

    def wave(self, tracer: Tracer, first: object, alone: bool) -> ForwardWave:
        if tracer.generation is not None:
            return tracer.generation.wave()
        if not tracer.waves:
            self._follow()
        return ForwardWave(self, tracer, first, alone)

    def _follow(self) -> None:
        """Learn the module tree again, where a module was put in or taken out behind our back."""
        if self.scanner.watch.moved():
            tree_of(self.model).changed()

    def generation(
        self, tracer: Tracer, first: Batch, draws: Sequence[torch.Generator] | None = None
    ) -> Generation | None:
        """The generation that a trace is, if its function runs the model many times. `draws`: a generator for each of its rows."""
        if tracer.fn != "generate" or tracer.scan_only:
            return None
        self._follow()
        batch = self.inputs.arguments(tracer.fn, [first], tracer.pad_to)
        return Generation.begun(self, tracer, batch.args, batch.kwargs, batch.text, draws)

    def moves_state(self, wave: ForwardWave) -> str | None:
        """Why a second forward in one trace would move state twice, if it would."""
        kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
        active = next((p for m, p in self.markers.paths.items() if m.training and isinstance(m, kinds)), None)
        if active is not None:
            return f"`{active}` is in train mode"
        objects = [
            x
            for b in wave.batches
            for x in tree.flatten((b.args, b.kwargs))[0]
            if not isinstance(x, (torch.Tensor, *PLAIN))
        ]
        return f"a {type(objects[0]).__name__} was given" if objects else None

    def note(self, tracer: Tracer) -> None:
        """A trace has run."""
        notes = tracer.notes
        if notes and tracer.session is None:
            self.told.ran = functools.reduce(operator.add, notes)
            if self.shared.verb is not None:
                self.shared.verb.alone(tracer.line, notes)

    def bug_report(self, tracer: Tracer, path: str | os.PathLike, inputs: bool) -> None:
        bug_report.write(tracer, path, inputs)

    def cache(
        self, tracer: Tracer, modules: Any, device: Any, dtype: Any, detach: bool, output: bool, inputs: bool
    ) -> CacheView:
        kinds = [kind for kind, wanted in (("input", inputs), ("output", output)) if wanted]
        return cache(tracer, modules, kinds, observed(detach, device, dtype))

    def run(self, request: Request) -> Run:
        """The run of a request, which has not begun."""
        plan, batch, fn = request.plan, request.batch, request.fn
        capture = self.capture_for(request.compile)
        how = choose(request, capture, self.module)
        waited_for = self.waited_for(request.compile) if capture is None else None

        def call() -> Any:
            return callee(self.module, fn)(*batch.args, **batch.kwargs)

        given = (plan, request.constants, request.lines, self.markers, call, self.module.get_submodule, request.symbols)
        if capture is None or how.engine == "hooks":
            run = Run(*given)
            run.how = how
            if waited_for is not None:
                run.how, run.waited_for = How(why=waits(waited_for, self.module)), waited_for
            if capture is not None:
                capture.fall_back(how.why)
                run.report.append(how.why)
            return run
        frames = self.markers.operations.frames(plan)

        def stop_at() -> tuple[str, str, int] | None:
            values = request.constants[len(request.tape.constants) :]
            return request.sites.stop_site(request.tape, plan, values)

        def entry(half: InterventionGraph | None) -> EntryPoint:
            return capture.entry(self.module, fn, half, frames, self.scanner.collects)

        spliced = SplicedRun(*given)
        spliced.opened, spliced.how = request.opened, how
        if capture.options.dynamic is None and capture.options.capture == "dynamo":
            self.inputs.let_vary(batch, request.generates)
            if request.in_session and capture.lets_vary(fn, batch.length, batch.text):
                batch.let_lengths_vary()
        spliced.start(capture, stop_at, request.sites, entry, (batch.args, batch.kwargs))
        return spliced

    def capture_for(self, compile: Compile) -> Capture | None:
        """The capture that a trace runs on, or `None` for the hook engine."""
        capture, auto = self.captured_by(compile)
        return None if capture is not None and auto and waits(capture, self.module) else capture

    def waited_for(self, compile: Compile) -> Capture | None:
        """The capture that a trace would run on, if compiling did pay."""
        capture, auto = self.captured_by(compile)
        return capture if capture is not None and auto and waits(capture, self.module) else None

    def captured_by(self, compile: Compile) -> tuple[Capture | None, bool]:
        """The capture that a trace names, if it does, and does that wait until compiling pays."""
        if compile is False or (compile is None and self.compiled is None):
            return None, False
        if compile is None or (compile in (True, "auto") and self.compiled is not None):
            return self.compiled, compile == "auto" or (compile is None and self.auto)
        if compile in (True, "auto"):
            return self.captured(), compile == "auto"
        if not isinstance(compile, dict):
            raise TypeError(
                f'{user_line()}: `compile=` is `False`, `True`, `"auto"`, or a dict of `model.compile`\'s keywords, '
                f'`compile={{"backend": "eager"}}`; it is {compile!r}.'
            )
        return self.captured(**compile), False

    @named("`compile`")
    def captured(
        self,
        backend: Any = "inductor",
        mode: str | None = None,
        dynamic: bool | None = None,
        fullgraph: bool = False,
        options: dict | None = None,
        capture: str = "dynamo",
        regional: bool | None = None,
        passes: Sequence | None = None,
        disable: Collection[str] = (),
    ) -> Capture:
        if not isinstance(backend, str) and not callable(backend):
            raise TypeError(
                f"{user_line()}: a backend is a name, or a function `backend(gm, inputs)`; it is {backend!r}. To run on hooks leave "
                "`compile` out, or give a trace `compile=False`"
            )
        if isinstance(backend, str) and backend not in BACKENDS:
            known = torch.compiler.list_backends(exclude_tags=())
            if backend not in known:
                shown = [name for name in known if name not in BACKENDS and not name.endswith("_TESTING_ONLY")]
                raise ValueError(
                    f"{user_line()}: torch knows no backend `{backend}`; {nearest(backend, [*BACKENDS, *shown])}"
                )
        if capture not in ("dynamo", "symbolic"):
            raise ValueError(f'{user_line()}: `capture={capture!r}` is unknown; there is "dynamo" and "symbolic"')
        if capture == "symbolic" and dynamic:
            raise ValueError(
                f"{user_line()}: a symbolic capture is for the sizes that it was made with, so `dynamic=True` cannot hold; "
                "leave it out, or capture with Dynamo"
            )
        needed = {step.__name__ for step in PIPELINE} - OPTIONAL
        disable = [disable] if isinstance(disable, str) else disable
        for name in disable:
            if name not in OPTIONAL:
                why = "without it a plan would not run" if name in needed else nearest(str(name), OPTIONAL)
                raise ValueError(f"{user_line()}: the pass `{name}` cannot be left out: {why}")
        try:
            steps = None if passes is None else pipeline(passes)
        except ValueError as error:
            raise ValueError(f"{user_line()}: {error}") from None
        further = tuple(sorted((options or {}).items()))
        chosen = Options(*(backend, mode, dynamic, fullgraph, further, capture, regional), steps, frozenset(disable))
        if chosen not in self.captures:
            self.captures[chosen] = Capture(self.markers, chosen)
        return self.captures[chosen]
