"""A request: one forward that is to run. Its plan, the values and lines of the plan, and what the model is called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..lines import Line
from ..plan.plan import InterventionGraph
from ..scan.wave_sites import WaveSites
from ..tracing.tape import Tape

Compile: TypeAlias = (
    bool | Literal["auto"] | dict | None
)  # what a trace says of the engine; `None`: as the model is compiled


@dataclass(frozen=True)
class Request:
    """What a wave asks of its model."""

    plan: InterventionGraph
    constants: list  # the plan's values, by slot
    lines: list[Line]  # of its operations
    batch: Any  # what the model is called with
    fn: str | None  # the function that is traced; the model itself, if None
    opened: Line  # where the trace was opened
    compile: Compile
    tape: Tape
    sites: WaveSites
    symbols: dict  # what the sizes that were unknown turned out to be
    in_session: bool = False  # is it one of several traces
    generates: bool = False  # is it a forward of a generation, which goes on with what the model returns
