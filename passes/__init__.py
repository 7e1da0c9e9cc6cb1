"""Compile passes over captured segments: each a plain function in a file of its own, in a visible tuple.

A pass is `def name(gm, job) -> int`: it changes `gm` in place and returns how many rewrites it made, 0 for none. Only
`run` lints and recompiles.
May import: `plan/`, `capture/`, `compat/`, the ground. Start with `splice.py`; CONTRIBUTING.md shows how to add one.
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
from .job import CutSite, Job, Progress
from .lift_constants import lift_constants
from .linearize import linearize
from .narrow import narrow
from .prune import prune
from .read_positions import read_positions
from .skip import skip
from .splice import splice
from .truncate import truncate

Pass = Callable[[fx.GraphModule, Job], int]

PIPELINE: tuple[Pass, ...] = (
    *(skip, splice, truncate, narrow, lift_constants, expose),
    *(blocks, erase, prune, read_positions, conditional, batch_linears, differentiate, linearize),
)

# These round differently: the backends `eager` and `aot_eager`, which keep the model's bits, go without them.
ROUNDS = frozenset({"read_positions", "batch_linears"})

# Without these a plan would not take effect, or not run. All others can be left out.
NEEDED = frozenset({"splice", "lift_constants", "expose", "conditional", "differentiate", "linearize"})
OPTIONAL = frozenset({step.__name__ for step in PIPELINE} | {"demand", "causal"}) - NEEDED


def pipeline(given: Sequence) -> tuple[Pass, ...]:
    """`(..., mine)` as passes: `...` stands for the library's own.

    Raises:
        ValueError: what is no function, what stands in front of `splice`, or no `...` and no `splice`: then no intervention
            would take place.
    """
    whole = tuple(step for each in given for step in (PIPELINE if each is Ellipsis else (each,)))
    strange = next((step for step in whole if not callable(step)), None)
    if strange is not None:
        raise ValueError(f"a pass is a function `(gm, job) -> int`, not {strange!r}")
    missing = [step.__name__ for step in PIPELINE if step.__name__ not in OPTIONAL and step not in whole]
    if missing:
        raise ValueError(
            f"passes without {', '.join(f'`{name}`' for name in missing)} cannot run a plan: `...` stands for the library's own, `passes=(..., mine)`"
        )
    early = next((step for step in whole[: whole.index(splice)] if step not in PIPELINE), None)
    if early is not None:
        raise ValueError(
            f"the pass `{getattr(early, '__name__', early)}` stands in front of `splice`, which needs the graph as it was captured: put it behind"
        )
    return whole


def run(
    gm: fx.GraphModule, job: Job, pipeline: Sequence[Pass] = PIPELINE, disable: Collection[str] = ()
) -> list[tuple[str, int, int]]:
    """Run `pipeline` over `gm` and return `(pass, rewrites, nodes after)` for each."""
    for step in pipeline:
        name = getattr(step, "__name__", None) or step.func.__name__  # type: ignore[attr-defined]
        if name in disable:
            continue
        try:
            rewrites = step(gm, job)
            if step not in PIPELINE:
                gm.graph.lint()
        except Exception as error:
            error.add_note(f"nnsight_fx: in the pass `{name}`")
            raise
        job.report.append((name, rewrites or 0, len(gm.graph.nodes)))
    gm.graph.lint()
    gm.recompile()
    return job.report


__all__ = [
    "OPTIONAL",
    "PIPELINE",
    "ROUNDS",
    "CutSite",
    "Progress",
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
    "linearize",
    "narrow",
    "pipeline",
    "prune",
    "read_positions",
    "run",
    "skip",
    "splice",
    "truncate",
]
