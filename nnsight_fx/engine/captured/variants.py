"""Variants: what a segment becomes under a plan, compiled as Dynamo would have compiled it."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from ... import compat, passes
from ...capture.marker import WHOLE, is_marker, marker_of, supply
from ...capture.segment import Segment
from ...compat.tensors import memory, whole
from ...errors import PlanMismatchError
from ...passes.job import (
    CutSite,
    Job,
    NotDifferentiable,
    Progress,
    Take,
    TakesConstant,
    TakesMemory,
    Unfit,
)
from ...passes.linearize import Derivative
from ...plan import ambient
from ...plan.keys import Value
from ...plan.lifting import EXACT
from .. import clock
from . import following
from .gradients import differentiable
from .regions import Whole, regional
from .removal import check

if TYPE_CHECKING:
    from .run import SplicedRun


@dataclass
class Variant:
    """A compiled segment: what it takes and gives beside its own inputs and outputs, and where the plan stands after it."""

    call: Callable
    sizes: Callable[[list], bool]  # the guards on the sizes of its inputs
    takes: list[Take]
    gives: list[Value]
    own: int
    exit: Any
    cut: CutSite | None = None
    tail: Segment | None = None
    leaves: list[int | None] = field(default_factory=list)  # for each leaf of the cut site, its place in the outputs
    resumed: list[int | tuple] = field(
        default_factory=list
    )  # the tail's inputs: a place in the outputs, or ("leaf", i)
    report: list[tuple[str, int, int]] = field(default_factory=list)
    requires: list[bool] | None = None  # of a graph with its own backward: the outputs that require grad in eager
    linear: Derivative | None = None  # of a plan that keeps it: what it takes are the last outputs
    accumulates: list[int] = field(default_factory=list)  # the inputs whose gradients are further outputs
    ends: bool = False  # does the run end with it: the plan stops the model here
    whole: bool = False  # is the one leaf of the cut site its value
    unread: bool = False  # was what the model returns not computed, since nobody takes it
    fresh: bool = False  # is it of a plan that is known to its end, and of which nothing had happened
    constants: list[following.Constant] = field(default_factory=list)  # where one is as wide as an input

    def guards(self, run: Any, args: tuple) -> bool:
        """Does it serve these inputs, with the constants of this run?"""
        return self.sizes(list(args)) and all(each.fits(run, args) for each in self.constants)


VARIANTS = 512  # compiled plans kept a segment


def variant(segment: Segment, run: SplicedRun, args: tuple) -> Variant:
    """The variant of a segment for where a run's plan stands: found, or compiled now."""
    aliases = _aliases(run, args) if run.env and run.plan.writes else {}
    if run.plan.backs:  # a parameter that the body uses, too, is one leaf
        own = {id(arg): i for i, arg in enumerate(args)}
        constants = ((slot, own.get(id(c))) for slot, c in enumerate(run.constants) if isinstance(c, torch.Tensor))
        aliases.update({TakesConstant(slot, "tensor"): (i, None) for slot, i in constants if i is not None})
    if run.plan.changes_constants:
        aliases.update(_shared(run, args))
    key = (run.entry_key(), _unread(segment, run), tuple(aliases.items()))
    found = segment.variants.setdefault(key, [])
    segment.variants.move_to_end(key)
    for each in found:
        if each.guards(run, args):
            return _hit(run, each)
    lifted = any(isinstance(c, torch.Tensor) for c in run.constants)
    kin = following.kin(key) if lifted else key  # looked for only where the plan itself has none
    for each in segment.following.get(kin, ()):
        if each.guards(run, args):
            return _hit(run, each)
    _check_written(segment, run, args)
    begun = time.perf_counter()
    with clock.doing("compiling"), compat.symbols.own_sizes(segment.context, segment.fakes, args) as fakes:
        fakes = [compat.fakes.unchanged(segment.context, *each) for each in zip(fakes, args, strict=True)]
        made = _compile(segment, run, fakes, args, aliases)
    took = time.perf_counter() - begun
    run.compile_s += took
    run.capture.took(clock.COMPILE, took, clock.shape_of(run.inputs, segment.varying), run.opened)
    found.append(made)
    if made.constants:
        segment.following.setdefault(kin, []).append(made)
        if len(segment.following) > VARIANTS:
            segment.following.popitem(last=False)
    if len(segment.variants) > VARIANTS:
        segment.variants.popitem(last=False)
    return made


