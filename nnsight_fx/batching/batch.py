"""Plain batching on hooks: traces become the rows of one forward, each with its own interventions, as invokes are."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..compat.tensors import shares_memory
from ..engine.run import Run
from ..plan import tree
from ..plan.interleave import Firing, Interleaver
from ..plan.keys import Key, Leaf, NumberSlot, TensorSlot, Value, mapped
from ..plan.plan import Groups, InterventionGraph, Op
from ..plan.verbs import Read, Site, Verb, Write
from ..report.runs import Group
from ..scan.scan import callee
from .memory import chunks, out_of_memory
from .pending import Pending
from .rows import Mixed, Rows

if TYPE_CHECKING:
    from ..tracing.tape import Tape

ROWS = 32  # a forward: on 2 cores more cost as much a row

Flags = dict[Site, tuple[bool | None, ...]]
proofs: weakref.WeakKeyDictionary[object, Flags | str] = weakref.WeakKeyDictionary()  # signature -> where the rows are
NOTHING = InterventionGraph.of((), Groups((None,), 0), "", ())


def batched(group: list[Pending], told: Group) -> None:
    """Run traces in forwards of up to `ROWS` rows.

    The first forward follows each operation of the model (`Rows`); `Mixed` where one lets rows see one another, and then
    nothing has been delivered.
    """
    known = proofs.get(group[0].tape.sites.signature)
    if isinstance(known, str):
        raise Mixed(known)
    try:
        _chunked(group, told, max(1, ROWS // group[0].wave.batch.rows))
    except Mixed as why:
        proofs[group[0].tape.sites.signature] = str(why)
        raise


def _chunked(group: list[Pending], told: Group, size: int) -> None:
    for cells in chunks(group, size):
        try:
            run = _forward(cells)
        except Exception as error:
            if not out_of_memory(error) or len(cells) == 1:
                raise
            told.note(f"out of memory with {len(cells)} traces in a forward: halved")
            _chunked(cells, told, -(-len(cells) // 2))
            continue
        told.forwards += 1
        for p in cells:
            p.tracer.forwards.deliver()
        del run


def _forward(cells: list[Pending]) -> Run:
    """One forward; afterwards each wave has its share of it."""
    first = cells[0]
    merged = Merged([Piece(p.tape, p.plan, p.wave.batch.rows) for p in cells])
    batch = first.host.inputs.collate([p.wave.batch for p in cells])
    signature = first.tape.sites.signature
    flags = proofs.get(signature)

    def call() -> Any:
        return callee(first.host.module, first.wave.fn)(*batch.args, **batch.kwargs)

    run = BatchedRun(
        merged.plan, merged.constants, merged.lines, first.host.markers, call, first.host.module.get_submodule, {}
    )
    run.waited_for = first.host.waited_for(first.tracer.compile)
    if isinstance(flags, dict):
        run.flags = flags
        run.finish(merged.plan)
    else:
        inputs = [x for x in tree.flatten((batch.args, batch.kwargs))[0] if isinstance(x, torch.Tensor)]
        run.proof = Rows(
            batch.rows, inputs, {n for t in (*inputs, *first.host.module.parameters()) for n in t.shape[1:]}
        )
        run.everything = True
        run.finish(merged.plan)
        if not run.proof.decides and not run.stopping:
            proofs[signature] = run.flags
    shares = merged.shares(run)
    if any(share.unfinished() and not share.stopping for share in shares):
        raise Mixed("a site that was asked for was never reached")
    for p, share in zip(cells, shares, strict=True):
        p.wave.run, p.done = share, True
    return run


class Piece(NamedTuple):
    """One of several recordings that share a forward."""

    tape: Tape | None  # none: its rows are only there
    plan: InterventionGraph
    rows: int


class Merged:
    """Several plans as one: the workers of each on its own rows. `like` is what may have been made of the same plans before."""

    def __init__(self, parts: Sequence[Piece], like: Merged | None = None):
        self.lines: list = []
        self.constants: list = []
        for tape in [part.tape for part in parts if part.tape is not None]:
            tape.operands.resolve()
            self.lines += tape.lines
            self.constants += tape.constants
        self.parts = [(plan, rows, 0 if tape is None else len(tape.constants)) for tape, plan, rows in parts]
        if like is not None and all(
            a[0] is b[0] and a[1:] == b[1:] for a, b in zip(self.parts, like.parts, strict=True)
        ):
            self.plan, self.cells = like.plan, like.cells
        else:
            self._merge()

    def _merge(self) -> None:
        ops: list[Op] = []
        specs: list = []
        rows: list[tuple[int, int]] = []
        self.cells: list[tuple[InterventionGraph, int]] = []
        start = constants = 0
        for plan, size, lifted in self.parts:
            self.cells.append((plan, len(ops)))
            moved = Moved(len(ops), constants)
            workers = len(rows)
            ops += [
                op._replace(
                    verb=_unflagged(op.verb),
                    invoke=workers + op.invoke,
                    args=mapped(op.args, moved.leaf),
                    kwargs=mapped(op.kwargs, moved.leaf),
                )
                for op in plan.ops
            ]
            rows += [(start, size)] * len(plan.workers)
            specs += plan.specs
            start, constants = start + size, constants + lifted
        recapture = next((plan.recapture for plan, *_ in self.parts if plan.recapture), "")
        self.plan = InterventionGraph.of(tuple(ops), Groups(tuple(rows), start), recapture, tuple(specs))

    def shares(self, run: Run) -> list[Share]:
        """What each plan has of a run of all."""
        found: list[Share] = []
        for plan, start in self.cells:
            share = Share(plan)
            stop = start + len(plan.ops)
            share.done = {n - start for n in run.done if start <= n < stop}
            share.env = {Value(n - start, j): x for (n, j), x in run.env.items() if start <= n < stop}
            share.stopping = run.stopping
            found.append(share)
        return found


class Share(Interleaver):
    """What one plan has of a run of several."""

    compiles = hits = 0
    forwards, shared, capture_s, compile_s = 1, "batched", 0.0, 0.0
    result = coroutine = None

    def __init__(self, plan: InterventionGraph):
        super().__init__(plan)
        self.lines: list = []
        self.report: list[str] = []

    def abandon(self) -> None:
        """The run is over."""


class Moved:
    """Keys of a plan whose operations and constants come behind others'."""

    def __init__(self, ops: int, constants: int):
        self.ops, self.constants = ops, constants

    def leaf(self, key: Leaf) -> Key:
        """Where a leaf is then."""
        if isinstance(key, Value):
            return Value(key.op + self.ops, key.leaf)
        if isinstance(key, TensorSlot | NumberSlot):
            return key._replace(slot=key.slot + self.constants)
        return key


