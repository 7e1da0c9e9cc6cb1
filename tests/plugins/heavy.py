"""Which rows `make test` leaves to `make test-slow`: those that take long where a lighter row of the same test stays.
The rows on hooks, the reference, all stay.

`tests/heavy.txt` names them. `make heavy` measures anew (all but the Inductor and GPU tests) and writes it.
"""

from __future__ import annotations

import collections
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

NAMES = Path(__file__).parents[1] / "heavy.txt"
SECONDS, ALONE = 1.0, 4.0  # a row with a lighter one on its engine; one whose lighter ones are on others
ENGINE = re.compile(r"(?:^|[\[-])(aot_eager|inductor|eager|hooks)(?=[\]-]|$)")


def names() -> frozenset[str]:
    """`file::test[row]` for each row that is left to `make test-slow`."""
    return frozenset(line for line in NAMES.read_text().splitlines() if line and not line.startswith("#"))


def found(report: Path) -> dict[tuple[str, str], list[tuple[float, str, str]]]:
    """The rows of each test, the lightest first: seconds, name, engine."""
    rows = collections.defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        file, name = case.get("classname", "").rpartition(".")[2], case.get("name", "")
        test, _, row = name.partition("[")
        engine = ENGINE.search(row)
        rows[file, test].append((float(case.get("time", 0)), f"{file}::{name}", engine[1] if engine else ""))
    return {test: sorted(each) for test, each in rows.items()}


def heavy(rows: list[tuple[float, str, str]]) -> set[str]:
    """The rows of one test that go."""
    gone, kept = set(), set()
    for n, (seconds, name, engine) in enumerate(rows):
        if n and engine != "hooks" and seconds >= (SECONDS if engine in kept else ALONE):
            gone.add(name)
        else:
            kept.add(engine)
    return gone


def write(report: Path) -> None:
    """Name the heavy rows of a report; a row that is named and did not run stays."""
    rows = found(report).values()
    ran = {name for each in rows for _, name, _ in each}
    kept = names() - ran if NAMES.exists() else set()
    lines = sorted(set().union(*map(heavy, rows)) | kept)
    NAMES.write_text("\n".join(["# written by `make heavy` (tests/plugins/heavy.py); not by hand", *lines]) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
