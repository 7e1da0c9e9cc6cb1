"""Which traces of a session run together, and how."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from ..engine import clock
from ..engine.captured.watch import watch
from ..engine.how import How
from ..engine.switch import within
from ..plan import tree
from ..report.runs import Group, Report
from .batch import batched
from .forked import forked
from .pending import Pending, in_force, why_alone
from .rows import Mixed

Strategy = Callable[[list[Pending], Group], None]
STRATEGIES: dict[str, Strategy] = {"batched": batched, "forked": forked}


def run(todo: list[Pending], report: Report) -> None:
    """Run traces, in an order that gives each what it needs, and deliver what they saved."""
    for p in todo:
        p.note_length()
    for group in groups(todo):
        _run(group, report)


def groups(todo: list[Pending]) -> list[list[Pending]]:
    """Traces that may run in one forward: recorded alike, none in need of another."""
    level: dict[Pending, int] = {}
    found: dict[Hashable, list[Pending]] = {}
    for p in todo:
        level[p] = 1 + max((level[q] for q in p.needs if q in level), default=0)
        p.alone = why_alone(p)
        found.setdefault((level[p], p if p.alone else _kind(p)), []).append(p)
    return [found[key] for key in sorted(found, key=lambda k: k[0])]  # type: ignore[index]


def _kind(p: Pending) -> Hashable:
    """What traces have in common that can share a forward."""
    wave, state = p.wave, p.tracer.state
    leaves, spec = tree.flatten((wave.batch.args, wave.batch.kwargs))
    inputs = tuple((x.shape[1:], x.dtype, x.device) if isinstance(x, torch.Tensor) else x for x in leaves)
    flags = (state.ambient, state.autocast_cache, state.dtype, tuple(state.sdpa), state.deterministic)
    stops = p.plan if p.plan.stops else None
    options = p.tracer.compile
    return (
        *(id(p.host.module), len(p.host.edits), tuple(map(id, p.host.edits)), wave.fn, repr(options)),
        *(spec, inputs, wave.batch.rows, flags, id(p.setting), stops),
    )


def _run(group: list[Pending], report: Report) -> None:
    first = group[0]
    with within(first.tracer.state), in_force(first.setting, first):
        for p in group:
            p.check()
        how = together(group)
        strategy = STRATEGIES.get(how.engine)
        told = Group(how.engine, [p.line for p in group], how.why or None)
        told.structures = len({p.plan for p in group})
        compiles, waited = watch.compiles, clock.process.total
        try:
            if strategy is None or not _together(strategy, group, told):
                _one_by_one([p for p in group if not p.done], told)
        finally:
            told.compiles, told.waited = watch.compiles - compiles, clock.process.total - waited
            report.add(told)


def _together(strategy: Strategy, group: list[Pending], told: Group) -> bool:
    """Did a strategy give every trace its values?"""
    try:
        strategy(group, told)
        return True
    except Mixed as error:
        told.why = str(error)
    except Exception as error:  # one by one it is its own trace's
        told.why = f"together they failed: {type(error).__name__}: {error}".partition("\n")[0]
    told.strategy = "one by one"
    return False


def together(group: list[Pending]) -> How:
    """How the traces of a group run: in one forward, or one by one and why."""
    first = group[0]
    if len(group) == 1:
        return How("one by one", why=first.alone or "")
    return How("batched" if first.capture is None else "forked")


def _one_by_one(group: list[Pending], told: Group) -> None:
    for p in group:
        p.done = True
        told.forwards += 1
        try:
            p.tracer.forwards.run_recorded()
            told.ran_alone(p.tracer.notes)
        except Exception as error:
            note(error, p.line, p.session_line)
            raise


def note(error: BaseException, line: object, session: object) -> None:
    """Say of which trace an error is."""
    error.add_note(f"nnsight_fx: in the trace at {line}, in the session at {session}")
