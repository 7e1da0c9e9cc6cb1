"""Which rows `make test` leaves to `make test-slow`: those that take long where a lighter row of the same test and engine stays.
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
SECONDS = 1.5
ENGINE = re.compile(r"(?:^|[\[-])(aot_eager|inductor|eager|hooks)(?=[\]-]|$)")


def names() -> frozenset[str]:
    """`file::test[row]` for each row that is left to `make test-slow`."""
    return frozenset(line for line in NAMES.read_text().splitlines() if line and not line.startswith("#"))


def found(report: Path) -> dict[str, list[tuple[float, str]]]:
    """The rows of each test on one engine with their seconds, the lightest first."""
    rows = collections.defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        file, name = case.get("classname", "").rpartition(".")[2], case.get("name", "")
        engine = ENGINE.search(name.partition("[")[2])
        rows[f"{file}::{name.partition('[')[0]} {engine and engine[1]}"].append(
            (float(case.get("time", 0)), f"{file}::{name}")
        )
    return {test: sorted(each) for test, each in rows.items()}


def write(report: Path) -> None:
    """Name the heavy rows of a report; a row that is named and did not run stays."""
    rows = found(report)
    ran = {name for each in rows.values() for _, name in each}
    slow = [each[1:] for test, each in rows.items() if not test.endswith(" hooks")]
    heavy = {name for each in slow for seconds, name in each if seconds >= SECONDS}
    kept = names() - ran if NAMES.exists() else set()
    NAMES.write_text(
        "# written by `make heavy` (tests/plugins/heavy.py); not by hand\n" + "\n".join(sorted(heavy | kept)) + "\n"
    )


if __name__ == "__main__":
    write(Path(sys.argv[1]))
