"""A plan whose run is a call: what an earlier run has shown to be in one captured graph runs again with nothing around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..capture import _torch
from ..capture.markers import active
from ..capture.segment import Segment
from ..tracing.encode import Key
from .run import Run
from .spliced import SplicedRun, Unread


class Steady:
    """What a finished run has shown of its plan. Dynamo checks its guards at each call, and we the hooks on the modules."""

    def __init__(self, run: SplicedRun, keys: Sequence[Key]):
        assert run.entry is not None and run.variant is not None
        self.capture, self.entry, self.segment, self.variant = run.capture, run.entry, run.segment, run.variant
        self.hooks = run.owner.own()
        self.slots = [take[1] for take in self.variant.takes]
        self.given = [self.variant.own + self.variant.gives.index(key[1:3]) for key in keys]

    @classmethod
    def of(cls, run: Run, keys: Sequence[Key]) -> Steady | None:
        """A run that gave the values `keys` as a call, if it was no more than that."""
        if not isinstance(run, SplicedRun) or run.entry is None or run.variant is None or run.segment is None:
            return None
        found, plan = run.variant, run.plan
        one = run.entry.whole and run.segments_run == 1 and not run.on_hooks and not run.report
        plain = not (run.frames or plan.skips or plan.recapture or plan.backs or run.live_sites)
        begun = found not in run.segment.variants.get(
            ((plan, True), found.unread, ()), ()
        )  # did anything happen before the graph
        inputs = all(take[0] == "constant" and take[2] == "tensor" for take in found.takes)
        gives = found.requires is None and found.cut is None and all(key[1:3] in found.gives for key in keys)
        return cls(run, keys) if one and plain and not begun and inputs and gives and not run.replays else None

    def __call__(self, inputs: tuple, constants: list, hooks: tuple) -> list:
        """The values, of a run on other inputs and lifted values; `NotCaptured`, before anything ran, where it is no such run."""
        if hooks != self.hooks:
            raise _torch.NotCaptured
        call, outer = _Call(self, constants), getattr(active, "run", None)
        active.run = call
        try:
            with _torch.as_compiled():
                self.entry.cached(*inputs)  # type: ignore[misc]
        except Unread:
            pass
        finally:
            active.run = outer
        self.capture.hits += 1
        return call.values


class _Call:
    """What captured code finds as the run."""

    owner = None

    def __init__(self, steady: Steady, constants: list):
        self.steady, self.constants = steady, constants
        self.values: list = []

    def run_segment(self, segment: Segment, args: tuple) -> Any:
        steady, found = self.steady, self.steady.variant
        if segment is not steady.segment or not found.guards(list(args)):
            raise _torch.NotCaptured
        outputs = found.call(*args, *[self.constants[slot] for slot in steady.slots])
        self.values = [outputs[i] for i in steady.given]
        if found.unread:
            raise Unread
        return outputs[: found.own]
