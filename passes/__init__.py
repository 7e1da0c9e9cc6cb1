"""Compile passes over captured segments: each a plain function in a file of its own, in a visible tuple.

A pass is `def name(gm, job) -> int`: it changes `gm` in place and returns how many rewrites it made, 0 for none. Only
`run` lints and recompiles.
"""

from __future__ import annotations

if __name__ != "nnsight_fx.passes":
    # A checkout has these files under two names; a second copy of a pass would match none of the first one's markers.
    raise ImportError(f"`{__name__}` is `nnsight_fx.passes`: import it by that name")

from collections.abc import Callable, Collection, Sequence

import torch.fx as fx

from .batch_linears import batch_linears
from .blocks import blocks
from .conditional import conditional
from .differentiate import differentiate
from .erase import erase
from .expose import expose
from .functionalize import functionalize
from .job import Cut, Entry, Job
from .lift_constants import lift_constants
from .narrow import narrow
from .prune import prune
from .read_positions import read_positions
from .skip import skip
from .splice import splice
from .truncate import truncate

Pass = Callable[[fx.GraphModule, Job], int]

PIPELINE: tuple[Pass, ...] = (
    *(skip, splice, truncate, narrow, lift_constants, expose),
    *(blocks, erase, prune, read_positions, conditional, batch_linears, differentiate),
)


def run(
    gm: fx.GraphModule, job: Job, pipeline: Sequence[Pass] = PIPELINE, disable: Collection[str] = ()
) -> list[tuple[str, int, int]]:
    """Run `pipeline` over `gm` and return `(pass, rewrites, nodes after)` for each."""
    for step in pipeline:
        name = getattr(step, "__name__", None) or step.func.__name__  # type: ignore[attr-defined]
        if name not in disable:
            job.report.append((name, step(gm, job), len(gm.graph.nodes)))
    gm.graph.lint()
    gm.recompile()
    return job.report


__all__ = [
    "PIPELINE",
    "Cut",
    "Entry",
    "Job",
    "Pass",
    "batch_linears",
    "blocks",
    "conditional",
    "differentiate",
    "erase",
    "expose",
    "functionalize",
    "lift_constants",
    "narrow",
    "prune",
    "read_positions",
    "run",
    "skip",
    "splice",
    "truncate",
]
