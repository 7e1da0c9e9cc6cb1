"""After the trace: recorded values become the real tensors, in place, wherever they are held."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable

import torch

from .. import compat
from ..plan.keys import Recorded
from ..tracing.lazy import LazyTensor, key_of
from ..tracing.objects import become, real_of
from ..tracing.saving import put_objects
from ..tracing.tape import Tape
from .retained import retained

_RECORDED = ("_tape", "_key", "_fake", "_line")


def deliver(tape: Tape, value: Callable[[Recorded], object], release: Callable[[], None]) -> list[tuple[int, bool]]:
    """Turn every saved value that was computed into the real tensor; `release` makes the runs let go of theirs.

    Returns, for each, its bytes and whether it lies on an autograd graph.
    """
    objects = tape.objects
    for lazy, key in list(objects.kept.values()):
        with contextlib.suppress(KeyError):
            lazy.__dict__["_real"] = value(key)
            del objects.kept[id(lazy)]
    found = []
    for lazy in tape.saved.values():
        if type(lazy) is LazyTensor:
            try:
                if not tape.conditions.used or tape.conditions.hold(lazy, value):
                    found.append((lazy, [value(key_of(lazy))]))
            except KeyError:  # the run did not come to it
                pass
    for lazy, held in found:
        if not isinstance(held[0], torch.Tensor):  # the scan took it for one
            lazy.__dict__["_real_object"] = held[0]
    for container in tape.containers:
        put_objects(container)
    tape.containers = []
    for stand_in in objects.held:
        if "_real" in stand_in.__dict__:
            become(stand_in, real_of(stand_in))
    release()
    tape.forget_reads()
    delivered = []
    while found:
        lazy, held = found.pop()
        if not isinstance(held[0], torch.Tensor):
            continue
        del tape.saved[id(lazy)]  # from here on the user's names alone hold it
        own_state = vars(lazy)
        for name in _RECORDED:
            own_state.pop(name, None)
        real = held[0]
        kept = retained(real)
        own_state.update({k: v for k, v in vars(real).items() if k not in own_state and not k.startswith("_dynamo")})
        delivered.append((real.nbytes if real.layout is torch.strided else _bytes(real), real.grad_fn is not None))
        del real
        made, same = own(held)
        compat.tensors.swap(lazy, made)
        tape.delivered[id(lazy)] = weakref.ref(lazy)
        del made
        if kept is not None:
            kept.give(lazy, same)
    return delivered


def own(held: list[torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """A tensor that nobody else holds: the one in the list where it lies on an autograd graph and is ours alone, so that later gradients
    find it there; else an alias, which shares storage and version counter. Is it the one in the list?"""
    if held[0].grad_fn is not None and not held[0].retains_grad and compat.tensors.alone(held):
        return held.pop(), True
    real = held.pop()
    inference, grad = real.is_inference(), real.requires_grad
    if inference is torch.is_inference_mode_enabled() and grad is torch.is_grad_enabled():
        return _alias(real), False
    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        return _alias(real), False


def _alias(real: torch.Tensor) -> torch.Tensor:
    if real.layout is torch.strided or real.requires_grad or real.is_inference():
        return real.view_as(real)
    return real.detach()


def _bytes(x: torch.Tensor) -> int:
    return x._nnz() * x.element_size() if x.is_sparse else 0
