"""A function that runs the model many times (`generate`), in a greenlet that stops at each forward.

A forward is the call of any module of the model that no other module of it has made: mostly the model's own, but the encoder's
in front of the loop of an encoder-decoder model, and the inner model's where a wrapper (PEFT's, `torch.compile`'s) hands
`generate` on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch.overrides import TorchFunctionMode

from ..capture.marker import active
from ..engine.run import Run
from ..engine.switch import Coroutine, ThreadState
from ..plan.interleave import Stopped

Host: TypeAlias = Any  # a `ModelHost`
Prepared: TypeAlias = Any  # an input of it, as `model.inputs` prepares it: both are of the room above

STREAMER = "generator.streamer"  # the path of what is given to a streamer


class Attendant(Protocol):
    """Who runs the forwards when no body stops them any more."""

    def unattended(self) -> Run:
        """The run of the next forward."""
        ...

    def ran(self, run: Run) -> None:
        """It has run."""
        ...


class Loop:
    """One call of `generate`. It begins with the first `go_on`, and pauses in front of each forward."""

    def __init__(
        self, host: Host, args: tuple, kwargs: dict, state: ThreadState, draws: Sequence[torch.Generator] | None = None
    ):
        self.module, self.check_generated = host.module, host.inputs.check_generated
        self.args, self.kwargs = args, {"disable_compile": True, **kwargs}  # captured by us, or not at all
        if beams(self.module, kwargs) == 1:
            self.kwargs["streamer"] = Streamer(self, kwargs.get("streamer"))
        self.calls = 0  # forwards begun
        self.path = ""  # the module whose call the forward is that is to run
        self.inputs: tuple[tuple, dict] = ((), {})  # of that call
        # What stands in for each module's call, by the module's attributes.
        self.stops = [(m.__dict__, functools.partial(self._called, path)) for m, path in host.markers.paths.items()]
        self.run: Run | None = None  # the one of the forward that is running, or has just run
        self.given: list = []  # what the streamer got: the prompt, and the tokens of each forward
        self.first = 0  # how much of it came before the first forward
        self.free: Attendant | None = None  # nothing stops any more
        self.result: object = None
        self.sampler = None if draws is None else Sampler(draws)
        self.restore: Callable[[], None] = lambda: None
        self.coroutine = Coroutine(self._generate, state)

    @property
    def ended(self) -> bool:
        return self.coroutine.ended

    def go_on(self) -> None:
        """Run the forward that is due, and stop in front of the next one."""
        self.coroutine.go_on()

    def abandon(self) -> None:
        self.coroutine.abandon()

    def _generate(self) -> None:
        active.run = None
        self._watch()
        try:
            with self.sampler or contextlib.nullcontext():
                self.result = self.module.generate(*self.args, **self.kwargs)
        except Stopped:
            pass
        finally:
            self.restore()

    def _watch(self) -> None:
        """Stop at the next call of any module. This is done at each step, so it is only writes to dicts."""
        name, users = "_compiled_call_impl", []
        for state, call in self.stops:
            if name in state:
                users.append((state, state[name]))
            state[name] = call

        def restore() -> None:
            for state, call in self.stops:
                if state.get(name) is call:
                    del state[name]
            for state, own in users:
                state[name] = own
            users.clear()

        self.restore = restore

    def _called(self, path: str, /, *args: object, **kwargs: object) -> object:
        """A module is called: wait for the plan of this forward, and run it."""
        self.restore()
        self.check_generated(kwargs)
        self.path, self.inputs, self.run = path, (args, kwargs), None
        self.first = self.first if self.calls else len(self.given)
        self.calls += 1
        with self.sampler.off() if self.sampler else contextlib.nullcontext():
            free = self.free
            if free is None:
                self.coroutine.pause()
            else:
                self.run = free.unattended()
            assert self.run is not None
            self.run.forward()
        if free is not None:
            free.ran(self.run)
        if self.run.stopping:
            raise Stopped
        self._watch()
        return self.run.result

    def put(self, value: object) -> None:
        """The streamer is given `value`."""
        self.given.append(value)
        if self.run is not None:
            self.run.pass_site(STREAMER, "output", value)


def option(module: object, kwargs: dict, name: str) -> Any:
    """An option of a generation: as it was called, else as its configuration has it."""
    config = kwargs.get("generation_config") or getattr(module, "generation_config", None)
    return kwargs[name] if name in kwargs else getattr(config, name, None)


def beams(module: object, kwargs: dict) -> int:
    """How many beams a generation searches with."""
    return option(module, kwargs, "num_beams") or 1


class Streamer:
    """Passes on to the user's streamer, if there is one, and to the sites of the body."""

    def __init__(self, loop: Loop, users: Any):
        self.loop, self.users = loop, users

    def put(self, value: object) -> None:
        if self.users is not None:
            self.users.put(value)
        self.loop.put(value)

    def end(self) -> None:
        if self.users is not None:
            self.users.end()


class Sampler(TorchFunctionMode):
    """Each row draws its tokens from a generator of its own, so that they do not depend on the other rows."""

    def __init__(self, draws: Sequence[torch.Generator]):
        super().__init__()
        self.draws = draws

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        if func not in (torch.multinomial, torch.Tensor.multinomial) or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        weights, rest = (args[0], args[1:]) if args else (kwargs["input"], ())
        if weights.dim() != 2 or len(weights) != len(self.draws):
            return func(*args, **kwargs)
        given = {name: value for name, value in kwargs.items() if name not in ("input", "generator")}
        rows = zip(weights.split(1), self.draws, strict=True)
        return torch.cat([torch.multinomial(row, *rest, **given, generator=draws) for row, draws in rows])

    @contextlib.contextmanager
    def off(self):
        """The model runs, which draws as it always does."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()


class ForwardTurn:
    """The coroutine of a loop as the run of one forward has it: over when the next forward is to begin."""

    def __init__(self, loop: Loop):
        self.loop, self.number = loop, loop.calls

    @property
    def ended(self) -> bool:
        return self.loop.ended or self.loop.calls > self.number

    def go_on(self) -> None:
        self.loop.go_on()

    def pause(self) -> None:
        self.loop.coroutine.pause()

    def abandon(self) -> None:
        self.loop.abandon()