def _hit(run: SplicedRun, found: Variant) -> Variant:
    run.capture.hits += 1
    run.hits += 1
    return found


def _unread(segment: Segment, run: SplicedRun) -> bool:
    """Is the model's result nobody's, and nothing else that its Python does behind the graph seen by anybody?"""
    return run.unread and run.closed and segment.pure and segment.whole


def _check_written(segment: Segment, run: SplicedRun, args: tuple) -> None:
    """What comes into the segment is of the kind that it was captured with: behind a sync point another could be written."""
    for fake, value in zip(segment.fakes, args, strict=True):
        if not isinstance(fake, torch.Tensor) or not isinstance(value, torch.Tensor):
            continue
        sizes = [isinstance(n, int) and n != m for n, m in zip(fake.shape, value.shape, strict=False)]
        if fake.dim() != value.dim() or fake.dtype != value.dtype or any(sizes):
            done, line = run.written or ("a site was written", "a write")
            raise PlanMismatchError(
                f"{line}: {done} with another shape, dtype or structure after a sync point has begun the captured run, which cannot "
                "take it any more. Write it before the sync point, or trace with `compile=False`."
            )


def _aliases(run: SplicedRun, args: tuple) -> dict[Take, tuple[int | Take, tuple | None]]:
    """Which values of earlier segments lie in the memory of an input: it itself, or a view of it."""
    stored = _stored(args)
    found: dict[Take, tuple[int | Take, tuple | None]] = {}
    for value, real in run.env.items():
        if value.leaf < 0 or not isinstance(real, torch.Tensor) or real.layout is not torch.strided:
            continue
        same = next((i for i, arg in enumerate(args) if arg is real), None)
        i = stored.get(memory(real))
        if same is not None:
            found[value] = (same, None)
        elif i is not None and real.numel():
            found[value] = (i, _view(real, args[i]))
    return found


def _view(x: torch.Tensor, base: torch.Tensor) -> tuple:
    """How a tensor is a view of one in the same memory: size, stride, offset, and its dtype where that is another."""
    return tuple(x.shape), x.stride(), x.storage_offset(), None if x.dtype == base.dtype else x.dtype


def _stored(args: tuple) -> dict[int, int]:
    """Which input has a memory first."""
    stored: dict[int, int] = {}
    for i, arg in enumerate(args):
        if isinstance(arg, torch.Tensor) and arg.layout is torch.strided:
            stored.setdefault(memory(arg), i)
    return stored


def _shared(run: SplicedRun, args: tuple) -> dict[Take, tuple[int | Take, tuple | None]]:
    """Constants that lie in one memory, or in an input's, where the plan changes constants in place.

    A compiler takes its inputs for apart. So these are views of the input, or of one input that is all of the memory.
    """
    stored = _stored(args)
    found: dict[Take, tuple[int | Take, tuple | None]] = {}
    strided = {
        slot: c for slot, c in enumerate(run.constants) if isinstance(c, torch.Tensor) and c.layout is torch.strided
    }
    wheres = {slot: memory(c) for slot, c in strided.items()}
    often = Counter(wheres.values())
    for slot, c in strided.items():
        i = stored.get(wheres[slot])
        if i is not None:
            found[TakesConstant(slot, "tensor")] = (i, None if args[i] is c else _view(c, args[i]))
        elif often[wheres[slot]] > 1:
            first = next(other for other, where in wheres.items() if where == wheres[slot])
            found[TakesConstant(slot, "tensor")] = (TakesMemory(first), _view(c, strided[first]))
    return found


