"""The capture half of a plan: what the model's Python sees of writes and skips while it is captured.

The markers that Dynamo traces ask `FakeCapture`, which runs the plan on Dynamo's own fakes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ...capture.marker import active
from ...capture.marking import SUPPLIED, Replacement
from ...compat.fakes import FakeTensor, FakeTensorMode, detect_fake_mode
from ...errors import SkipError
from ...passes.calls import ModuleCall
from ...plan.ambient import under
from ...plan.interleave import Firing
from ...plan.keys import Identity, Keep, Plain, TensorSlot, Value
from ...plan.plan import InterventionGraph, Op
from ...plan.skips import gather
from ...plan.verbs import CallModule, Site, Skip, Write
from ...scan.wave_sites import FakeInterleaver

if TYPE_CHECKING:
    from .run import SplicedRun


class StopUnknown(Exception):
    """No scan could tell at which site the model's Python is to stop. Never reaches the user."""


@contextlib.contextmanager
def in_force(run: SplicedRun, plan: InterventionGraph | None) -> Iterator[None]:
    """The capture half of a plan, for the markers that are traced in this block."""
    markers, outer = run.owner, getattr(active, "capture", None)
    old = (markers.half, markers.stop_at, markers.calls)
    if plan is not None:
        stop_at = run.stop_at() if plan.stops else None
        if plan.stops and stop_at is None:
            raise StopUnknown
        markers.half = _replacements(plan)
        markers.stop_at = stop_at
        markers.calls = {(path, kind): [] for path, kind, _ in [*markers.half, *([stop_at] if stop_at else [])]}
        active.capture = FakeCapture(run)
    try:
        yield
    finally:
        markers.half, markers.stop_at, markers.calls = old
        active.capture = outer


def _replacements(plan: InterventionGraph) -> dict[tuple[str, str, int], Replacement]:
    """The capture half: what the model's Python sees replaced."""
    found: dict[tuple[str, str, int], Replacement] = {}
    for op in plan.ops:
        match op.verb:
            case Write(site, spec, fits=False):
                found[site] = Replacement(spec, _described(op))
            case Skip((path, _, call), spec):
                found[(path, "skip", call)] = Replacement(spec, _described(op))
    return found


def _described(op: Op) -> list:
    """Each leaf of a written tree: supplied by the graph, kept, or an object."""
    described = []
    for key in op.tree:
        if isinstance(key, Value | TensorSlot):
            described.append(SUPPLIED)
        elif isinstance(key, Plain):
            described.append(key.value)
        else:
            described.append(key.obj if isinstance(key, Identity) else Keep(0))
    return described


class FakeCapture:
    """A plan run on Dynamo's own fakes while it traces: what its Python gets to see of writes and skips."""

    def __init__(self, run: SplicedRun):
        self.run = run
        self.states: dict[FakeTensorMode | None, DynamoInterleaver] = {}
        self.mode: FakeTensorMode | None = (
            None  # of Dynamo's latest fakes: not every torch tells it where there is none
        )

    def _state(self, mode: FakeTensorMode | None) -> DynamoInterleaver:
        mode = self.mode = mode or self.mode
        if mode not in self.states:
            self.states[mode] = DynamoInterleaver(self.run, mode)
        return self.states[mode]

    def fake_site(self, x: torch.Tensor, path: str, kind: str, leaf: int, left: int) -> torch.Tensor:
        if isinstance(x, FakeTensor):
            self._state(x.fake_mode).leaf(x, path, kind, leaf, left == 1)
        return x

    def taken(self, at: Site) -> bool:
        return self._state(detect_fake_mode()).taken(at)

    def fake_anchor(self) -> torch.Tensor:
        return torch.empty(0)

    def fake_supply(self, path: str, kind: str, call: int, leaf: int) -> torch.Tensor:
        mode = detect_fake_mode()
        return self._state(mode).supply((path, kind, call), leaf)


class DynamoInterleaver(FakeInterleaver):
    """A plan's operations on the fakes of one of Dynamo's tracings, from where the run stands."""

    def __init__(self, run: SplicedRun, mode: Any):
        constants = [
            mode.from_tensor(c, static_shapes=True) if isinstance(c, torch.Tensor) else c for c in run.constants
        ]
        super().__init__(run.plan, constants, run.sites)
        self.run, self.mode = run, mode
        self.at, self.done, self.counts = list(run.at), set(run.done), dict(run.counts)
        self.env = {
            k: mode.from_tensor(v, static_shapes=True) if isinstance(v, torch.Tensor) else v for k, v in run.env.items()
        }

        def fake(x: object) -> object:
            return mode.from_tensor(x, static_shapes=True) if isinstance(x, torch.Tensor) else x

        self.skipped = {
            at: {i: (spec, [fake(x) for x in leaves], batched) for i, (spec, leaves, batched) in parts.items()}
            for at, parts in run.skipped.items()
        }
        self.group: dict[int, torch.Tensor] = {}
        self.supplied: dict[Site, list] = {}

    def execute(self, n: int, op: Op) -> object:
        if not isinstance(op.verb, CallModule):
            return super().execute(n, op)
        path = op.verb.path
        module, (args, kwargs) = self.run.modules(path), self.arguments(op)
        tensors = {
            name: self.mode.from_tensor(t, static_shapes=True)
            for name, t in [*module.named_parameters(), *module.named_buffers()]
        }
        with under(op.ambient):
            return ModuleCall(path, self.run.skeleton(path))(tensors, args, kwargs)

    def leaf(self, x: torch.Tensor, path: str, kind: str, leaf: int, last: bool) -> None:
        self.group[leaf] = x
        if last:
            leaves: list = [self.group.get(i) for i in range(leaf + 1)]
            self.group = {}
            self.fire(Firing((path, kind, self.count(path, kind)), leaves, None))

    def _write(self, op: Op, verb: Write, firing: Firing) -> None:
        if verb.fits:
            super()._write(op, verb, firing._replace(spec=verb.spec))
        else:
            self.supplied[firing.site] = self.merged(op, verb, firing, list(self.arguments(op)[0][0]))

    def taken(self, at: Site) -> bool:
        """Did the plan replace a site, or skip a call, when it came by?"""
        if at[1] != "skip":
            return at in self.supplied
        try:
            return self.skip_parts((at[0], "output", at[2]), self.run.lines) is not None
        except SkipError:
            return False  # splicing says so, behind Dynamo

    def supply(self, at: Site, leaf: int) -> torch.Tensor:
        if at not in self.supplied:
            self.supplied[at] = gather(self.skipped[(at[0], "output", at[2])], self.plan.groups)[0]
        return self.supplied[at][leaf]
