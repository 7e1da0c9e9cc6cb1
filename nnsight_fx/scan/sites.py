"""Where a recording learns the metadata of sites: one scan a signature, on a structural copy of the model."""

from __future__ import annotations

import copy
import os
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
import torch
import torch.nn as nn

from ..capture.odd import odd
from ..capture.operations import alike, frames_of
from ..compat.fakes import FakeCopyMode, FakeTensorMode, GuardOnDataDependentSymNode, on_symbols
from ..compat.modes import NoTorchFunction
from ..compat.symbols import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    constant_source,
    free_unbacked_symbols,
    guards_hold,
)
from ..compat.transformers import collects
from ..errors import PaddedLengthUnknown
from ..lines import user_line
from ..plan import ambient, tree
from ..plan.ambient import under
from ..plan.interleave import TensorInterleaver
from ..plan.plan import MODULE, SKIP, STOP, Groups, InterventionGraph, Op, Site
from ..plan.tree import PLAIN
from ..tracing.steps import Missing, SiteMeta, Step
from ..tracing.tape import Tape, quiet_fakes
from .past import Past, copied, growing, is_cache, state
from .scan import Scan, callee, scan, skeleton

# Sizes that stand for the unknown ones in a scan: they show up as symbols, never as numbers.
ROWS, LENGTH = 11, 13
_TORCH, _HERE = os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__))
SIGNATURES = 64  # scans kept a model
TURNS = 520  # how often a scan goes the same way at a line that values decide: more than models have experts
STEPS = 100_000  # recorded operations kept a scan


class _Unknown(PaddedLengthUnknown, GuardOnDataDependentSymNode):
    """Torch takes it for an error of its own; the user sees the public class, at the line of the body."""

    __module__, __qualname__ = PaddedLengthUnknown.__module__, PaddedLengthUnknown.__qualname__
    of_the_body = True

    def __init__(self, message: str):
        Exception.__init__(self, message)
        self.cond: Any = None


class Shapes(ShapeEnv):
    """A shape environment whose only unknown is the padded length.

    During a scan it guesses what depends on data (a branch of the model, an expert's rows), so that the scan goes on; the
    metadata of all sites from there on is checked when they are read.
    """

    guessing = guessed = False

    def __init__(self):
        super().__init__()
        self.inside: list[str] = []  # the modules that are running in a scan
        self.deciders: set[str] = set()  # those whose Python has looked at values
        self.turns: dict[tuple, int] = {}  # how often each line of a running frame has been decided

    def _first_turns(self) -> bool:
        """Is a line decided for the first times? A `while` on values would never end with one answer."""
        frame: Any = sys._getframe(2)
        while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, _HERE)):
            frame = frame.f_back
        line = (id(frame), frame.f_lineno)
        self.turns[line] = self.turns.get(line, 0) + 1
        if self.turns[line] > 2 * TURNS:
            raise RuntimeError(f"values decide how often {frame.f_code.co_filename}:{frame.f_lineno} runs")
        return self.turns[line] <= TURNS

    @property
    def allow_scalar_outputs(self) -> bool:
        return self.guessing

    @property
    def allow_dynamic_output_shape_ops(self) -> bool:
        return self.guessing

    def evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().evaluate_expr(orig_expr, *args, **kwargs)
        except GuardOnDataDependentSymNode:
            if not self.guessing:
                raise
            self.guessed = True
            self.deciders.add(self.inside[-1] if self.inside else "")
            guess = orig_expr.xreplace({s: sympy.Integer(1) for s in free_unbacked_symbols(orig_expr)})
            return guess if guess not in (sympy.true, sympy.false) or self._first_turns() else sympy.Not(guess)

    def _make_data_dependent_error(self, *args: Any, **kwargs: Any) -> Any:
        return _Unknown(
            f"{user_line()}: the padded length of this batch is not known before all its prompts are. Index from the right "
            "(`h[:, -1]`), give the prompts first (`a, b = tracer.batch(p1, p2)`, then `with a:` and `with b:`), or fix the length "
            "(`model.trace(pad_to=32)`)."
        )


