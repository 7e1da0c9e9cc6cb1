"""Plans that run on the hook engine though the model is compiled, as far as it is known before anything runs."""

from __future__ import annotations

import torch

from ...capture.markers import Markers
from ...compat.fakes import with_attributes
from ...plan.plan import InterventionGraph
from ...plan.verbs import CallModule
from ...scan.wave_sites import WaveSites

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def refusal(
    plan: InterventionGraph, sites: WaveSites, inputs: list, markers: Markers, symbolic: bool = False
) -> str | None:
    """Why a plan runs on the hook engine with these inputs, if it does. `symbolic`: the capture is."""
    own = next((type(x) for x in inputs if isinstance(x, torch.Tensor) and type(x) not in _PLAIN), None)
    if own is not None:
        return f"hook engine: the model is called with a {own.__name__}, a tensor of a class of its own"
    named = with_attributes(inputs)
    put = f"`{named}` on an input" if named else sites.signature.scan.attributes
    if put is not None:
        return f"hook engine: a tensor has an attribute, which behind a module's border would be lost: {put}"
    if plan.sees_objects:
        return f"hook engine: the body looks at objects, or at a site that no scan could tell{sites.ended()}"
    if symbolic and markers.operations.frames(plan):
        return "hook engine: the body looks inside a module (`.source`), which a symbolic capture does not"
    if plan.retains_rows:
        return "hook engine: an invoke retains the gradient of its rows (`retain_grad`)"
    if plan.syncs and sites.signature.scan.ended is not None:
        return f"hook engine: the body looks at a value, and no scan could tell all sites behind it{sites.ended()}"
    called = {verb.path for _, _, verb in plan.of_kind(CallModule)}
    odd = next((f"`{path}`, which the body calls, holds {why}" for path in called if (why := sites.odd(path))), None)
    if odd is not None or plan.holds_odd:
        return f"hook engine: {odd or 'the body calls a function on packed weights'}"
    if plan.chooses:
        return "hook engine: a `tracer.cond` decides whether the model skips a call, or stops"
    return None
