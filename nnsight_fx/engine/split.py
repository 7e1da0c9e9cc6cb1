"""One recording as several forwards: what one invoke computes late, another one uses early (SEMANTICS D12)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..plan.keys import NO_KWARGS, Items, Key, Leaf, Recorded, TensorSlot, Value, facts, mapped
from ..plan.plan import Groups, InterventionGraph, Op
from ..plan.verbs import Save
from ..tracing.tape import Tape


@dataclass
class Part:
    """The invokes of one forward, and their operations renumbered."""

    members: list[int]
    plan: InterventionGraph
    constants: list
    lines: list
    numbers: dict[int, int]  # operation in the recording -> operation in the plan


def parts(tape: Tape, members: list[int]) -> list[list[int]]:
    """The invokes of each forward, in order."""
    found: dict[int, list[int]] = {}
    for member in members:
        found.setdefault(sum(start <= member for start in tape.accesses.splits), []).append(member)
    return list(found.values())


def part(tape: Tape, members: list[int], groups: Groups, real: Callable[[Recorded], Any]) -> Part:
    """The plan of one forward; `real` gives the values of earlier ones, which become constants of this one."""
    own = [n for n, op in enumerate(tape.ops) if op.invoke in members and not _left_out(tape, op, members, real)]
    numbers = {n: i for i, n in enumerate(own)}
    constants = list(tape.constants)
    slots: dict[Value, TensorSlot] = {}

    def renumbered(key: Leaf) -> Key:
        if not isinstance(key, Value):
            return key
        if key.op in numbers:
            return Value(numbers[key.op], key.leaf)
        if key not in slots:
            value = real(key)
            slots[key] = TensorSlot(len(constants), facts(value))
            constants.append(value)
        return slots[key]

    ops = [
        tape.ops[n]._replace(
            invoke=members.index(tape.ops[n].invoke),
            args=mapped(tape.ops[n].args, renumbered),
            kwargs=mapped(tape.ops[n].kwargs, renumbered),
            when=tuple([mapped(key, renumbered) for key in tape.ops[n].when]),
        )
        for n in own
    ]
    lines, specs = [tape.lines[n] for n in own], [tape.specs[n] for n in own]
    for value in sorted(_used_later(tape, members)):
        by, keep = tape.ops[value.op], Items(tuple, (Value(numbers[value.op], value.leaf),))
        when = tuple([mapped(key, renumbered) for key in by.when])
        ops.append(Op(Save(), members.index(by.invoke), keep, NO_KWARGS, when=when))
        lines.append(tape.lines[value.op])
        specs.append(None)
    plan = InterventionGraph.of(tuple(ops), groups, tape.recapture, tuple(specs))
    return Part(members, plan, constants, lines, numbers)


def _left_out(tape: Tape, op: Op, members: list[int], real: Callable[[Recorded], object]) -> bool:
    """Has an earlier forward decided that an operation does not take effect?"""
    for key in op.when:
        if isinstance(key, Value) and tape.ops[key.op].invoke not in members:
            try:
                if not real(key):
                    return True
            except KeyError:  # its own condition did not hold
                return True
    return False


def _used_later(tape: Tape, members: list[int]) -> set[Value]:
    """Values made by these invokes that later ones use."""
    used = {v for op in tape.ops if op.invoke not in members for v in op.needs}
    return {v for v in used if tape.ops[v.op].invoke in members}
