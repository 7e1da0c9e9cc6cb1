"""Interventions in blocks that `torch.utils.checkpoint` runs once more, in the backward: there they would not take place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import torch

from ..compat.tensors import hook, version
from ..errors import NotRecordableError


def checkpointed() -> str | None:
    """Does the caller run in a checkpointed block? The name of torch's function around it."""
    module = sys.modules.get("torch.utils.checkpoint")
    frame: FrameType | None = sys._getframe(1) if module is not None else None
    while frame is not None:
        if frame.f_code.co_filename == module.__file__:  # type: ignore[union-attr]
            return frame.f_code.co_name
        frame = frame.f_back
    return None


def versions(leaves: list) -> list:
    """How often each tensor was changed in place."""
    return [version(x) if isinstance(x, torch.Tensor) and not x.is_inference() else None for x in leaves]


def refuse_backward(within: str, leaves: list, what: str, gradients: Callable[[], bool]) -> None:
    """Something was changed at a site in a checkpointed block (`within`): a backward through it is an error.

    torch runs the block again for it, and would take its gradients from values that are not changed. `gradients`: may the
    block have some even where what was changed has none.
    """

    def refuse(*_: object) -> NoReturn:
        raise NotRecordableError(
            f"{what} in a block that `torch.utils.checkpoint` runs again in the backward, where the intervention would not take "
            "place: the gradients would be of another computation. Turn checkpointing off (transformers: "
            "`model.gradient_checkpointing_disable()`), or trace under `torch.no_grad()`."
        )

    through = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    if within == "forward" or (not through and gradients()):  # reentrant: nothing in it has a gradient yet
        refuse()
    for x in through:
        hook(x, refuse)
