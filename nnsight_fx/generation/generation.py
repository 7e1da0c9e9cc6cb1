"""A generation as its body sees it: forward by forward.

`generate` runs in a `Loop`, which stops at each forward of the model. What the body records then is the plan of that forward
alone: a wave like any other, with values of earlier forwards as constants. When the body goes on to the next forward, this
one runs, with its plan in it, and the loop goes on to the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..engine.notes import Notes, of_run
from ..engine.run import Run
from ..engine.wave import ForwardWave
from ..errors import MissedSiteError
from ..lines import user_line
from ..plan import tree
from ..plan.plan import Groups
from ..plan.verbs import AtSite, Site, place_of_site
from ..scan.scan import Scan
from ..scan.scanner import Signature
from ..scan.wave_sites import WaveSites
from ..tracing.draft import Repeated
from ..tracing.steps import Invoke, Missing, SiteMeta, Step
from ..tracing.tape import Tape
from .loop import STREAMER, ForwardTurn, Host, Loop, Prepared

if TYPE_CHECKING:
    from ..tracing.contexts import Tracer


class Generation:
    """What one body has of a loop."""

    def __init__(self, host: Host, tracer: Tracer, loop: Loop, text: bool = False):
        self.host, self.tracer, self.loop = host, tracer, loop
        self.text = text  # was it called with text
        self.edits = [Repeated(edit) for edit in host.edits]
        self.passed: Counter[tuple[str, str]] = Counter()  # sites of the forwards so far, counted for the edits
        self.held: dict[str, set[str]] = {}  # `parts` of the modules that were called
        self.caches: list = []  # what observes every forward
        self.freed: Notes | None = None  # what the forwards behind the body did

    @classmethod
    def begun(
        cls,
        host: Host,
        tracer: Tracer,
        args: tuple,
        kwargs: dict,
        text: bool,
        draws: Sequence[torch.Generator] | None = None,
    ) -> Generation:
        """A generation of its own, which stands in front of its first forward."""
        made = cls(host, tracer, Loop(host, args, kwargs, tracer.state, draws), text)
        made.loop.go_on()
        return made

    @property
    def ended(self) -> bool:
        return self.loop.ended

    @property
    def run(self) -> Run | None:
        """The run of the forward that is running, or has just run."""
        return self.loop.run

    @property
    def result(self) -> Any:
        """What `generate` returned."""
        return self.loop.result

    @property
    def given(self) -> list:
        """What the streamer got: the prompt, and the tokens of each forward."""
        return self.loop.given

    @property
    def prompted(self) -> int:
        """How many of the tokens that it returns were there before it began."""
        if self.given:
            return self.given[0].shape[1]
        prompt = self.kwargs.get("input_ids")  # beams stream nothing
        encoded = getattr(self.host.module.config, "is_encoder_decoder", False)
        return 1 if encoded else 0 if prompt is None else prompt.shape[1]

    @property
    def kwargs(self) -> dict:
        """What `generate` was called with."""
        return self.loop.kwargs

    @property
    def modes(self) -> object:
        """The modes that hold where the model is called: those of the body too."""
        coroutine = self.loop.coroutine
        return coroutine.states[coroutine.model].ambient if not self.ended else self.tracer.state.ambient

    def scanned(self) -> tuple[Prepared, Signature, int | None]:
        """The input of the forward that is due, its signature, and the length of the cache that it goes on from."""
        args, kwargs = self.loop.inputs
        leaves = tree.flatten((args, kwargs))[0]
        rows = next((x.shape[0] for x in leaves if isinstance(x, torch.Tensor) and x.dim()), 1)
        batch = self.host.inputs.given(args, kwargs, rows, self.text)
        return batch, *self.host.scanner.continued(batch, self.loop.path or None)

    def parts(self, path: str) -> set[str]:
        """The paths of a module and all in it, which may be shared with others and named by their place there."""
        if path not in self.held:
            paths = self.host.markers.paths
            self.held[path] = {paths[m] for m in self.host.module.get_submodule(path).modules()}
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
        self.loop.free = None if self.caches else self

    def unattended(self) -> Run:
        return self.wave()._start()

    def ran(self, run: Run) -> None:
        told = of_run(run)  # no wave of the trace tells of it
        self.freed = told if self.freed is None else self.freed + told

    def abandon(self) -> None:
        self.loop.abandon()


class Forward(ForwardWave):
    """One forward of a generation, as a wave."""

    def __init__(self, generation: Generation):
        batch, signature, past = generation.scanned()
        self.host, self.tracer, self.alone = generation.host, generation.tracer, True
        self.fn = generation.loop.path or None
        self.generation, self.batch, self.batches, self.edits = generation, batch, [batch], len(self.host.edits)
        self.members, self.run, self.done, self.fixed = [None] * (self.edits + 1), None, [], None
        scanner = self.host.scanner
        sites = ForwardSites(scanner, signature, self.rows_of, None, past=past)
        sites.rows = batch.rows
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
            run.coroutine = ForwardTurn(self.generation.loop)  # type: ignore[assignment]
            self.generation.loop.run = run
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

    def lookup(self, tape: Tape, site: Site) -> SiteMeta | Missing:
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


def streamed(tracer: Tracer) -> Any:
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
    cursor.pin = (pin or 0) - generation.loop.first  # the forward behind which it comes: what came before has none
    try:
        call = cursor.call(STREAMER, "output")
    finally:
        cursor.pin = pin
    return tracer.tape.read((STREAMER, "output", call))
