"""Whose fault it is that Dynamo could not trace a model: this package's, a write's, or the model's own."""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING

from ...config import OURS
from ...plan.verbs import Skip, Write

if TYPE_CHECKING:
    from .run import SplicedRun

_FROM = re.compile(r'File "([^"]+)", line (\d+)')


def ours(error: BaseException, handled: BaseException | None) -> str | None:
    """The line of this package that raised, `file:line`, if one did. Dynamo keeps the traceback of what it wraps.

    `handled`: what was being handled when the model was called, which has nothing to do with it.
    """
    frames = [f for e in _chain(error, handled) for f in traceback.extract_tb(e.__traceback__)[-1:]]
    own = (f for f in frames if f.filename.startswith(OURS) and f.name != "execute")  # which calls what a body wrote
    return next((f"{f.filename}:{f.lineno}" for f in own), None)


def _chain(error: BaseException | None, handled: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error is not handled and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def untraceable(error: Exception, handled: BaseException | None, run: SplicedRun) -> str:
    """Why a model runs on hooks that Dynamo failed on, in one line."""
    cause = _chain(error, handled)[-1]
    reason = f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"
    line = ours(error, handled)
    if line is not None:
        return f"hook engine: nnsight_fx failed at {line} while Dynamo traced the model, which is its own fault ({reason}). Please report it"
    told = _FROM.findall(str(error).partition("from user code")[2])
    at = f" at {told[-1][0]}:{told[-1][1]}" if told else ""
    plan = run.entrance.half
    if plan is not None and plan.recapture == "changes":
        writes = [
            n
            for n, op in enumerate(plan.ops)
            if isinstance(op.verb, Skip) or (isinstance(op.verb, Write) and not op.verb.fits)
        ]
        lines = ", ".join(dict.fromkeys(str(run.lines[n]) for n in writes if n < len(run.lines)))
        return f"hook engine: Dynamo could not trace the model with what was written at {lines} ({reason}{at})"
    return f"hook engine: Dynamo could not trace the model itself{at} ({reason})"
