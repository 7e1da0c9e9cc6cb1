"""Where a recording learns the metadata of sites: one scan a signature, on a structural copy of the model."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn

from ..capture.operations import alike, frames_of
from ..compat.fakes import FakeCopyMode, FakeTensorMode, on_symbols
from ..compat.modes import NoTorchFunction
from ..compat.symbols import (
    DimDynamic,
    StatelessSymbolicContext,
    constant_source,
    guards_hold,
)
from ..compat.transformers import collects
from ..plan import ambient, tree
from ..plan.plan import InterventionGraph
from ..plan.tree import PLAIN
from ..plan.verbs import Site
from ..tracing.steps import Missing, SiteMeta, Step
from ..tracing.tape import quiet_fakes
from .past import Past, copied, growing, is_cache, state
from .scan import Scan, callee, scan, skeleton
from .shapes import Shapes
from .watch import TreeWatch

# Sizes that stand for the unknown ones in a scan: they show up as symbols, never as numbers.
ROWS, LENGTH = 11, 13
SIGNATURES = 64  # scans kept a model
STEPS = 100_000  # recorded operations kept a scan


class Signature:
    """What all recordings over inputs of one kind share: the tree of steps and the scan."""

    def __init__(self, found: Scan, keep: object, fn: str | None = None):
        self.scan, self.keep, self.fn = found, keep, fn
        self._root = Step()
        self.inputs: Callable[[], Any] = lambda: ((), {})  # fresh fakes of them: a forward fills a cache
        self.past: dict[object, int] = {}  # symbols of sizes that grow with a cache, and what each is beyond its length
        self.holds: Callable[[list], bool] = lambda values: True  # is it the scan for such lengths
        self.rescans: OrderedDict[Step, Scan] = OrderedDict()
        self.stops: weakref.WeakKeyDictionary[InterventionGraph, Site] = weakref.WeakKeyDictionary()
        self.symbols: tuple = (None, None)  # of rows and length, in a scan over unknown sizes
        self.metas: dict[tuple, SiteMeta | Missing] = {}
        self.grown: tuple[int, dict[Site, SiteMeta | Missing]] = (-1, {})  # the sites behind a cache of one length
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
        self.watch = TreeWatch(list(self.module_.modules()))
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
            state = self.watch.weights()
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

    def signature(self, batch: object, fn: str | None, unknown: tuple | None) -> Signature:
        """The signature of an input. `unknown` gives the dims of each tensor leaf that hold rows and length."""
        return self._signature(batch, fn, unknown, None)

    def continued(self, batch: object, fn: str | None = None) -> tuple[Signature, int | None]:
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
        key = (spec, described, fixed, unknown, fn, ambient.current(), self.watch.training())
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
            made = [faked(self.fakes, x, past and past.faker(self.fakes, found)) for x in leaves]
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
                real=dict(zip(copied.modules(), self.watch.modules, strict=True)).get,
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


def faked(fakes: FakeTensorMode, x: object, make: Callable | None = None) -> object:
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

    def again(x: object) -> object:
        return own(x) if isinstance(x, torch.Tensor) else x if isinstance(x, PLAIN) or callable(x) else copied(x, own)

    with NoTorchFunction():
        return [again(x) for x in inputs]
