"""The spliced engine: the model is captured once, and every plan runs in its graphs."""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
import types
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .. import compat, passes
from ..capture import variables
from ..capture.markers import (
    SUPPLIED,
    Markers,
    Replacement,
    Stop,
    active,
    among,
    anchor,
    between,
    mark,
    site,
    supply,
    taken,
    uncompiled,
)
from ..capture.scan import callee
from ..capture.segment import Segment
from ..capture.symbolic import Untraceable
from ..compat.fakes import FakeTensor, detect_fake_mode
from ..compat.transformers import settle
from ..errors import FallbackError, FallbackWarning, PlanMismatchError, SkipError
from ..passes.calls import ModuleCall
from ..passes.job import NotDifferentiable, Unfit
from ..tracing import tree
from ..tracing.ambient import under
from ..tracing.encode import Keep, facts
from ..tracing.interleave import Firing, Stopped, gather
from ..tracing.lazy import user_line
from ..tracing.plan import MODULE, OBJECT, OBSERVE, READ, SKIP, STOP, WRITE, InterventionGraph, Op, Site
from ..tracing.printing import short
from . import clock, cuda_graphs, gradients
from .failure import ours, untraceable
from .run import Run, live, written
from .sites import FakeInterleaver
from .symbolic import Symbolic
from .variants import Variant, extras, variant

if TYPE_CHECKING:
    from .steady import Steady

_serial, _clock = itertools.count(), itertools.count(1)
PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
EXACT = ("eager", "aot_eager")  # backends whose numbers are the model's, to the bit
STEADY = 512  # plans kept that run as a call
ENTRIES = 128  # captures kept a model and set of options
REASONS = 256  # why something ran outside captured code: the latest kept
MISSES = 3  # how often an entry may look for its capture in vain before it stops trying without hooks


@dataclass(frozen=True)
class Options:
    """`model.compile`'s arguments: those of `nn.Module.compile`, and who captures the graphs, `dynamo` or `symbolic`."""

    backend: Any = "inductor"
    mode: str | None = None
    dynamic: bool | None = None
    fullgraph: bool = False
    options: tuple = ()
    capture: str = "dynamo"
    regional: bool | None = None  # are equal blocks compiled once; `None`: by Inductor's default mode they are
    passes: tuple | None = None  # a pipeline with the user's own; `None`: the library's
    disable: frozenset = frozenset()  # passes that are left out

    @property
    def replays(self) -> bool:
        """Are CUDA graphs recorded, whose next replay writes over what this one gave?"""
        return cuda_graphs.recorded(self.backend, self.mode, dict(self.options))


@dataclass
class Entry:
    """A function of the model that is captured."""

    call: Callable
    inner: Callable | None = None  # what Dynamo evaluates
    cached: Callable | None = None  # runs what is captured, and raises `NotCaptured` where nothing fits
    whole: bool = False  # was it captured in one graph, so that no hook has anything to do any more
    missed: int = 0  # how often nothing fitted, though it was there
    segments: list[Segment] = field(default_factory=list)  # what was captured of it
    used: int = 0  # when it ran last


