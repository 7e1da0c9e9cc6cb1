"""The forwards of one trace: one, or those of a generation, each recorded as a wave, run, and delivered."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import MissedSiteError
from ..plan import ambient
from . import saving
from .recorder import unrecorded

if TYPE_CHECKING:
    from .contexts import Tracer


class Forwards:
    """Those of `tracer`."""

    def __init__(self, tracer: Tracer):
        self.tracer = tracer
        self.waves: list = []
        self.generation: Any = None  # a function that runs the model many times, forward by forward
        self.generations: list = []  # those that have run, each of an invoke
        self.begins: Callable | None = None  # makes the generation, where it is not one of its own
        self.start = 0  # the first wave of the open generation
        self.modes: contextlib.AbstractContextManager = contextlib.nullcontext()  # those that a generation runs under
        self.missed: MissedSiteError | None = None
        self.counted: dict[tuple[str, str], tuple[int, int]] = {}

    def begin_alone(self, first: object) -> None:
        """Begin with the one input of a forward, or of a generation."""
        if self.tracer.fn == "generate":
            saving.catch_up()
        self.generation = (self.begins or self.tracer.host.generation)(self.tracer, first)
        if self.generation is not None:
            self.modes = stack = contextlib.ExitStack()
            stack.enter_context(ambient.under(self.generation.modes))
        self.start, self.counted = len(self.waves), {}
        self.begin(first, alone=True)

    def end_generation(self) -> None:
        """The body is done: the generation runs to its end."""
        self.to_the_end()
        self.run_open()
        self.missed = self.missed or self.generation.missed()
        self.generations.append(self.generation)
        self.modes.__exit__(None, None, None)
        self.modes = contextlib.nullcontext()

    def to_the_end(self) -> None:
        self.generation.to_the_end()
        while self.can_advance:
            self.advance()

    def begin(self, first: object, alone: bool) -> None:
        wave = self.tracer.host.wave(self.tracer, first, alone)
        if not self.waves:
            wave.tape.containers = self.tracer.early.containers
        self.waves.append(wave)
        self.tracer.recorder.tape, self.tracer.recorder.inside = wave.tape, alone
        wave.tape.conditions.blocks = self.tracer.conditions
        saving.opened(wave.tape)

    def run(self) -> None:
        """The body is done: run what is left of it, and deliver what was saved."""
        self.tracer.check_barriers()
        if self.generation is None:
            self.run_open()
        elif self.generation not in self.generations:
            self.end_generation()
        self.deliver()

    def put_off(self) -> None:
        """The body is done, and nothing runs yet: a session does that later, by `run_recorded`."""
        self.tracer.check_barriers()
        tape = self.waves[-1].tape
        tape.settle()
        saving.collect(tape, held=False)
        tape.forget_reads()

    def run_recorded(self) -> None:
        """Run what was put off, and deliver what was saved."""
        self._finish(self.waves[-1])
        self.deliver()

    def run_open(self) -> None:
        """Run what is recorded of the open wave. A site that it never reaches is told when everything else is delivered."""
        wave = self.waves[-1]
        wave.tape.settle()
        for each in self.waves:
            saving.collect(each.tape)
        if self.can_advance:
            wave.tape.close_step()
        self._finish(wave)

    def _finish(self, wave: Any) -> None:
        wave.tape.busy = True  # as in `running`
        try:
            wave.finish()
        except MissedSiteError as e:
            self.missed = self.missed or e
        finally:
            wave.tape.busy = False

    def deliver(self) -> None:
        """What was saved is there; then a site that was never reached is told."""
        self.hand_over()
        if self.missed is not None:
            raise self.missed

    def hand_over(self) -> None:
        for wave in self.waves:
            wave.deliver()
        self.tracer.host.note(self.tracer)

    def abort(self) -> None:
        for wave in self.waves:
            wave.abandon()
        if self.generation is not None:
            self.generation.abandon()
        self.tracer.host.scanner.forget_failed()

    @property
    def step(self) -> int:
        """The forward that is open."""
        return len(self.waves) - 1 - self.start if self.generation is not None else 0

    @property
    def can_advance(self) -> bool:
        """Does anything come after the open forward?"""
        return self.generation is not None and self.waves[-1].forward

    def advance(self) -> None:
        """Run the open forward. The next one is open then, or, after the last, what follows the generation."""
        with unrecorded():
            self.run_open()
            self.begin(None, alone=True)
            tape = self.tracer.recorder.tape
        self.tracer.recorder.tape = tape
        for wave in self.waves[:-2]:
            wave.forget()

    def calls(self, path: str, kind: str, step: int) -> int:
        """How often a forward passes a site."""
        return self.waves[self.start + step if self.generation is not None else -1].calls(path, kind)

    def before(self, path: str, kind: str, step: int) -> int:
        """How often the forwards before one have passed a site."""
        at, total = self.counted.get((path, kind), (0, 0))
        if at > step:
            at, total = 0, 0
        total += sum(self.waves[self.start + i].came(path, kind) for i in range(at, step))
        self.counted[(path, kind)] = (step, total)
        return total

    def open_ended(self, path: str, kind: str, step: int) -> bool:
        """Is it only known from the run how often a forward passes a site? In a generation one call is taken for the only one."""
        if self.generation is None:
            return self.waves[-1].open_ended(path)
        wave = self.waves[self.start + step]
        return wave.open_ended(path) and wave.calls(path, kind) != 1

    def decides(self) -> bool:
        """Do values decide how often any module is called, in the one forward of a trace?"""
        return self.generation is None and self.waves[-1].open_ended(None)

    def most_calls(self, step: int) -> int:
        """How often a forward passes the site that it passes most."""
        return self.waves[self.start + step if self.generation is not None else -1].most_calls()

    def containers(self) -> list:
        """What `nnsight_fx.save(container)` got."""
        return [c for wave in self.waves for c in wave.tape.containers]

    @property
    def notes(self) -> list:
        """Of each forward that has run."""
        behind = [generation.freed for generation in self.generations if generation.freed is not None]
        return [*(wave.notes for wave in self.waves if wave.notes is not None), *behind]
