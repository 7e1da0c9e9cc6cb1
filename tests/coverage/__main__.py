"""`python -m tests.coverage [NAME ...]`: run the matrix, two architectures at a time, and write `docs/coverage.md`."""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from .architectures import KNOWN
from .programs import ALL, PROGRAMS, Cell, Row, work

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


def page(rows: list[Row], backend: str) -> str:
    """The table, as Markdown."""
    cells = [c for r in rows for c in r.cells.values()]
    refused = sum(c.verdict == "refused" for c in cells)
    lines = [
        "# Coverage",
        "",
        f"`make coverage` on {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f'{transformers.__version__}, `backend="{backend}"`: {len(rows)} of {len(ALL)} architectures, from small random configs or with real '
        f"weights from packages; {sum(r.whole for r in rows)} without a whole-model fallback and with at least 95 % of their sites in "
        f"captured code; {sum(not r.red for r in rows)} without a red cell; {refused} of {len(cells)} cells refused.",
        "",
        "Each cell compares the hook engine with the spliced graph: `=` equal to the bit, `~` within 1e-5, with the largest difference,",
        "`refused`: the same error on both, `red`: different; `(hooks)`: the whole trace fell back to the hook engine, so that both sides",
        "ran on it. Sites are inputs and outputs of all modules that a forward calls once.",
        "",
        "| architecture | kind | segments | sites | captured | " + " | ".join(PROGRAMS) + " |",
        "| --- | --- | --- | --- | --- |" + " --- |" * len(PROGRAMS),
    ]
    for r in rows:
        cells = [shown_cell(r.cells.get(name)) for name in PROGRAMS]
        shown = [r.name, r.kind, str(r.segments), str(r.sites), f"{100 * r.share:.0f} %", *cells]
        lines.append("| " + " | ".join(shown) + " |")
    notes = [f"- {r.name}: {r.error}" for r in rows if r.error]
    notes += [f"- {r.name}, graph break: {b}" for r in rows for b in r.breaks]
    notes += [f"- {r.name}, fallback: {f}" for r in rows for f in r.fallbacks]
    notes += [f"- {r.name}, upstream: {KNOWN[r.name]}" for r in rows if r.name in KNOWN]
    notes += [f"- {r.name}, {n}: {c.verdict}: {c.note}" for r in rows for n, c in r.cells.items() if c.note]
    return "\n".join([*lines, "", "## Graph breaks, fallbacks, refusals and red cells", "", *(notes or ["none"]), ""])


def shown_cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    mark = {"equal": "=", "close": f"~ {cell.difference:.0e}", "refused": "refused"}.get(cell.verdict, "**red**")
    return mark if cell.engine == "spliced" else f"{mark} ({cell.engine})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.coverage", description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures, by name; all without")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write the rows, too")
    options = parser.parse_args()
    names = options.names or list(ALL)
    unknown = [n for n in names if n not in ALL]
    if unknown:
        parser.error(f"unknown: {unknown}; there is {', '.join(ALL)}")
    rows: dict[str, Row] = {}
    ordered, text = [], ""
    # A process for each row: what one model leaves in Dynamo is not the next one's.
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        jobs = pool.imap_unordered(functools.partial(work, backend=options.backend), names)
        for row in tqdm(jobs, total=len(names), unit="model"):
            rows[row.name] = row
            ordered = [rows[n] for n in names if n in rows]
            text = page(ordered, options.backend)
            if not options.names:
                PAGE.write_text(text)
            if options.json:
                options.json.write_text(json.dumps([asdict(r) for r in ordered], indent=1))
    print(text if options.names else f"written: {PAGE}")
    red = [r.name for r in ordered if r.red]
    print(f"red: {', '.join(red) or 'none'}", file=sys.stderr)
    return bool(red)


if __name__ == "__main__":
    sys.exit(main())
