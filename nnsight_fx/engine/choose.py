"""How a request runs: the one decision, and the reason that `explain()` prints.

`choose` says it before anything runs. What only the run can find out (a graph break, a failed trace) changes it there; the
run's `as_it_ran()` is what came of it.
"""

from __future__ import annotations

import torch.nn as nn

from .captured.capture import Capture
from .captured.removal import removable
from .how import CHANGES, FIRST, INSIDE, NOTICED, UNCOMPILED, How
from .request import Request


def choose(request: Request, capture: Capture | None, module: nn.Module) -> How:
    """How a request runs on a model; `capture` is what its trace or the model is compiled as, if it is."""
    plan = request.plan
    if capture is None:
        return How(why=UNCOMPILED)
    refused = capture.refusal(plan, request.sites, request.batch.flat[0])
    if refused is not None:
        return How(why=refused)
    unread = not request.generates
    if plan.recapture == "changes":
        return How("captured", "own", unread=unread, why=CHANGES)
    frames = capture.markers.operations.frames(plan)
    if plan.recapture == "removes":
        why = INSIDE if frames else "" if capture.shares(request.fn, plan) else FIRST
        why = why or ("" if removable(plan, request.tape, module) else NOTICED)
        return How("captured", "own" if why else "shared", not why, unread, why)
    return How("captured", "source" if frames else "shared", unread=unread)
