"""Taps: how a run gets at the gradients of a backward in its body, and puts others in their place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import compat
from ..plan.ambient import under
from ..plan.keys import Recorded, TensorSlot, Value
from ..plan.plan import Op
from ..plan.verbs import RunBackward

if TYPE_CHECKING:
    from .run import Run


class Taps:
    """The tensor hooks that one run has on the way of its gradients. It holds no run, so that a run goes when nobody has it."""

    def __init__(self):
        self.taps: dict[int, tuple[torch.Tensor, Any]] = {}  # gradient -> the tensor that has it, and its hook
        self.flowing: int | None = None  # the backward that runs

    def on_the_way(self, run: Run, key: Recorded) -> list:
        """The tensor that has a value's gradient, and which part of it, where the value is an invoke's rows."""
        return [*(run.bases.get(key, ()) if isinstance(key, Value) else ())] or [run.lookup(key)]

    def tap(self, run: Run, n: int, op: Op) -> None:
        """Gradient `n` is asked for: it arrives in the backward that follows."""
        of = op.first
        assert isinstance(of, Value | TensorSlot)
        tensor, *part = self.on_the_way(run, of)

        def arrived(gradient: torch.Tensor) -> torch.Tensor | None:
            if self.flowing is None or run.plan.binds[n] != self.flowing:
                return None
            own = run.rows(gradient, *part) if part else gradient
            mine = own.clone() if (n, 0) in run.plan.changed else own
            new = run.arrive(n, mine)
            if new is own:
                return None
            return run.put_rows(gradient, new, *part) if part else new

        self.taps[n] = (tensor, compat.tensors.hook(tensor, arrived))

    def differentiate(self, run: Run, n: int, op: Op, verb: RunBackward) -> None:
        """A backward of the body."""
        (loss, gradient), options = run.arguments(op)
        mine = [m for m, b in run.plan.binds.items() if b == n]
        self.flowing = n
        try:
            with under(op.ambient):
                if verb.returns:  # `torch.autograd.grad`: nothing is accumulated
                    inputs = [self.taps[m][0] for m in mine]
                    options.pop("inputs")
                    torch.autograd.grad(loss, inputs, gradient, allow_unused=True, **options)
                else:
                    torch.autograd.backward(loss, gradient, **options)
        except Exception as e:
            e.add_note(f"nnsight_fx: in the backward at {run.lines[n]}")
            run.written = None
            raise
        finally:
            self.flowing = None
            self.remove(mine)

    def remove(self, gradients: list[int] | None = None) -> None:
        """Take the hooks of some gradients off, or all."""
        for n in list(self.taps) if gradients is None else gradients:
            if n in self.taps:
                self.taps.pop(n)[1].remove()
