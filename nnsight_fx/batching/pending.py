"""A trace that its session has put off: what it was recorded under, and whether it may wait and run with others."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..compat.fakes import with_attributes
from ..compat.tensors import version
from ..engine.captured.capture import Capture
from ..errors import OutOfOrderError
from ..plan import tree
from ..plan.ambient import under
from ..plan.keys import facts, made_at
from ..plan.plan import InterventionGraph
from ..plan.tree import PLAIN
from ..plan.verbs import Apply, Barrier, Call, CallModule, Grad, Read, RunBackward, Save, SetGrad, StopRun, Sync, Write
from ..scan.watch import Setting
from ..tracing.functions import inside
from ..tracing.lazy import LazyTensor, key_of
from .effects import effects

if TYPE_CHECKING:
    from ..lines import Line
    from ..tracing.contexts import Tracer
    from ..tracing.tape import Tape


# What may be in traces that share a forward. A kind that is not here runs alone.
TOGETHER = Read | Write | Call | CallModule | Save | StopRun | Barrier | Grad | SetGrad | RunBackward | Apply | Sync
COPIED = 2**20  # bytes: what is larger is watched, not copied (SEMANTICS D23)


@contextlib.contextmanager
def in_force(setting: Setting, pending: Pending) -> Iterator[None]:
    """Run under it: flags are put back for the while, other changes are an error."""
    watch = pending.host.scanner.watch
    now = watch.setting()
    if now[1:] != setting[1:]:
        what = "the weights" if now.hooks == setting.hooks else "the hooks"
        raise OutOfOrderError(
            f"{pending.line}: {what} of the model were changed between this trace and the end of its session at "
            f"{pending.session_line}, which runs it only then. Look at one of its values (`print(value)`) before the change, or "
            "leave the session first."
        )
    for module, flag in zip(watch.modules, setting.training, strict=True):
        module.training = flag
    try:
        yield
    finally:
        for module, flag in zip(watch.modules, now.training, strict=True):
            module.training = flag


@dataclass(eq=False)
class Pending:
    """One recorded trace. `alone` says why it cannot run with others, where it cannot."""

    tracer: Any
    session_line: object
    setting: Setting
    needs: list[Pending] = field(default_factory=list)  # earlier traces whose values it uses
    watched: list[tuple[torch.Tensor, int]] = field(default_factory=list)  # large tensors, and their versions
    alone: str | None = None
    done: bool = False

    @property
    def host(self) -> Any:
        return self.tracer.host

    @functools.cached_property
    def capture(self) -> Capture | None:
        """What its model's graphs are kept in; `None`: it runs on hooks."""
        return self.host.capture_for(self.tracer.compile)

    @property
    def wave(self) -> Any:
        return self.tracer.waves[-1]

    @property
    def tape(self) -> Any:
        return self.wave.tape

    @property
    def line(self) -> Line:
        return self.tracer.line

    @property
    def plan(self) -> InterventionGraph:
        return self.tape.plan(self.wave.groups())

    def check(self) -> None:
        """Is everything large that it holds what it was?"""
        for tensor, seen in self.watched:
            if version(tensor) != seen:
                raise OutOfOrderError(
                    f"{self.line}: a tensor of shape {tuple(tensor.shape)} that this trace uses was changed in place before the end of "
                    f"its session at {self.session_line}, which runs the trace only then. Give the trace a copy (`.clone()`), or look "
                    "at one of its values (`print(value)`) before the change."
                )

    def note_length(self) -> None:
        """Its number of tokens is one that its model runs with."""
        length = self.wave.batch.length if self.wave.alone else None
        if self.capture is not None and length is not None:
            self.capture.lengths.setdefault(self.wave.fn, set()).add(length)

    def keep(self, wanted: set[int] | None) -> None:
        """Let the run give what was saved, and of the rest what is `wanted` (ids; `None`: all that somebody holds)."""
        tape = self.tape
        kept = {v for op in tape.ops if isinstance(op.verb, Save) for v in op.needs}
        tape.open = True
        try:
            with under(tape.base):
                for lazy in sorted(tape.values.values(), key=lambda x: made_at(key_of(x))):
                    asked = id(lazy) in tape.saved or wanted is None or id(lazy) in wanted
                    if asked and not inside(key_of(lazy)) and key_of(lazy) not in kept:
                        tape.keep(lazy)
                for stand_in in tape.objects.held:
                    if wanted is None or id(stand_in) in tape.objects.asked:
                        tape.objects.keep(stand_in)
        finally:
            tape.open = False