@dataclass(eq=False)
class Capture:
    """What was captured of one wrapped model, under one set of options."""

    markers: Markers
    options: Options
    pipeline: tuple = passes.PIPELINE
    disable: frozenset = frozenset()
    captures: int = 0
    compiles: int = 0
    hits: int = 0
    fallbacks: list[str] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)  # reasons that the user was warned of
    live_sites: set[str] = field(default_factory=set)  # touched by a plan between segments, behind a graph break
    rowwise: dict[tuple, Callable] = field(default_factory=dict)  # what captures a function for any number of rows
    row_graphs: weakref.WeakKeyDictionary = field(
        default_factory=weakref.WeakKeyDictionary
    )  # what it captured -> of what input
    ledger: clock.Ledger = field(default_factory=clock.Ledger)
    lengths: dict[str | None, set[int]] = field(
        default_factory=dict
    )  # by function: the numbers of tokens that its sweeps and sessions had
    one_length: dict[str | None, str] = field(
        default_factory=dict
    )  # functions of which each length has a graph for many rows, and why
    swept: set = field(default_factory=set)  # the inputs' shapes that a sweep has compiled for
    hooks_s: float = 0.0  # seconds of sweeps on hooks, for which nothing was compiled
    entries: dict[tuple, Entry] = field(default_factory=dict)
    last: list = field(default_factory=list)  # the pass reports of the latest compiles
    unrecorded: list[str] = field(
        default_factory=list
    )  # why no CUDA graph is recorded of a segment, where that was asked for
    whole: str | None = None  # why the latest was not compiled block by block, where that was asked for
    few_rows: bool = False  # may products of few rows be `products.few_rows`
    nodes: int = 0  # of the segment that was compiled last, before its passes
    refused: weakref.WeakKeyDictionary = field(default_factory=weakref.WeakKeyDictionary)  # plan -> why
    steady: OrderedDict[tuple, Steady] = field(default_factory=OrderedDict)  # (signature, plan) -> the plan as a call
    settled: bool = False  # has the model transformers' hooks that collect outputs
    unfit: weakref.WeakSet = field(default_factory=weakref.WeakSet)  # plans that need a capture of their own

    def __post_init__(self):
        self.pipeline = self.options.passes or self.pipeline
        self.disable |= self.options.disable
        if self.options.backend in EXACT:
            self.disable |= {"batch_linears", "read_positions"}
        compat.dynamo.register(site, supply, anchor)
        compat.variables.traced_by(between, variables.between)
        compat.variables.traced_by(among, variables.among)
        torch.compiler.assume_constant_result(taken)
        options = dict(self.options.options)
        if self.options.backend == "inductor":
            from . import products  # which imports Inductor

            options = products.chosen({"fallback_random": True, **options})  # draws as eager's
            self.few_rows = products.FewRows in map(type, options.values())
        self.compiler = compat.dynamo.backend(
            self.options.backend, self.options.mode, options or None, self.options.dynamic
        )
        asked = self.options.regional
        self.regional = (
            self.options.backend == "inductor" and self.options.mode in (None, "default") if asked is None else asked
        )
        self.passing = compat.frames.undisturbed(SplicedRun.live_site)
        for function in (
            *next(iter(self.markers.hooks.values())),
            between,
            among,
            SplicedRun.pass_site,
            Run.operation,
            Run.skip,
            mark,
            self.markers.operations.op(""),
        ):
            compat.frames.never_compile(function)

    def reset(self) -> None:
        self.settled = False
        self.entries.clear()
        self.rowwise.clear()
        self.row_graphs.clear()
        self.lengths.clear()
        self.one_length.clear()
        self.swept.clear()
        self.steady.clear()

    def lets_vary(self, fn: str | None, length: int | None, text: bool) -> bool:
        """Is a function captured for any number of tokens, where it is for many rows: text has another length each time, ids
        once there were two."""
        if length is None or length < 2 or fn in self.one_length or self.options.dynamic is False:
            return False
        return text or bool(self.options.dynamic) or len(self.lengths.get(fn, ())) > 1

    def entry(
        self,
        module: torch.nn.Module,
        fn: str | None,
        plan: InterventionGraph | None,
        frames: frozenset[str] = frozenset(),
        collects: Callable[[], bool] = lambda: True,
    ) -> Entry:
        """The captured function that runs a plan: one for all plans that leave the model's Python alone and look into the
        same modules, else one a plan."""
        if not self.settled and collects():  # before the key is made, which has the hooks in it
            settle(module)
            self.settled = True
        key = (fn, plan, frames, self.markers.own())
        if key not in self.entries and self.options.capture == "symbolic":
            self.entries[key] = Entry(Symbolic(module, fn, self.markers, self.add, self.drop))
        elif key not in self.entries:
            inner = entry_point(module, fn)
            own = weakref.WeakMethod(self.backend)  # Dynamo keeps it with the code, where no collector sees the ring
            root, hooked = compat.guards.root(inner), self.markers.hooked()

            def backend(gm: torch.fx.GraphModule, inputs: list) -> Callable:
                if not hooked:
                    compat.guards.forget_tables(root)
                return own()(gm, inputs)  # type: ignore[misc]

            call, cached = compat.dynamo.dynamo_compile(inner, backend, self.options.dynamic, self.options.fullgraph)
            self.entries[key] = Entry(call, inner, cached)
        found = self.entries[key]
        self.touch(found)
        if len(self.entries) > ENTRIES:
            gone = self.entries.pop(min(self.entries, key=lambda k: self.entries[k].used))
            for call in [call for call, steady in self.steady.items() if steady.entry is gone]:
                del self.steady[call]
        return found

    def touch(self, entry: Entry) -> None:
        """An entry runs: it is the last to go."""
        entry.used = next(_clock)

    @property
    def segments(self) -> list[Segment]:
        """All that is captured."""
        return [segment for entry in self.entries.values() for segment in entry.segments]

    def shares(self, fn: str | None, plan: InterventionGraph) -> bool:
        """Can a plan that leaves parts out be tried in the graph of all plans: is there one, and none for it alone?"""
        pure = any(s.pure and s.plan is None for s in self.segments)
        own = self.markers.own()
        return (
            pure
            and (fn, None, frozenset(), own) in self.entries
            and (fn, plan, frozenset(), own) not in self.entries
            and plan not in self.unfit
        )

    def backend(self, gm: torch.fx.GraphModule, inputs: list) -> Callable:
        """What Dynamo calls with each graph it captured."""
        segment = Segment.captured(gm)
        self.add(segment)

        @compat.frames.undisturbed
        def run_segment(*args: Any) -> Any:
            return active.run.run_segment(segment, args)

        return run_segment

    def add(self, segment: Segment) -> None:
        """A graph was captured, for the run that is active."""
        segment.plan = active.run.capture_half
        active.run.entry.segments.append(segment)
        self.captures += 1

    def settle(self, key: tuple, steady: Steady | None) -> None:
        """A plan has run: remember whether it runs as a call."""
        self.steady.pop(key, None)
        if steady is not None:
            self.steady[key] = steady
            if len(self.steady) > STEADY:
                self.steady.popitem(last=False)

    def drop(self, segment: Segment) -> None:
        for entry in self.entries.values():
            entry.segments = [s for s in entry.segments if s is not segment]

    def build(self, gm: torch.fx.GraphModule, inputs: Callable[[], list], report: list[str]) -> Callable:
        """A rewritten segment, compiled; where its compiler fails by `aot_eager`, and where that fails the graph as it is."""
        if self.options.backend == "eager":
            return self.compiler(gm, inputs())
        spare = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))
        try:
            return self._compiled(gm, inputs())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            cause = error
        try:
            gm = torch.fx.GraphModule(spare, copy.deepcopy(spare.graph))
            made, instead = (
                compat.dynamo.backend("aot_eager", None, None, self.options.dynamic)(gm, inputs()),
                "aot_eager",
            )
        except Exception:
            made, instead = spare, "eager"
        name = (
            self.options.backend
            if isinstance(self.options.backend, str)
            else getattr(self.options.backend, "__name__", "backend")
        )
        why = f"`{name}` could not compile a segment, which runs with `{instead}`: {type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"
        self.fall_back(why)
        report.append(why)
        self.warn(why)
        return made

    def _compiled(self, gm: torch.fx.GraphModule, inputs: list) -> Callable:
        if not self.options.replays:
            return self.compiler(gm, inputs)
        device = next((x.device for x in inputs if isinstance(x, torch.Tensor) and x.dim()), None)
        with cuda_graphs.refusals(device) as why:
            made = self.compiler(gm, inputs)
        self.unrecorded += [reason for reason in why if reason not in self.unrecorded]
        return made

    def took(self, what: str, seconds: float, shape: str, plan: Any) -> None:
        """Capturing or compiling took so long."""
        spent = clock.Spent(what, seconds, shape, short(plan))
        self.ledger.add(spent)
        clock.process.add(spent)

    def note_compile(self, segment: Segment, job: Any) -> None:
        self.compiles += 1
        watch.compiles += 1
        if job is not None:
            self.last = [*self.last[-9:], job.report]
            self.whole = job.whole
        self.nodes = len(segment.gm.graph.nodes)

    def refusal(self, plan: InterventionGraph, sites: Any, inputs: list) -> str | None:
        """Why a plan runs on the hook engine with these inputs, if it does."""
        own = next((type(x) for x in inputs if isinstance(x, torch.Tensor) and type(x) not in PLAIN), None)
        if own is not None:
            return f"hook engine: the model is called with a {own.__name__}, a tensor of a class of its own"
        if plan.sees_objects:
            return f"hook engine: the body looks at objects, or at a site that no scan could tell{sites.ended()}"
        if self.options.capture == "symbolic" and self.markers.operations.frames(plan):
            return "hook engine: the body looks inside a module (`.source`), which a symbolic capture does not"
        if plan.retains_rows:
            return "hook engine: an invoke retains the gradient of its rows (`retain_grad`)"
        if plan.syncs and sites.signature.scan.ended is not None:
            return f"hook engine: the body looks at a value, and no scan could tell all sites behind it{sites.ended()}"
        called = {op.target for op in plan.ops if op.kind == MODULE}
        odd = next(
            (f"`{path}`, which the body calls, holds {why}" for path in called if (why := sites.odd(path))), None
        )
        if odd is not None or plan.holds_odd:
            return f"hook engine: {odd or 'the body calls a function on packed weights'}"
        if plan.chooses:
            return "hook engine: a `tracer.cond` decides whether the model skips a call, or stops"
        return self.refused.get(plan)

    def refuse(self, plan: InterventionGraph, why: str) -> str:
        """This plan's backward runs on the hook engine, now and later."""
        self.refused[plan] = f"hook engine: a backward that no captured graph can hold: {why}"
        self.fall_back(self.refused[plan])
        return self.refused[plan]

    def warn(self, why: str) -> None:
        """Say at the user's line, once, why the model does not run as it was asked to."""
        if why in self.warned:
            return
        self.warned = {*([] if len(self.warned) >= REASONS else self.warned), why}
        warnings.warn_explicit(f"nnsight_fx: {why}.", FallbackWarning, *user_line())

    def fall_back(self, why: str) -> None:
        if why not in self.fallbacks:
            self.fallbacks = [*self.fallbacks[1 - REASONS :], why]
        watch.fall_back(why)


