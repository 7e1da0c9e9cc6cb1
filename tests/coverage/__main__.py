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

from .programs import ALL, PROGRAMS, Row, work

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


def page(rows: list[Row], backend: str) -> str:
    """The table, as Markdown."""
    whole = [r for r in rows if not r.error and r.segments and r.share >= 0.95]
    green = [
        r for r in rows if not r.error and all(c.verdict in ("equal", "close", "refused") for c in r.cells.values())
    ]
    lines = [
        "# Coverage",
        "",
        f"`make coverage` on {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f'{transformers.__version__}, `backend="{backend}"`: {len(rows)} architectures, from small random configs or with real '
        f"weights from packages; {len(whole)} with at least 95 % of their sites in captured code, {len(green)} without a red cell.",
        "",
        "Each cell compares the hook engine with the spliced graph: `=` equal to the bit, `~` within 1e-5, with the largest difference,",
        "`refused`: the same error on both, `red`: different. Sites are inputs and outputs of all modules that a forward calls once.",
        "",
        "| architecture | kind | segments | sites | captured | " + " | ".join(PROGRAMS) + " |",
        "| --- | --- | --- | --- | --- |" + " --- |" * len(PROGRAMS),
    ]
    for r in rows:
        cells = []
        for name in PROGRAMS:
            c = r.cells.get(name)
            mark = {"equal": "=", "close": f"~ {c.difference:.0e}" if c else "", "refused": "refused"}
            cells.append("" if c is None else mark.get(c.verdict, "**red**"))
        shown = [r.name, r.kind, str(r.segments), str(r.sites), f"{100 * r.share:.0f} %", *cells]
        lines.append("| " + " | ".join(shown) + " |")
    notes = [f"- {r.name}: {r.error}" for r in rows if r.error]
    notes += [f"- {r.name}, fallback: {f}" for r in rows for f in r.fallbacks]
    notes += [f"- {r.name}, {n}: {c.verdict}: {c.note}" for r in rows for n, c in r.cells.items() if c.note]
    return "\n".join([*lines, "", "## Fallbacks, refusals and red cells", "", *(notes or ["none"]), ""])


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
    # A process for each row: what one model leaves in Dynamo is not the next one's.
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        jobs = pool.imap_unordered(functools.partial(work, backend=options.backend), names)
        for row in tqdm(jobs, total=len(names), unit="model"):
            rows[row.name] = row
    ordered = [rows[n] for n in names]
    text = page(ordered, options.backend)
    if options.names:
        print(text)
    else:
        PAGE.write_text(text)
        print(f"written: {PAGE}")
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in ordered], indent=1))
    red = [r.name for r in ordered if r.error or any(c.verdict in ("differs", "failed") for c in r.cells.values())]
    print(f"red: {', '.join(red) or 'none'}", file=sys.stderr)
    return bool(red)


if __name__ == "__main__":
    sys.exit(main())