class Signature:
    """What all recordings over inputs of one kind share: the tree of steps and the scan."""

    def __init__(self, found: Scan, keep: Any, fn: str | None = None):
        self.scan, self.keep, self.fn = found, keep, fn
        self._root = Step()
        self.inputs: Callable[[], Any] = lambda: ((), {})  # fresh fakes of them: a forward fills a cache
        self.past: dict[Any, int] = {}  # symbols of sizes that grow with a cache, and what each is beyond its length
        self.holds: Callable[[list], bool] = lambda values: True  # is it the scan for such lengths
        self.rescans: OrderedDict[Step, Scan] = OrderedDict()
        self.symbols: tuple[Any, Any] = (None, None)  # of rows and length, in a scan over unknown sizes
        self.metas: dict[tuple, SiteMeta | Missing] = {}
        self.frames: frozenset[str] = frozenset()  # the modules that the scan looks into

    @property
    def root(self) -> Step:
        """Where a recording starts: the tree of all recordings so far, until it has grown too large."""
        if self._root.size > STEPS:
            self._root = Step()
            self.rescans.clear()
            self.metas.clear()
        return self._root


class Scanner:
    """The scans of one model."""

    def __init__(self, module: nn.Module):
        self.module_ = module
        self.reset()

    def reset(self) -> None:
        """Forget everything: the module tree has changed."""
        self.modules = list(self.module_.modules())
        self.tables = [table for m in self.modules for table in (m._parameters, m._buffers)]
        self.paths = {path for path, _ in self.module_.named_modules()}
        self.shapes = Shapes()
        self.fakes = FakeTensorMode(shape_env=self.shapes, allow_non_fake_inputs=True)
        self.rows, self.length = (self.shapes.create_unbacked_symint() for _ in range(2))
        for symbol in (self.rows, self.length):
            torch._check(symbol >= 1)
            torch._check(symbol <= 2**24)
        self.signatures: OrderedDict[tuple, Signature] = OrderedDict()
        self._copy: tuple[tuple, nn.Module | Exception] | None = None
        self.collecting = False  # did the latest scan find them

    def forget_failed(self) -> None:
        """Forget the scans that ended: a trace failed, maybe by the same fault, which may be gone when the next one scans."""
        failed = [key for key, found in self.signatures.items() if found.scan.ended is not None]
        for key in failed:
            del self.signatures[key]
        if failed:
            self._copy = None  # it holds the module's attributes as they were

    def skeleton(self) -> nn.Module:
        """The structural copy, made anew when parameters changed their dtype, device or gradient flag."""
        with NoTorchFunction():  # in a body each look at an attribute would be looked at
            tensors = [t for table in self.tables if table for t in table.values() if t is not None]
            ids, devices = list(map(id, tensors)), [t.device for t in tensors]
            state = (ids, devices, [t.dtype for t in tensors], [t.requires_grad for t in tensors])
        if self._copy is None or self._copy[0] != state:
            if self._copy is not None:
                self.signatures.clear()
            try:
                self._copy = (state, skeleton(self.module_, self.fakes))
            except Exception as e:
                self._copy = (state, e)
        if isinstance(self._copy[1], Exception):
            raise self._copy[1]
        return self._copy[1]

    def collects(self) -> bool:
        """Do forwards of this model collect outputs with transformers' hooks? Where no scan can tell, they may."""
        return self.collecting or self._copy is None or isinstance(self._copy[1], Exception)

    def signature(self, batch: Any, fn: str | None, unknown: tuple | None) -> Signature:
        """The signature of an input. `unknown` gives the dims of each tensor leaf that hold rows and length."""
        return self._signature(batch, fn, unknown, None)

    def continued(self, batch: Any, fn: str | None = None) -> tuple[Signature, int | None]:
        """The signature of a forward that may go on from a cache, whose length is then a symbol, and that length."""
        with NoTorchFunction():  # in a body each look at a tensor would be looked at
            past = growing(batch)
            if past is not None:
                found = self._signature(batch, fn, None, past)
                if found.scan.ended is None and found.holds([past.length + more for more in found.past.values()]):
                    return found, past.length
            return self._signature(batch, fn, None, None), None

    def _signature(self, batch: Any, fn: str | None, unknown: tuple | None, past: Past | None) -> Signature:
        leaves, spec = batch.flat
        described = tuple(
            (
                ("?" if unknown else past.shape(x) if past else tuple(x.shape)),
                x.dim(),
                x.dtype,
                x.device,
                x.requires_grad,
            )
            if isinstance(x, torch.Tensor)
            else state(x, past)
            for x in leaves
        )
        fixed = _fixed(leaves, unknown) if unknown else None
        try:
            copied: Any = self.skeleton()
        except Exception as e:
            copied = e
        modes = tuple([m.training for m in self.modules])
        key = (spec, described, fixed, unknown, fn, ambient.current(), modes)
        found = self.signatures.get(key)
        if found is None:
            found = self.signatures[key] = self._scan(copied, leaves, spec, fn, unknown, past)
            if len(self.signatures) > SIGNATURES:
                self.signatures.popitem(last=False)
        self.signatures.move_to_end(key)
        return found

    def _scan(
        self, copied: Any, leaves: list, spec: tree.Spec, fn: str | None, unknown: tuple | None, past: Past | None
    ) -> Signature:
        kept = [x for x in leaves if not isinstance(x, (torch.Tensor, *PLAIN)) and not is_cache(x)]
        found = Signature(Scan(), kept, fn)
        if isinstance(copied, Exception):
            found.scan.ended = copied
            return found
        if unknown:
            made = [
                self._unknown(x, unknown[i], found) if isinstance(x, torch.Tensor) else x for i, x in enumerate(leaves)
            ]
        else:
            made = [_faked(self.fakes, x, past and past.faker(self.fakes, found)) for x in leaves]
        found.inputs = lambda: tree.unflatten(_again(made), spec)
        args, kwargs = found.inputs()
        before = len(self.shapes.guards)
        found.scan = self.run(copied, fn, args, kwargs, found)
        if found.past:
            fakes = [self.shapes.create_symintnode(s, hint=None) for s in found.past]
            found.holds = guards_hold(self.shapes, before, fakes)
        return found

    def run(
        self, copied: nn.Module, fn: str | None, args: tuple, kwargs: dict, of: Signature, plan: Any = None
    ) -> Scan:
        rows = of.symbols[0]

        def batched(t: torch.Tensor) -> bool:
            first: Any = t.shape[0]
            return rows is not None and isinstance(first, torch.SymInt) and first.node.expr == rows

        def call(m: nn.Module) -> Any:
            with on_symbols(), quiet_fakes():
                return callee(m, fn)(*args, **kwargs)

        self.shapes.guessing, self.shapes.guessed, self.shapes.turns = True, False, {}
        self.shapes.inside, self.shapes.deciders = [], set()
        try:
            done = scan(
                copied,
                call,
                self.fakes,
                plan=plan,
                batched=batched,
                unsure=lambda: self.shapes.guessed,
                frames=of.frames,
                inside=self.shapes.inside,
                real=dict(zip(copied.modules(), self.modules, strict=True)).get,
            )
        finally:
            self.shapes.guessing = False
        done.deciders = self.shapes.deciders
        self.collecting = collects(copied)
        replaced = self.shapes.replacements
        if any(s is not None and s in replaced for s in of.symbols):
            done = Scan()
            done.ended = RuntimeError("the model's shapes depend on the number of rows or the length themselves")
        return done

    def look_inside(self, of: Signature, paths: Iterable[str]) -> None:
        """Have the sites of the operations among `paths` in a signature's scan."""
        frames = frames_of(paths, self.paths) - of.frames
        if not frames or (of.scan.ended is not None and not of.scan.sites):
            return
        of.frames |= frames | alike(frames, self.module_, of.scan.called)  # else a scan for every layer
        of.rescans.clear()
        with NoTorchFunction():  # the scan's own work is nobody's to record
            args, kwargs = of.inputs()
            again = self.run(self.skeleton(), of.fn, args, kwargs, of)
        of.scan.sites = {**again.sites, **of.scan.sites}  # what is known stays what it was
        of.scan.counts.update(again.counts)
        of.scan.called = again.called
        of.scan.ended = of.scan.ended or again.ended

    def _unknown(self, x: torch.Tensor, dims: tuple[int | None, int | None], of: Signature) -> torch.Tensor:
        """A fake of an input whose rows and length are symbols."""
        shape, kinds = list(x.shape), [DimDynamic.STATIC] * x.dim()
        for dim, size in zip(dims, (ROWS, LENGTH), strict=True):
            if dim is not None:
                shape[dim], kinds[dim] = size, DimDynamic.DUCK
        example = torch.zeros(shape, dtype=x.dtype, device=x.device, requires_grad=x.requires_grad)
        context = StatelessSymbolicContext(kinds)
        made = self.fakes.from_tensor(
            example, symbolic_context=context, source=constant_source(f"input_{len(self.signatures)}")
        )
        found = list(of.symbols)
        for i, dim in enumerate(dims):
            if dim is not None and isinstance(made.shape[dim], torch.SymInt):
                size: Any = made.shape[dim]
                found[i] = size.node.expr
        of.symbols = (found[0], found[1])
        return made


