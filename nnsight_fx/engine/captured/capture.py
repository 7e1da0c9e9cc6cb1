"""A capture: what is known of one wrapped model under one set of options."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ... import compat, passes
from ...capture import variables
from ...capture.marker import active, anchor, site, supply, taken
from ...capture.markers import Markers, among, between, block
from ...capture.marking import mark
from ...capture.segment import Segment
from ...compat.transformers import settle
from ...passes.job import Job
from ...plan.plan import InterventionGraph
from ...plan.printing import short
from .. import clock
from ..run import Run
from .builder import Builder
from .entries import Entries, EntryPoint, by_dynamo
from .options import EXACT, Options
from .refusal import refusal
from .run import SplicedRun
from .symbolic import Symbolic
from .watch import Fallbacks, watch

if TYPE_CHECKING:
    from ...scan.wave_sites import WaveSites


@dataclass(eq=False)
class Capture:
    """What was captured of one wrapped model, under one set of options."""

    markers: Markers
    options: Options
    pipeline: tuple = passes.PIPELINE
    disable: frozenset = frozenset()
    entries: Entries = field(default_factory=Entries)
    told: Fallbacks = field(default_factory=Fallbacks)  # why something ran on hooks, and what the user was told of it
    ledger: clock.Ledger = field(default_factory=clock.Ledger)
    captures: int = 0
    compiles: int = 0
    hits: int = 0
    live_sites: set[str] = field(default_factory=set)  # touched by a plan between segments, behind a graph break
    refused: weakref.WeakKeyDictionary = field(default_factory=weakref.WeakKeyDictionary)  # plan -> why
    unfit: weakref.WeakSet = field(default_factory=weakref.WeakSet)  # plans that need a capture of their own
    settled: bool = False  # has the model transformers' hooks that collect outputs
    # Of the latest compiles.
    last: list = field(default_factory=list)  # their pass reports
    whole: str | None = None  # why the latest was not compiled block by block, where that was asked for
    nodes: int = 0  # of the segment that was compiled last, before its passes
    # What batches and sweeps know.
    rowwise: dict[tuple, Callable] = field(default_factory=dict)  # what captures a function for any number of rows
    row_graphs: weakref.WeakKeyDictionary = field(default_factory=weakref.WeakKeyDictionary)  # graph -> of what input
    lengths: dict[str | None, set[int]] = field(default_factory=dict)  # by function: how many tokens its inputs had
    one_length: dict[str | None, str] = field(
        default_factory=dict
    )  # functions with a row graph for each length, and why
    swept: set = field(default_factory=set)  # the inputs' shapes that a sweep has compiled for
    # What speaks for compiling, and against it (`engine/worth.py`).
    hooks_s: float = 0.0  # seconds of sweeps and traces on hooks, for which nothing was compiled
    cost: float | None = None  # seconds that compiling is likely to take
    begun: bool = False  # it pays, or was asked for

    def __post_init__(self):
        self.pipeline = self.options.passes or self.pipeline
        self.disable |= self.options.disable
        if self.options.backend in EXACT:
            self.disable |= passes.ROUNDS
        self.builder = Builder(self.options, self.told)
        self.steady = self.entries.steady
        self.passing = compat.frames.undisturbed(SplicedRun.live_site)
        _teach_dynamo(self.markers)

    def reset(self) -> None:
        """The module tree is new."""
        self.settled = False
        self.entries.clear()
        self.rowwise.clear()
        self.row_graphs.clear()
        self.lengths.clear()
        self.one_length.clear()
        self.swept.clear()

    def lets_vary(self, fn: str | None, length: int | None, text: bool) -> bool:
        """Is a function captured for any number of tokens, where it is for many rows: text has another length each time, ids
        once there were two."""
        if length is None or length < 2 or fn in self.one_length or self.options.dynamic is False:
            return False
        return text or bool(self.options.dynamic) or len(self.lengths.get(fn, ())) > 1

    # -- entries -------------------------------------------------------------------------------------------------

    def entry(
        self,
        module: torch.nn.Module,
        fn: str | None,
        plan: InterventionGraph | None,
        frames: frozenset[str] = frozenset(),
        collects: Callable[[], bool] = lambda: True,
    ) -> EntryPoint:
        """The captured function that runs a plan: one for all plans that leave the model's Python alone and look into the
        same modules, else one a plan."""
        if not self.settled and collects():  # before the key is made, which has the hooks in it
            settle(module)
            self.settled = True
        key = (fn, plan, frames, self.markers.own())
        return self.entries.find(key, lambda: self._new_entry(module, fn))

    def _new_entry(self, module: torch.nn.Module, fn: str | None) -> EntryPoint:
        if self.options.capture == "symbolic":
            return EntryPoint(Symbolic(module, fn, self.markers, self.add, self.entries.drop))
        return by_dynamo(module, fn, self.markers, self.options, weakref.WeakMethod(self.backend))

    def shares(self, fn: str | None, plan: InterventionGraph) -> bool:
        """Can a plan that leaves parts out be tried in the graph of all plans?"""
        return self.entries.shares(fn, plan, self.markers.own()) and plan not in self.unfit

    @property
    def segments(self) -> list[Segment]:
        """All that is captured."""
        return self.entries.segments

    def backend(self, gm: torch.fx.GraphModule, inputs: list) -> Callable:
        """What Dynamo calls with each graph it captured."""
        segment = Segment.captured(gm)
        self.add(segment)

        @compat.frames.undisturbed
        def run_segment(*args: object) -> object:
            return active.run.run_segment(segment, args)

        return run_segment

    def add(self, segment: Segment) -> None:
        """A graph was captured, for the run that is active."""
        active.run.entrance.took(segment)
        self.captures += 1

    # -- what is noted -------------------------------------------------------------------------------------------

    def took(self, what: str, seconds: float, shape: str, plan: object) -> None:
        """Capturing or compiling took so long."""
        spent = clock.Spent(what, seconds, shape, short(plan))
        self.ledger.add(spent)
        clock.process.add(spent)

    def note_compile(self, segment: Segment, job: Job | None) -> None:
        """A segment was compiled, by passes of a `job`."""
        self.compiles += 1
        watch.compiles += 1
        if job is not None:
            self.last = [*self.last[-9:], job.report]
            self.whole = job.whole
        self.nodes = len(segment.gm.graph.nodes)

    def refusal(self, plan: InterventionGraph, sites: WaveSites, inputs: list) -> str | None:
        """Why a plan runs on the hook engine with these inputs, if it does."""
        why = refusal(plan, sites, inputs, self.markers, self.options.capture == "symbolic")
        return self.refused.get(plan) if why is None else why

    def refuse(self, plan: InterventionGraph, why: str) -> str:
        """This plan's backward runs on the hook engine, now and later."""
        self.refused[plan] = f"hook engine: a backward that no captured graph can hold: {why}"
        self.fall_back(self.refused[plan])
        return self.refused[plan]

    @property
    def fallbacks(self) -> list[str]:
        """Why something ran outside captured code."""
        return self.told.reasons

    def fall_back(self, why: str) -> None:
        self.told.fall_back(why)


def _teach_dynamo(markers: Markers) -> None:
    """Which functions become nodes, which Dynamo does not read, and which it does not compile."""
    compat.dynamo.register(site, supply, anchor)
    compat.variables.traced_by(between, variables.between)
    compat.variables.traced_by(among, variables.among)
    compat.variables.traced_by(block, variables.block)
    torch.compiler.assume_constant_result(taken)
    before, after = next(iter(markers.hooks.values()))
    live = (SplicedRun.pass_site, Run.operation, Run.skip, markers.operations.op(""))
    for function in (before, after, between, block, among, mark, *live):
        compat.frames.never_compile(function)
