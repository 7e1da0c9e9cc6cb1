"""A plan whose run is a call: what an earlier run has shown to be in one captured graph runs again with nothing around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from ... import compat
from ...capture.marker import active
from ...capture.segment import Segment
from ...compat.fakes import with_attributes
from ...lines import Line
from ...plan.keys import Recorded, Value
from ...plan.verbs import Call, CallModule, Read, Save, Write
from ..how import How
from ..run import Run, blame, written
from .entrance import Unread
from .run import SplicedRun
from .variants import extras

KINDS = Read | Write | Call | CallModule | Save


class Steady:
    """What a finished run has shown of its plan. Dynamo checks its guards at each call, and we the hooks on the modules."""

    def __init__(self, run: SplicedRun):
        assert run.entrance.entry is not None and run.variant is not None
        self.capture, self.entry, self.segment, self.variant = run.capture, run.entrance.entry, run.segment, run.variant
        self.plan, self.modules, self.hooks = run.plan, run.modules, run.owner.own()
        self.how = run.as_it_ran()
        self.call = compat.frames.inside(run.variant.call)
        self.written = max(
            ((n, verb) for n, _, verb in run.plan.of_kind(Write)), key=lambda found: found[0], default=None
        )

    @classmethod
    def of(cls, run: Run) -> Steady | None:
        """A finished run that missed nothing as a call, if it was no more than that."""
        if not isinstance(run, SplicedRun) or run.entrance.entry is None or run.variant is None or run.segment is None:
            return None
        found, plan = run.variant, run.plan
        one = (
            run.entrance.entry.whole
            and run.segments_run == 1
            and not run.entrance.on_hooks
            and not run.report
            and not run.replays
        )
        plain = not (run.frames or plan.recapture or plan.backs or run.live_sites) and all(
            isinstance(op.verb, KINDS) and not op.when for op in plan.ops
        )
        whole = found.requires is None and found.cut is None and plan.saved <= set(found.gives)
        return cls(run) if one and plain and found.fresh and whole else None

    def __call__(self, inputs: tuple, leaves: list, constants: list, lines: list[Line], hooks: tuple) -> SteadyCall:
        """A run on other inputs, whose tensors are among `leaves`, and lifted values; `NotCaptured`, before anything ran, where it is no such run."""
        if hooks != self.hooks or not self.entry.whole or with_attributes(leaves):
            raise compat.dynamo.NotCaptured
        call, outer = SteadyCall(self, constants, lines), getattr(active, "run", None)
        active.run = call
        try:
            with compat.frames.as_compiled():
                self.entry.cached(*inputs)  # type: ignore[misc]
        except Unread:
            pass
        except compat.dynamo.NotCaptured:
            raise
        except Exception as error:
            if self.written is not None:
                n, verb = self.written
                blame(error, written(verb, lines[n]))
            raise
        finally:
            active.run = outer
        self.capture.hits += 1
        self.capture.entries.touch(self.entry)
        return call


class SteadyCall:
    """What captured code finds as the run, and whoever asks for its values."""

    owner = coroutine = None
    stopping, segments_run, compiles, hits = False, 1, 0, 1
    forwards, shared, capture_s, compile_s = 1, "", 0.0, 0.0
    report: Sequence[str] = ()
    live_sites: Sequence[str] = ()

    def __init__(self, steady: Steady, constants: list, lines: list[Line]):
        self.steady, self.constants, self.lines = steady, constants, lines
        self.capture, self.plan, self.modules = steady.capture, steady.plan, steady.modules
        self.env: dict[Value, Any] = {}

    def run_segment(self, segment: Segment, args: tuple) -> object:
        found = self.steady.variant
        if segment is not self.steady.segment or not found.guards(self, args):
            raise compat.dynamo.NotCaptured
        outputs = self.steady.call(*args, *extras(cast(Any, self), found))
        self.env = dict(zip(found.gives, outputs[found.own :], strict=True))
        if found.unread:
            raise Unread
        return outputs[: found.own]

    def as_it_ran(self) -> How:
        """As the run did that has shown it to be a call."""
        return self.steady.how

    @property
    def done(self) -> range:
        """The operations of the plan that took place: all."""
        return range(len(self.plan.ops))

    def lookup(self, key: Recorded) -> Any:
        return self.env[key] if isinstance(key, Value) else self.constants[key.slot]

    def release(self) -> None:
        """The values belong to whoever saved them."""
        self.env = {}

    def abandon(self) -> None:
        """There is nothing to end."""
