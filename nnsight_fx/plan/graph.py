"""`tracer.graph`: what a trace has recorded, to read, compare, draw and save."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..lines import Line
from . import differences, printing
from .keys import slots
from .plan import InterventionGraph
from .verbs import AtSite, Site


@dataclass(frozen=True)
class RecordedOperation:
    """One recorded operation."""

    index: int
    kind: str  # "read", "write", "skip", "call", "save", ...
    name: str  # the function of a call; else the kind
    site: Site | None  # (module path, "input" | "output" | "result", call index)
    line: Line | None  # the user's
    invoke: int
    inputs: tuple[int, ...]  # the operations whose values it uses
    constants: tuple[int, ...]  # the slots of the lifted values it uses
    code: str

    def __str__(self) -> str:
        return self.code + (f"  # {printing.short(self.line)}" if self.line else "")


class Graph:
    """The interventions of a trace as data.

    ```python
    with model.trace(prompt) as tracer:
        model.transformer.h[7].output[:, -1] += steering
        logits = model.lm_head.output.save()

    print(tracer.graph)                       # code, with the line that each operation comes from
    tracer.graph.draw("steer.svg")            # Graphviz; steer.dot where that is not installed
    tracer.graph.save_plan("steer.safetensors", names={"logits": logits, "steering": steering})
    [op.site for op in tracer.graph if op.kind == "write"]
    ```

    Two graphs are equal when their structures are: what is lifted (tensors, positions, numbers in arithmetic) may differ,
    and so may the lines.
    """

    def __init__(
        self,
        plan: InterventionGraph,
        lines: Sequence[Line],
        constants: Sequence[object],
        names: dict[int, str] | None = None,
        recording: object = None,
    ):
        self.plan, self.lines, self.constants = plan, list(lines), list(constants)
        self.names = names or {}  # constants by slot
        self.recording = recording  # what `save_plan` needs besides: a `writing.Recording`

    @cached_property
    def operations(self) -> tuple[RecordedOperation, ...]:
        printer = printing.Printer(self.plan, self.names)
        return tuple(
            RecordedOperation(
                n,
                op.verb.name,
                printing.function_name(op),
                op.verb.site if isinstance(op.verb, AtSite) else None,
                self.lines[n] if n < len(self.lines) else None,
                op.invoke,
                tuple(sorted({m for m, _ in self.plan.needs[n]})),
                tuple(dict.fromkeys(slots(op.args, op.kwargs, *op.when))),
                printer.line(n),
            )
            for n, op in enumerate(self.plan.ops)
        )

    def __iter__(self) -> Iterator[RecordedOperation]:
        return iter(self.operations)

    def __len__(self) -> int:
        return len(self.plan.ops)

    def __getitem__(self, index: int) -> RecordedOperation:
        return self.operations[index]

    @cached_property
    def key(self) -> str:
        """A hash of the structure, the same in every process; functions of the user's own count by identity."""
        return differences.key(self.plan)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and (self.plan is other.plan or self.key == other.key)

    def __hash__(self) -> int:
        return hash(self.key)

    def diff(self, other: Graph) -> list[differences.Difference]:
        """Why the structures differ, so that the two do not share what is compiled; empty when they do."""

        def say(graph: Graph) -> Callable:
            return lambda n: f"`{graph[n].code}` ({printing.short(graph.lines[n])})"

        return differences.diff(self.plan, other.plan, say(self), say(other))

    @property
    def code(self) -> str:
        """A line for each operation, behind it the line of the user's code."""
        return printing.code(self.plan, self.lines, self.constants, self.names)

    def __repr__(self) -> str:
        return self.code

    def to_dot(self) -> str:
        """The graph in Graphviz' DOT language; it needs nothing installed."""
        from . import drawing

        return drawing.to_dot(self)

    def draw(self, path: str | os.PathLike) -> str:
        """Draw into an SVG, PNG or PDF file, by suffix, and return the path of what was written.

        That takes the package `graphviz` (the extra `viz`) and the program `dot`; where one is missing, the DOT text is written
        beside it, as `<path>.dot`, with a `UserWarning` that says so.
        """
        from . import drawing

        return drawing.draw(self, path)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        from . import drawing

        svg = drawing.svg(self)
        return {"text/plain": self.code} | ({"image/svg+xml": svg} if svg is not None else {})

    def save_plan(self, path: str | os.PathLike, names: dict[str, object] | None = None) -> None:
        """Write the plan to `path`: one safetensors file, the operations as JSON in its header; no pickle, no code.

        `names` calls saved values, caches and lifted tensors by name: `{"logits": logits, "steering": vector}`; a module that
        the body used (an autoencoder, an intervention) gives its name to its parameters: `{"sae": sae}` makes them `sae.weight`,
        ...; numbers, which are no objects of their own, have the names that the printed graph gives them:
        `{"position": ("constant_0", "constant_2")}`.
        Without it saved values are named after their sites and constants `constant_0`, `constant_1`, ...

        Constants have the values that they have now. Parameters and buffers of the model are kept by name, not by value.

        Raises:
            PlanError: something in it is not data: a function of one's own, a value that Python looked at, an object.
        """
        from . import files
        from .writing import PlanWriter

        writer = PlanWriter(self, names or {})
        files.write(path, files.PLAN, writer.document(), writer.tensors)
