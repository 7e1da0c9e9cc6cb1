"""Generations of many bodies as the rows of one: each forward of the model serves all of them.

Every body is in a greenlet of its own and records its part of the forward that is due; then the forward runs once, with all
plans in it, each on its own rows (`batching.batch`). A body goes on with its values, and to the next forward. A generation
whose rows have all come to their end is over for its body, while the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import greenlet
import torch

from ..batching.batch import NOTHING, BatchedRun, Flags, Merged, Piece, Share, proofs
from ..batching.memory import chunks, out_of_memory
from ..batching.pending import beyond_values, unbatchable
from ..batching.rows import Mixed, Rows
from ..draws import Stream, generators
from ..engine.request import Compile
from ..engine.switch import Coroutine
from ..engine.wave import ForwardWave
from ..envoys.envoy import host_of
from ..errors import NotRecordableError
from ..lines import user_line
from ..plan import tree
from ..plan.plan import InterventionGraph
from ..report.runs import Group, Report, gathered
from ..scan.past import copied, held_tensors
from ..scan.scan import callee
from ..scan.scanner import Signature
from ..tracing import saving
from ..tracing.saving import save
from .generation import Following, Forward, Generation
from .loop import STREAMER, ForwardTurn, Host, Loop, Prepared, beams, option

if TYPE_CHECKING:
    from ..engine.run import Run
    from ..lines import Line
    from ..tracing.contexts import Tracer

Model: TypeAlias = Any  # the envoy of a whole model, which has `trace`

ROWS = 32  # of a loop: on two cores a wider one costs as much a row
IDLE = 16  # rows that nobody has asked for
SINGLE = {  # options by which rows are no longer one generation each, or end by more than their own tokens
    "assistant_model": "an assistant model drafts its tokens",
    "prompt_lookup_num_tokens": "its tokens are drafted",
    "custom_generate": "it decodes by code of yours",
    "penalty_alpha": "it searches contrastively",
    "dola_layers": "it contrasts layers",
    "guidance_scale": "its guidance runs the model twice a token",
    "stop_strings": "it may end at a string",
    "stopping_criteria": "a criterion of yours ends it",
    "max_time": "it ends by the clock",
    "logits_processor": "a processor of yours sees all rows",
    "prefix_allowed_tokens_fn": "a function of yours sees all rows",
    "streamer": "it has a streamer of yours",
    "past_key_values": "it goes on from a cache",
    "return_dict_in_generate": "it returns more than tokens",
}


Returned: TypeAlias = Mapping[str, torch.Tensor | Sequence[torch.Tensor]]  # values by name, and lists of them


class Apart(BaseException):
    """A body does what cannot wait for the others. Never reaches the user."""


class GridCell(NamedTuple):
    """One generation of a grid: what `generate` is called with, its body, and the number of its random draws."""

    args: tuple
    kwargs: dict
    body: Callable[[Tracer], Returned]
    draws: tuple[int, int]  # a seed, and a number
    compile: Compile = None
    name: str = ""  # as an error names it


class Made(NamedTuple):
    """What a cell gave: what its body returned, and its tokens, int64 of shape (rows, new tokens)."""

    returned: Returned
    tokens: torch.Tensor


class Failed(NamedTuple):
    """A cell whose body or generation raised, while others have their results."""

    error: Exception


def why_apart(module: torch.nn.Module, kwargs: dict) -> str | None:
    """Why generations with these options cannot be rows of one, if they cannot."""
    if beams(module, kwargs) > 1:
        return "it searches with beams"
    if (option(module, kwargs, "num_return_sequences") or 1) > 1:
        return "it returns several sequences"
    return next((why for name, why in SINGLE.items() if option(module, kwargs, name) not in (None, False, [])), None)


def run(model: Model, cells: Sequence[GridCell], report: Report) -> list[Made | Failed]:
    """Run the generations of a grid: those with inputs of one shape as rows of one loop, where rows cannot meet.

    An error is raised at once where no cell has a result yet; later it is that cell's, and the others go on.
    """
    host = host_of(model)
    batches = [host.inputs.prepare(cell.args, dict(cell.kwargs)) for cell in cells]
    alike: dict[object, list[int]] = {}
    for n, batch in enumerate(batches):
        shapes = tuple((x.shape[1:], x.dtype) for x in batch.flat[0] if isinstance(x, torch.Tensor))
        alike.setdefault(shapes, []).append(n)
    made: dict[int, Made | Failed] = {}
    for group in alike.values():
        why = why_apart(host.module, cells[group[0]].kwargs) or _why_not(host, cells[group[0]])
        widest = max(batches[n].rows for n in group)
        pieces = [group] if why else chunks(group, max(1, ROWS // widest))
        for piece in pieces:
            if why:
                _alone(model, cells, piece, why, report, made)
            else:
                _together(model, cells, batches, piece, report, made)
    return [made[n] for n in range(len(cells))]


def _why_not(host: Host, cell: GridCell) -> str | None:
    """What keeps all cells apart, whatever their bodies do."""
    state = host.state()
    if state.functions or state.dispatch:
        return "a mode of yours is active (`TorchFunctionMode`, `TorchDispatchMode`)"
    if host.capture_for(cell.compile) is not None:
        return "it runs on captured graphs, where each generation is its own"
    return None


def _together(
    model: Model, cells: Sequence[GridCell], batches: list, piece: list[int], report: Report, made: dict
) -> None:
    """Some cells as the rows of one loop; what cannot be one runs alone, and is told. Their results go to `made`."""
    told = Group("batched", [])
    try:
        grid = Grid(model, [cells[n] for n in piece], [batches[n] for n in piece])
        found = grid.run()
    except Exception as error:  # alone it is its own generation's
        if out_of_memory(error) and len(piece) > 1:
            report.notes.append(f"out of memory with {len(piece)} generations in a loop: halved")
            for half in chunks(piece, -(-len(piece) // 2)):
                _together(model, cells, batches, list(half), report, made)
            return
        together = str(error) if isinstance(error, Mixed) else f"together they failed: {type(error).__name__}: {error}"
        _alone(model, cells, piece, together.partition("\n")[0], report, made)
        return
    ran = {n: one for n, one in zip(piece, found, strict=True) if isinstance(one, Made)}
    made.update(ran)
    told.lines, told.forwards = [body.line for body in grid.bodies if body.made is not None], grid.loop.calls
    if ran:
        report.add(told)
    for n, one in zip(piece, found, strict=True):
        if not isinstance(one, Made):
            _alone(model, cells, [n], one, report, made)


def _alone(model: Model, cells: Sequence[GridCell], piece: list[int], why: str, report: Report, made: dict) -> None:
    """Cells one by one, each a generation of its own."""
    host = host_of(model)
    for n in piece:
        cell, ran = cells[n], Report()

        def begins(tracer: Tracer, first: Prepared, cell: GridCell = cell) -> Generation:
            return host.generation(tracer, first, _draws(model, cell, first.rows))

        try:
            with Stream(model, *cell.draws).going_on(), gathered(model, ran):
                made[n] = played(model, cell, begins)
        except Exception as error:
            error.add_note(f"nnsight_fx: in the sweep's cell {cell.name}")
            if out_of_memory(error) or not any(isinstance(one, Made) for one in made.values()):
                raise
            made[n] = Failed(error)
            continue
        for group in ran.groups:
            group.why = why
            report.add(group)


def _draws(model: Model, cell: GridCell, rows: int) -> list[torch.Generator]:
    return generators(model, *cell.draws, rows)


def played(model: Model, cell: GridCell, begins: Callable) -> Made:
    """A cell's trace, from its `with` to its tokens."""
    tracer = model.trace(*cell.args, fn="generate", compile=cell.compile, **cell.kwargs)
    tracer.forwards.begins = begins
    tokens: torch.Tensor | None = None
    with tracer:
        returned = cell.body(tracer)
        result = tracer.result
        result = result if isinstance(result, torch.Tensor) else result.sequences
        tokens = save(result[:, tracer.generation.prompted :])
    if tokens is None:
        raise NotRecordableError(
            f"{user_line()}: a sweep's body ended by `tracer.stop()`, before its generation did. Give the sweep a smaller "
            "`max_new_tokens`, or leave the block with `return`."
        )
    return Made(returned, tokens)


