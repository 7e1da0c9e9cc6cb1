"""Dynamo: the names and the fake values of one block in terms of another's."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from .given import fake
from .identities import Translator
from .tensors import memory, tree_map_only

if TYPE_CHECKING:
    from torch._guards import Source

NOWHERE: Any = object()


class Rerooted:
    """Where a thing of one module lies in another: `layers[0].mlp.scale` -> `layers[1].mlp.scale`."""

    def __init__(self, old: Source, new: Source):
        self.known: dict[Source, Source] = {old: new}

    def __call__(self, source: Source) -> Source:
        found = self.known.get(source)
        if found is None:
            fields = [(f.name, getattr(source, f.name)) for f in dataclasses.fields(source)]  # type: ignore[arg-type]
            changed = {name: self(x) for name, x in fields if isinstance(x, _source())}
            changed = {name: x for name, x in changed.items() if x is not getattr(source, name)}
            if NOWHERE in changed.values():
                found = NOWHERE
            else:
                found = dataclasses.replace(source, **changed) if changed else source  # type: ignore[type-var]
            self.known[source] = found
        return found


def _source() -> type:
    from torch._guards import Source

    return Source


class Values:
    """Fake values like others: tensors that share memory do so here, and one that was an input stands for the input."""

    def __init__(self, tx: Translator, given: list[tuple[torch.Tensor, torch.Tensor]]):
        self.mode: contextlib.AbstractContextManager = tx.fake_mode
        self.known = {id(old): new for old, new in given if isinstance(old, torch.Tensor)}
        self.held = [old for old, _ in given]
        self.memory = {memory(old): new.untyped_storage() for old, new in given if _strided(old)}

    def like(self, value: object) -> object:
        return tree_map_only(torch.Tensor, self._tensor, value)

    def _tensor(self, x: torch.Tensor) -> torch.Tensor:
        if id(x) not in self.known:
            self.held.append(x)
            self.known[id(x)] = self._made(x)
        return self.known[id(x)]

    def _made(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            made = self._plain(x)
        if x.requires_grad:
            made.requires_grad_()
            if not x.is_leaf:
                with self.mode, torch.enable_grad():
                    made = made.view_as(made)
        return made

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        if not _strided(x) or any(isinstance(n, torch.SymInt) for n in x.shape):
            with self.mode:
                return torch.empty_like(x)
        size = x.untyped_storage().nbytes()
        storage = self.memory.setdefault(memory(x), torch.UntypedStorage(size, device="meta"))
        made = torch.empty(0, dtype=x.dtype, device="meta").set_(storage, x.storage_offset(), x.shape, x.stride())
        return fake()(self.mode, made, x.device)


def _strided(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.layout is torch.strided
