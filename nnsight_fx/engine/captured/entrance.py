"""How a captured run calls the model: through what is captured, else while it is captured, else on hooks."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ... import compat
from ...capture.hook_tables import uncompiled
from ...capture.segment import Segment
from ...capture.symbolic import Untraceable
from ...errors import FallbackError
from ...passes.job import NotDifferentiable, Unfit
from ...plan.plan import InterventionGraph
from ...plan.verbs import Write
from .. import clock
from ..run import live, written
from .capture_half import StopUnknown, in_force
from .entries import EntryPoint
from .failure import ours, untraceable

if TYPE_CHECKING:
    from .capture import Capture
    from .run import SplicedRun

MISSES = 3  # an entry that failed this often to find its capture without hooks does not try it again


class Unread(Exception):
    """The graph has run, and its result was not computed: nobody takes it. Never reaches the user."""


class Entrance:
    """The call of the model in one run. `plain` calls it as it is."""

    def __init__(
        self,
        run: SplicedRun,
        capture: Capture,
        entry_of: Callable[[InterventionGraph | None], EntryPoint],
        inputs: tuple,
        plain: Callable[[], object],
    ):
        self.run, self.capture, self.entry_of, self.inputs, self.plain = run, capture, entry_of, inputs, plain
        self.plan = run.plan
        self.entry: EntryPoint | None = None  # through which the run went
        self.half: InterventionGraph | None = None  # a plan that has a capture of its own
        self.on_hooks = False  # has it fallen back to hooks, before anything ran

    def took(self, segment: Segment) -> None:
        """A graph was captured for this run."""
        assert self.entry is not None
        segment.plan = self.half
        self.entry.segments.append(segment)

    def __call__(self) -> object:
        """The model's result, or its own exception."""
        run, handled = self.run, sys.exception()
        self.half = self.plan if self.plan.recapture and not run.removes else None
        try:
            return self._captured(self.entry_of(self.half))
        except (NotDifferentiable, Untraceable) as why:  # nothing has run yet
            if run.removes:
                raise Unfit from why  # hooks skip by an override, of which such a run has none
            self._tell(why)
        except StopUnknown:  # nor here
            run.fall_back("hook engine: no scan could tell where the trace stops the model")
        except Exception as error:
            if not self._captures_nothing(error):
                self._blamed(error)
                raise
            run.fall_back(untraceable(error, handled, run))
            if ours(error, handled) is not None:
                self.capture.told.warn(run.report[-1])
        self.on_hooks, run.segments_run = True, 0
        with run.on_hooks():
            return self.plain()

    def _tell(self, why: NotDifferentiable | Untraceable) -> None:
        """The run goes on on hooks."""
        if isinstance(why, NotDifferentiable):
            self.run.report.append(self.capture.refuse(self.plan, str(why)))
        elif self.capture.options.fullgraph:
            raise FallbackError(f"under `fullgraph=True` nothing may run on hooks, but {why}") from why
        else:
            self.run.fall_back(f"hook engine: the model could not be traced symbolically: {why}")
            self.capture.told.warn(
                f"the model is compiled and ran on hooks: it could not be traced symbolically, {why}. `model.compile()` "
                "captures with Dynamo, which can do more; `fullgraph=True` makes this an error"
            )

    def _captured(self, entry: EntryPoint) -> object:
        """The model through an entry: by what is captured already, where that is all of it, with no hook on any module."""
        run, missed, self.entry = self.run, False, entry
        if entry.whole and not run.frames and not run.skips and entry.cached is not None:
            try:
                with contextlib.nullcontext() if self.half is None else in_force(run, self.half):
                    return entry.cached(*self.inputs)
            except Unread:
                return None
            except compat.dynamo.NotCaptured:
                missed = True
        captures, begun, inside = self.capture.captures, time.perf_counter(), run.segments_s
        told = contextlib.nullcontext() if entry.segments else clock.doing("capturing the model")
        with told, in_force(run, self.half), compat.dynamo.capturing(len(run.owner.paths)), live(run, run.everything):
            try:
                result = entry.call(*self.inputs)
            except Unread:
                result = None
            finally:
                if self.capture.captures > captures:
                    run.capture_s += time.perf_counter() - begun - (run.segments_s - inside)
                    varying = [shape for segment in entry.segments[-1:] for shape in segment.varying]
                    self.capture.took(clock.CAPTURE, run.capture_s, clock.shape_of(self.inputs, varying), run.opened)
        if missed and captures == self.capture.captures:
            entry.missed += 1
            entry.whole = False
        if entry.inner is not None and entry.missed < MISSES:
            one = run.segments_run == 1 and run.segment is not None and run.segment.whole
            entry.whole = one and not uncompiled(run.owner.paths) and not compat.guards.needs_hooks(entry.inner)
        return result

    def _blamed(self, error: Exception) -> None:
        """Dynamo runs a frame that it cannot trace, and may fail in a later one on what the capture half writes (torch 2.14 on)."""
        run = self.run
        writes = list(run.plan.of_kind(Write)) if self.half is not None else []
        if writes and run.written is None and compat.dynamo.fails(error):
            n, _, verb = writes[-1]
            run.written = written(verb, run.lines[n])

    def _captures_nothing(self, error: Exception) -> bool:
        """Did tracing fail in Dynamo itself, or on what the plan writes, before anything of the model ran?"""
        asked = self.capture.options.fullgraph and compat.dynamo.cannot_trace(error)
        writes = self.half is not None and self.half.recapture == "changes"
        return (
            (writes or compat.dynamo.fails(error)) and not asked and not self.run.segments_run and not self.run.counts
        )
