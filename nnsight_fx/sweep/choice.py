"""Which engine runs a sweep of a compiled model: hooks, while compiling would take longer than it saves.

The first cells run on hooks, by a watch. What is left of the grid at that pace stands against what compiling is likely to
take: by the model's modules, each distinct one compiled once, by how fast this machine runs Python now, and by what earlier
compiles in this process took. What sweeps of the model have cost on hooks before counts, too: whoever runs one after
another pays at most about twice what either takes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from ..engine.captured.options import EXACT
from ..engine.clock import seconds
from ..engine.worth import estimate, learn
from ..errors import nearest
from ..lines import user_line
from ..report.runs import Report
from .job import Done, SweepJob

ENGINES = ("auto", "hooks", "compiled")
WARM, TIMED = 2, 8  # cells on hooks before the choice: those that learn the model, and those by the watch
FASTER = 4  # a cell on hooks takes at least that many compiled ones: `python -m bench.sweep`
HOOKS, COMPILED, AFTER = "hooks", "compiled", f"compiled, after {WARM + TIMED} cells on hooks"


def checked(engine: str) -> str:
    """`engine=` of a sweep."""
    if engine not in ENGINES:
        raise ValueError(f"{user_line()}: there is no engine `{engine}` for a sweep; {nearest(str(engine), ENGINES)}")
    return engine


class Choice:
    """The engine of one sweep; under "auto" found out by its first cells. `known` is what a store says of it."""

    def __init__(self, job: SweepJob, engine: str, report: Report, here: bool, known: str | None = None):
        self.job, self.report, self.known = job, report, known
        self.capture = job.capture
        job.note_lengths()
        self.shapes = {self._shape(prompt) for prompt in {job.prompt(cell) for cell in range(len(job.cells))}}
        self.pilot: set[int] = set()
        self.pace: list[float] = []  # seconds a cell of what runs on hooks before the choice
        self.ran = self._begin(engine, here)
        job.on_hooks = self.capture is not None and (self.ran == HOOKS or bool(self.pilot))

    def _begin(self, engine: str, here: bool) -> str | None:
        """What is chosen before anything has run; `None`: the first cells tell."""
        if self.capture is None:
            if engine == "compiled":
                raise ValueError(
                    f'{user_line()}: `engine="compiled"` needs a compiled model: call `model.compile()` before, or give '
                    "the sweep `compile=True`."
                )
            return HOOKS
        backend = self.capture.options.backend
        if self.job.generate is not None and engine != "compiled":
            return self._told(
                HOOKS, 'as rows of one loop generations run there; `engine="compiled"` runs each by itself'
            )
        if engine != "auto":
            return self._told(engine, f'`engine="{engine}"`')
        if not isinstance(backend, str) or backend in EXACT:
            return self._told(COMPILED, "this backend's compiling is not estimated")
        if not here:
            return self._told(COMPILED, "the executor's workers share what one of them compiles")
        if self.known in (HOOKS, COMPILED):
            return self._told(self.known, "so this store was begun")
        self.pilot = set([cell for chunk in self.job.chunks(len(self.job.cells)) for cell in chunk][: WARM + TIMED])
        if self.known == AFTER:
            return self._told(AFTER, "so this store was begun")
        if self.shapes <= self.capture.swept:
            self.pilot = set()
            return self._told(COMPILED, "its graphs are compiled already")
        return None

    def _shape(self, prompt: int) -> tuple:
        """Of what input a graph has to be, to serve one prompt: of any length, where its graph is."""
        fn, shapes = self.job.options.get("fn"), self.job.shapes[prompt]
        length, text = self.job.texts[prompt]
        if self.capture is not None and self.capture.lets_vary(fn, length, text):
            shapes = tuple((s[0], "any", *s[2:]) if s[1:2] == (length,) else s for s in shapes)
        return fn, shapes

    def _told(self, ran: str, why: str) -> str:
        if self.capture is not None and ran != HOOKS:
            self.capture.begun = True
        self.report.notes = [f"{ran}: {why}"]
        return ran

    def run(self, chunks: Sequence[list[int]]) -> Iterator[tuple[list[int], Done]]:
        """All chunks, here, one after the other."""
        left = sum(map(len, chunks))
        for chunk in chunks:
            done = Done([], [], Report())
            self.job.prepared(chunk)
            for piece in self._pieces(chunk):
                begun = time.perf_counter()
                if self.ran is None and (len(self.pace) > 1 or piece[0] not in self.pilot):
                    self._choose(left)
                self.job.on_hooks = self.capture is not None and (piece[0] in self.pilot or self.ran == HOOKS)
                done = done.joined(self.job(piece, ready=True))
                left -= len(piece)
                self._count(piece, time.perf_counter() - begun)
            yield chunk, done
        if self.ran is None and chunks:
            self.ran = self._told(HOOKS, "there are too few cells to compile for")
        self._learn()

    def _pieces(self, chunk: list[int]) -> list[list[int]]:
        """A chunk, parted where its engine may change."""
        first = [cell for cell in chunk if cell in self.pilot]
        return [piece for piece in (first[:WARM], first[WARM:], chunk[len(first) :]) if piece]

    def _count(self, piece: list[int], took: float) -> None:
        if self.capture is None or not self.job.on_hooks:
            return
        self.capture.hooks_s += took
        if piece[0] in self.pilot:
            self.pace.append(took / len(piece))

    def _choose(self, left: int) -> None:
        """By the first cells: go on as they ran, or compile."""
        assert self.capture is not None
        pace, before = (self.pace or [0.0])[-1], self.capture.hooks_s
        new = len(self.shapes - self.capture.swept)
        cost, saves = estimate(self.job.model._module) * new, (left * pace + before) * (1 - 1 / FASTER)
        each = f"{left} cells left at {pace:.2g} s each on hooks"
        each += f", after {seconds(before)} of sweeps there" if before > 4 * sum(self.pace) * TIMED else ""
        cost_text = f"compiling takes about {seconds(cost)}{f' for {new} shapes of inputs' if new > 1 else ''}"
        if saves > cost:
            self.capture.hooks_s = 0.0
            self.ran = self._told(AFTER, f"{cost_text}, less than it saves: {each}")
        else:
            self.ran = self._told(HOOKS, f'{cost_text}, more than it saves: {each}. `engine="compiled"` compiles')

    def settle(self) -> None:
        """Behind the sweep: what was to run compiled and could not says so."""
        groups = self.report.groups
        if self.ran == COMPILED and groups and all(group.engine == HOOKS for group in groups):
            self.report.notes = [f"{HOOKS}: the model is compiled and could not be captured; why stands below"]

    def _learn(self) -> None:
        """What compiling has taken, for the next estimate."""
        if self.ran not in (COMPILED, AFTER) or self.capture is None:
            return
        new = len(self.shapes - self.capture.swept)
        waited = sum(group.waited for group in self.report.groups)
        self.capture.swept |= self.shapes
        if new and waited and self.capture.options.backend not in EXACT:
            learn(self.job.model._module, waited, new)