def _compile(segment: Segment, run: SplicedRun, fakes: list, args: tuple, aliases: dict) -> Variant:
    gm = segment.copy()
    pristine = list(gm.graph.nodes)
    job = Job(
        plan=run.plan,
        entry=Progress(list(run.at), set(run.done), dict(run.counts), set(run.env), dict(run.skipped)),
        closed=run.closed,
        raw_numbers=raw_numbers(run),
        skeleton=lambda path: run.skeleton(path),
        aliases=aliases,
        half=frozenset(run.owner.half or ()),
        lines=run.lines,
        modes=ambient.current(),
        begun=run.entrance.half is None and not run.removes,
        removes=run.removes and segment.pure,
        unread=_unread(segment, run),
    )

    def inputs() -> list:
        return [*fakes, *(_fake(segment, run, fakes, take) for take in job.takes)]

    job.inputs = lambda: [compat.fakes.as_leaf(segment.context, x) for x in inputs()]
    job.differentiates = differentiable(run, args)
    state = {"leaves": [], "resumed": [], "tail": None}
    cut_after_splice = _head(segment, pristine, state)
    at = run.capture.pipeline.index(passes.splice) + 1
    pipeline = [*run.capture.pipeline[:at], cut_after_splice, *run.capture.pipeline[at:]]
    with compat.graphs.tracing(segment.context):
        passes.run(gm, job, pipeline, run.capture.disable)
    check(job, run.removes)
    job.skeleton = job.inputs = None  # they know the run, and the variant, which knows the job, outlives that
    if job.differentiates and not run.plan.backs <= job.exit.done:
        raise NotDifferentiable("the loss is not in the first captured segment")
    if run.plan.linear is not None and run.plan.linear not in job.exit.done:
        raise NotDifferentiable("a target or a source is not in the first captured segment")
    with (
        compat.graphs.tracing(segment.context),
        torch.set_grad_enabled(torch.is_grad_enabled() and job.requires is None),
    ):
        call = _built(segment, run, gm, job, fakes, args, inputs)
    sizes = compat.symbols.added_guards(segment.context, segment.guards, fakes)
    run.capture.note_compile(segment, job)
    run.compiles += 1
    return Variant(
        call,
        sizes,
        job.takes,
        job.gives,
        job.own,
        job.exit,
        job.cut,
        state["tail"],
        state["leaves"],
        state["resumed"],
        job.report,
        ends=None in job.removed,
        whole=job.cut is not None and marker_of(pristine[job.cut.last]).last == WHOLE,
        unread=job.unread and job.cut is None,
        fresh=run.closed and not (run.counts or run.env or run.done or aliases),
        requires=job.requires,
        linear=job.linear,
        accumulates=job.accumulates,
        constants=following.following(run, fakes, job.takes),
    )


def _built(
    segment: Segment, run: SplicedRun, gm: fx.GraphModule, job: Job, fakes: list, args: tuple, inputs: Callable
) -> Callable:
    """A rewritten segment, compiled: by blocks where it has equal ones."""
    if not run.capture.options.by_regions or job.linear is not None:
        builder = run.capture.builder if job.linear is None else run.capture.builder.plain
        compat.graphs.as_dynamos(gm)
        return builder.build(gm, inputs, run.report)
    cut = compat.graphs.copied(gm)
    twins = dict(zip(gm.graph.nodes, cut.graph.nodes, strict=True))
    try:
        job.blocks = [twins[n] for n in job.blocks if n in twins]
        given = [compat.fakes.as_leaf(segment.context, x) for x in inputs()]
        build = functools.partial(run.capture.builder.build, report=run.report)
        return regional(cut, job, segment, (fakes, given), list(args), build)
    except Whole as why:
        job.whole = str(why)
        compat.graphs.as_dynamos(gm)
        return run.capture.builder.build(gm, inputs, run.report)


