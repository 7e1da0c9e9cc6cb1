"""A function that runs the model many times (`generate`), forward by forward.

It runs in a greenlet of its own and stops at each forward of the model. What the body records then is the plan of that
forward alone: a wave like any other, with values of earlier forwards as constants. When the body goes on to the next
forward, this one runs, with its plan in it, and the generation goes on to the next.

A forward is the call of any module of the model that no other module of it has made: mostly the model's own, but the encoder's
in front of the loop of an encoder-decoder model, and the inner model's where a wrapper (PEFT's, `torch.compile`'s) hands
`generate` on.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from ..capture.marker import active
from ..engine.notes import Notes, of_run
from ..engine.run import Run
from ..engine.switch import Coroutine
from ..engine.wave import ForwardWave
from ..errors import MissedSiteError
from ..lines import user_line
from ..plan import tree
from ..plan.interleave import Stopped
from ..plan.plan import Groups
from ..plan.verbs import AtSite, Site, place_of_site
from ..scan.scan import Scan
from ..scan.scanner import Signature
from ..scan.wave_sites import WaveSites
from ..tracing.draft import Repeated
from ..tracing.steps import Invoke, SiteMeta, Step
from ..tracing.tape import Tape

STREAMER = "generator.streamer"  # the path of what is given to a streamer


class Generation:
    """One call of `generate`, from forward to forward."""

    def __init__(self, host: Any, tracer: Any, args: tuple, kwargs: dict, text: bool = False):
        self.host, self.tracer, self.module = host, tracer, host.module
        self.args, self.kwargs = args, {"disable_compile": True, **kwargs}  # captured by us, or not at all
        if _beams(self.module, kwargs) == 1:
            self.kwargs["streamer"] = Streamer(self, kwargs.get("streamer"))
        self.text = text  # was it called with text
        self.calls = 0  # forwards begun
        self.path = ""  # the module whose call the forward is that is to run
        self.inputs: tuple[tuple, dict] = ((), {})  # of that call
        self.edits = [Repeated(edit) for edit in host.edits]
        self.passed: Counter[tuple[str, str]] = Counter()  # sites of the forwards so far, counted for the edits
        # What stands in for each module's call, by the module's attributes.
        self.stops = [(m.__dict__, functools.partial(self._called, path)) for m, path in host.markers.paths.items()]
        self.held: dict[str, set[str]] = {}  # `parts` of the modules that were called
        self.run: Run | None = None  # the one of the forward that is running, or has just run
        self.given: list = []  # what the streamer got: the prompt, and the tokens of each forward
        self.caches: list = []  # what observes every forward
        self.free = False  # is the body done? Then nothing stops any more
        self.freed: Notes | None = None  # what the forwards behind the body did
        self.result: Any = None
        self.restore: Callable[[], None] = lambda: None
        self.coroutine = Coroutine(self._generate, tracer.state)
        self.coroutine.go_on()
        self.first = len(self.given)  # what the streamer was given before the first forward

    @property
    def ended(self) -> bool:
        return self.coroutine.ended

    @property
    def modes(self) -> object:
        """The modes that hold where the model is called: those of the body too."""
        return self.coroutine.states[self.coroutine.model].ambient if not self.ended else self.tracer.state.ambient

    def _generate(self) -> None:
        active.run = None
        self._watch()
        try:
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

    def _called(self, path: str, /, *args: object, **kwargs: object) -> Any:
        """A module is called: wait for the plan of this forward, and run it."""
        self.restore()
        self.path, self.inputs, self.run = path, (args, kwargs), None
        self.calls += 1
        behind = self.free
        if behind:
            self.run = self.wave()._start()
        else:
            self.coroutine.pause()
        assert self.run is not None
        self.run.forward()
        if behind:  # no wave of the trace tells of it
            told = of_run(self.run)
            self.freed = told if self.freed is None else self.freed + told
        if self.run.stopping:
            raise Stopped
        self._watch()
        return self.run.result

    def put(self, value: object) -> None:
        """The streamer is given `value`."""
        self.given.append(value)
        if self.run is not None:
            self.run.pass_site(STREAMER, "output", value)

    def parts(self, path: str) -> set[str]:
        """The paths of a module and all in it, which may be shared with others and named by their place there."""
        if path not in self.held:
            self.held[path] = {self.host.markers.paths[m] for m in self.module.get_submodule(path).modules()}
        return self.held[path]

    def wave(self) -> ForwardWave:
        """The open forward; what follows the last one."""
        return Following(self) if self.ended else Forward(self)

    def missed(self) -> MissedSiteError | None:
        """What an edit touches that no forward has passed."""
        if self.run is not None and self.run.stopping:
            return None
        for op, line in [each for edit in self.edits for each in edit.waiting]:
            if not isinstance(op.verb, AtSite):
                continue
            return MissedSiteError(
                f"{line}: an edit touches `{place_of_site(op.verb.site)}`, which no forward of the generation has passed. "
                "Edit a module that `generate` calls, or a part of one."
            )
        return None

    def to_the_end(self) -> None:
        """The body is done with it: it goes on without stopping, unless each forward is observed."""
        self.free = not self.caches

    def abandon(self) -> None:
        self.coroutine.abandon()


def _beams(module: object, kwargs: dict) -> int:
    config = kwargs.get("generation_config") or getattr(module, "generation_config", None)
    return kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1


class Streamer:
    """Passes on to the user's streamer, if there is one, and to the sites of the body."""

    def __init__(self, generation: Generation, users: Any):
        self.generation, self.users = generation, users

    def put(self, value: object) -> None:
        if self.users is not None:
            self.users.put(value)
        self.generation.put(value)

    def end(self) -> None:
        if self.users is not None:
            self.users.end()


