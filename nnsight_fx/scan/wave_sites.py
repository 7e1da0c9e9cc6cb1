"""The sites of one recording: what its signature's scan knows, given what was recorded so far."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
import torch.nn as nn

from ..capture.odd import odd
from ..compat.fakes import on_symbols
from ..compat.symbols import (
    free_unbacked_symbols,
)
from ..lines import BELOW
from ..plan.ambient import under
from ..plan.interleave import Firing, TensorInterleaver
from ..plan.plan import Groups, InterventionGraph, Op
from ..plan.verbs import Call, CallModule, Grad, RunBackward, Site, Skip, StopRun
from ..tracing.steps import Missing, SiteMeta
from ..tracing.tape import Tape, quiet_fakes
from .scan import Mended, Scan
from .scanner import SIGNATURES, Scanner, Signature, faked


class WaveSites:
    """The sites of one recording: `tracing.steps.Sites`."""

    def __init__(
        self,
        scanner: Scanner,
        signature: Signature,
        rows_of: Callable[[int], object],
        length: object,
        alone: Callable[[int], Signature | None] = lambda index: None,
        past: int | None = None,
    ):
        self.scanner, self.signature = scanner, signature
        self.rows_of, self.length = rows_of, length  # an invoke's rows; the padded length, an int or a symbol
        self.past = past  # the length of the cache, where it is a symbol of the scan
        self.alone = alone  # the scan of one invoke's own input, where no length is unknown
        self.rewritten: BaseException | None = None  # how the last scan with writes in it ended

    def lookup(self, tape: Tape, site: Site) -> SiteMeta | Missing:
        if site[0] not in self.scanner.paths:
            self.scanner.look_inside(self.signature, [site[0]])
        if self.past is not None:
            return self._grown(tape, site, self.past)
        if tape.reshaped:
            return _known(self._rescanned(tape).lookup(site))
        if self.signature.symbols == (None, None):
            return _known(self.signature.scan.lookup(site))
        rows = self.rows_of(tape.invoke.index)
        key = (site, str(rows), str(self.length))
        found = self.signature.metas.get(key)
        if found is None:
            found = _known(self._sized(self.signature.scan.lookup(site), rows), rows, self.length)
            if isinstance(found, Missing) and self.signature.scan.ended is not None:
                found = self._alone(tape.invoke.index, site) or found
            self.signature.metas[key] = found
        return found

    def _grown(self, tape: Tape, site: Site, past: int) -> SiteMeta | Missing:
        """A site behind a cache of some length; known for all recordings of one step."""
        sizes = {s: sympy.Integer(past + more) for s, more in self.signature.past.items()}
        if tape.reshaped:
            return _known(self._substituted(self._rescanned(tape).lookup(site), sizes))
        length, metas = self.signature.grown
        if length != past:
            metas = {}
            self.signature.grown = past, metas
        if site not in metas:
            metas[site] = _known(self._substituted(self.signature.scan.lookup(site), sizes))
        return metas[site]

    @property
    def fixed(self) -> bool:
        """Are all sizes numbers, the same in every recording?"""
        return self.past is None and self.signature.symbols == (None, None)

    def ended(self) -> str:
        """How the scan ended before the model did, and at which of its lines; empty where it did not."""
        error = self.signature.scan.ended or self.rewritten
        if error is None:
            return ""
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if not f.filename.startswith(BELOW)]
        at = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
        reason = (str(error).strip().splitlines() or [""])[0]
        return f" (a forward on fake tensors ended{at} with {type(error).__name__}: {reason})"

    def calls(self, path: str, kind: str) -> int:
        """How often the forward passes a site, as its scan saw it."""
        if path not in self.scanner.paths:
            self.scanner.look_inside(self.signature, [path])
        scan = self.signature.scan
        found = scan.counts.get((path, kind), 0)
        return found if scan.ended is None else max(found, 1)

    def open_ended(self, path: str | None) -> bool:
        """Do values decide how often the forward calls a module? `None`: any module."""
        return self.signature.scan.decided(path)

    def called(self, path: str) -> Any:
        """What an operation inside a module calls, if the scan came by."""
        self.scanner.look_inside(self.signature, [path])
        found = self.signature.scan.called.get(path)
        alone = self.alone(0) if found is None and self.signature.scan.ended is not None else None
        if alone is not None:
            self.scanner.look_inside(alone, [path])
            found = alone.scan.called.get(path)
        return found

    def _alone(self, index: int, site: Site) -> SiteMeta | None:
        """A site as one invoke alone would have it, where the model does not take sizes that are symbols (an LSTM)."""
        signature = self.alone(index)
        if signature is not None:
            self.scanner.look_inside(signature, [site[0]])
        meta = None if signature is None else _known(signature.scan.lookup(site))
        return meta._replace(batched=(None,) * len(meta.leaves)) if isinstance(meta, SiteMeta) else None

    def _rescanned(self, tape: Tape) -> Scan:
        """The scan with what was recorded so far in it."""
        scans, step = self.signature.rescans, tape.step.changed
        if step not in scans:
            if self.signature.symbols != (None, None) or self.signature.scan.ended is not None:
                scans[step] = Scan()
                scans[step].ended = RuntimeError("an earlier write changed the metadata of what follows")
            else:
                scans[step] = self.replay(tape)
            if len(scans) > SIGNATURES:
                scans.popitem(last=False)
        self.rewritten = scans[step].ended
        return scans[step]

    def replay(self, tape: Tape, plan: InterventionGraph | None = None, values: Sequence = ()) -> Scan:
        """A scan in which the recorded plan takes effect. It shows the metadata after it, and where it stops the model.

        `plan` is the part of it that one of several forwards runs; the `values` of earlier ones are constants of this one.
        """
        interleaver = self._interleaver(tape, plan or tape.plan(Groups((), 0)), values)
        args, kwargs = self.signature.inputs()
        return self.scanner.run(self.scanner.skeleton(), self.signature.fn, args, kwargs, self.signature, interleaver)

    def _interleaver(self, tape: Tape, plan: InterventionGraph, values: Sequence) -> FakeInterleaver:
        plan = InterventionGraph.of(plan.ops, Groups((None,) * len(plan.workers), 0), plan.recapture, plan.specs)
        constants = [
            tape.operands.fake_at(i) if isinstance(c, torch.Tensor) else c for i, c in enumerate(tape.constants)
        ]
        constants += [faked(self.scanner.fakes, x) for x in values]
        return FakeInterleaver(plan, constants, self)

    def stop_site(self, tape: Tape, plan: InterventionGraph, values: Sequence) -> Site | None:
        """Where a plan stops the model, if a scan can tell."""
        found = self.signature.stops.get(plan)
        if found is None:
            found = self._passed(tape, plan, values) or self.replay(tape, plan, values).stop_site
        if found is not None:
            self.signature.stops[plan] = found
        return found

    def _passed(self, tape: Tape, plan: InterventionGraph, values: Sequence) -> Site | None:
        """The same without the model, for a plan behind which it passes the sites that it passed in the scan."""
        scan = self.signature.scan
        if scan.ended is not None or scan.deciders or plan.recapture == "changes" or plan.skips:
            return None
        try:
            with self.scanner.fakes, on_symbols(), quiet_fakes(), Mended():
                interleaver = self._interleaver(tape, plan, values)
                interleaver.work(None)
                for site, meta in sorted(scan.sites.items(), key=lambda passed: passed[1].order):
                    if site in plan.touches:  # clones: what the plan changes in place is the scan's
                        leaves = [x.clone() if isinstance(x, torch.Tensor) else x for x in meta.leaves]
                        interleaver.fire(Firing(site, leaves, meta.spec))
                    if interleaver.stopping:
                        return site
        except Exception:  # the model's own run says what is wrong
            return None
        return None

    def _sized(self, meta: SiteMeta | Missing, rows: object) -> SiteMeta | Missing:
        """A site's metadata for one invoke: the symbols of the scan replaced by what this trace knows."""
        known = {
            s: v.node.expr if isinstance(v, torch.SymInt) else sympy.Integer(v)
            for s, v in zip(self.signature.symbols, (rows, self.length), strict=True)
            if s is not None
        }
        return self._substituted(meta, known)

    def _substituted(self, meta: SiteMeta | Missing, known: dict) -> SiteMeta | Missing:
        if isinstance(meta, Missing):
            return meta
        sizes: list = []

        def size(n: object) -> Any:
            if not isinstance(n, torch.SymInt):
                return n
            expr = sympy.sympify(n.node.expr).xreplace(known)
            sizes.append(expr)
            return int(expr) if expr.is_number else self.symbol(expr)

        leaves = []
        for leaf in meta.leaves:
            if isinstance(leaf, torch.SymInt):
                leaf = size(leaf)
            elif isinstance(leaf, torch.Tensor):
                with self.scanner.fakes:
                    made = torch.empty_strided(
                        [size(n) for n in leaf.shape],
                        [size(n) for n in leaf.stride()],
                        dtype=leaf.dtype,
                        device=leaf.device,
                    )
                    leaf = made.requires_grad_() if leaf.requires_grad and leaf.is_leaf else _computed(made, leaf)
            leaves.append(leaf)
        return meta._replace(leaves=tuple(leaves) if sizes else meta.leaves, sizes=tuple(sizes))

    def symbol(self, expr: object) -> sympy.Symbol | None:
        """The size that an expression over the padded length stands for."""
        return self.scanner.shapes.create_symintnode(expr, hint=None)

    def module(self, path: str) -> Callable:
        """A module's forward, on fakes."""
        return self.scanner.skeleton().get_submodule(path).forward

    def real(self, path: str) -> nn.Module:
        """The module itself."""
        return self.scanner.module_.get_submodule(path)

    def odd(self, path: str) -> str | None:
        """Why a call of a module needs the real one, if it does."""
        return odd(self.real(path))


