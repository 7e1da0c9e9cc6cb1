"""One recording as several forwards: what one invoke computes late, another one uses early (SEMANTICS D12)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..plan.encode import Key, facts
from ..plan.plan import SAVE, Groups, InterventionGraph, Op
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


def part(tape: Tape, members: list[int], groups: Groups, real: Callable[[Key], Any]) -> Part:
    """The plan of one forward; `real` gives the values of earlier ones, which become constants of this one."""
    own = [n for n, op in enumerate(tape.ops) if op.invoke in members and not _left_out(tape, op, members, real)]
    numbers = {n: i for i, n in enumerate(own)}
    constants, slots = list(tape.constants), {}

    def rekey(key: object) -> Any:
        if not isinstance(key, tuple) or not key:
            return key
        if key[0] == "v":
            if key[1] in numbers:
                return ("v", numbers[key[1]], key[2])
            if key not in slots:
                value = real(key)
                slots[key] = ("c", len(constants), facts(value))
                constants.append(value)
            return slots[key]
        return key if key[0] in ("c", "n", "l", "s", "o") else tuple(rekey(k) for k in key)

    ops = [
        tape.ops[n]._replace(
            invoke=members.index(tape.ops[n].invoke),
            args=rekey(tape.ops[n].args),
            kwargs=rekey(tape.ops[n].kwargs),
            when=rekey(tape.ops[n].when),
        )
        for n in own
    ]
    lines, specs = [tape.lines[n] for n in own], [tape.specs[n] for n in own]
    for value in sorted(_used_later(tape, members)):
        keep = ("t", tuple, (("v", numbers[value[0]], value[1]),))
        by = tape.ops[value[0]]
        ops.append(Op(SAVE, members.index(by.invoke), None, keep, ("d", (), ()), None, "", None, rekey(by.when)))
        lines.append(tape.lines[value[0]])
        specs.append(None)
    plan = InterventionGraph.of(tuple(ops), groups, tape.recapture, tuple(specs))
    return Part(members, plan, constants, lines, numbers)


def _left_out(tape: Tape, op: Op, members: list[int], real: Callable[[Key], Any]) -> bool:
    """Has an earlier forward decided that an operation does not take effect?"""
    for key in op.when:
        if key[0] == "v" and tape.ops[key[1]].invoke not in members:
            try:
                if not real(key):
                    return True
            except KeyError:  # its own condition did not hold
                return True
    return False


def _used_later(tape: Tape, members: list[int]) -> set[tuple[int, int]]:
    """Values made by these invokes that later ones use."""
    used = {v for op in tape.ops if op.invoke not in members for v in op.needs}
    return {v for v in used if tape.ops[v[0]].invoke in members}
