"""Reads of sites, and the order in which the body touches them: the model passes each site once."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..compat.fakes import FakeTensor
from ..compat.modes import NoTorchFunction
from ..compat.tensors import memory, wraps_tensors
from ..errors import NotRecordableError, OutOfOrderError
from ..lines import Line, user_line
from ..plan import tree
from ..plan.interleave import observed
from ..plan.keys import Value
from ..plan.plan import Op
from ..plan.verbs import EVERY, Call, Grad, Observation, Observe, Reach, Read, Save, Site, Write, name_of_site
from .gradients import LATE
from .lazy import LazyTensor, fake_in
from .nested import refuse_nested
from .steps import ANY, Beaten, Missing, SiteMeta, nothing

if TYPE_CHECKING:
    from .tape import Tape

place_of = operator.itemgetter(0)


class Accesses:
    """Those of one recording."""

    def __init__(self, tape: Tape):
        self.tape = tape
        # Of each operation: the latest site that it depends on, that site's place, and the invoke that read it.
        self.order: dict[int, tuple[float, Site, int]] = {}
        # Invokes that need another forward, because they use early what an earlier invoke has late.
        self.splits: set[int] = set()
        self.passed: tuple[Site, Line] | None = None  # how far a sync point has run the model
        # The site that never came, and the line that ran the model to its end for it.
        self.over: tuple[Site, Line] | None = None

    def place(self, n: int, op: Op) -> None:
        """Where in the model's order the results of an operation exist."""
        verb = op.verb
        if isinstance(verb, Grad):
            self.order[n] = (LATE, ("the gradient", "", 0), self.tape.invoke.index)
            return
        if isinstance(verb, Read):
            meta = self.tape.invoke.metas.get(verb.site)
            self.order[n] = (meta.order if meta is not None else -1, verb.site, self.tape.invoke.index)
            return
        found = [self.order[v] for v, _ in self.tape.step.needs if v in self.order]
        if found:
            at = self.order[n] = max(found, key=place_of) if len(found) > 1 else found[0]
            if (
                verb.effect == "inplace"
                and isinstance(verb, Call)
                and at[0] > self.tape.invoke.order
                and at[2] != self.tape.invoke.index
            ):
                self.splits.add(self.tape.invoke.index)

    def meta(self, site: Site) -> SiteMeta | Missing:
        """What is known of a site, given what was recorded so far."""
        if site in self.tape.modules.visits:
            return self.tape.invoke.metas.setdefault(site, self.tape.modules.visits[site][0])
        if site not in self.tape.invoke.metas:
            with NoTorchFunction():  # the scan's own work is nobody's to record
                found = self.tape.sites.lookup(self.tape, site)
            if isinstance(found, Missing):
                return found
            self.tape.invoke.metas[site] = found
        return self.tape.invoke.metas[site]

    def read(self, site: Site) -> Any:
        """The value of a site: its tree, with lazy tensors, and what stands for objects (a KV cache)."""
        invoke = self.tape.invoke
        if invoke.containers:
            self.settle()
        if site in invoke.values:
            self.touch(site)
            return invoke.values[site]
        again = self.tape.beaten((site, invoke.index))
        if again is not None:
            return self._read_again(site, again)
        self.check_passed(site, "read")
        meta = self.meta(site)
        opaque = isinstance(meta, SiteMeta) and meta.opaque
        if not isinstance(meta, SiteMeta) or meta.guesses_numbers(site[1]):
            value = self._read_live(site)
        else:

            def result() -> Any:
                _check_plain(site, meta.leaves)
                return tree.unflatten(list(meta.leaves), meta.spec, meta.like)

            before = self.tape.step
            value = self.tape.add(Read(site, meta.batched, _expected(meta)), result=result, sizes=meta.sizes)
            if not opaque:
                self.tape.beat(before, (site, self.tape.invoke.index), meta)
        self.tape.invoke.values[site] = value
        self.touch(site)
        self.follow_container(site, value)
        return value

    def _read_again(self, site: Site, again: Beaten) -> object:
        """A read that other recordings have made behind the same lines."""
        invoke, meta = self.tape.invoke, again.meta
        assert meta is not None
        invoke.metas[site] = meta
        value = invoke.values[site] = self.tape.advance(again.step, again.op)
        self.touch(site)
        if again.step.spec is not None:
            self.follow_container(site, value)
        return value

    def reaches(self, site: Site) -> bool:
        """Does the run come by a site? A sync point: the model runs up to there, or to its end."""
        n, line = self.tape.number(Reach(site), result=nothing), user_line()
        found = self.tape.syncs.values_of([Value(n, 0)])[0]
        if not found:
            self.over = (site, line)
        return found

    def observe(self, site: Site, how: Observation) -> tuple[int, object]:
        """A saved read of a site as everybody leaves it; the operation's number and the value."""
        meta = self.meta(site)
        assert isinstance(meta, SiteMeta)
        value = self.tape.add(
            Observe(site, meta.batched, how),
            result=lambda: tree.unflatten([observed(x, how) for x in meta.leaves], meta.spec),
        )
        n = len(self.tape.ops) - 1
        kept = [x for x in tree.flatten(value)[0] if isinstance(x, LazyTensor)]
        self.tape.saved.update((id(x), x) for x in kept)
        self.tape.add(Save(), tuple(kept), result=nothing)
        return n, value

    def follow(self, path: str, kind: str, how: Observation) -> int:
        """An observation of every call of a module, of which nothing is known before the run."""
        return self.tape.number(Observe((path, kind, EVERY), None, how), result=nothing)

    def _read_live(self, site: Site) -> object:
        """A read whose value must be looked at: the model runs up to it."""
        n = self.tape.number(Read(site), result=nothing)
        real = self.tape.syncs.values_of([Value(n, -1)])[0]
        leaves, spec = tree.flatten(real)
        refuse_nested(user_line(), site, leaves)
        _check_plain(site, leaves)
        fakes = [
            self.tape.fakes.from_tensor(x, static_shapes=True) if isinstance(x, torch.Tensor) else x for x in leaves
        ]
        line = user_line()
        values = [
            self.tape.lazy(Value(n, j), x, line) if isinstance(x, FakeTensor) else self.tape.objects.given(x)
            for j, x in enumerate(fakes)
        ]
        self.tape.invoke.metas[site] = SiteMeta(spec, tuple(fakes), (False,) * len(fakes), -1)
        return tree.unflatten(values, spec, real)

    def read_input(self, site: Site) -> object:
        """The first argument at an input: positional, else by keyword."""
        args, kwargs = self.read(site)
        return args[0] if args else next(iter(kwargs.values()), None)

    def touch(self, site: Site) -> None:
        meta, invoke = self.tape.invoke.metas.get(site), self.tape.invoke
        if meta is None:
            return
        if meta.order > invoke.order:
            invoke.order, invoke.latest = meta.order, site
        elif 0 <= meta.order < invoke.order and invoke.latest is not None:  # asked for behind a later one
            invoke.late |= dict.fromkeys(
                _memory(invoke.values.get(site)) - _memory(invoke.values.get(invoke.latest)), site
            )

    def check_late(self, changed: object) -> None:
        """A value that was asked for behind a later site cannot be changed in place: the model may have used it by then."""
        if not self.tape.invoke.late or not isinstance(changed, LazyTensor):
            return
        site = next((self.tape.invoke.late[m] for m in _memory(changed) if m in self.tape.invoke.late), None)
        latest = self.tape.invoke.latest
        if site is not None and latest is not None:
            n = next(
                (
                    n
                    for n, op in enumerate(self.tape.ops)
                    if isinstance(op.verb, Read | Write) and op.verb.site == latest
                ),
                None,
            )
            raise OutOfOrderError(
                f"{user_line()}: `{name_of_site(site)}` is changed in place behind `{name_of_site(latest)}`"
                f"{f', which {self.tape.lines[n]} has asked for,' if n is not None else ''} and the model computes it later: the change "
                f"would come too late. Change `{name_of_site(site)}` before that line."
            )

    def follow_container(self, site: Site, value: object) -> None:
        """Remember a container that the user can change in place."""
        if isinstance(value, torch.Tensor):
            return
        leaves, spec = tree.flatten(value)
        if tree.holds(spec, tree.MUTABLE):
            self.tape.invoke.containers[site] = (value, leaves, spec)

    def settle(self) -> None:
        """Record as writes what the user did to the containers he was given."""
        if not self.tape.invoke.containers:
            return
        for site, (value, leaves, spec) in list(self.tape.invoke.containers.items()):
            now, now_spec = tree.flatten(value)
            if now_spec != spec or any(a is not b for a, b in zip(now, leaves, strict=True)):
                del self.tape.invoke.containers[site]
                self.tape.writes.write(site, value)

    def check_passed(self, site: Site, done: str) -> None:
        if self.over is not None:
            asked, line = self.over
            raise OutOfOrderError(
                f"{user_line()}: `{name_of_site(site)}` was passed when {line} ran the model to its end: values decide how often `{name_of_site(asked[:2] + (0,))}` "
                f"comes, and the loop asks for one more. It can only be {done} before the loop, or with an end that is known (`tracer.iter[:3]`)."
            )
        if self.passed is None:
            return
        at, line = self.passed
        meta, here = self.tape.invoke.metas.get(at), self.meta(site)
        if isinstance(here, SiteMeta) and meta is not None and -1 < here.order < meta.order:
            raise OutOfOrderError(
                f"{user_line()}: `{name_of_site(site)}` was passed when {line} ran the model to `{name_of_site(at)}`; it can only be "
                f"{done} before that line."
            )


