"""`torch.utils.checkpoint`: which blocks of its are running, and that one shall not run again in the backward."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

from .probe import Name

_FRAME = Name(
    "torch.utils.checkpoint._CheckpointFrame",
    "behind a place that was changed in a checkpointed block, gradients of parameters alone are not refused on hooks",
)


def running() -> list[FrameType]:
    """The frames of torch's that stand around checkpointed blocks which the caller runs in, the innermost first."""
    module = sys.modules.get("torch.utils.checkpoint")
    found: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1) if module is not None else None
    while frame is not None:
        if frame.f_code.co_filename == module.__file__:  # type: ignore[union-attr]
            found.append(frame)
        frame = frame.f_back
    return found


def reentrant(frame: FrameType) -> bool:
    """Does the block run without recording, so that all of its gradients come from a second run?"""
    return frame.f_code.co_name == "forward"


def never_again(frame: FrameType, refuse: Callable) -> None:
    """Have `refuse` called where torch would run the block again, if this torch tells where that is."""
    generator = frame.f_locals.get("gen")
    inside = getattr(generator, "gi_frame", None)
    if inside is None:  # a frame of another purpose
        return
    kind, kept = _FRAME(), inside.f_locals.get("new_frame")
    if kind is None or not isinstance(kept, kind) or not hasattr(kept, "recompute_fn"):
        _FRAME.fails()
        return
    kept.recompute_fn = refuse