def why_now(tracer: Tracer) -> str | None:
    """Why a trace cannot be put off, if it cannot: it or its model does more than compute values."""
    if tracer.generation is not None:
        return "it generates"
    if tracer.scan_only:
        return "it is a scan"
    if len(tracer.waves) != 1 or tracer.waves[0].started:
        return "it has looked at a value"
    wave, host = tracer.waves[0], tracer.host
    tape, state = wave.tape, tracer.state
    if state.functions or state.dispatch:
        return "a mode of yours is active (`TorchFunctionMode`, `TorchDispatchMode`)"
    why = beyond_values(tape)
    if why:
        return why
    batches = [tree.flatten((b.args, b.kwargs))[0] for b in wave.batches]
    inputs = [x for leaves in batches for x in leaves]
    if any(not isinstance(x, (torch.Tensor, *PLAIN)) for x in inputs):
        return "an object is among its inputs"
    if with_attributes(inputs):
        return "a tensor among its inputs has attributes"
    if tape.base.grad and _differentiable(host, [*inputs, *tape.constants]):
        return "its values are differentiable: put the session under `torch.no_grad()`, or freeze the parameters"
    return effects(host, wave.tape.sites.signature, tracer.fn)


def beyond_values(tape: Tape) -> str | None:
    """What a recording does beside computing values, if it does."""
    if tape.told or tape.objects.kept:
        return "it keeps objects or a cache"
    if tape.operands.changed:
        return "it changes a tensor of yours in place"
    for op in tape.ops:
        if isinstance(op.verb, Apply | Sync):
            return "it calls a function of yours"
        if isinstance(op.verb, Call) and op.effect == "random":
            return "it draws random numbers"
        if op.when:
            return "it has conditions (`tracer.cond`)"
    return "it runs a backward" if tape.gradients.backwards else None


def _differentiable(host: Any, held: list) -> bool:
    return any(isinstance(x, torch.Tensor) and type(x) is not LazyTensor and x.requires_grad for x in held) or any(
        p.requires_grad for p in host.module.parameters()
    )


def why_alone(pending: Pending) -> str | None:
    """Why a trace that may wait cannot run in one forward with others, if it cannot."""
    wave, plan = pending.wave, pending.plan
    if not wave.alone:
        return "it has invokes of its own"
    capture = pending.capture
    if capture is not None and capture.options.passes is not None:
        return "passes of yours are for the graph of one trace"
    why = unbatchable(plan)
    if why:
        return why
    batch = wave.batch
    for leaf in tree.flatten((batch.args, batch.kwargs))[0]:
        if isinstance(leaf, torch.Tensor) and (leaf.dim() == 0 or leaf.shape[0] != batch.rows):
            return "an input of it does not hold the rows on dimension 0"
    return None


def unbatchable(plan: InterventionGraph) -> str | None:
    """Why a plan cannot share a forward with others, if it cannot."""
    if plan.recapture == "changes":
        return "it changes the shape, dtype or structure of a value"
    for op in plan.ops:
        verb = op.verb
        if not isinstance(verb, TOGETHER):
            return f"it has a `{verb.name}`"
        if isinstance(verb, Read) and (verb.live or verb.expected is not None):
            return "it reads what no scan is sure of"
        if isinstance(verb, Read | Write) and verb.site[1] not in ("input", "output", "result"):
            return "it looks inside a module (`.source`)"
    return None


class Copies:
    """The tensors that a session's traces hold, as they were: one copy of each for each change of it."""

    def __init__(self):
        self.known: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def take(self, tensor: torch.Tensor, watched: list[tuple[torch.Tensor, int]], own: bool) -> torch.Tensor:
        """A copy of a small tensor; a large one itself, to be `watched`. `own`: a copy for one trace, which may change it."""
        if tensor.is_inference() or isinstance(tensor, torch.nn.Parameter):
            return tensor
        key = (id(tensor), version(tensor))
        if key not in self.known:
            size = tensor.numel() * tensor.element_size()
            copied = tensor.detach().clone() if size <= COPIED and tensor.layout is torch.strided else tensor
            self.known[key] = (tensor, copied if facts(copied) == facts(tensor) else tensor)
        found = self.known[key][1]
        if found is tensor:
            watched.append((tensor, version(tensor)))
            return found
        return found.clone() if own else found
