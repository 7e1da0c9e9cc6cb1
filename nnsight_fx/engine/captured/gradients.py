"""A body's backward inside a captured graph: when it can be there, and what is left to do when the graph has run."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch

from ...compat.tensors import shares_memory
from ...passes.job import NotDifferentiable
from ...plan.keys import Plain

if TYPE_CHECKING:
    from .run import SplicedRun
    from .variants import Variant


def differentiable(run: SplicedRun, args: tuple) -> bool:
    """Can the backward passes of a run's plan be part of the segment that it is about to run?

    `NotDifferentiable`, before anything has run, says why not.
    """
    plan = run.plan
    if not plan.backs or not run.closed or run.segments_run != 1:
        return False
    if any(op.kwargs.get("create_graph") == Plain(bool, True) for n in plan.backs if (op := plan.ops[n])):
        raise NotDifferentiable("`create_graph=True`")
    inputs = [x for x in [*args, *run.constants] if isinstance(x, torch.Tensor) and x.requires_grad]
    if any(not x.is_leaf for x in inputs):
        raise NotDifferentiable("an input has an autograd graph of its own")
    if any(x._backward_hooks or x._post_accumulate_grad_hooks for x in inputs):  # type: ignore[attr-defined]
        raise NotDifferentiable("a parameter has a gradient hook")
    return True


def settle(found: Variant, inputs: list, outputs: list) -> list:
    """Accumulate the gradients of leaves; give the other outputs the place on the autograd graph that they have in eager."""
    assert found.requires is not None
    outputs = list(outputs)
    n = len(found.requires)
    for i, grad in zip(found.accumulates, outputs[n:], strict=True):
        leaf = inputs[i]
        if leaf.grad is None:
            held = any(isinstance(x, torch.Tensor) and shares_memory(x, grad) for x in outputs[:n])
            leaf.grad = grad.clone() if held else grad
        else:
            leaf.grad += grad
    return [
        _Freed.apply(x, torch.empty(0, requires_grad=True)) if freed else x
        for x, freed in zip(outputs, found.requires, strict=False)
    ]


class _Freed(torch.autograd.Function):
    """A value whose autograd graph a backward has been through: as in eager, there is no second time."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, *gradients: object) -> NoReturn:
        raise RuntimeError(
            "Trying to backward through the graph a second time: the body's own backward has freed it. Say "
            "`backward(retain_graph=True)` there."
        )