def _fixed(leaves: list, unknown: tuple) -> tuple:
    return tuple(
        tuple(None if d in dims else s for d, s in enumerate(x.shape)) if isinstance(x, torch.Tensor) else None
        for x, dims in zip(leaves, unknown, strict=True)
    )


def _faked(fakes: FakeTensorMode, x: Any, make: Callable | None = None) -> Any:
    if isinstance(x, torch.Tensor):
        return make(x) if make else fakes.from_tensor(x, static_shapes=True)
    if isinstance(x, PLAIN) or callable(x):
        return x
    if make:
        return copied(x, make)
    with FakeCopyMode(fakes):
        return copy.deepcopy(x)


def _again(inputs: list) -> list:
    """The inputs for another scan: what it changes of one is its own."""
    made: dict[int, torch.Tensor] = {}

    def own(x: torch.Tensor) -> torch.Tensor:
        if id(x) not in made:
            made[id(x)] = x if x.requires_grad else x.detach()  # which a write of something that does would change
        return made[id(x)]

    def again(x: Any) -> Any:
        return own(x) if isinstance(x, torch.Tensor) else x if isinstance(x, PLAIN) or callable(x) else copied(x, own)

    with NoTorchFunction():
        return [again(x) for x in inputs]


class WaveSites:
    """The sites of one recording: `tracing.tape.Sites`."""

    def __init__(
        self,
        scanner: Scanner,
        signature: Signature,
        rows_of: Callable[[int], Any],
        length: Any,
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
            known = {s: sympy.Integer(self.past + more) for s, more in self.signature.past.items()}
            scanned = self._rescanned(tape) if tape.reshaped else self.signature.scan
            return _known(self._substituted(scanned.lookup(site), known))
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
        own = [f for f in frames if not f.filename.startswith((_TORCH, _HERE))]
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
        plan = plan or tape.plan(Groups((), 0))
        plan = InterventionGraph.of(plan.ops, Groups((None,) * len(plan.workers), 0), plan.recapture, plan.specs)
        constants = [
            tape.operands.fake_of(("c", i)) if isinstance(c, torch.Tensor) else c for i, c in enumerate(tape.constants)
        ]
        constants += [_faked(self.scanner.fakes, x) for x in values]
        interleaver = FakeInterleaver(plan, constants, self)
        args, kwargs = self.signature.inputs()
        return self.scanner.run(self.scanner.skeleton(), self.signature.fn, args, kwargs, self.signature, interleaver)

    def _sized(self, meta: SiteMeta | Missing, rows: Any) -> SiteMeta | Missing:
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

        def size(n: Any) -> Any:
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

    def symbol(self, expr: Any) -> Any:
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


def _computed(made: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`made` as the result of an operation, where `like` requires grad: no leaf, so that a body can change it in place."""
    if like.requires_grad:
        with torch.enable_grad():
            made.add_(torch.zeros((), dtype=made.dtype, device=made.device, requires_grad=True))
    return made


def _known(meta: SiteMeta | Missing, *symbols: Any) -> SiteMeta | Missing:
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


class FakeInterleaver(TensorInterleaver):
    """A plan's operations on fakes."""

    def __init__(self, plan: Any, constants: list, sites: WaveSites):
        super().__init__(plan, constants)
        self.sites = sites

    def holds(self, op: Op) -> bool:
        """Fakes cannot tell, and what a conditional operation changes keeps its metadata; a skip or stop may not come."""
        return op.kind not in (SKIP, STOP)

    def select(self, op: Op, new: Any, old: Any) -> Any:
        return torch.where(self.lookup(op.when[-1]), new, old) if op.when else new

    def tap(self, n: int, op: Op) -> None:
        value = self.lookup(op.args[2][0])
        self.arrive(n, torch.empty(value.shape, dtype=value.dtype, device=value.device, requires_grad=op.extra))

    def differentiate(self, n: int, op: Op) -> None:
        """Fakes have no graph to go back through; their gradients were there at once."""

    def execute(self, n: int, op: Op) -> Any:
        if op.kind not in ("call", MODULE):
            return None
        args, kwargs = self.arguments(op)
        fn = self.sites.module(op.target) if op.kind == MODULE else op.target.obj
        self.calling = op.kind == MODULE
        try:
            with under(op.ambient):
                return fn(*args, **kwargs)
        finally:
            self.calling = False
