"""The operations of a saved plan, recorded again on the tape of an open trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from ..envoys.source import at, is_inside
from ..errors import PlanError
from ..plan import tree
from ..plan.ambient import under
from ..plan.forms import ambient_of, decode, spec_of
from ..plan.verbs import Call, CallModule, Grad, Read, RunBackward, Save, SetGrad, Site, Skip, StopRun, Visit, Write
from ..tracing.recorder import Recorder
from ..tracing.steps import SiteMeta, nothing
from ..tracing.tape import Tape
from .file import Stored, arguments, line_of


class Held(NamedTuple):
    """A condition, as a recording has its open blocks."""

    predicate: torch.Tensor


class Replay:
    """`strict`: sizes must be those of the recording, and every error is one of not fitting."""

    def __init__(self, stored: Stored, constants: list, *, strict: bool):
        self.stored, self.constants, self.strict = stored, constants, strict
        self.values: list[list] = [[] for _ in stored.operations]

    def operations(self, tape: Tape, numbers: Iterable[int]) -> None:
        for n in numbers:
            op, mark = self.stored.operations[n], len(tape.ops)
            try:
                with under(ambient_of(op.get("ambient"))), self._conditions(tape, op):
                    self.values[n] = tree.flatten(self._operation(tape, op))[0]
            except PlanError:
                raise
            except Exception as e:
                if self.strict:
                    raise self._unfit(op, f"({op['kind']}): {e}") from e
                e.add_note(f"nnsight_fx: in the plan `{self.stored.path}`, recorded at {op['line']}")
                raise
            tape.lines[mark:] = [line_of(op)] * (len(tape.lines) - mark)

    @contextlib.contextmanager
    def _conditions(self, tape: Tape, op: dict) -> Iterator[None]:
        """What must hold for the operation, as open blocks of `tracer.cond`."""
        blocks: list = tape.conditions.blocks
        held = decode(op.get("when", []), self._value, self.constants.__getitem__)
        blocks += map(Held, held)
        try:
            yield
        finally:
            del blocks[len(blocks) - len(held) :]

    def _value(self, n: int, leaf: int) -> Any:
        return self.values[n][leaf]

    def _unfit(self, op: dict, why: str) -> PlanError:
        return PlanError(f"`{self.stored.path}` does not fit this model: {op['line']} {why}")

    def _operation(self, tape: Tape, op: dict) -> object:
        kind: str = op["kind"]
        target: Any = op.get("target")
        if kind in (Read.name, Write.name, Skip.name) and is_inside(target[0]) and target[0] not in self.stored.paths:
            at(self.stored.model, target[0])  # what operations call is learnt on the way
        args, kwargs = arguments(op, self._value, self.constants.__getitem__)
        if kind == Call.name:
            return self.stored.functions[target](*args, **kwargs)  # the recorder sees it as it sees the body's
        if kind == Read.name:
            return self._read(tape, (*target,), op)
        if kind == Write.name:
            return self._write(tape, (*target,), op, list(args[0]))
        if kind == Skip.name:
            return tape.skip(target[0], target[2], tree.unflatten(list(args[0]), spec_of(op["tree"])))
        if kind == CallModule.name:
            return tape.module(target, tuple(args), kwargs)
        if kind == Visit.name:
            made = tape.modules.visit(target[0], target[1], tree.unflatten(list(args[0]), spec_of(op["tree"])))
            passed = tape.ops[-1].verb
            assert isinstance(passed, Visit)
            if passed.site != tuple(target):
                raise self._unfit(op, f"is call {target[2]} of `{target[0]}`, and here call {passed.site[2]}")
            return made
        if kind == Save.name:
            return args[0].save()
        if kind == Grad.name:
            tape.gradients.asked.pop(tape.operands.encode(args[0]), None)
            tape.gradients.creating = op["extra"]
            return tape.gradients.get(args[0])
        if kind == SetGrad.name:
            return tape.add(SetGrad(), tuple(args), result=nothing)
        if kind == RunBackward.name:
            loss, gradient = args
            options = (kwargs["retain_graph"], kwargs["create_graph"], kwargs["inputs"])
            return tape.gradients.record(loss, gradient, *options, op["extra"])
        return tape.stop() if kind == StopRun.name else tape.barrier()

    def _write(self, tape: Tape, site: Site, op: dict, leaves: list) -> None:
        meta = tape.meta(site)
        spec = meta.spec if op["tree"] == "same" and isinstance(meta, SiteMeta) else spec_of(op["tree"])
        if tree.leaf_count(spec) != len(leaves):
            raise self._unfit(
                op,
                f"writes {len(leaves)} values to `{'.'.join(site[:2])}`, which has {tree.leaf_count(spec)}.",
            )
        tape.write(site, tree.unflatten(leaves, spec))

    def _read(self, tape: Tape, site: Site, op: dict) -> object:
        value = tape.read(site)
        leaves: list = tree.flatten(value)[0]
        found: Any = op["found"]
        name = ".".join(p for p in site[:2] if p)
        if found is not None and len(found) != len(leaves):
            raise self._unfit(
                op, f"reads `{name}`, which has {len(leaves)} values, and had {len(found)} when that was recorded."
            )
        before: list = found or []
        for leaf, was in zip(leaves, before, strict=False):
            if was is None or not isinstance(leaf, torch.Tensor):
                continue
            shape, dtype = was
            now = [n if isinstance(n, int) else None for n in leaf.shape]
            sizes = self.strict and any(None not in (a, b) and a != b for a, b in zip(shape, now, strict=False))
            if len(shape) != len(now) or str(leaf.dtype) != dtype or sizes:
                raise PlanError(
                    f"`{self.stored.path}` does not fit this model: `{name}` is {now} of {leaf.dtype}, and was {shape} of "
                    f"{dtype} when {op['line']} was recorded."
                )
        return value


class Edit:
    """The operations of an edit that a plan holds, as an edit of the model that it runs on."""

    def __init__(self, replayed: Replay, numbers: list[int]):
        self.replayed, self.numbers = replayed, numbers

    def replay(self, tape: Tape) -> None:
        with Recorder(tape):
            self.replayed.operations(tape, self.numbers)
        tape.settle()
