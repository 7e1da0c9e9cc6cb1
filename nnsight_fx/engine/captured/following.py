"""Constants as wide as the batch or the prompt: a compiled variant takes them in every size that the model's inputs have.

A plan holds the sizes of its constants, so that a steering vector for each row makes another plan of each batch. Such plans are
*kin*: the same but for those sizes. A variant that was compiled with a constant's dimension as the batch's own symbol serves
all kin whose constants are as wide as their batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ... import compat
from ...passes.job import Take, TakesConstant

if TYPE_CHECKING:
    from .run import SplicedRun


def kin(key: tuple) -> tuple:
    """The key of a variant, for all plans that differ from its plan by sizes of constants alone."""
    (plan, *entry), *rest = key
    return (plan.kin, *entry), *rest


class Constant(NamedTuple):
    """A constant of a variant: its slot, and each of its sizes: a number, or the place of an input that has it."""

    slot: int
    sizes: tuple[int | tuple[int], ...]

    def fits(self, run: SplicedRun, args: tuple) -> bool:
        shape = run.constants[self.slot].shape
        wanted = (args[n[0]] if isinstance(n, tuple) else n for n in self.sizes)
        return all(size == n for size, n in zip(shape, wanted, strict=True))


def following(run: SplicedRun, fakes: list, takes: list[Take]) -> list[Constant]:
    """The constants of a variant's takes, if one of them is as wide as the batch or the prompt; else none."""
    slots = [take.slot for take in takes if isinstance(take, TakesConstant) and not take.number]
    found = [Constant(slot, _sizes(run.constants[slot], fakes)) for slot in slots]
    return found if any(isinstance(n, tuple) for each in found for n in each.sizes) else []


def facts(value: torch.Tensor, fakes: list) -> tuple:
    """Shape, strides, dtype, device and `requires_grad` of a constant's fake: sizes of the model's inputs are theirs."""
    sizes = [fakes[n[0]] if isinstance(n, tuple) else n for n in _sizes(value, fakes)]
    strides: list[object] = [*value.stride()]
    if any(isinstance(n, torch.SymInt) for n in sizes):  # it is contiguous
        step: Any = 1
        for i in reversed(range(len(sizes))):
            strides[i], step = step, step * sizes[i]
    return (tuple(sizes), tuple(strides), value.dtype, value.device, value.requires_grad)


def _sizes(value: torch.Tensor, fakes: list) -> tuple[int | tuple[int], ...]:
    """The sizes of a constant: `(i,)` for one that input `i`, a symbol, has as well."""
    if not value.is_contiguous():
        return tuple(value.shape)
    places = [compat.symbols.input_of_size(fakes, n, dim) for dim, n in enumerate(value.shape)]
    return tuple(n if i is None else (i,) for n, i in zip(value.shape, places, strict=True))