def _memory(value: object) -> set[int]:
    """The storages that the recorded tensors in a value lie in."""
    with NoTorchFunction():
        return {memory(fake_in(x)) for x in tree.flatten(value)[0] if type(x) is LazyTensor}


def _expected(meta: SiteMeta) -> tuple | None:
    """What a read must find at a site whose metadata is a guess."""
    if not meta.unsure:
        return None
    return tuple(
        (_known_sizes(x), x.dtype) if isinstance(x, torch.Tensor) else x if isinstance(x, bool | str | None) else ANY
        for x in meta.leaves
    )


def _known_sizes(x: torch.Tensor) -> tuple[int | None, ...]:
    """The sizes of a tensor; `None` for one that depends on a padded length."""
    return tuple(n if isinstance(n, int) else None for n in x.shape)


def _check_plain(site: Site, leaves: Iterable) -> None:
    """What is recorded is a plain tensor's operations; a class of its own (`DTensor`, `NestedTensor`) has others."""
    own = next((x for x in leaves if isinstance(x, torch.Tensor) and (wraps_tensors(x) or x.is_quantized)), None)
    if own is not None:
        kind = f"quantised tensor ({own.dtype})" if own.is_quantized else type(own).__name__
        raise NotRecordableError(
            f"{user_line()}: `{name_of_site(site)}` holds a {kind}, a tensor of a class of its own, whose operations cannot be "
            "recorded. Read it where it is a plain tensor (behind `.to_local()`, `.full_tensor()` or `.dequantize()` in the model), or "
            "take it with `register_forward_hook` on the module."
        )
