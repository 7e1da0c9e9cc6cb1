"""A run: one forward of the model with a plan's interventions in it.

The same object serves the hook engine (every site is live) and the spliced engine (sites inside captured segments are
spliced, the rest is live). Live sites call `pass_site`; segments take and give values through `env`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch

from .. import compat
from ..capture.marker import active
from ..capture.markers import Markers
from ..errors import MissedSiteError, PlanMismatchError
from ..lines import Line
from ..plan import tree
from ..plan.ambient import under
from ..plan.interleave import Firing, Stopped
from ..plan.keys import Outside, Recorded, SizeExpr, TensorSlot, Value
from ..plan.lifting import name_of
from ..plan.names import RANDOM_IN_PLACE
from ..plan.plan import InterventionGraph, Op
from ..plan.skips import check_skips, gather
from ..plan.verbs import (
    Apply,
    Call,
    CallModule,
    Observation,
    Read,
    RunBackward,
    Site,
    Skip,
    Sync,
    Write,
    place_of_site,
)
from ..tracing.nested import refuse_nested
from . import recomputed
from .how import How
from .linear import Differentiating
from .missed import check, missed_error
from .offload import Offload
from .retained import retain
from .switch import Coroutine, ThreadState
from .taps import Taps

if TYPE_CHECKING:
    from .captured.capture import Capture


class Run(Differentiating):
    """One forward. `call` runs the model and returns its result; `modules` finds a module by path."""

    forwards = 1  # none: work on values that the model has given
    shared = ""  # how it ran with others in one forward, where it did: `Notes.engine`
    how = How()  # as it was chosen
    grads = False  # may a backward follow
    waited_for: Capture | None = None  # it is on hooks until compiling pays
    changing: int | None = None  # the operation that changed what the model goes on with, at the site that it passes

    def __init__(
        self,
        plan: InterventionGraph,
        constants: list,
        lines: list[Line],
        owner: Markers,
        call: Callable[[], Any],
        modules: Callable[[str], torch.nn.Module],
        symbols: dict,
    ):
        super().__init__(plan, constants)
        self.lines, self.owner, self.call, self.modules, self.symbols = lines, owner, call, modules, symbols
        self.coroutine: Coroutine | None = None
        self.result: Any = None
        self.everything = False  # hook every module: the plan may still grow
        self.written: tuple[str, Line] | None = None  # the last write: whom to name when the model cannot use it
        self.report: list[str] = []  # why it ran on hooks, where it should not
        self.compiles = self.hits = 0
        self.capture_s = self.compile_s = 0.0  # seconds of this run that went into them
        self.taps = Taps()
        self.offload = Offload()

    # -- the model -----------------------------------------------------------------------------------------------

    def forward(self) -> None:
        """Run the model once."""
        outer = getattr(active, "run", None)
        active.run, self.grads = self, torch.is_grad_enabled()
        begun = time.perf_counter()
        try:
            self.work(None)
            if self.stopping:
                raise Stopped
            with compat.frames.as_compiled(), self.around():
                self.result = self.pass_site("", "result", self.call())
        except Stopped:
            pass
        except Exception as e:
            blame(e, self.written)
            raise
        finally:
            active.run = outer
            if self.waited_for is not None:
                self.waited_for.hooks_s += time.perf_counter() - begun

    def as_it_ran(self) -> How:
        """How the run went, with what it found out on the way."""
        return self.how

    def around(self) -> contextlib.AbstractContextManager:
        """Around the model: what makes its sites call `pass_site`."""
        return self.on_hooks()

    @contextlib.contextmanager
    def on_hooks(self) -> Iterator[None]:
        """Around a model all of whose sites are live."""
        with live(self, self.everything), self.follow(next(iter(self.owner.paths))):
            yield

    def until(self, plan: InterventionGraph, state: ThreadState) -> Callable[[Recorded], Any]:
        """Run as far as the plan's last operation, a sync, needs; returns the look-up of values."""
        self.closed = False
        self.extend(plan)
        self.everything = True
        if self.coroutine is None:
            self.coroutine = Coroutine(self._suspendable, state)
        if not self.coroutine.ended:
            self._resume()
        if self.coroutine.ended:
            self.never()
            self.work(None)
        self.offload.wait()
        missed = self.unfinished() if self.coroutine.ended else []
        if missed:
            raise self.missed_error(missed)
        return self.lookup

    def _suspendable(self) -> None:
        active.run = None  # a greenlet shares its thread's locals: the body must not see this run
        self.forward()

    def _resume(self) -> None:
        outer = getattr(active, "run", None)
        active.run = self
        try:
            assert self.coroutine is not None
            self.coroutine.go_on()
        finally:
            active.run = outer

    def finish(self, plan: InterventionGraph) -> None:
        """The body is done: run the model to its end."""
        self.extend(plan)
        check_skips(self.plan, self.lines)
        try:
            if self.coroutine is None:
                self.forward()
            elif not self.coroutine.ended:
                self._resume()
            else:
                self.work(None)
        finally:
            self.taps.remove()
            self.offload.wait()

    def extend(self, plan: InterventionGraph) -> None:
        super().extend(plan)
        if self.coroutine is not None and not self.coroutine.ended:
            self.look_inside(self.owner.operations.frames(plan))

    def look_inside(self, frames: frozenset[str]) -> None:
        """A body that looked at a value goes on to operations inside modules: they are observed from here on."""
        for _ in self.owner.operations.use(frames):  # every module's `forward` is ours by now, and calls these
            pass

    def release(self) -> None:
        super().release()
        self.result = self.coroutine = None

    def abandon(self) -> None:
        self.taps.remove()
        if self.coroutine is not None:
            self.coroutine.abandon()

    @property
    def skips(self) -> Collection[str]:
        """The modules whose `forward` the plan may leave out: any, while it may grow."""
        return self.owner.paths.values() if self.everything else self.plan.skips

    # -- live sites ----------------------------------------------------------------------------------------------

    def pass_site(self, path: str, kind: str, value: object) -> Any:
        """The model passes a site with `value`; what it goes on with is returned."""
        call = self.count(path, kind)
        site = (path, kind, call)
        if self.closed and not self._watches(site):
            return value
        leaves, spec = tree.flatten(value)
        old, before, self.changing = list(leaves), recomputed.versions(leaves) if self.grads else [], None
        self.fire(Firing(site, leaves, spec))
        if self.grads and (self.changing is not None or recomputed.versions(old) != before):
            self._changed(site, old, leaves)
        if self.stopping:
            raise Stopped
        new_spec = self.restructured.pop(site, spec)
        if new_spec != spec:
            return tree.unflatten(leaves, new_spec, value)
        if any(a is not b for a, b in zip(old, leaves, strict=True)):
            return tree.replace(value, old, leaves)
        return value

    def _changed(self, site: Site, old: list, leaves: list) -> None:
        """Something other than reading took place at a site."""
        within = compat.checkpoints.running()
        if not within:
            return
        where = f"`{place_of_site(site)}`"
        what = f"{where} is changed" if self.changing is None else f"{self.lines[self.changing]}: {where} is changed"
        skips = self.changing is not None and isinstance(self.plan.ops[self.changing].verb, Skip)

        def gradients() -> bool:
            had = any(isinstance(x, torch.Tensor) and x.requires_grad for x in old)
            return had or any(p.requires_grad for p in next(iter(self.owner.paths)).parameters())

        recomputed.refuse_backward(within, [] if skips else leaves, what, gradients)

    def _watches(self, site: Site) -> bool:
        path, kind, _ = site
        plan = self.plan
        return site in plan.touches or (kind == "input" and path in plan.skips) or (path, kind) in plan.followed

    def skip_value(self, path: str, call: int) -> tuple[list, tree.Spec] | None:
        """The output that the plan gives to a skipped call, if it is one."""
        parts = self.skip_parts((path, "output", call), self.lines)
        return None if parts is None else gather(parts, self.plan.groups)

    def operation(self, path: str, fn: Callable, args: tuple, kwargs: dict) -> Any:
        """An operation inside a module: `fn(*args, **kwargs)` with a site before and one behind it."""
        args, kwargs = self.pass_site(path, "input", (args, kwargs))
        found = self.skip_value(path, self.counts[(path, "input")] - 1) if path in self.plan.skips else None
        out = fn(*args, **kwargs) if found is None else tree.unflatten(*found)
        return self.pass_site(path, "output", out)

    def skip(self, path: str) -> Callable:
        """The `forward` of a module that the plan skips."""

        def forward(original: Callable, args: tuple, kwargs: dict) -> object:
            called = self.owner.running() is not self  # by an operation of the plan
            found = None if called else self.skip_value(path, self.counts.get((path, "input"), 0) - 1)
            return original(*args, **kwargs) if found is None else tree.unflatten(*found)

        return forward

    # -- operations ----------------------------------------------------------------------------------------------

    def observed(self, leaf: object, how: Observation) -> Any:
        if isinstance(leaf, torch.Tensor) and how.leaves_gpu(leaf):
            return self.offload.begin(leaf, how)
        return super().observed(leaf, how)

    def perform(self, n: int, firing: Firing | None) -> None:
        op = self.plan.ops[n]
        verb = op.verb
        if isinstance(verb, Read | Write) and firing is not None:
            refuse_nested(self.lines[n], verb.site, firing.leaves)
        if isinstance(verb, Read) and firing is not None:
            self._alias_saved(n, verb, firing.leaves)
        if isinstance(verb, Write | Skip) or op.effect == "random" or _draws_in_place(op):
            self.changing = n
        self.note_write(n)
        super().perform(n, firing)

    def note_write(self, n: int) -> None:
        """Remember whom to blame, should the model fail now."""
        verb = self.plan.ops[n].verb
        if isinstance(verb, Write | Skip):
            self.written = written(verb, self.lines[n])

    def _alias_saved(self, n: int, verb: Read, leaves: list) -> None:
        """Where a saved value requires grad the model goes on with an alias, which is the saved tensor's own (SEMANTICS D5).

        An invoke's rows are a view beside the model's way, and have no such alias.
        """
        invoke, batched = self.plan.ops[n].invoke, verb.batched
        for j, leaf in enumerate(leaves):
            if (
                isinstance(leaf, torch.Tensor)
                and leaf.requires_grad
                and torch.is_grad_enabled()
                and leaf.layout is torch.strided
                and ((n, j) in self.plan.saved or not self.closed)
                and self._batched(leaf, invoke, batched[j] if batched else None) is None
            ):
                leaves[j] = leaf.view_as(leaf)
                vars(leaves[j]).update(vars(leaf))

    def execute(self, n: int, op: Op) -> Any:
        verb = op.verb
        if isinstance(verb, Sync):
            if n == len(self.plan.ops) - 1 and self.coroutine is not None:
                run, active.run = active.run, None
                self.coroutine.pause()
                active.run = run
            return None
        if op.retains:
            return self._retain(n, op)
        args, kwargs = self.arguments(op)
        if isinstance(verb, CallModule):
            fn = self.modules(verb.path).forward
        else:
            assert isinstance(verb, Call | Apply)
            fn = verb.fn.obj
        try:
            with under(op.ambient), unobserved():
                return fn(*args, **kwargs)
        except Exception as e:
            e.add_note(f"nnsight_fx: in the intervention at {self.lines[n]}")
            self.written = None
            raise

    # -- gradients -----------------------------------------------------------------------------------------------

    def _retain(self, n: int, op: Op) -> None:
        key = op.first
        assert isinstance(key, Value | TensorSlot)
        tensor, *part = self.taps.on_the_way(self, key)
        read = isinstance(key, Value) and isinstance(self.plan.ops[key.op].verb, Read)
        if self.plan.retains_rows and not part and read:
            raise PlanMismatchError(
                f"{self.lines[n]}: an invoke retains the gradient of its rows after a sync point has begun the "
                "captured run, which has only these rows. Trace with `compile=False`."
            )
        retain(self.lookup(key), tensor, self._batched(tensor, *part) if part else None)

    def tap(self, n: int, op: Op) -> None:
        self.taps.tap(self, n, op)

    def differentiate(self, n: int, op: Op, verb: RunBackward) -> None:
        self.taps.differentiate(self, n, op, verb)

    def constant(self, key: Outside) -> Any:
        return self.symbols_value(key.expr) if isinstance(key, SizeExpr) else self.constants[key.slot]

    def symbols_value(self, expr: Any) -> int:
        return int(expr.subs(self.symbols))

    def check(self, n: int, leaves: list, expected: tuple, spec: tree.Spec) -> None:
        check(self, n, leaves, expected, spec)

    def missed_error(self, missed: list[int]) -> MissedSiteError:
        return missed_error(self, missed)


