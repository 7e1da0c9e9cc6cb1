"""The shape environment of a scan: what is unknown of sizes, and how the scan goes on where data decides."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import sympy

from ..compat.fakes import GuardOnDataDependentSymNode
from ..compat.symbols import (
    ShapeEnv,
    free_unbacked_symbols,
)
from ..errors import PaddedLengthUnknown
from ..lines import BELOW, user_line

TURNS = 520  # how often a scan goes the same way at a line that values decide: more than models have experts


class _Unknown(PaddedLengthUnknown, GuardOnDataDependentSymNode):
    """Torch takes it for an error of its own; the user sees the public class, at the line of the body."""

    __module__, __qualname__ = PaddedLengthUnknown.__module__, PaddedLengthUnknown.__qualname__
    of_the_body = True

    def __init__(self, message: str):
        Exception.__init__(self, message)
        self.cond: object = None


class Shapes(ShapeEnv):
    """A shape environment whose only unknown is the padded length.

    During a scan it guesses what depends on data (a branch of the model, an expert's rows), so that the scan goes on; the
    metadata of all sites from there on is checked when they are read.
    """

    guessing = guessed = False

    def __init__(self):
        super().__init__()
        self.inside: list[str] = []  # the modules that are running in a scan
        self.deciders: set[str] = set()  # those whose Python has looked at values
        self.turns: dict[tuple, int] = {}  # how often each line of a running frame has been decided

    def _first_turns(self) -> bool:
        """Is a line decided for the first times? A `while` on values would never end with one answer."""
        frame: FrameType = sys._getframe(2)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(BELOW):
            frame = frame.f_back
        line = (id(frame), frame.f_lineno)
        self.turns[line] = self.turns.get(line, 0) + 1
        if self.turns[line] > 2 * TURNS:
            raise RuntimeError(f"values decide how often {frame.f_code.co_filename}:{frame.f_lineno} runs")
        return self.turns[line] <= TURNS

    @property
    def allow_scalar_outputs(self) -> bool:
        return self.guessing

    @property
    def allow_dynamic_output_shape_ops(self) -> bool:
        return self.guessing

    def evaluate_expr(self, orig_expr: Any, *args: object, **kwargs: object) -> object:
        try:
            return super().evaluate_expr(orig_expr, *args, **kwargs)
        except GuardOnDataDependentSymNode:
            if not self.guessing:
                raise
            self.guessed = True
            self.deciders.add(self.inside[-1] if self.inside else "")
            guess = orig_expr.xreplace({s: sympy.Integer(1) for s in free_unbacked_symbols(orig_expr)})
            return guess if guess not in (sympy.true, sympy.false) or self._first_turns() else sympy.Not(guess)

    def _make_data_dependent_error(self, *args: object, **kwargs: object) -> PaddedLengthUnknown:
        return _Unknown(
            f"{user_line()}: the padded length of this batch is not known before all its prompts are. Index from the right "
            "(`h[:, -1]`), give the prompts first (`a, b = tracer.batch(p1, p2)`, then `with a:` and `with b:`), or fix the length "
            "(`model.trace(pad_to=32)`)."
        )
