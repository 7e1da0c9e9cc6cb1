"""After the trace: recorded values become the real tensors, in place, wherever they are held."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..capture import _torch
from ..tracing.encode import Key
from ..tracing.lazy import LazyTensor
from ..tracing.saving import put_objects
from ..tracing.tape import Tape


def deliver(tape: Tape, value: Callable[[Key], Any]) -> None:
    """Turn every saved value that was computed into the real tensor."""
    for lazy, key in tape.objects.values():
        with contextlib.suppress(KeyError):
            lazy.__dict__["_real"] = value(key)
    for container in tape.containers:
        put_objects(container)
    for lazy in tape.saved.values():
        if type(lazy) is not LazyTensor:
            continue
        try:
            real = value(lazy._key)
        except KeyError:
            continue
        for name in ("_tape", "_key", "_fake", "_line"):
            vars(lazy).pop(name, None)
        _torch.swap(lazy, real if _ours(real) else _alias(real))


def _ours(real: torch.Tensor) -> bool:
    """An alias that the run made for this and that nobody else holds: it lies on the model's autograd graph."""
    return getattr(real, "_nnsight_fx_alias", False) and sys.getrefcount(real) <= 5


def _alias(real: torch.Tensor) -> torch.Tensor:
    """A tensor of our own that shares storage and version counter; the model or the user may hold `real` itself."""
    with torch.inference_mode(real.is_inference()), torch.set_grad_enabled(real.requires_grad):
        if real.requires_grad or real.is_inference():
            return real.view_as(real)
        return real.view_as(real) if real.layout is torch.strided else real.detach()
