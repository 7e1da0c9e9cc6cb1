"""The figures of a run of the fuzz suite: a file a theme while it runs; as a script, docs/equivalence.md out of them."""

from __future__ import annotations

import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
KEPT, PAGE = ROOT / ".cache" / "fuzz", ROOT / "docs" / "equivalence.md"
COUNTS = ("programs", "ran", "agreed", "refused", "rounded", "failed", "compiles", "fallbacks", "seconds")

TEXT = """# Equivalence: the figures of the last `make fuzz`

<!-- Written by tests/fuzz/figures.py. -->

Random programs on random small models (`tests/fuzz/`): containers with numbers in them, loops that values decide, batches of
changing sizes (1, 3 and 5 rows of 4, 6 and 9 tokens), objects in outputs, and models around a model are themes of their own. Each
program runs four times (two input shapes, each with two sets of values, numbers and tensors; three shapes for *sizes*) on the
hook engine and on the spliced graph (`backend="eager"`). Compared to the bit: what
was saved and which of it shares memory, gradients taken of it afterwards, caches, the inputs, parameters' gradients,
buffers, a cache object that the user gave, the state of the random generator, and the class of an error, which is never one of torch's insides. With new numbers
and tensors nothing may compile, and nothing may fall back where the program does not say so.

{table}

*ran*: at least one of its runs went through. *agreed*: at least one raised, the same class on both engines. *refused*:
the spliced engine said that it cannot (`PlanMismatchError`: after a sync point has begun the captured run, what the model's
Python sees cannot be changed any more). *rounded*: a program
with a backward, whose values agree but for their last bits (autograd adds gradients up in place, a graph does not, and some
kernels choose their order by the strides of what they get; `aot_eager` of the plain model does the same). *failed*: the engines
differed. *fallbacks*: runs on which the spliced engine said
that hooks did the work (behind a graph break: a cache of all sites, a backward; in invokes: sites behind a write
or a skip of another shape, type or `requires_grad`; a look at an object, or at a number that data decides).

torch {torch}, Python {python}.

## Errors on which both engines agree

{errors}

## Programs in which each verb occurs

{verbs}

## Programs on models with each kind of layer

{layers}
"""


def keep(theme: str, figures: Any) -> None:
    """Keep a theme's figures until the page is made."""
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{theme}.json").write_text(json.dumps(vars(figures)))


def _table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def page() -> str:
    """The page, out of what was kept."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(KEPT.glob("*.json"))}
    for each in found.values():
        each["seconds"] = round(each["seconds"])
    rows = [[theme, *(each[name] for name in COUNTS)] for theme, each in found.items()]
    rows.append(["all", *(sum(each[name] for each in found.values()) for name in COUNTS)])
    tallies = {
        name: sum((Counter(each[name]) for each in found.values()), Counter()) for name in ("errors", "verbs", "layers")
    }
    listed = {
        name: ", ".join(f"{key} {n}" for key, n in tally.most_common()) or "none" for name, tally in tallies.items()
    }
    listed["errors"] = listed["errors"].replace("_", r"\_")
    return TEXT.format(
        table=_table(["theme", *COUNTS], rows), torch=torch.__version__, python=platform.python_version(), **listed
    )


if __name__ == "__main__":
    PAGE.write_text(page())
    print(page())
