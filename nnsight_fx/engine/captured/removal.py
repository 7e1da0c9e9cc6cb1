"""Skips and stops that need no capture of their own: passes make them in the graph that all plans share.

That is right where the model's Python has nothing to do with what is left out. A run tries it (`SplicedRun.removes`); where
a pass finds that it does not hold, `Unfit` leads back to the capture half before anything has run.
"""

from __future__ import annotations

import torch
import torch.nn as nn

from ...compat.modules import comes_and_goes, hooked_everywhere
from ...compat.transformers import collects_states
from ...errors import PlanMismatchError
from ...passes.job import Job, Unfit
from ...plan import tree
from ...plan.plan import InterventionGraph
from ...plan.tree import PLAIN
from ...plan.verbs import Apply, Skip, Sync
from ...tracing.steps import SiteMeta
from ...tracing.tape import Tape


def removable(plan: InterventionGraph, tape: Tape, root: nn.Module) -> bool:
    """Can everything that this plan leaves out be left out without the model's Python noticing?"""
    if plan.recapture != "removes" or any(isinstance(op.verb, Apply | Sync) for op in plan.ops):
        return False
    if hooked_everywhere() or any(m._forward_hooks_always_called for m in root.modules()):
        return False
    return all(_alone(plan, tape, root, path, call) for path, calls in plan.skips.items() for call in calls)


def _alone(plan: InterventionGraph, tape: Tape, root: nn.Module, path: str, call: int) -> bool:
    """Is a module skipped for all rows, without hooks, and without an argument that it could change?"""
    skips = [op for _, op, verb in plan.of_kind(Skip) if verb.site == (path, "output", call)]
    skippers = {plan.groups.rows[op.invoke] for op in skips}
    found = tape.sites.lookup(tape, (path, "input", call))
    if not plan.groups.inputs <= skippers or not isinstance(found, SiteMeta) or _hooked(root.get_submodule(path)):
        return False
    arguments = [spec for part in tree.parts(found.spec) for spec in tree.parts(part)]
    return not any(tree.holds(spec, tree.MUTABLE) for spec in arguments) and all(
        isinstance(x, (torch.Tensor, *PLAIN)) for x in found.leaves
    )


def _hooked(module: nn.Module) -> bool:
    """Would calling the module call Python beside its forward, or a part of it count its calls?"""
    for m in module.modules():
        theirs = [h for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()) if not comes_and_goes(h)]
        if theirs or m._backward_hooks or m._backward_pre_hooks:
            return True
        if m is not module and any(collects_states(h) for h in m._forward_hooks.values()):
            return True
    return False


def check(job: Job, tries: bool) -> None:
    """After the passes: is everything left out that the plan leaves out of this segment?

    `Unfit` when it is not and the run only `tries` to do without a capture of its own; else it is too late for that.
    """
    plan = job.plan
    if tries:
        wanted: set = {(path, "output", call) for path, calls in plan.skips.items() for call in calls}
        if plan.stops:
            wanted = {*(s for s in wanted if s in job.exit.skipped), None}
        if wanted - job.removed:
            raise Unfit
    for path, kind, call in set(job.exit.skipped) - set(job.entry.skipped) - job.removed:
        job.exit.skip_parts((path, kind, call), job.lines)  # a `SkipError` where only some of the invokes skip
        if (path, "skip", call) not in job.half:
            n = next(n for n in plan.touches[(path, kind, call)] if isinstance(plan.ops[n].verb, Skip))
            raise PlanMismatchError(
                f"{job.lines[n]}: `{path}` is skipped after a sync point has begun the captured run, which cannot leave it out any "
                "more. Skip it before the sync point, or trace with `compile=False`."
            )