class ForwardTurn:
    """The coroutine of a generation as the run of one forward has it: over when the next forward is to begin."""

    def __init__(self, generation: Generation):
        self.generation, self.number = generation, generation.calls

    @property
    def ended(self) -> bool:
        return self.generation.ended or self.generation.calls > self.number

    def go_on(self) -> None:
        self.generation.coroutine.go_on()

    def pause(self) -> None:
        self.generation.coroutine.pause()

    def abandon(self) -> None:
        self.generation.abandon()


class Forward(ForwardWave):
    """One forward of a generation, as a wave."""

    def __init__(self, generation: Generation):
        args, kwargs = generation.inputs
        leaves = tree.flatten((args, kwargs))[0]
        rows = next((x.shape[0] for x in leaves if isinstance(x, torch.Tensor) and x.dim()), 1)
        batch = generation.host.inputs.given(args, kwargs, rows, generation.text)
        self.host, self.tracer, self.alone, self.fn = generation.host, generation.tracer, True, generation.path or None
        self.generation, self.batch, self.batches, self.edits = generation, batch, [batch], len(self.host.edits)
        self.members, self.run, self.done, self.fixed = [None] * (self.edits + 1), None, [], None
        scanner = self.host.scanner
        signature, past = scanner.continued(batch, self.fn)
        sites = ForwardSites(scanner, signature, self.rows_of, None, past=past)
        sites.rows = rows
        self.tape = Tape(signature.root, scanner.fakes, sites, self._until)
        for n, edit in enumerate(generation.edits):
            self.tape.invoke = Invoke(n)
            edit.replay(self.tape, self._passes)
        self.tape.invoke = Invoke(self.edits)
        if generation.edits:
            generation.passed.update({s: n for s, n in signature.scan.counts.items() if self._holds(s[0])})
        for cache in generation.caches:
            cache.record(self)

    def _start(self) -> Run:
        begun = self.run is not None
        run = super()._start()
        if not begun:
            run.coroutine = ForwardTurn(self.generation)  # type: ignore[assignment]
            self.generation.run = run
        return run

    def calls(self, path: str, kind: str) -> int:
        if path == STREAMER:
            return 1
        return super().calls(path, kind) if self._holds(path) else 0

    def _passes(self, path: str, kind: str) -> tuple[int, int]:
        """How often the forwards before this one have passed a site, and how often it does."""
        return self.generation.passed[path, kind], self.calls(path, kind)

    def _holds(self, path: str) -> bool:
        """Is a module, or an operation in one, a part of the module that is called?"""
        return self.fn is None or any(
            path == own or path.startswith(f"{own}.") for own in self.generation.parts(self.fn)
        )

    def forget(self) -> None:
        """Free what no name holds any more."""
        if self.run is not None and self.run.env:
            held = set(self.tape.values)
            objects = {key for _, key in self.tape.objects.kept.values()}
            self.run.env = {v: x for v, x in self.run.env.items() if v in held or v in objects}
            self.run.result = None
            self.run.call = lambda: None  # it holds the inputs
        self.batch = None


class ForwardSites(WaveSites):
    """The sites of the model in a forward, and the streamer's behind it."""

    rows = 1

    def lookup(self, tape: Tape, site: Site) -> Any:
        if site[0] != STREAMER:
            return super().lookup(tape, site)
        with self.scanner.fakes:
            fake = torch.empty(self.rows, dtype=torch.int64)
        return SiteMeta(None, (fake,), (False,), 2**40, sizes=("streamer", self.rows))


class Ended:
    """The coroutine of a run without a model."""

    ended = True

    def abandon(self) -> None:
        pass


class Following(ForwardWave):
    """What the body does when the generation is over: work on values, and its result."""

    forward = False

    def __init__(self, generation: Generation):
        self.host, self.tracer, self.alone, self.fn = generation.host, generation.tracer, True, None
        self.members = [None]
        self.generation, self.batches, self.edits = generation, [], 0
        self.run, self.done, self.fixed = None, [], None
        scanner = self.host.scanner
        sites = WaveSites(scanner, Signature(Scan(), None), self.rows_of, None)
        self.tape = Tape(Step(), scanner.fakes, sites, self._until)

    def _start(self) -> Run:
        if self.run is None:
            self._groups = Groups((None,), 0)
            plan, tape = self.tape.plan(self._groups), self.tape
            modules = self.host.module.get_submodule
            self.run = Run(plan, tape.constants, tape.lines, self.host.markers, lambda: None, modules, {})
            self.run.coroutine = Ended()  # type: ignore[assignment]
            self.run.forwards = 0
        return self.run

    def calls(self, path: str, kind: str) -> int:
        return 0

    def most_calls(self) -> int:
        return 0

    def open_ended(self, path: str | None) -> bool:
        return False

    def forget(self) -> None:
        pass


def streamed(tracer: Any) -> Any:
    """`model.generator.streamer.output`: the tokens that the streamer is given behind the open forward; occurrence 0 is the prompt."""
    generation = tracer.generation
    if generation is None or "streamer" not in generation.kwargs:
        raise MissedSiteError(f"{user_line()}: there is a streamer in `model.generate` only, and not with beams.")
    cursor = tracer.cursor
    if cursor.hit is not None:
        return tracer.tape.read((STREAMER, "output", cursor.call(STREAMER, "output")))
    pin = cursor.pin
    if (pin or 0) < len(generation.given):
        return tracer.known(generation.given[pin or 0])
    cursor.pin = (pin or 0) - generation.first  # the forward behind which it comes: what came before has none
    try:
        call = cursor.call(STREAMER, "output")
    finally:
        cursor.pin = pin
    return tracer.tape.read((STREAMER, "output", call))
