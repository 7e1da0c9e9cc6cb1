"""The modes of a thread that change what an operation means: grad mode, inference mode, autocast.

An operation recorded under other modes than those its trace was opened under is replayed under its own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..compat.modes import any_autocast


class Ambient(NamedTuple):
    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @property
    def casts(self) -> bool:
        """Is there an autocast among them?"""
        return any([enabled for _, enabled, _ in self.autocast])


@functools.cache
def devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def current() -> Ambient:
    """The modes that hold now."""
    autocast = tuple([(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices()])
    return Ambient(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)


def plain(ambient: Ambient) -> bool:
    """Do recorded modes, which have no autocast, hold now? The answer that costs next to nothing."""
    return (
        torch.is_grad_enabled() is ambient.grad
        and torch.is_inference_mode_enabled() is ambient.inference
        and not any_autocast()
    )


@contextlib.contextmanager
def under(ambient: Any) -> Iterator[None]:
    """Run a block under recorded modes; `None` means those that hold."""
    if ambient is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        if ambient.inference != torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(ambient.inference))
        stack.enter_context(torch.set_grad_enabled(ambient.grad))
        for device, enabled, dtype in ambient.autocast:
            if (enabled, dtype) != (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)):
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        yield
