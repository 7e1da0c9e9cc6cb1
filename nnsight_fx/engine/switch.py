"""One switch between a body and the run it waits for.

Both live on one thread, each with its own idea of grad mode, autocast, mode stacks and the rest. Every change of sides
goes through `Side.switch`, which puts away the state of the side that stops and puts back that of the side that goes on.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import greenlet
import torch

from .. import compat
from ..plan import ambient
from ..tracing.recorder import Recorder


class ThreadState:
    """The thread state of one side: looked at, or taken off the thread (`take`)."""

    def __init__(self, take: bool = False):
        found = compat.modes.function_modes(take)
        self.functions = found if take else [m for m in found if not isinstance(m, Recorder)]  # a body around this one
        self.dispatch = compat.modes.dispatch_modes(take)
        self.ambient = ambient.current()
        self.autocast_cache = torch.is_autocast_cache_enabled()
        self.dtype = torch.get_default_dtype()
        self.sdpa = [enabled() for enabled in compat.modes.SDPA.values()]
        self.deterministic = compat.modes.deterministic()
        self.stance = compat.frames.stance()
        self.frames = compat.frames.frame_callback() if take else None
        cuda = torch.cuda.is_initialized() and torch.cuda.is_available()
        self.cuda = (torch.cuda.current_device(), torch.cuda.current_stream()) if cuda else None

    def restore(self) -> contextlib.ExitStack:
        """Put it back. Closing what this returns, at the next switch, undoes the inference mode it may have entered."""
        guard = contextlib.ExitStack()
        if self.ambient.inference != torch.is_inference_mode_enabled():
            guard.enter_context(torch.inference_mode(self.ambient.inference))
        compat.modes.SET_GRAD(self.ambient.grad)
        for device, enabled, dtype in self.ambient.autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        torch.set_default_dtype(self.dtype)
        for name, enabled in zip(compat.modes.SDPA, self.sdpa, strict=True):
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(enabled)
        torch.use_deterministic_algorithms(self.deterministic[0], warn_only=self.deterministic[1])
        if self.cuda is not None:
            torch.cuda.set_device(self.cuda[0])
            torch.cuda.set_stream(self.cuda[1])
        compat.frames.set_stance(self.stance)
        compat.modes.push_dispatch_modes(self.dispatch)
        compat.modes.push_function_modes(self.functions)
        compat.frames.frame_callback(self.frames)
        return guard


@contextlib.contextmanager
def within(state: ThreadState) -> Iterator[None]:
    """Run a block in the state of another moment, and go on in one's own."""
    mine = ThreadState(take=True)
    guard = state.restore()
    try:
        yield
    finally:
        compat.modes.function_modes(take=True)
        compat.modes.dispatch_modes(take=True)
        guard.close()
        mine.restore()


FLOOR = 32  # calls from C: each is three frames of the C stack and more


def floored(run: Callable[[], object]) -> Callable[[], None]:
    """`run` on a floor of C frames.

    Every error of torch's records the innermost 64 C frames when it is made. A greenlet's stack ends where the body's begins, and
    that has moved on meanwhile: who walks across the border reads garbage (a segmentation fault, seen with torch 2.13). On the
    floor nobody gets that far.
    """

    def caught() -> BaseException | None:
        try:
            run()
        except BaseException as error:
            return error
        return None

    def floor() -> None:
        error = _from_c(FLOOR, caught)
        if error is not None:
            raise error

    return floor


def _from_c(levels: int, function: Callable[[], object]) -> Any:
    return next(map(_from_c, (levels - 1,), (function,))) if levels else function()


class Coroutine:
    """A run in a greenlet of its own, so that it can stop in the middle of a forward and go on later."""

    def __init__(self, run: Callable[[], object], state: ThreadState):
        self.model = greenlet.greenlet(floored(run))
        self.model.gr_context = contextvars.copy_context()
        self.body = greenlet.getcurrent()
        self.states: dict[object, ThreadState] = {self.model: state}
        self.guard = contextlib.ExitStack()

    def _switch(self, to: Any, throw: tuple = ()) -> None:
        mine = self.states[greenlet.getcurrent()] = ThreadState(take=True)
        self.guard.close()
        self.guard = self.states[to].restore()
        try:
            _ = to.throw(*throw) if throw else to.switch()
        finally:
            if to is self.model and self.model.dead:  # it ended, by itself or by an exception, and put nothing away
                compat.modes.function_modes(take=True)
                compat.modes.dispatch_modes(take=True)
                self.guard.close()
                self.guard = mine.restore()

    def go_on(self) -> None:
        """From the body: let the run go on until it stops or ends. Its exceptions are raised here."""
        self._switch(self.model)

    def pause(self) -> None:
        """From the run: let the body go on."""
        self._switch(self.body)

    @property
    def ended(self) -> bool:
        return self.model.dead

    def abandon(self) -> None:
        """End a suspended run: its `finally` blocks run."""
        if not self.model.dead:
            with contextlib.suppress(greenlet.GreenletExit):
                self._switch(self.model, (greenlet.GreenletExit,))