class Watch:
    """Counters over all models, for `assert_max_compiles` and `assert_no_fallback`."""

    def __init__(self):
        self.compiles = 0
        self.fell = 0  # how often something ran outside captured code
        self.reasons: deque[str] = deque(maxlen=REASONS)  # the latest

    def fall_back(self, why: str) -> None:
        self.fell += 1
        self.reasons.append(why)

    def since(self, fell: int) -> list[str]:
        """Why something ran outside captured code since that many had."""
        new = self.fell - fell
        return list(self.reasons)[-new:] if new else []


watch = Watch()


def _inner(module: torch.nn.Module, fn: str | None) -> Callable:
    called = callee(module, fn)

    def inner(args: tuple, kwargs: dict) -> Any:
        try:
            out = called(*args, **kwargs)
        except Stop:
            return None
        return mark(out, "", "result", True) if torch.compiler.is_compiling() else out

    return inner


def entry_point(module: torch.nn.Module, fn: str | None) -> Callable:
    """The function that Dynamo captures: with a code object of its own."""
    return _renamed(_inner(module, fn))


def _renamed(inner: Callable) -> Callable:
    """A code object of its own: Dynamo's cache and its recompile limit belong to the code."""
    code = inner.__code__.replace(co_name=f"inner_{next(_serial)}")
    return types.FunctionType(code, inner.__globals__, code.co_name, inner.__defaults__, inner.__closure__)


