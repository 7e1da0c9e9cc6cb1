"""`retain_grad` in a body.

torch's own holds a weak reference to its tensor, and no tensor with one can take the place of a recorded value. So the
run hooks the tensor, and what is delivered for it gets the gradients.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from .. import compat

_NAME = "_nnsight_retained"


class RetainedGrad:
    """The gradient of a value. `part` is `(start, rows)` where the value is an invoke's rows of `tensor`."""

    def __init__(self, tensor: torch.Tensor, part: tuple[int, int] | None = None):
        self.part, self.gradient = part, tensor.grad if tensor.retains_grad else None
        self.owner: Any = lambda: None
        self.handle = compat.tensors.hook(tensor, self.arrive)

    def arrive(self, gradient: torch.Tensor) -> None:
        own = gradient if self.part is None else gradient.narrow(0, *self.part)
        owner = self.owner()
        before = self.gradient if owner is None else owner.grad
        after = own.clone(memory_format=torch.contiguous_format) if before is None else before + own
        if owner is None:
            self.gradient = after
        else:
            owner.grad = after

    def give(self, value: torch.Tensor, same: bool) -> None:
        """`value` has been delivered. `same`: it lies where the run's tensor lay, and torch does the rest."""
        if not value.requires_grad:
            return
        value.retain_grad()
        value.grad = self.gradient
        self.gradient = None
        if same and self.part is None:
            self.handle.remove()
        else:
            self.owner = weakref.ref(value)


def retain(value: torch.Tensor, tensor: torch.Tensor, part: tuple[int, int] | None) -> None:
    """Keep the gradient of `value`, which is `part` of `tensor`."""
    if not value.requires_grad:
        value.retain_grad()  # torch's own refusal
    if _NAME not in vars(value):
        setattr(value, _NAME, RetainedGrad(tensor, part))


def retained(value: torch.Tensor) -> RetainedGrad | None:
    """What was kept for a value; it is torch's own where a function of the user's called `retain_grad`."""
    kept = vars(value).pop(_NAME, None)
    return RetainedGrad(value) if kept is None and value.retains_grad else kept
