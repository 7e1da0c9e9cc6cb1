"""Real tensors that a body writes to sites: from then on the model's value and the user's own tensor are one.

A change in place of the site changes the user's tensor, as in eager code. In a trace that is told once: with both lines where
the body changes the site itself, else, when the run is over, with the line of the write. A cell of a sweep changes a copy, so
that no cell sees what another has done.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..compat.modes import NoTorchFunction
from ..compat.tensors import memory, version, whole
from ..lines import Line, user_line
from ..plan.keys import TensorSlot, facts
from ..plan.verbs import Site


class Written(NamedTuple):
    """A real tensor that was written to a site, where, and how often it had been changed then."""

    name: str
    line: Line
    tensor: torch.Tensor
    seen: int | None


class Handed:
    """What one recording has written to sites, by its memory."""

    def __init__(self, constants: list, slots: dict[int, TensorSlot], watch: Callable[[torch.Tensor], object]):
        self.constants, self.slots, self.watch = constants, slots, watch
        self.apart = False  # is it of a cell of a sweep
        self.lines: dict[object, Written] = {}  # by memory, and by site
        self.made: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()  # by the body itself
        self.copies: dict[int, torch.Tensor] = {}  # memory of the cell's own
        self.told = False

    def take(self, site: Site, name: str, leaves: list) -> None:
        """Note the real tensors that are written to a site."""
        self.lines.pop(site, None)
        for x in leaves:
            if type(x) is torch.Tensor and x.layout is torch.strided and not x.requires_grad:
                seen = None if x.is_inference() else version(x)
                entry = self.lines.setdefault(memory(x), Written(name, user_line(), x, seen))
                self.lines.setdefault(site, entry)

    def note(self, result: object) -> None:
        """Note what the body made of real tensors: nobody else has it."""
        if type(result) is torch.Tensor and not result._is_view():
            self.made[id(result)] = result

    def holds(self, x: object) -> bool:
        """Does a real tensor lie in the memory of one that was written to a site? Then the model may change it in place."""
        return type(x) is torch.Tensor and x.layout is torch.strided and bool(self.lines) and memory(x) in self.lines

    def changes(self, x: object, site: Site | None) -> None:
        """A value is about to be changed in place; `site` is where a recorded one was read."""
        if not self.lines:
            return
        where = memory(x) if type(x) is torch.Tensor and x.layout is torch.strided else site
        if self.apart:
            for slot, constant in enumerate(self.constants):
                self.constants[slot] = self.own(constant, slot)
                if constant is not self.constants[slot] and memory(constant) == where:
                    self.watch(constant)
        elif where in self.lines and not self.told:
            entry = self.lines[where]
            what = f"was written with a tensor of yours at {entry.line}, and this line changes it in place"
            self._tell(entry, user_line(), what)

    def own(self, x: Any, slot: int) -> Any:
        """The cell's copy of a tensor, or of a view of one, that was written to a site; anything else as it is."""
        if not self.holds(x) or x.requires_grad:
            return x
        where = memory(x)
        with NoTorchFunction(), torch.no_grad():
            if where not in self.copies:
                self.copies[where] = whole(x).clone()  # other views of it are to come
            copy = self.copies[where].view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())
        self.slots[id(copy)] = self.slots.get(id(x), TensorSlot(slot, facts(x)))
        return copy

    def over(self) -> None:
        """The run is over: has what came behind a write changed a tensor of the user's?"""
        for entry in [] if self.apart else self.lines.values():
            if not self.told and entry.seen is not None and version(entry.tensor) != entry.seen:
                what = "is written with a tensor of yours, which the model, or a change at a later site, then changed in place"
                self._tell(entry, entry.line, what)

    def _tell(self, entry: Written, here: Line, what: str) -> None:
        if id(entry.tensor) in self.made:
            return
        self.told = True
        warnings.warn_explicit(
            f"nnsight_fx: {here}: `{entry.name}` {what}: your tensor changes too, as in eager code. "
            f"Write a copy: `{entry.name} = x.clone()`.",
            UserWarning,
            *here,
        )