def _head(segment: Segment, pristine: list[fx.Node], state: dict) -> Callable[[fx.GraphModule, Job], int]:
    """The pass that, where splicing met something that needs real values, keeps the graph's head only."""

    def cut(gm: fx.GraphModule, job: Job) -> int:
        if job.cut is None:
            return 0
        if job.removes:
            raise Unfit
        tail, taken, moved = segment.tail(job.cut.last, job.cut.site[2])
        kept = {*pristine[: job.cut.last + 1], *(pristine[i] for i in moved), *job.emitted}
        group = _group(pristine, job.cut)
        output = gm.graph.output_node()
        for i in moved:  # behind the last marker, in front of everything that goes
            output.prepend(pristine[i])
        outputs: list = []

        def place(node: object) -> int:
            if node not in outputs:
                outputs.append(node)
            return outputs.index(node)

        state["leaves"] = [place(leaf) if isinstance(leaf, fx.Node) else None for leaf in job.cut.leaves]
        for i in taken:
            node = pristine[i]
            state["resumed"].append(("leaf", group[node]) if node in group else place(job.cut.written.get(node, node)))
        state["tail"] = tail
        output.args = (tuple(outputs),)
        dropped = [n for n in gm.graph.nodes if n not in kept and n is not output]
        for node in reversed(dropped):
            gm.graph.erase_node(node)
        return len(dropped)

    return cut


def _group(pristine: list[fx.Node], cut: CutSite) -> dict[fx.Node, int]:
    """The markers of the cut site, and what stands for what it is written with, by leaf."""
    behind = [(n, marker_of(n)) for n in pristine[cut.last + 1 :] if n.target is supply]
    supplied = {n: marker.leaf for n, marker in behind if marker.site == cut.site}
    found: dict[fx.Node, int] = {}
    for node in reversed(pristine[: cut.last + 1]):
        marker = marker_of(node) if is_marker(node) else None
        if marker is None or marker.name != cut.site[:2] or (found and marker.last):
            break
        found[node] = marker.leaf
    return {**found, **supplied}


def _fake(segment: Segment, run: SplicedRun, fakes: list, take: Take) -> Any:
    """The fake of an extra input."""
    value = source(run, take)
    constant = isinstance(take, TakesConstant)
    if constant and take.number:
        if raw_numbers(run):
            return value
        value = number(take, value)
    if not isinstance(value, torch.Tensor):
        return value
    facts = following.facts(value, fakes if constant else [])
    return compat.fakes.fake_like(segment.context, facts)


def source(run: SplicedRun, take: Take) -> Any:
    """The value of an extra input."""
    if isinstance(take, TakesConstant):
        return run.constants[take.slot]
    if isinstance(take, Value):
        return run.env[take]
    if isinstance(take, TakesMemory):
        return whole(run.constants[take.slot])
    module = run.modules(take.path)
    owner, _, name = take.name.rpartition(".")
    return getattr(module.get_submodule(owner), name)


NUMBERS = {"int": torch.int64, "float": torch.float64} | {name: dtype for dtype, name in EXACT.items()}


def raw_numbers(run: SplicedRun) -> bool:
    """Are lifted numbers given as they are? A graph that is traced once more, for its backward, would keep the first ones."""
    return run.capture.options.backend == "eager" and not run.plan.backs and run.plan.linear is None


def number(take: TakesConstant, value: object) -> torch.Tensor:
    """A lifted number as the 0-d tensor that the graph takes."""
    return torch.tensor(value, dtype=NUMBERS[take.kind])


def extras(run: SplicedRun, found: Variant) -> list:
    """The extra inputs of a call."""
    if not found.takes:
        return []
    raw = raw_numbers(run)
    values = []
    for take in found.takes:
        value = source(run, take)
        values.append(number(take, value) if not raw and isinstance(take, TakesConstant) and take.number else value)
    return values
