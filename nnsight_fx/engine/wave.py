"""A wave: one forward of a trace, from its recording to its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch

from ..compat.dynamo import NotCaptured
from ..errors import InvokeError, NotRecordableError
from ..lines import user_line
from ..plan.graph import Graph
from ..plan.keys import Recorded, Value
from ..plan.plan import Groups, InterventionGraph
from ..scan.scanner import Signature
from ..scan.wave_sites import WaveSites
from ..tracing import saving
from ..tracing.contexts import Tracer
from ..tracing.invoke import Invoker
from ..tracing.tape import Tape
from .as_data import as_data
from .captured.run import SplicedRun
from .captured.steady import Steady
from .deliver import deliver
from .notes import Notes, notes_of
from .request import Request
from .run import Run
from .split import Part, part, parts


class Shadow(NamedTuple):
    """A worker that observes the rows of an invoke."""

    of: int


class ForwardWave:
    """Invokes that run together. `alone` is a trace with one direct input."""

    signature: Signature | None = None  # what the plans that run as a call are found by; none in a generation

    def __init__(self, host: Any, tracer: Tracer, first: object, alone: bool):
        """`first` is the first input; a list of them when all are given first."""
        self.host, self.tracer, self.alone, self.fn = host, tracer, alone, tracer.fn
        self.edits = len(host.edits)
        self.members: list[Invoker | Shadow | None] = [None] * (self.edits + alone)  # `None`: over the whole batch
        self.batches: list = [first] if alone else []
        self.run: Run | None = None
        self.notes: Notes | None = None  # when it has run
        self.done: list[tuple[Part, Run]] = []  # the forwards of a recording that does not fit one
        scanner = host.scanner
        self.fixed: int | None = tracer.pad_to  # the padded length, once it is known
        if alone:
            batch = self.batch = host.inputs.collate([first], pad_to=tracer.pad_to)
            signature = scanner.signature(batch, self.fn, None)
        else:
            given = first if isinstance(first, list) else [first]
            signature = scanner.signature(given[0], self.fn, host.inputs.unknown_dims(given[0]))
        length = tracer.pad_to if tracer.pad_to is not None else scanner.length
        if isinstance(first, list):
            self.batch = host.inputs.collate(first, pad_to=tracer.pad_to)
            length = host.inputs.length(self.batch) or length
        self.signature = signature
        sites = WaveSites(scanner, signature, self.rows_of, length, self._signature_of)
        self.tape = Tape(signature.root, scanner.fakes, sites, self._until)
        self.tape.operands.handed.apart = getattr(saving.session(), "apart", False)
        host.replay_edits(self.tape)

    # -- members -------------------------------------------------------------------------------------------------

    @property
    def started(self) -> bool:
        """Has a sync point begun the forward? Then no further input can join."""
        return self.run is not None

    def add(self, invoker: Invoker) -> None:
        if invoker not in self.members:
            self.members.append(invoker)
            if invoker.batch is not None:
                self.batches.append(invoker.batch)

    def index_of(self, invoker: Invoker) -> int:
        return self.members.index(invoker)

    def shadow(self, of: int) -> int:
        """A further worker, over the rows of an invoke."""
        self.members.append(Shadow(of))
        return len(self.members) - 1

    def rows_of(self, index: int) -> Any:
        """The rows of an invoke; of the whole batch so far for one without input."""
        member = self.members[index] if index < len(self.members) else None
        if isinstance(member, Shadow):
            return self.rows_of(member.of)
        if member is None and not self.batches:  # an edit: the inputs are still to come
            return self.host.scanner.rows
        batch = member.batch if member is not None else None
        return batch.rows if batch is not None else sum(b.rows for b in self.batches)

    def _signature_of(self, index: int) -> Signature | None:
        """The scan of one invoke's own input, if nothing else decides what its sizes are."""
        batch = self.members[index].batch if index < len(self.members) and self.members[index] is not None else None  # type: ignore[union-attr]
        if batch is None or any(length is not None for _, length in self.host.inputs.unknown_dims(batch)):
            return None
        return self.host.scanner.signature(batch, self.fn, None)

    def groups(self) -> Groups:
        if self.alone:
            return Groups((None,) * len(self.members), 0)
        return self._groups_of(list(range(len(self.members))))

    def _groups_of(self, members: list[int]) -> Groups:
        rows: list[tuple[int, int] | None] = []
        start = 0
        for member in (self.members[i] for i in members):
            if isinstance(member, Shadow):
                rows.append(rows[members.index(member.of)])
                continue
            batch = member.batch if member is not None else None
            rows.append((start, batch.rows) if batch is not None else None)
            start += batch.rows if batch is not None else 0
        return Groups(tuple(rows), start)

    def graph(self) -> Graph:
        """The recording so far, as data."""
        return as_data(self)

    def role(self, i: int) -> str:
        """What a member is, as a file names it."""
        member = self.members[i]
        if i < self.edits:
            return "edit"
        if isinstance(member, Shadow):
            return "cache"
        return "input" if self.alone or getattr(member, "batch", None) is not None else "whole"

    # -- occurrences ---------------------------------------------------------------------------------------------

    forward = True  # is it a forward of the model? Not what follows the last one of a generation

    def calls(self, path: str, kind: str) -> int:
        """How often the forward passes a site, as its scan saw it."""
        return self.tape.sites.calls(path, kind)  # type: ignore[attr-defined]

    def came(self, path: str, kind: str) -> int:
        """How often the forward has passed a site, when it has run: what values decide is the run's to say."""
        scanned = self.calls(path, kind)
        decided = scanned != 1 and self.run is not None and self.open_ended(path)
        return self.run.counts.get((path, kind), 0) if decided else scanned  # type: ignore[union-attr]

    def open_ended(self, path: str | None) -> bool:
        """Do values decide how often the forward calls a module? `None`: any module."""
        return self.tape.sites.open_ended(path)  # type: ignore[attr-defined]

    def most_calls(self) -> int:
        return max(self.tape.sites.signature.scan.counts.values(), default=1)  # type: ignore[attr-defined]

    # -- running -------------------------------------------------------------------------------------------------

    def _start(self) -> Run:
        run = self.run
        if run is None:
            self._gather()
            run = self.run = self.host.run(
                self.request(self.tape.plan(self.groups()), self.tape.constants, self.tape.lines)
            )
        return run

    def request(self, plan: InterventionGraph, constants: list, lines: list) -> Request:
        """One forward of this wave, to be run."""
        tape, tracer = self.tape, self.tracer
        return Request(
            *(plan, constants, lines, self.batch, self.fn, tracer.line, tracer.compile),
            *(tape, cast(WaveSites, tape.sites), self.symbols),
            in_session=tracer.session is not None,
            generates=tracer.generation is not None,
        )

    def _gather(self) -> None:
        """The model is about to run: what it is called with, and the values of earlier traces that the body used."""
        if not self.alone:
            self.batch = self.host.inputs.collate(self.batches, pad_to=self.tracer.pad_to)
            check_lengths(self.tape, self.symbols)
        self.tape.operands.resolve()

    def _call(self, plan: InterventionGraph) -> bool:
        """Run as a call, where an earlier run of the plan has shown to be no more."""
        capture = self.host.capture_for(self.tracer.compile) if self.run is None else None
        steady = None if capture is None else capture.steady.get((self.signature, plan))
        if steady is None:
            return False
        self._gather()
        try:
            inputs = (self.batch.args, self.batch.kwargs)
            call = steady(inputs, self.batch.flat[0], self.tape.constants, self.tape.lines, self.host.markers.own())
        except NotCaptured:
            return False
        self.run = cast(Any, call)  # it has what is asked of a run that is over
        return True

    def _scan(self) -> None:
        """Nothing runs: what the model would refuse on these shapes is raised."""
        sites = self.tape.sites
        assert isinstance(sites, WaveSites)
        ended = sites.replay(self.tape).ended if self.alone and self.tape.reshaped else None
        if ended is not None:
            raise ended

    def _until(self, tape: Tape) -> Callable[[Recorded], Any]:
        if self.tracer.scan_only:
            ended = self.tape.sites.signature.scan.ended  # type: ignore[attr-defined]
            what = (
                f"the scan ended before this value: {type(ended).__name__}: {ended}"
                if ended is not None
                else "this line needs a number"
            )
            raise NotRecordableError(
                f"{user_line()}: a scan has no values, only shapes; {what}. Use `model.trace`."
            ) from ended
        if self.run is not None and tape is not self.tracer.waves[-1].tape:
            return self.run.lookup  # a later wave asks for a value of this one
        if self.run is None:
            saving.catch_up()
        run = self._start()
        return run.until(tape.plan(self.groups()), self.tracer.state)

    def finish(self) -> None:
        if self.tracer.scan_only:
            return self._scan()
        if self.tape.accesses.splits and self.run is None:
            return self._finish_parts()
        plan = self.tape.plan(self.groups())
        if self._call(plan):
            return
        run = self._start()
        run.finish(plan)
        missed = run.unfinished()
        if missed and not run.stopping:
            raise run.missed_error(missed)
        if self.signature is not None and isinstance(run, SplicedRun):
            run.capture.entries.remember((self.signature, plan), Steady.of(run))

    def _finish_parts(self) -> None:
        """Several forwards, in order, each with the values of those before it."""
        why = self.host.moves_state(self)
        if why:
            first = min(self.tape.accesses.splits)
            raise InvokeError(
                f"{self.tracer.line}: invoke {first} uses early in the model what an earlier invoke computes late, so it needs a "
                f"forward of its own; {why}, which a second forward would move twice. Use two traces."
            )
        self.tape.operands.resolve()
        for members in self._parts():
            batches = [b for i in members if (b := getattr(self.members[i], "batch", None)) is not None]
            if not batches:
                raise InvokeError(
                    f"{self.tracer.line}: invoke {members[0]} has no input, and its forward has no other invoke."
                )
            self.batch = self.host.inputs.collate(batches, pad_to=self.tracer.pad_to)
            piece = part(self.tape, members, self._groups_of(members), self.value)
            run = self.host.run(self.request(piece.plan, piece.constants, piece.lines))
            self.done.append((piece, run))
            run.finish(piece.plan)
            missed = run.unfinished()
            if missed and not run.stopping:
                raise run.missed_error(missed)

    def _parts(self) -> list[list[int]]:
        """The members of each forward: the edits go with all, whoever observes an invoke goes with it."""
        shadows = {i: m.of for i, m in enumerate(self.members) if isinstance(m, Shadow)}
        edits, own = list(range(self.edits)), [i for i in range(self.edits, len(self.members)) if i not in shadows]
        return [[*edits, *p, *(i for i, of in shadows.items() if of in p)] for p in parts(self.tape, own)]

    def value(self, key: Recorded) -> Any:
        """A value of this wave, from whichever of its forwards made it."""
        if self.tracer.scan_only:
            return self._meta(key)
        for piece, run in self.done:
            if isinstance(key, Value) and key.op in piece.numbers:
                return run.lookup(Value(piece.numbers[key.op], key.leaf))
        if self.run is None:
            raise KeyError(key)
        return self.run.lookup(key)

    def visits(self, n: int) -> list:
        """What an observation of every call has seen."""
        return self.value(Value(n, -1)) if self.performed(n) and not self.tracer.scan_only else []

    def abandon(self) -> None:
        if self.run is not None:
            self.run.abandon()

    def deliver(self) -> None:
        for told in self.tape.told:
            told(self)
        if self.tracer.scan_only:
            deliver(self.tape, self._meta, lambda: None)
        if self.run is not None or self.done:
            self.notes = notes_of(self.tracer.line, self._runs(), deliver(self.tape, self.value, self._release))
            self.tape.operands.handed.over()
            if self.tracer.generation is not None:
                self.notes.what = "generation"

    def performed(self, n: int) -> bool:
        """Did the run get to an operation?"""
        if self.done:
            return any(n in piece.numbers and piece.numbers[n] in run.done for piece, run in self.done)
        return self.tracer.scan_only or (self.run is not None and n in self.run.done)

    def _release(self) -> None:
        """The values now belong to whoever saved them."""
        for run in self._runs():
            run.release()

    def _runs(self) -> list[Run]:
        return [*[run for _, run in self.done], *([] if self.run is None else [self.run])]

    def _meta(self, key: Recorded) -> torch.Tensor:
        """What a scan gives for a value: a tensor without data."""
        fake = self.tape.operands.fake_of(key)
        if fake is None:  # an object
            raise KeyError(key)
        sizes = [n if isinstance(n, int) else 0 for n in fake.shape]
        return torch.empty(sizes, dtype=fake.dtype, device="meta")

    @property
    def symbols(self) -> dict:
        """What the sizes that were unknown turned out to be."""
        if self.alone:
            return {}
        scanner = self.host.scanner
        known = ((scanner.rows, self.batch.rows), (scanner.length, self.host.inputs.length(self.batch)))
        return {symbol.node.expr: n for symbol, n in known if n is not None}


def check_lengths(tape: Tape, known: dict) -> None:
    """A value that was written whole before the padded length was known must have it."""
    for told, written, site in tape.writes.assumed:
        sizes = tuple(n if isinstance(n, int) else n.node.expr.xreplace(known) for n in site)
        if any(
            isinstance(n, int) and getattr(m, "is_number", True) and n != m for n, m in zip(written, sizes, strict=True)
        ):
            raise RuntimeError(
                f"{told} of shape {written}, where this batch has {sizes}: its longest prompt decides. "
                "Give the prompts first (`a, b = tracer.batch(p1, p2)`, then `with a:` and `with b:`) and write what fits."
            )
