"""A captured run: one run of a plan through captured segments; what Dynamo left out of them runs live."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch

from ...capture.segment import Segment
from ...errors import PlanMismatchError
from ...passes.job import Unfit
from ...plan import tree
from ...plan.interleave import Firing, Stopped
from ...plan.keys import Value, facts
from ...plan.plan import InterventionGraph
from ...plan.skips import skip_of
from ...plan.verbs import Observe, Read, ReadObject, Site, Skip, StopRun, Write, place_of_site
from ...scan.wave_sites import WaveSites
from ..how import NOTICED, How
from ..run import Run
from . import cuda_graphs, gradients
from .entrance import Entrance, Unread
from .entries import EntryPoint
from .linear import ByGraph
from .variants import Variant, extras, variant

if TYPE_CHECKING:
    from .capture import Capture


class SplicedRun(Run):
    """A run through captured segments; what Dynamo left out of them runs live, as in the hook engine."""

    capture: Capture
    entrance: Entrance
    skeleton: Callable[[str], torch.nn.Module]

    removes = False  # does this run leave out what its plan skips in the graph of all plans
    unread = False  # does nobody take what the model returns
    opened: object = ""  # the line of its trace
    segments_s = 0.0  # seconds in its segments, compiling too
    stop_at: Callable[[], Site | None]

    def start(
        self,
        capture: Capture,
        stop_at: Callable[[], Site | None],
        sites: WaveSites,
        entry: Callable[[InterventionGraph | None], EntryPoint],
        inputs: tuple,
    ) -> SplicedRun:
        self.capture, self.sites, self.stop_at, self.everything = capture, sites, stop_at, True
        self.removes, self.inputs, self.replays = self.how.leaves_out, inputs, capture.options.replays
        self.unread = self.how.unread and not self._root_reads()
        self.skeleton = lambda path: sites.scanner.skeleton().get_submodule(path)
        self.segments_run = 0
        self.segment: Segment | None = None  # the one that ran last
        self.variant: Variant | None = None  # as what
        self.frames = self.owner.operations.frames(self.plan)
        self.live_sites: set[str] = set()
        self.call = self.entrance = Entrance(self, capture, entry, inputs, self.call)
        return self

    def as_it_ran(self) -> How:
        """How the run went, with what it found out on the way."""
        if self.entrance.on_hooks:
            return How(why=self.report[-1] if self.report else "")
        own = self.entrance.half is not None
        entry = "own" if own else "source" if self.frames else "shared"
        why = self.how.why or NOTICED if own else ""
        return How("captured", entry, self.removes, bool(self.variant is not None and self.variant.unread), why)

    def around(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # the entrance decides

    def fall_back(self, why: str) -> None:
        self.capture.fall_back(why)
        self.report.append(why)

    # -- segments ------------------------------------------------------------------------------------------------

    def entry_key(self) -> tuple:
        """Where the plan stands: what a variant is compiled for."""
        if not self.counts and not self.env and not self.done:
            return (self.plan, self.closed)
        known = tuple(
            sorted((v, facts(x) if isinstance(x, torch.Tensor) else None) for v, x in self.env.items() if v[1] >= 0)
        )
        return (
            self.plan,
            self.closed,
            tuple(self.at),
            frozenset(self.done),
            frozenset(self.counts.items()),
            known,
        )

    def run_segment(self, segment: Segment, args: tuple) -> object:
        """One captured segment: its variant for this plan; cut where the plan needs real values."""
        begun = time.perf_counter()
        try:
            return self._run_segment(segment, args)
        finally:
            self.segments_s += time.perf_counter() - begun

    def _run_segment(self, segment: Segment, args: tuple) -> object:
        self.segments_run += 1
        self.segment = segment
        while True:
            found = self.variant = variant(segment, self, args)
            for n in sorted(found.exit.done - self.done):
                self.note_write(n)
            inputs = [*args, *extras(self, found)]
            if found.requires is None:
                outputs = found.call(*inputs)
            else:
                with torch.no_grad():
                    outputs = found.call(*inputs)
                if found.linear is not None:
                    self.linear = ByGraph(found.linear, inputs, list(outputs), self.capture.builder.plain, self.report)
                    outputs = outputs[: found.linear.own]
                outputs = gradients.settle(found, inputs, outputs)
            self._go_past(found, outputs)
            if found.ends:
                raise Stopped
            if found.unread:
                raise Unread
            if found.cut is None:
                return outputs[: found.own] if len(outputs) != found.own else outputs
            leaves = [outputs[i] if i is not None else None for i in found.leaves]
            self.fire(Firing(found.cut.site, leaves, None, whole=found.whole))
            if self.stopping:
                self._end_in(segment)
            args = tuple(leaves[r[1]] if isinstance(r, tuple) else outputs[r] for r in found.resumed)
            assert found.tail is not None
            segment = found.tail

    def _end_in(self, segment: Segment) -> None:
        """The plan stops the model inside a segment of a run that had begun before it was known to stop."""
        if not segment.pure:
            n = next(n for n, _, _ in self.plan.of_kind(StopRun))
            raise PlanMismatchError(
                f"{self.lines[n]}: the model is stopped after a sync point has begun the captured run, and what its Python did before "
                "the stop (a cache that it filled, an attribute that it set) would be lost. Trace with `compile=False`."
            )
        raise Stopped

    def _go_past(self, found: Variant, outputs: list | tuple) -> None:
        """Take over where the plan stands after a segment, and the values it gave."""
        for value, real in zip(found.gives, outputs[found.own :], strict=True):
            verb = self.plan.ops[value.op].verb
            if isinstance(verb, Observe) and isinstance(real, torch.Tensor) and verb.how.leaves_gpu(real):
                real = self.offload.begin(real, verb.how)
            self.env[value] = real
        self.at, self.done, self.counts = list(found.exit.at), set(found.exit.done), dict(found.exit.counts)
        self.skipped = {
            at: {
                i: (spec, [self.env.get(Value(skip_of(self.plan, at, i), j), x) for j, x in enumerate(leaves)], batched)
                for i, (spec, leaves, batched) in parts.items()
            }
            for at, parts in found.exit.skipped.items()
        }
        self.stopping = found.exit.stopping

    def perform(self, n: int, firing: Firing | None) -> None:
        op = self.plan.ops[n]
        unknown = firing is not None and firing.spec is None and not firing.whole
        if isinstance(op.verb, Read) and unknown and (n, -1) in self.plan.users:
            raise PlanMismatchError(
                f"{self.lines[n]}: `{place_of_site(op.verb.site)}` holds objects that captured code does not have, and "
                "an earlier sync point has begun the captured run. Trace with `compile=False`."
            )
        super().perform(n, firing)
        parts = self.skipped.get(op.verb.site, {}) if isinstance(op.verb, Skip) else {}
        if op.invoke in parts:  # the module may be called in a later segment
            self.env.update({Value(n, j): x for j, x in enumerate(parts[op.invoke][1])})

    def look_inside(self, frames: frozenset[str]) -> None:
        """What runs was captured without the markers of these operations."""
        new = frames - self.frames
        if not new:
            return
        path, n = next(
            (op.verb.site[0], n)
            for n, op in enumerate(self.plan.ops)
            if isinstance(op.verb, Read | Write | Skip) and op.verb.site[0].rpartition(".")[0] in new
        )
        raise PlanMismatchError(
            f"{self.lines[n]}: `{path}` is inside a module that nothing before the sync point looked into, and the captured run has "
            "begun without it. Touch an operation of that module before the sync point, or trace with `compile=False`."
        )

    # -- live parts ----------------------------------------------------------------------------------------------

    def pass_site(self, path: str, kind: str, value: object) -> object:
        return self.capture.passing(self, path, kind, value)  # compiled code may be calling: Dynamo stays out of this

    def live_site(self, path: str, kind: str, value: object) -> object:
        """A site outside captured code."""
        if self.removes and not self.segments_run:
            raise Unfit  # no captured code to begin with: live code is skipped as the hook engine does it
        if (path, kind) == ("", "result") and self.counts.get(("", "result")):
            return value  # its marker is in a segment
        if self.stopping:
            return value
        before = len(self.done)
        value = super().pass_site(path, kind, value)
        if len(self.done) > before and kind != "result" and not self.entrance.on_hooks:
            self.live_sites.add(".".join(p for p in (path, kind) if p))
        return value

    @property
    def skips(self) -> Collection[str]:
        return () if self.removes else self.plan.skips  # what it overrides, Dynamo guards on

    def forward(self) -> None:
        if self.replays:
            cuda_graphs.begin()
        try:
            super().forward()
        except Unfit:  # nothing has run yet
            self.capture.unfit.add(self.plan)
            self.removes, self.segments_run = False, 0
            super().forward()
        self._root_objects()
        if self.replays and torch.cuda.is_available():
            root = next(iter(self.owner.paths))
            given = [*root.parameters(), *root.buffers(), *self.constants, self.inputs]
            self.offload.wait()
            self.env = cuda_graphs.apart(self.env, given)
        self.capture.live_sites.update(self.live_sites)
        if not self.segments_run and not self.stopping and not self.entrance.on_hooks:
            self.fall_back("nothing was captured: Dynamo ran the model as it is (recompile limit, or disabled)")
            self.capture.told.warn(
                "nothing of the model ran captured in this trace (Dynamo's recompile limit, or compilation is disabled); the hook "
                "engine did the work. `model.explain()` has the details"
            )

    def _root_reads(self) -> list[tuple[int, int]]:
        """The operations that read such objects, and which leaf each reads."""
        return [(n, verb.leaf) for n, _, verb in self.plan.of_kind(ReadObject) if not verb.site[0]]

    def _root_objects(self) -> None:
        """Objects that the root returned: captured code does not have them, its caller does."""
        wanted = self._root_reads()
        if wanted:
            leaves = tree.flatten(self.result)[0]
            self.env.update({Value(n, 0): leaves[leaf] for n, leaf in wanted})