class Unread(Exception):
    """The graph has run, and its result was not computed: nobody takes it. Never reaches the user."""


class StopUnknown(Exception):
    """Which site the model's Python is to stop at, no scan could tell. Never reaches the user."""


class SplicedRun(Run):
    """A run through captured segments; what Dynamo left out of them runs live, as in the hook engine."""

    capture: Capture
    skeleton: Callable[[str], Any]
    everything: bool = True

    on_hooks = False  # did it turn out, before anything ran, that the model runs as it is
    removes = False  # does this run leave out what its plan skips in the graph of all plans
    unread = False  # does nobody take what the model returns
    capture_half: InterventionGraph | None = None  # the plan whose own capture it runs on
    opened: Any = ""  # the line of its trace
    segments_s = 0.0  # seconds in its segments, compiling too
    stop_at: Callable[[], Site | None]

    def start(
        self,
        capture: Capture,
        stop_at: Callable[[], Site | None],
        sites: Any,
        entry: Callable[[InterventionGraph | None], Entry],
        inputs: tuple,
        removes: bool = False,
        unread: bool = False,
    ) -> SplicedRun:
        self.capture, self.sites, self.stop_at, self.everything = capture, sites, stop_at, True
        self.removes, self.inputs, self.replays = removes, inputs, capture.options.replays
        self.unread = unread and not self._root_reads()
        self.skeleton = lambda path: sites.scanner.skeleton().get_submodule(path)
        self.segments_run = 0
        self.segment: Segment | None = None  # the one that ran last
        self.variant: Variant | None = None  # as what
        self.entry: Entry | None = None  # through which
        self.frames = self.owner.operations.frames(self.plan)
        self.live_sites: set[str] = set()
        self.result_marked = False
        plan, plain = self.plan, self.call

        def call() -> Any:
            self.capture_half = plan if plan.recapture and not self.removes else None
            try:
                return self._captured(entry(self.capture_half), inputs)
            except (NotDifferentiable, Untraceable) as why:  # nothing has run yet
                if self.removes:
                    raise Unfit from why  # hooks skip by an override, of which such a run has none
                if isinstance(why, NotDifferentiable):
                    self.report.append(self.capture.refuse(plan, str(why)))
                elif self.capture.options.fullgraph:
                    raise FallbackError(f"under `fullgraph=True` nothing may run on hooks, but {why}") from why
                else:
                    self.fall_back(f"hook engine: the model could not be traced symbolically: {why}")
                    self.capture.warn(
                        f"the model is compiled and ran on hooks: it could not be traced symbolically, {why}. `model.compile()` "
                        "captures with Dynamo, which can do more; `fullgraph=True` makes this an error"
                    )
            except StopUnknown:  # nor here
                self.fall_back("hook engine: no scan could tell where the trace stops the model")
            except Exception as error:
                if not self._captures_nothing(error):
                    self._blamed(error)
                    raise
                self.fall_back(untraceable(error, self))
                if ours(error) is not None:
                    self.capture.warn(self.report[-1])
            self.on_hooks, self.segments_run = True, 0
            with live(self, self.everything):
                return plain()  # the model's own exception, or its result

        self.call = call
        return self

    def _captured(self, entry: Entry, inputs: tuple) -> Any:
        """The model through an entry: by what is captured already, where that is all of it, with no hook on any module."""
        missed, self.entry = False, entry
        if entry.whole and not self.frames and not self.skips and entry.cached is not None:
            try:
                with contextlib.nullcontext() if self.capture_half is None else self.half(self.capture_half):
                    return entry.cached(*inputs)
            except Unread:
                return None
            except compat.dynamo.NotCaptured:
                missed = True
        captures, begun, inside = self.capture.captures, time.perf_counter(), self.segments_s
        if not entry.segments:
            clock.say("capturing the model")
        with self.half(self.capture_half), compat.dynamo.capturing(len(self.owner.paths)), live(self, self.everything):
            try:
                result = entry.call(*inputs)
            except Unread:
                result = None
            finally:
                if self.capture.captures > captures:
                    self.capture_s += time.perf_counter() - begun - (self.segments_s - inside)
                    self.capture.took(clock.CAPTURE, self.capture_s, clock.shape_of(self.inputs), self.opened)
        if missed and captures == self.capture.captures:
            entry.missed += 1
            entry.whole = False
        if entry.inner is not None and entry.missed < MISSES:
            one = self.segments_run == 1 and self.segment is not None and self.segment.whole
            entry.whole = one and not uncompiled(self.owner.paths) and not compat.guards.needs_hooks(entry.inner)
        return result

    def around(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # `_captured` decides

    def fall_back(self, why: str) -> None:
        self.capture.fall_back(why)
        self.report.append(why)

    def _blamed(self, error: Exception) -> None:
        """Dynamo runs a frame that it cannot trace, and may fail in a later one on what the capture half writes (torch 2.14 on)."""
        writes = [n for n, op in enumerate(self.plan.ops) if op.kind == WRITE] if self.capture_half is not None else []
        if writes and self.written is None and compat.dynamo.fails(error):
            self.written = written(self.plan.ops[writes[-1]], self.lines[writes[-1]])

    def _captures_nothing(self, error: Exception) -> bool:
        """Did tracing fail in Dynamo itself, or on what the plan writes, before anything of the model ran?"""
        asked = self.capture.options.fullgraph and compat.dynamo.cannot_trace(error)
        writes = self.capture_half is not None and self.capture_half.recapture == "changes"
        return (writes or compat.dynamo.fails(error)) and not asked and not self.segments_run and not self.counts

    @contextlib.contextmanager
    def half(self, plan: InterventionGraph | None) -> Iterator[None]:
        """The capture half of the plan in force, for the markers that Dynamo traces."""
        markers, outer = self.owner, getattr(active, "capture", None)
        old = (markers.half, markers.stop_at, markers.calls)
        if plan is not None:
            stop_at = self.stop_at() if plan.stops else None
            if plan.stops and stop_at is None:
                raise StopUnknown
            markers.half = _half(plan)
            markers.stop_at = stop_at
            markers.calls = {(path, kind): [] for path, kind, _ in [*markers.half, *([stop_at] if stop_at else [])]}
            active.capture = FakeCapture(self)
        try:
            yield
        finally:
            markers.half, markers.stop_at, markers.calls = old
            active.capture = outer

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

    def run_segment(self, segment: Segment, args: tuple) -> Any:
        """One captured segment: its variant for this plan; cut where the plan needs real values."""
        begun = time.perf_counter()
        try:
            return self._run_segment(segment, args)
        finally:
            self.segments_s += time.perf_counter() - begun

    def _run_segment(self, segment: Segment, args: tuple) -> Any:
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
            n = next(n for n, op in enumerate(self.plan.ops) if op.kind == STOP)
            raise PlanMismatchError(
                f"{self.lines[n]}: the model is stopped after a sync point has begun the captured run, and what its Python did before "
                "the stop (a cache that it filled, an attribute that it set) would be lost. Trace with `compile=False`."
            )
        raise Stopped

    def _go_past(self, found: Any, outputs: Any) -> None:
        """Take over where the plan stands after a segment, and the values it gave."""
        for value, real in zip(found.gives, outputs[found.own :], strict=True):
            op = self.plan.ops[value[0]]
            away = op.kind == OBSERVE and isinstance(real, torch.Tensor) and op.extra[1].leaves_gpu(real)
            self.env[value] = self.offload.begin(real, op.extra[1]) if away else real
        self.at, self.done, self.counts = list(found.exit.at), set(found.exit.done), dict(found.exit.counts)
        self.skipped = {
            at: {
                i: (spec, [self.env.get((self.skip_of(at, i), j), x) for j, x in enumerate(leaves)], batched)
                for i, (spec, leaves, batched) in parts.items()
            }
            for at, parts in found.exit.skipped.items()
        }
        self.stopping = found.exit.stopping

    def perform(self, n: int, firing: Firing | None) -> None:
        op = self.plan.ops[n]
        unknown = firing is not None and firing.spec is None and not firing.whole
        if op.kind == READ and unknown and (n, -1) in self.plan.users:
            raise PlanMismatchError(
                f"{self.lines[n]}: `{'.'.join(p for p in op.target[:2] if p)}` holds objects that captured code does not have, and "
                "an earlier sync point has begun the captured run. Trace with `compile=False`."
            )
        super().perform(n, firing)
        if op.kind == SKIP and op.invoke in self.skipped.get(
            op.target, ()
        ):  # the module may be called in a later segment
            self.env.update({(n, j): x for j, x in enumerate(self.skipped[op.target][op.invoke][1])})

    def look_inside(self, frames: frozenset[str]) -> None:
        """What runs was captured without the markers of these operations."""
        new = frames - self.frames
        if not new:
            return
        path, n = next(
            (op.target[0], n)
            for n, op in enumerate(self.plan.ops)
            if op.kind in (READ, WRITE, SKIP) and op.target[0].rpartition(".")[0] in new
        )
        raise PlanMismatchError(
            f"{self.lines[n]}: `{path}` is inside a module that nothing before the sync point looked into, and the captured run has "
            "begun without it. Touch an operation of that module before the sync point, or trace with `compile=False`."
        )

    # -- live parts ----------------------------------------------------------------------------------------------

    def pass_site(self, path: str, kind: str, value: Any) -> Any:
        return self.capture.passing(self, path, kind, value)  # compiled code may be calling: Dynamo stays out of this

    def live_site(self, path: str, kind: str, value: Any) -> Any:
        """A site outside captured code."""
        if self.removes and not self.segments_run:
            raise Unfit  # no captured code to begin with: live code is skipped as the hook engine does it
        if (path, kind) == ("", "result") and self.counts.get(("", "result")):
            return value  # its marker is in a segment
        if self.stopping:
            return value
        before = len(self.done)
        value = super().pass_site(path, kind, value)
        if len(self.done) > before and kind != "result" and not self.on_hooks:
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
        if not self.segments_run and not self.stopping and not self.on_hooks:
            self.fall_back("nothing was captured: Dynamo ran the model as it is (recompile limit, or disabled)")
            self.capture.warn(
                "nothing of the model ran captured in this trace (Dynamo's recompile limit, or compilation is disabled); the hook "
                "engine did the work. `model.explain()` has the details"
            )

    def _root_reads(self) -> list[int]:
        """The operations that read such objects."""
        return [n for n, op in enumerate(self.plan.ops) if op.kind == OBJECT and not op.target[0]]

    def _root_objects(self) -> None:
        """Objects that the root returned: captured code does not have them, its caller does."""
        wanted = self._root_reads()
        if wanted:
            leaves = tree.flatten(self.result)[0]
            self.env.update({(n, 0): leaves[self.plan.ops[n].extra] for n in wanted})


def _half(plan: InterventionGraph) -> dict[tuple[str, str, int], Replacement]:
    """The capture half: what the model's Python sees replaced."""
    found: dict[tuple[str, str, int], Replacement] = {}
    for op in plan.ops:
        if op.kind == WRITE and not op.extra[2]:
            found[op.target] = Replacement(op.extra[0], _described(op))
        elif op.kind == SKIP:
            path, _, call = op.target
            found[(path, "skip", call)] = Replacement(
                op.extra[0], [SUPPLIED if x is SUPPLIED else x for x in _described(op)]
            )
    return found


def _described(op: Op) -> list:
    """Each leaf of a written tree: supplied by the graph, kept, or an object."""
    described = []
    for key in op.args[2][0][2]:
        if key[0] in ("v", "c"):
            described.append(SUPPLIED)
        elif key[0] == "l":
            described.append(float.fromhex(key[2]) if key[1] is float else key[2])
        else:
            described.append(key[1].obj if key[0] == "o" else Keep(0))
    return described


class FakeCapture:
    """A plan run on Dynamo's own fakes while it traces: what its Python gets to see of writes and skips."""

    def __init__(self, run: SplicedRun):
        self.run = run
        self.states: dict[Any, DynamoInterleaver] = {}
        self.mode: Any = None  # of Dynamo's latest fakes: not every torch tells it where there is none

    def _state(self, mode: Any) -> DynamoInterleaver:
        mode = self.mode = mode or self.mode
        if mode not in self.states:
            self.states[mode] = DynamoInterleaver(self.run, mode)
        return self.states[mode]

    def fake_site(self, x: torch.Tensor, path: str, kind: str, leaf: int, left: int) -> torch.Tensor:
        if isinstance(x, FakeTensor):
            self._state(x.fake_mode).leaf(x, path, kind, leaf, left == 1)
        return x

    def taken(self, at: Site) -> bool:
        return self._state(detect_fake_mode()).taken(at)

    def fake_anchor(self) -> torch.Tensor:
        return torch.empty(0)

    def fake_supply(self, path: str, kind: str, call: int, leaf: int) -> torch.Tensor:
        mode = detect_fake_mode()
        return self._state(mode).supply((path, kind, call), leaf)


class DynamoInterleaver(FakeInterleaver):
    """A plan's operations on the fakes of one of Dynamo's tracings, from where the run stands."""

    def __init__(self, run: SplicedRun, mode: Any):
        constants = [
            mode.from_tensor(c, static_shapes=True) if isinstance(c, torch.Tensor) else c for c in run.constants
        ]
        super().__init__(run.plan, constants, run.sites)
        self.run, self.mode = run, mode
        self.at, self.done, self.counts = list(run.at), set(run.done), dict(run.counts)
        self.env = {
            k: mode.from_tensor(v, static_shapes=True) if isinstance(v, torch.Tensor) else v for k, v in run.env.items()
        }

        def fake(x: Any) -> Any:
            return mode.from_tensor(x, static_shapes=True) if isinstance(x, torch.Tensor) else x

        self.skipped = {
            at: {i: (spec, [fake(x) for x in leaves], batched) for i, (spec, leaves, batched) in parts.items()}
            for at, parts in run.skipped.items()
        }
        self.group: dict[int, torch.Tensor] = {}
        self.supplied: dict[Site, list] = {}

    def execute(self, n: int, op: Op) -> Any:
        if op.kind != MODULE:
            return super().execute(n, op)
        module, (args, kwargs) = self.run.modules(op.target), self.arguments(op)
        tensors = {
            name: self.mode.from_tensor(t, static_shapes=True)
            for name, t in [*module.named_parameters(), *module.named_buffers()]
        }
        with under(op.ambient):
            return ModuleCall(op.target, self.run.skeleton(op.target))(tensors, args, kwargs)

    def leaf(self, x: torch.Tensor, path: str, kind: str, leaf: int, last: bool) -> None:
        self.group[leaf] = x
        if last:
            leaves: list[Any] = [self.group.get(i) for i in range(leaf + 1)]
            self.group = {}
            self.fire(Firing((path, kind, self.count(path, kind)), leaves, None))

    def _write(self, op: Op, firing: Firing | None) -> None:
        assert firing is not None
        spec, batched, fits = op.extra
        if fits:
            super()._write(op, firing._replace(spec=spec))
        else:
            self.supplied[firing.site] = self.merged(op, firing, list(self.arguments(op)[0][0]))

    def taken(self, at: Site) -> bool:
        """Did the plan replace a site, or skip a call, when it came by?"""
        if at[1] != "skip":
            return at in self.supplied
        try:
            return self.skip_parts((at[0], "output", at[2]), self.run.lines) is not None
        except SkipError:
            return False  # splicing says so, behind Dynamo

    def supply(self, at: Site, leaf: int) -> torch.Tensor:
        if at not in self.supplied:
            self.supplied[at] = gather(self.skipped[(at[0], "output", at[2])], self.plan.groups)[0]
        return self.supplied[at][leaf]


@contextlib.contextmanager
def assert_max_compiles(n: int) -> Iterator[None]:
    """Raise `RecompileError` when more than `n` graph variants are compiled in the block, over all models."""
    from ..errors import RecompileError

    before = watch.compiles
    yield
    if watch.compiles - before > n:
        raise RecompileError(f"{watch.compiles - before} graphs were compiled in this block, at most {n} were expected")


@contextlib.contextmanager
def assert_no_fallback() -> Iterator[None]:
    """Raise `FallbackError` when anything that a plan touches ran outside captured code in the block."""
    before = watch.fell
    yield
    if watch.fell > before:
        raise FallbackError("ran outside captured code: " + "; ".join(watch.since(before)))


__all__ = ["READ", "Capture", "Options", "SplicedRun", "assert_max_compiles", "assert_no_fallback"]