def _unflagged(verb: Verb) -> Verb:
    """Where the rows are is found by the run, not told by a scan of one trace's input."""
    if isinstance(verb, Read):
        return Read(verb.site, batched=())
    return replace(verb, batched=None) if isinstance(verb, Write) else verb


class Flagged(Firing):
    """A site of which it is known which leaves hold the rows."""

    def batched(self, leaf: int, batched: object) -> bool | None:
        return self.flags[leaf]  # type: ignore[attr-defined]


class BatchedRun(Run):
    """A forward in which each plan has its rows."""

    proof: Rows | None = None

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.flags: Flags = {}
        self.written_rows: dict[
            int, tuple[torch.Tensor, set]
        ] = {}  # the leaves of a site that were written, and by whom

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        with super().around(), self.proof or contextlib.nullcontext():
            yield

    @property
    def skips(self) -> dict[str, set[int]]:
        return self.plan.skips

    def pass_site(self, path: str, kind: str, value: object) -> object:
        follow = self.proof
        if follow is None:
            return super().pass_site(path, kind, value)
        leaves = tree.flatten(value)[0]
        self.flags[(path, kind, self.counts.get((path, kind), 0))] = tuple(_flag(x, follow) for x in leaves)
        follow.paused = True
        try:
            new = super().pass_site(path, kind, value)
        finally:
            follow.paused = False
        for old, x in zip(leaves, tree.flatten(new)[0], strict=True):
            if x is not old and follow.dim(old) is not None:
                follow.dims[x] = follow.dim(old)
        return new

    def put_rows(self, leaf: Any, new: Any, invoke: int, batched: bool | None) -> Any:
        """The first write to a leaf makes it anew, the others take place in that: so each keeps what it aliases."""
        group = self._batched(leaf, invoke, batched)
        if group is None:
            raise Mixed("a tensor that all rows share is written")
        _, rows = self.written_rows.get(id(leaf), (None, set()))
        if not rows:
            leaf = super().put_rows(leaf, new, invoke, batched)
        elif group in rows:
            raise Mixed("a site is written twice")
        own = leaf.narrow(0, *group)
        if rows:
            own.copy_(new)
        self.written_rows[id(leaf)] = leaf, {*rows, group}
        move_aliases(self.env, new, own)
        return leaf

    def fire(self, firing: Firing) -> None:
        flags = self.flags.get(firing.site)
        if flags is None:
            raise Mixed(f"`{'.'.join(p for p in firing.site[:2] if p)}` was not passed before")
        made = Flagged(*firing)
        made.flags = flags  # type: ignore[attr-defined]
        for n in self.plan.touches.get(firing.site, ()):
            op = self.plan.ops[n]
            for i, flag in enumerate(flags):
                cell = isinstance(op.verb, Write) or Value(n, i) in self.plan.may_change
                if (
                    flag is not True
                    and isinstance(firing.leaves[i], torch.Tensor)
                    and (n, i) in self.plan.users
                    and cell
                ):
                    raise Mixed(f"`{firing.site[0]}` holds a tensor that all rows share")
                if flag is None and (isinstance(op.verb, Write) or (n, i) in self.plan.users):
                    raise Mixed(f"`{firing.site[0]}` does not hold the rows on dimension 0")
        super().fire(made)
        self.written_rows.clear()


def move_aliases(env: dict, old: torch.Tensor, new: torch.Tensor) -> None:
    """What shares memory with a written value shares it with the place that the model now has it in."""
    for value, x in env.items():
        if not isinstance(x, torch.Tensor) or not shares_memory(x, old):
            continue
        if x is old:
            env[value] = new
        elif old.stride() == new.stride() and x.untyped_storage().nbytes() == old.untyped_storage().nbytes():
            env[value] = new.as_strided(
                x.shape, x.stride(), new.storage_offset() + x.storage_offset() - old.storage_offset()
            )
        else:
            raise Mixed("a view of a written value is laid out differently among other rows")


def _flag(x: object, follow: Rows) -> bool | None:
    """Does a leaf hold the rows on dimension 0; `None`: it holds them elsewhere."""
    if not isinstance(x, torch.Tensor) or (follow.dim(x) is None and x not in follow.decided):
        return False
    return True if follow.holds(x) else None
