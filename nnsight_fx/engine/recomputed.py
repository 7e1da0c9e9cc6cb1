"""Interventions in blocks that `torch.utils.checkpoint` runs once more, in the backward: there they would not take place."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import torch

from ..compat import checkpoints
from ..compat.tensors import hook, version
from ..errors import NotRecordableError


def versions(leaves: list) -> list:
    """How often each tensor was changed in place."""
    return [version(x) if isinstance(x, torch.Tensor) and not x.is_inference() else None for x in leaves]


def refuse_backward(within: list[FrameType], leaves: list, what: str, gradients: Callable[[], bool]) -> None:
    """Something was changed at a site in checkpointed blocks (`within`, torch's frames around them): a backward through them is
    an error.

    torch runs a block again for it, and would take its gradients from values that are not changed: also those of parameters
    behind the site, for which no gradient passes what was changed. `gradients`: may the block have some even where what was
    changed has none.
    """

    def refuse(*_: object) -> NoReturn:
        raise NotRecordableError(
            f"{what} in a block that `torch.utils.checkpoint` runs again in the backward, where the intervention would not take "
            "place: the gradients would be of another computation. Turn checkpointing off (transformers: "
            "`model.gradient_checkpointing_disable()`), or trace under `torch.no_grad()`."
        )

    through = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    untold = not through and gradients()
    if untold or any(map(checkpoints.reentrant, within)):  # reentrant: nothing has a gradient yet
        refuse()
    for frame in within:
        checkpoints.never_again(frame, refuse)
    for x in through:
        hook(x, refuse)