class Grid:
    """One loop, and the bodies of its rows."""

    def __init__(self, model: Model, cells: Sequence[GridCell], batches: Sequence[Prepared]):
        self.model, self.host = model, host_of(model)
        joined = self.host.inputs.arguments("generate", [*batches, *self._idle(batches)], None)
        self.text, self.rows = joined.text, joined.rows
        draws = [one for cell, batch in zip(cells, batches, strict=True) for one in _draws(model, cell, batch.rows)]
        draws += [torch.Generator(device=model.device) for _ in range(self.rows - len(draws))]
        self.loop = Loop(self.host, joined.args, joined.kwargs, self.host.state(), draws)
        ends = option(self.host.module, joined.kwargs, "eos_token_id")
        self.ends = torch.as_tensor([] if ends is None else ends).reshape(-1).cpu()
        self.finished = torch.zeros(self.rows, dtype=torch.bool)
        self.tokens: list[torch.Tensor] = []  # int64 (rows,), of each step
        self.seen: dict[int, tuple] = {}  # what the scan of the forward that is due says, by rows
        self.merged: Merged | None = None  # of the last forward
        self.flags: dict[Signature, Flags] = {}  # where the rows are, of the forwards so far
        self.why: dict[int, tuple[InterventionGraph, str | None]] = {}  # of a plan by its id: why it is apart, if it is
        self.bodies: list[Body] = []
        for cell, batch in zip(cells, batches, strict=True):
            self.bodies.append(Body(self, cell, sum(body.size for body in self.bodies), batch.rows))

    def _idle(self, batches: Sequence[Prepared]) -> list:
        """Rows without a body, as many as it takes that no other size of the model is the number of rows: `Rows` tells them by it."""
        config, length = getattr(self.host.module, "config", None), self.host.inputs.length(batches[0])
        parts = [config, *vars(config).values()] if config is not None else []
        sizes = {n for part in parts if hasattr(part, "__dict__") for n in vars(part).values() if isinstance(n, int)}
        sizes |= {n for p in self.host.module.parameters() for n in p.shape[1:]}
        steps = option(self.host.module, batches[0].kwargs, "max_new_tokens") or 0
        starts = {1 if length is None or getattr(config, "is_encoder_decoder", False) else length, length or 1}
        lengths = {start + n for start in starts for n in range(steps + 1)}
        rows = sum(batch.rows for batch in batches)
        for avoided in (sizes | lengths, sizes | starts | {start + 1 for start in starts}):
            idle: list = []
            while rows + batches[0].rows * len(idle) in avoided:
                idle.append(batches[0])
            if batches[0].rows * len(idle) <= max(IDLE, rows // 4):
                break
        self.numbered = rows + batches[0].rows * len(idle) not in lengths
        return idle

    def run(self) -> list[Made | str]:
        """What each cell has made, or why it must run alone."""
        try:
            self.loop.go_on()
            for body in self.bodies:
                body.go_on()
            while not self.loop.ended and any(body.waiting for body in self.bodies):
                self._forward()
                self._count()
                for body in self.bodies:
                    if body.waiting and (body.waiting.over or not body.waiting.free):
                        body.go_on()
        finally:
            for body in self.bodies:
                body.abandon()
            self.loop.abandon()
        return [body.made if body.made is not None else body.why for body in self.bodies]

    def _forward(self) -> None:
        """Run the forward that is due, with what every body has recorded of it."""
        loop, host = self.loop, self.host
        parts = [body.part() for body in self.bodies]
        parts.append(Piece(None, NOTHING, self.rows - sum(body.size for body in self.bodies)))
        merged = self.merged = Merged(parts, self.merged)
        (args, kwargs), path = loop.inputs, loop.path

        def call() -> object:
            return callee(host.module, path or None)(*args, **kwargs)

        run = BatchedRun(merged.plan, merged.constants, merged.lines, host.markers, call, host.module.get_submodule, {})
        run.coroutine = ForwardTurn(loop)  # type: ignore[assignment]
        loop.run = run
        signature = self.scanned(self.bodies[0].size)[1]
        known = self.flags.get(signature) or proofs.get(signature)
        if isinstance(known, str):
            raise Mixed(known)
        if known is not None:
            run.flags = known
        else:
            held = [x for leaf in tree.flatten((args, kwargs))[0] for x in held_tensors(leaf)]
            inputs = [x for x in held if x.dim() > 1 and len(x) == self.rows]
            sizes = {n for t in (*inputs, *host.module.parameters()) for n in t.shape[1:]}
            masks = [x for name, x in kwargs.items() if name.endswith("mask") and any(x is y for y in inputs)]
            run.proof = Rows(self.rows, inputs, sizes, masks, numbered=self.numbered)
            run.everything = True
        try:
            run.finish(merged.plan)
        except Mixed as why:
            proofs[signature] = str(why)
            raise
        if run.proof is not None and not run.proof.decides:
            self.flags[signature] = run.flags
        for body, share in zip(self.bodies, merged.shares(run), strict=False):
            if body.waiting:
                share.counts = run.counts
                body.waiting.took_part(share)

    def _count(self) -> None:
        """Which rows have come to their end, and whose bodies with them."""
        new = self.loop.given[1 + len(self.tokens) :]
        if not new and self.tokens and not self.loop.ended:
            raise Mixed("the loop tells its tokens late")
        self.tokens += new
        for tokens in new:
            self.finished |= torch.isin(tokens, self.ends)
        for body in self.bodies:
            if body.waiting and (self.loop.ended or bool(self.finished[body.start : body.start + body.size].all())):
                body.waiting.over = True

    def scanned(self, rows: int) -> tuple[Prepared, Signature, int | None]:
        """The input of the forward that is due as a cell of so many rows has it, its signature, and the length of its cache."""
        calls, *found = self.seen.get(rows, (None,))
        if calls == self.loop.calls:
            return tuple(found)  # type: ignore[return-value]

        def own(x: torch.Tensor) -> torch.Tensor:
            return x[:rows] if x.dim() > 1 and len(x) == self.rows else x

        leaves, spec = tree.flatten(self.loop.inputs)
        leaves = [own(x) if isinstance(x, torch.Tensor) else copied(x, own) for x in leaves]
        batch = self.host.inputs.given(*tree.unflatten(leaves, spec, self.loop.inputs), rows, self.text)
        made = batch, *self.host.scanner.continued(batch, self.loop.path or None)
        self.seen[rows] = (self.loop.calls, *made)
        return made


class Body(Coroutine):
    """The body of one cell, which waits where the forward that it recorded is to run."""

    def __init__(self, grid: Grid, cell: GridCell, start: int, size: int):
        super().__init__(self._play, grid.host.state())
        self.grid, self.cell, self.start, self.size = grid, cell, start, size
        self.waiting: Member | None = None
        self.made: Made | None = None
        self.why = ""
        self.line: Line | None = None
        self.open: list = saving.scopes()  # what it has open, while it waits
        self.tracer: Tracer | None = None
        self.stream = Stream(grid.model, *cell.draws)

    def _play(self) -> None:
        def begins(tracer: Tracer, first: Prepared) -> Member:
            tracer.session, self.line = self.grid, tracer.line
            return Member(self, tracer)

        self.made = played(self.grid.model, self.cell, begins)

    def _switch(self, to: greenlet.greenlet, throw: tuple = ()) -> None:
        if to is not self.model:
            return super()._switch(to, throw)
        host, outer = self.grid.host, (saving.exchange(self.open), self.grid.host.tracer)
        host.tracer, self.waiting = self.tracer, None
        try:
            with self.stream.going_on():
                super()._switch(to, throw)
        finally:
            self.open, self.tracer = saving.exchange(outer[0]), host.tracer
            host.tracer = outer[1]

    def go_on(self) -> None:
        """Let it record up to its next forward. Where it fails it runs again, alone, and that is told."""
        try:
            super().go_on()
        except Apart as apart:
            self.why = str(apart)
        except Exception as error:
            self.why = f"together it failed: {type(error).__name__}: {error}".partition("\n")[0]

    def part(self) -> Piece:
        """What it has recorded of the forward that is due."""
        if self.waiting is None or self.waiting.over:
            return Piece(None, NOTHING, self.size)
        return self.waiting.part()


class Member(Generation):
    """Some rows of a loop, as their body has them."""

    def __init__(self, body: Body, tracer: Tracer):
        super().__init__(body.grid.host, tracer, body.grid.loop, body.grid.text)
        self.body, self.grid = body, body.grid
        self.over = False  # have all its rows come to their end
        self.free = False  # does its body wait for that
        self.open: ForwardWave | None = None  # what is recorded of the forward that is due
        self.share: Share | None = None  # what it had of the last forward

    @property
    def ended(self) -> bool:
        return self.over

    @property
    def run(self) -> Share | None:  # type: ignore[override]
        return self.share

    @property
    def result(self) -> torch.Tensor:
        """As `generate` gives it: int64 of shape (rows, prompt + new tokens)."""
        grid, rows = self.grid, slice(self.body.start, self.body.start + self.body.size)
        new = [tokens[rows, None] for tokens in grid.tokens[: self.length]]
        return torch.cat([grid.loop.given[0][rows], *new], 1).to(self.host.device)

    @property
    def length(self) -> int:
        """How many tokens its rows have made."""
        if not self.over:
            return len(self.grid.tokens)
        rows = slice(self.body.start, self.body.start + self.body.size)
        ended = [torch.isin(tokens[rows], self.grid.ends) for tokens in self.grid.tokens]
        done = torch.stack(ended).cumsum(0).bool().all(1) if ended else torch.zeros(0, dtype=torch.bool)
        return int(done.int().argmax()) + 1 if bool(done.any()) else len(done)

    @property
    def given(self) -> list:
        raise Apart("it reads what the streamer is given")

    @property
    def prompted(self) -> int:
        return self.grid.loop.given[0].shape[1]

    def scanned(self) -> tuple[Prepared, Signature, int | None]:
        return self.grid.scanned(self.body.size)

    def wave(self) -> ForwardWave:
        return Following(self) if self.over else SharedForward(self)

    def to_the_end(self) -> None:
        self.free = True

    def abandon(self) -> None:
        """The loop is not its own."""

    def wait(self, wave: SharedForward) -> None:
        """A body is done with the forward that is due: wait until that has run."""
        self.open, self.body.waiting = wave, self
        self.body.pause()

    def part(self) -> Piece:
        """What is recorded of the forward that is due; of a body that waits for the end, what the edits do in it."""
        if self.open is None:
            self.open = SharedForward(self)
        tape = self.open.tape
        return Piece(tape, tape.plan(self.open.groups()), self.body.size)

    def took_part(self, share: Share) -> None:
        """The forward has run."""
        assert self.open is not None
        self.share = self.open.run = share  # type: ignore[assignment]
        self.open = None


class SharedForward(Forward):
    """A forward of a member."""

    generation: Member

    def _start(self) -> Run:
        raise Apart("it looks at a value of the forward that it is in")

    def finish(self) -> None:
        member, plan = self.generation, self.tape.plan(self.groups())
        grid = member.grid
        if id(plan) not in grid.why:
            grid.why[id(plan)] = plan, unbatchable(plan) or _streams(plan)
        why = grid.why[id(plan)][1] or beyond_values(self.tape)
        if why:
            raise Apart(why)
        member.wait(self)
        assert self.run is not None
        if self.run.unfinished():
            raise Apart("a site that was asked for was never reached")


def _streams(plan: InterventionGraph) -> str | None:
    return "it reads what the streamer is given" if any(site[0] == STREAMER for site in plan.touches) else None
