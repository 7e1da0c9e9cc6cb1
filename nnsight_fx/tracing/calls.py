"""Calls of torch's functions on recorded values: recorded, answered from what is known, or looked at by a sync point."""

from __future__ import annotations

import itertools
import types
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from ..compat.modes import NoTorchFunction, transforms
from ..config import CONFIG
from ..errors import NNsightFXError, NotRecordableError
from ..lines import user_line
from ..plan import tree
from ..plan.encode import Lifted
from ..plan.keys import Identity, Value
from ..plan.lifting import lift, name_of
from ..plan.names import (
    ASKS_NOTHING,
    LIVE_CALLS,
    NEEDS_DATA,
    NEEDS_MEMORY,
    RANDOM_IN_PLACE,
    draws,
    effect_of,
    needs_data,
)
from ..plan.verbs import Apply, Call, Read, Site, name_of_site
from .functions import custom_function, inside
from .lazy import LazyTensor, key_of, tape_of
from .objects import LazyObject, real_of

if TYPE_CHECKING:
    from .tape import Tape


class TorchCalls:
    """Those of one recording."""

    def __init__(self, tape: Tape):
        self.tape = tape
        self.transforms = transforms()  # those that were open when the trace began

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Record `func(*args, **kwargs)`, or answer it where it needs no data, or sync where it needs Python numbers."""
        if self.tape.bridged:
            return self.tape.given.saveable(func(*held(args), **held(kwargs)))
        self.tape.check_open(args, kwargs)
        if transforms() != self.transforms:
            raise NotRecordableError(
                f"{user_line()}: `{name_of(func)}` on a recorded value inside a torch.func transform (grad, vmap, ...) cannot be "
                "recorded. Call the transformed function on real values: `tracer.apply(fn, value)`."
            )
        if CONFIG.APP.DEBUG:
            self._note_first_row(func, args)
        within = custom_function(self.tape, func, args, kwargs)
        if within is not None:
            return within.value
        self.tape.accesses.settle()
        written = self._written(func, args) if not kwargs and type(func) in _FUNCTIONS else None
        again = self.tape.beaten(written) if written is not None else None
        if again is not None:
            if again.op.effect:
                self._changes(args[0])
            for number in again.numbers:
                self.tape.operands.number_key(number)
            return self.tape.advance(again.step, again.op)
        name = name_of(func)
        if name in ("__get__", "__set__"):
            return self._attribute(func, name, args)
        if name in ASKS_NOTHING:
            known = func(*self.tape.operands.fakes_of(args), **self.tape.operands.fakes_of(kwargs))
            if not isinstance(known, torch.Tensor):  # `h.type(dtype)` converts
                return known
        if name in NEEDS_MEMORY:
            raise NotRecordableError(
                f"{user_line()}: `.{name}` works on a tensor's memory, and a recorded value has none yet. "
                "Call it on the real value: `tracer.apply(fn, value)`."
            )
        if name in NEEDS_DATA:
            return func(*self.tape.syncs.real_args(args), **self.tape.syncs.real_args(kwargs))
        if name == "__len__":
            return len(args[0])
        if name == "__hash__":
            return id(args[0])
        if name == "__deepcopy__":
            return self.call(torch.Tensor.clone, args[:1], {})
        if func is torch.Tensor.backward:
            return self.tape.gradients.backward(*args, **kwargs)
        if func is torch.autograd.grad:
            return self.tape.gradients.grad(*args, **kwargs)
        if name in LIVE_CALLS:
            n = self.tape.number(Apply(Identity(func)), args, kwargs)
            return None if self.tape.ops[n].retains else self.tape.objects.returned(n, RemovableHandle)
        if kwargs.get("generator") is not None and draws(name, args, kwargs):
            return self._drawn(func, name, args, kwargs)
        effect = effect_of(name, kwargs, args)
        if effect == "inplace" and args:
            self._changes(args[0])
            args = (held(args[0]), *args[1:])  # what is changed must be there
        args, kwargs = lift(
            name, args, kwargs, lambda t: (self.tape.operands.fake(t).shape, self.tape.operands.fake(t).dtype)
        )
        try:
            before, slots = self.tape.step, len(self.tape.constants)
            result = self.tape.add(Call(Identity(func), effect), args, kwargs)
            if written is not None and (effect == "inplace" or (not effect and type(result) is LazyTensor)):
                values, at = self.tape.constants[slots:], itertools.count(slots)
                self.tape.beat(
                    before,
                    written,
                    None,
                    tuple(Lifted("int", v, self.tape.operands.negative.get(next(at))) for v in values),
                )
            return result
        except RuntimeError as e:  # the parent of all that fakes refuse
            if isinstance(e, NNsightFXError) or not needs_data(e):
                raise
        return self.tape.given.saveable(func(*self.tape.syncs.real_args(args), **self.tape.syncs.real_args(kwargs)))

    def _changes(self, changed: object) -> None:
        """An operation is about to change an argument in place."""
        self.tape.accesses.check_late(changed)
        self.tape.operands.handed.changes(changed, self.read_at(changed))

    def _drawn(self, func: Callable, name: str, args: tuple, kwargs: dict) -> object:
        """A draw from a generator of the user's: made now, since the model has no part in it."""
        self.tape.drew = True
        if name not in RANDOM_IN_PLACE:
            return self.tape.given.saveable(func(*self.tape.syncs.real_args(args), **self.tape.syncs.real_args(kwargs)))
        fake = self.tape.operands.fake(args[0])
        with NoTorchFunction():
            made = torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)
            made = func(made, *self.tape.syncs.real_args(args[1:]), **self.tape.syncs.real_args(kwargs))
        return self.call(torch.Tensor.copy_, (args[0], made), {})

    def _written(self, func: object, args: tuple) -> tuple | None:
        """A call by what the user wrote, where that is this recording's values, positions and slices."""
        tape = self.tape
        parts: list = [func, tape.invoke.index, len(tape.constants)]
        for x in args:
            cls = type(x)
            if cls is LazyTensor:
                part: object = key_of(x)
                part = part if tape_of(x) is tape and not inside(part) else None
            elif cls is torch.Tensor:
                part = tape.operands.slots.get(id(x))
            elif cls is tuple:
                places = tuple(map(_position, x))
                part = None if None in places else ("i", *places)  # `Value(5, 0) == (5, 0)`
            else:
                part = _position(x)
            if part is None:
                return None
            parts.append(part)
        return tuple(parts)

    def _attribute(self, func: Any, name: str, args: tuple) -> object:
        attr = func.__self__.__name__
        if attr == "grad":
            if not isinstance(args[0], LazyTensor):
                return self.tape.gradients.of_parameter(args[0]) if name == "__get__" else func(*args)
            return self.tape.gradients.get(args[0]) if name == "__get__" else self.tape.gradients.set(*args)
        if name == "__set__":
            if attr == "requires_grad":
                return args[0].requires_grad_(args[1])
            raise NotRecordableError(
                f"{user_line()}: `.{attr} = ...` on a recorded value cannot be recorded. Write the site (`module.output = ...`) "
                "or change the value in place (`value[:] = ...`)."
            )
        if attr in ("grad_fn", "_grad_fn") and not self.tape.operands.fake(args[0]).is_leaf:
            raise NotRecordableError(
                f"{user_line()}: `.{attr}` of a recorded value is not known before the run. `.save()` the value and use "
                "`torch.autograd.grad` after the trace."
            )
        got = func(self.tape.operands.fake(args[0]))
        return self.tape.add(Call(Identity(func)), args) if isinstance(got, torch.Tensor) else got

    def read_at(self, x: object) -> Site | None:
        """The site that a recorded value was read at."""
        key = key_of(x) if isinstance(x, LazyTensor) and tape_of(x) is self.tape else None
        verb = self.tape.ops[key.op].verb if isinstance(key, Value) and not inside(key) else None
        return verb.site if isinstance(verb, Read) else None

    def _note_first_row(self, func: object, args: tuple) -> None:
        """`output[0]` was a block's tensor while a block gave a tuple; of a tensor it is the first prompt alone."""
        if func not in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) or type(args[1]) is not int or args[1] != 0:
            return
        site = self.read_at(args[0])
        if site is None or site[1] != "output" or self.tape.operands.fake(args[0]).dim() < 3:
            return
        if getattr(self.tape.accesses.meta(site), "spec", None) is not None:  # it is one of a tuple
            return
        here = user_line()
        warnings.warn_explicit(
            f"nnsight_fx: {here}: `{name_of_site(site)}` is a tensor, so its `[0]` is the first prompt alone. Tutorials for transformers 4 "
            "write it where a block gave a tuple; the whole value is `.output`. (A note of `CONFIG.APP.DEBUG`.)",
            UserWarning,
            *here,
        )


_FUNCTIONS = {types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType}


def _position(x: Any) -> object:
    """A position or slice as something to look up by; `None` for anything else."""
    cls = type(x)
    if cls is int:
        return x
    if cls is slice:
        ends = x.start, x.stop, x.step
        return ("k", *ends) if all(i is None or type(i) is int for i in ends) else None
    return "None" if x is None else "..." if x is Ellipsis else None


def held(args: object) -> Any:
    """Arguments with the values of earlier traces as the real tensors and objects that they are by now."""
    leaves, spec = tree.flatten(args)
    real = [_held(x) for x in leaves]
    if all(a is b for a, b in zip(leaves, real, strict=True)):
        return args  # containers, and whoever holds them, stay what they are
    return tree.unflatten(real, spec, args)


def _held(x: object) -> object:
    if isinstance(x, LazyObject):
        return real_of(x)
    return tape_of(x).syncs.earlier(x) if type(x) is LazyTensor and tape_of(x).bridged else x
