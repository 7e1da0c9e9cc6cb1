"""Writes to sites and skips of modules: does the new value take the old one's place with nothing in the model noticing?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import NotRecordableError, OutOfOrderError, PaddedLengthUnknown
from ..lines import user_line
from ..plan import tree
from ..plan.keys import Keep, Value
from ..plan.verbs import Batched, Read, Site, Skip, Write, name_of_site
from .accesses import place_of
from .lazy import LazyTensor, key_of, tape_of
from .steps import Missing, SiteMeta, nothing

if TYPE_CHECKING:
    from .tape import Tape


class Writes:
    """Those of one recording."""

    def __init__(self, tape: Tape):
        self.tape = tape
        self.assumed: list[tuple[str, tuple, tuple]] = []  # writes that fit if the padded length is theirs

    def write(self, site: Site, value: object) -> None:
        """Set a site to `value`, a tree that may hold `Keep(i)` for what stays."""
        if value is None and site[1] == "output":
            raise NotRecordableError(
                f"{user_line()}: `{name_of_site(site)} = None` cannot be recorded: to a module hook, None means no change. Do not run the "
                "module instead (`.skip(None)`), or write a tensor."
            )
        self.tape.accesses.settle()
        meta = self.tape.accesses.meta(site)
        if type(value) is list and isinstance(meta, SiteMeta) and tree.is_tuple(meta.spec, len(value)):
            value = tuple(value)  # the model goes on with the structure that it made
        leaves, spec = tree.flatten(value)
        leaves = [self.tape.objects.written(x, site) for x in leaves]
        order = self.written_order([*leaves, *(block.predicate for block in self.tape.conditions.blocks)])
        if (
            order is not None
            and isinstance(meta, SiteMeta)
            and meta.order >= 0
            and order[0] > meta.order
            and order[2] != self.tape.invoke.index
        ):
            self.tape.accesses.splits.add(self.tape.invoke.index)
        elif order is not None and isinstance(meta, SiteMeta) and meta.order >= 0 and order[0] > meta.order:
            raise OutOfOrderError(
                f"{user_line()}: `{name_of_site(site)}` is written with a value that depends on `{name_of_site(order[1])}`, which the model "
                "computes later. Write it to a later site, or run two traces."
            )
        self.tape.accesses.check_passed(site, "written")
        if isinstance(meta, SiteMeta):
            leaves = [self._to_device(x, meta, i) for i, x in enumerate(leaves)]
        fits = isinstance(meta, SiteMeta) and self.fits(site, leaves, spec, meta)
        self.tape.modules.check_visited(site, fits)
        self._check_conditional(site, leaves, spec, meta, fits)
        self.tape.recapture = self.tape.recapture if fits else "changes"
        self.tape.reshaped = self.tape.reshaped or not fits
        batched: Batched | None = None
        if isinstance(meta, SiteMeta):  # another structure has no rows of other invokes
            batched = meta.batched if spec == meta.spec else (False,) * len(leaves)
        stays = [fits and not isinstance(x, torch.Tensor) for x in leaves]  # what fits and is no tensor is what it was
        self.tape.add(
            Write(site, spec, batched, fits),
            (tuple(Keep(i) if same else x for i, (x, same) in enumerate(zip(leaves, stays, strict=True))),),
            result=nothing,
        )
        self.tape.accesses.touch(site)
        self.tape.operands.handed.take(site, name_of_site(site), leaves)
        tree_value = tree.unflatten(leaves, spec, value)
        self.tape.invoke.values.pop(site, None)
        self.tape.invoke.containers.pop(site, None)
        if not self.tape.conditions.blocks and not any(isinstance(x, Keep) for x in leaves):
            self.tape.invoke.values[site] = tree_value
            self.tape.accesses.follow_container(site, tree_value)
        self.tape.invoke.metas = {
            s: m
            for s, m in self.tape.invoke.metas.items()
            if not self.tape.reshaped or m.order <= getattr(meta, "order", -1)
        }
        self.tape.invoke.metas.pop(site, None)

    def _check_conditional(
        self, site: Site, leaves: list, spec: tree.Spec, meta: SiteMeta | Missing, fits: bool
    ) -> None:
        """What is written in a `tracer.cond` can be there or not, and the model goes on alike."""
        if fits or not self.tape.conditions.blocks:
            return

        def like(new: object, old: object) -> bool:
            if not isinstance(new, torch.Tensor) or not isinstance(old, torch.Tensor):
                return new is old
            fake = self.tape.operands.fake(new)
            return fake.shape == old.shape and fake.dtype == old.dtype

        if not isinstance(meta, SiteMeta) or spec != meta.spec or not all(map(like, leaves, meta.leaves)):
            raise NotRecordableError(
                f"{user_line()}: `{name_of_site(site)}` is written in a `tracer.cond` with another shape, dtype or structure than it has. "
                "Decide in Python, `if value:`, which runs the model up to there."
            )

    def write_input(self, site: Site, value: object) -> None:
        """Set the first argument, and leave the others."""
        meta = self.tape.accesses.meta(site)
        if isinstance(meta, SiteMeta):
            args, kwargs = tree.unflatten([Keep(i) for i in range(len(meta.leaves))], meta.spec)
        else:
            args, kwargs = self.tape.accesses.read(site)
        if args:
            args = (value, *args[1:])
        elif kwargs:
            kwargs = {**kwargs, next(iter(kwargs)): value}
        else:
            raise ValueError(f"{user_line()}: `{site[0]}` is called without arguments: there is no input to write")
        self.write(site, (args, kwargs))

    def written_order(self, leaves: list) -> tuple[float, Site, int] | None:
        keys = [key_of(x) for x in leaves if isinstance(x, LazyTensor) and tape_of(x) is self.tape]
        order = self.tape.accesses.order
        found = [order[key.op] for key in keys if isinstance(key, Value) and key.op in order]
        return max(found, key=place_of) if found else None

    def _to_device(self, leaf: object, meta: SiteMeta, i: int) -> object:
        if isinstance(leaf, torch.Tensor) and i < len(meta.leaves) and isinstance(meta.leaves[i], torch.Tensor):
            device = meta.leaves[i].device
            if self.tape.operands.device_of(leaf) != device:
                return leaf.to(device)
        return leaf

    def fits(self, site: Site, leaves: list, spec: tree.Spec, meta: SiteMeta) -> bool:
        """Can the written tree take the place of the old one with nothing in the model's Python noticing?"""
        if spec != meta.spec or self._parts_one(site, leaves, meta):
            return False
        for i, (new, old) in enumerate(zip(leaves, meta.leaves, strict=True)):
            if isinstance(new, Keep) and new.index == i:
                continue
            if isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor):
                if not isinstance(new, LazyTensor):
                    self.tape.operands.key_of(new)
                fake = self.tape.operands.fake(new)
                if meta.batched[i] and not _alike(fake.shape[1:], old.shape[1:]):
                    raise RuntimeError(
                        f"{user_line()}: `{name_of_site(site)}` holds the rows of several invokes: the written rows have shape "
                        f"{tuple(fake.shape)}, the site {tuple(old.shape)}. Only dimension 0 may differ."
                    )
                if not _alike(_meta_of(fake), _meta_of(old)):
                    return False
                if any(isinstance(n, torch.SymInt) for n in old.shape):
                    told = f"{user_line()}: `{name_of_site(site)}` is written with a value"
                    self.assumed.append((told, tuple(fake.shape), tuple(old.shape)))
            elif type(new) is not type(old) or (new is not old and new != old):
                return False
        return True

    def _parts_one(self, site: Site, leaves: list, meta: SiteMeta) -> bool:
        """Are leaves that are one tensor, as attention's query and key, written apart? The model's Python can see that."""

        def now(i: int) -> tuple | int:
            x = leaves[i]
            if isinstance(x, Keep):
                return "kept", meta.same[x.index]
            key = key_of(x) if isinstance(x, LazyTensor) and tape_of(x) is self.tape else None
            read = self.tape.ops[key.op].verb if isinstance(key, Value) else None
            own = isinstance(read, Read) and read.site == site
            return ("kept", meta.same[key.leaf]) if own and isinstance(key, Value) else id(x)

        return any(now(i) != now(first) for i, first in enumerate(meta.same))

    def skip(self, path: str, call: int, value: object) -> None:
        """The module's `forward` is not run; its output is `value`."""
        site = (path, "input", call)
        self.tape.accesses.check_passed(site, "skipped")
        self.tape.modules.check_visited(site, False)
        leaves, spec = tree.flatten(value)
        leaves = [self.tape.objects.written(x, site) for x in leaves]
        out = self.tape.accesses.meta((path, "output", call))
        batched = out.batched if isinstance(out, SiteMeta) and len(out.batched) == len(leaves) else None
        fits = isinstance(out, SiteMeta) and self.fits((path, "output", call), leaves, spec, out)
        self.tape.recapture = self.tape.recapture or "removes" if fits else "changes"
        self.tape.reshaped = self.tape.reshaped or not fits
        self.tape.add(Skip((path, "output", call), spec, batched), (tuple(leaves),), result=nothing)
        self.tape.accesses.touch(site)
        self.tape.operands.handed.take((path, "output", call), f"{path}.output", leaves)
        if self.tape.reshaped:
            self.tape.invoke.metas = {
                s: m for s, m in self.tape.invoke.metas.items() if m.order <= self.tape.invoke.order
            }


def _meta_of(t: torch.Tensor) -> tuple:
    return (tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad)


def _alike(new: object, old: object) -> bool:
    """Are they equal? A padded length that is not known yet is taken to be the one that was written; the run compares."""
    if isinstance(new, tuple) and isinstance(old, tuple):
        return len(new) == len(old) and all(map(_alike, new, old))
    try:
        return bool(new == old)
    except PaddedLengthUnknown:
        return True