def _draws_in_place(op: Op) -> bool:
    return op.effect == "inplace" and isinstance(op.verb, Call) and name_of(op.verb.fn.obj) in RANDOM_IN_PLACE


def written(verb: Write | Skip, line: Line) -> tuple[str, Line]:
    """What a write or a skip did, and where."""
    return f"`{place_of_site(verb.site)}` was {'skipped' if isinstance(verb, Skip) else 'written'}", line


def blame(error: Exception, done: tuple[str, Line] | None) -> None:
    """Name the write after which the model failed."""
    if done is not None:
        error.add_note(f"nnsight_fx: the model failed after {done[0]} at {done[1]}")


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    """No run sees the sites that are passed in here: an operation calls modules on values of its own."""
    run, active.run = getattr(active, "run", None), None
    try:
        yield
    finally:
        active.run = run


@contextlib.contextmanager
def live(run: Run, everything: bool) -> Any:
    """The hooks of the hook engine: where the plan needs them, or everywhere when it may still grow."""
    owner = run.owner
    paths = {path for path, _ in run.plan.watched} if not everything else ()
    modules = (
        [m for m, path in owner.paths.items() if path in paths or path in run.skips]
        if not everything
        else list(owner.paths)
    )
    frames = owner.operations.frames(run.plan)
    with owner.installed(modules, {path: run.skip(path) for path in run.skips}, frames):
        yield