class FakeInterleaver(TensorInterleaver):
    """A plan's operations on fakes."""

    def __init__(self, plan: Any, constants: list, sites: WaveSites):
        super().__init__(plan, constants)
        self.sites = sites

    def holds(self, op: Op) -> bool:
        """Fakes cannot tell, and what a conditional operation changes keeps its metadata; a skip or stop may not come."""
        return not isinstance(op.verb, Skip | StopRun)

    def select(self, op: Op, new: Any, old: Any) -> object:
        return torch.where(self.lookup(op.when[-1]), new, old) if op.when else new

    def tap(self, n: int, op: Op) -> None:
        (value,), _ = self.arguments(op)
        creating = isinstance(op.verb, Grad) and op.verb.creating
        self.arrive(n, torch.empty(value.shape, dtype=value.dtype, device=value.device, requires_grad=creating))

    def differentiate(self, n: int, op: Op, verb: RunBackward) -> None:
        """Fakes have no graph to go back through; their gradients were there at once."""

    def execute(self, n: int, op: Op) -> object:
        verb = op.verb
        if not isinstance(verb, Call | CallModule):
            return None
        args, kwargs = self.arguments(op)
        fn = self.sites.module(verb.path) if isinstance(verb, CallModule) else verb.fn.obj
        self.calling = isinstance(verb, CallModule)
        try:
            with under(op.ambient):
                return fn(*args, **kwargs)
        finally:
            self.calling = False


def _computed(made: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`made` as the result of an operation, where `like` requires grad: no leaf, so that a body can change it in place."""
    if like.requires_grad:
        with torch.enable_grad():
            made.add_(torch.zeros((), dtype=made.dtype, device=made.device, requires_grad=True))
    return made


def _known(meta: SiteMeta | Missing, *symbols: object) -> SiteMeta | Missing:
    """`meta`, unless a size or a number in it depends on data: such a site must be looked at."""
    if isinstance(meta, Missing):
        return meta
    sizes = [
        n for leaf in meta.leaves if isinstance(leaf, torch.Tensor) for n in leaf.shape if isinstance(n, torch.SymInt)
    ]
    numbers = [leaf for leaf in meta.leaves if isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool)]
    known = {s.node.expr for s in symbols if isinstance(s, torch.SymInt)}
    if any(free_unbacked_symbols(n) - known for n in sizes):
        return Missing("its size depends on data")
    if any(free_unbacked_symbols(n) - known for n in numbers):
        return Missing("a number in it depends on data")
    return meta
