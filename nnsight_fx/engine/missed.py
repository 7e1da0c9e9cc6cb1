"""Errors of a run: an operation that did not take place, and a site that is not what the body was recorded for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import MissedSiteError, PlanMismatchError
from ..plan import tree
from ..plan.verbs import AtSite, Read, Skip, Sync, Write, place_of_site
from ..tracing.steps import ANY

if TYPE_CHECKING:
    from .run import Run

# The call took place, and the operation did not.
_PASSED = (
    ", but the run had passed it by then: an earlier line of the body has looked at a later site (at a number or an object "
    "in it, or at a value), or what is written comes from one. Touch sites in the model's order"
)


def missed_error(run: Run, missed: list[int]) -> MissedSiteError:
    """Why the first of the operations that a run `missed` did not take place."""
    for n in missed:
        op = run.plan.ops[n]
        asked = [m for m, _ in run.plan.needs[n] if m in run.plan.binds and (m, 0) not in run.env]
        if asked:
            b = run.plan.binds[asked[0]]
            why = (
                f"the backward at {run.lines[b]} did not pass that value: it is not on the way from the loss to what requires grad"
                if b < len(run.plan.ops)
                else f"{run.lines[-1]} looks at its numbers before a backward has run. Read it where it is, and look at it "
                "behind `loss.backward()`, or behind the block of `with loss.backward():`"
                if isinstance(run.plan.ops[-1].verb, Sync)
                else "no backward follows it. Read it before `loss.backward()`, or inside `with loss.backward():`"
            )
            return MissedSiteError(f"{run.lines[asked[0]]}: `.grad` was used, but {why}.")
        if isinstance(op.verb, Read | Write | Skip):
            path, kind, call = op.verb.site
            what = {Read: "read", Write: "written", Skip: "skipped"}[type(op.verb)]
            inside = path not in run.owner.operations.modules
            seen = run.counts.get((path, "input" if isinstance(op.verb, Skip) else kind), 0)
            missed_it = "the run never reached it"
            if isinstance(op.verb, Write) and seen > call:
                missed_it = "it came too late"
                why = (
                    "its value is computed behind a later site that the body has asked for. Compute it before that line"
                )
            elif seen:
                why = f"its {'operation ran' if inside else 'module was called'} {seen} time(s)"
                why += _PASSED if seen > call else ""
            elif inside:
                why = (
                    "that line was not run (its module was skipped, stopped before, or took another branch), or its `forward` had "
                    "begun when it was first asked for"
                )
            else:
                why = (
                    "its module was not called as a module in this run (it was skipped, stopped before, on a branch not taken, "
                    "or its parent uses its weight or `forward` directly: try the parent's `.source`)"
                )
            return MissedSiteError(
                f"{run.lines[n]}: `{path}.{kind}` (call {call}) was {what}, but {missed_it}: {why}. "
                "Everything else that was saved has been delivered."
            )
    return MissedSiteError(f"{run.lines[missed[0]]}: the run ended before this operation had what it needs.")


def check(run: Run, n: int, leaves: list, expected: tuple, spec: tree.Spec) -> None:
    """Is a site what the body was recorded for, when operation `n` reads it? `PlanMismatchError` where it is not."""
    read = run.plan.ops[n].verb
    assert isinstance(read, AtSite)
    site = place_of_site(read.site)
    advice = "Look at the value first (`tracer.apply(lambda h: h, value)` or `print(value)` syncs), so that the body follows the model."
    if spec is not None and spec != run.plan.specs[n]:
        raise PlanMismatchError(
            f"{run.lines[n]}: `{site}` has another structure than the body was recorded for: the model takes another way on this "
            f"input. {advice}"
        )
    for leaf, want in zip(leaves, expected, strict=False):
        got = (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf
        if isinstance(got, tuple) and isinstance(want, tuple) and len(got[0]) == len(want[0]):  # a padded length fits
            want = (tuple(n if m is None else m for m, n in zip(want[0], got[0], strict=True)), want[1])
        if isinstance(got, tuple) and isinstance(want, tuple) and got != want:
            raise PlanMismatchError(
                f"{run.lines[n]}: `{site}` has shape {got[0]} and dtype {got[1]}, but the body was recorded for {want[0]} and "
                f"{want[1]}: the model takes another way on this input. {advice}"
            )
        if want is not ANY and (type(got) is not type(want) or got != want):
            raise PlanMismatchError(
                f"{run.lines[n]}: `{site}` holds {_shown(leaf)}, but the body was recorded for {_shown(want)}: the model takes another "
                f"way on this input. {advice}"
            )


def _shown(leaf: object) -> str:
    """A leaf of a site, in an error."""
    return (
        "a tensor"
        if isinstance(leaf, torch.Tensor | tuple)
        else repr(leaf)
        if isinstance(leaf, bool | str | None)
        else type(leaf).__name__
    )
