"""The table of verbs by engines, collected from the tests that prove each cell: `pytest --write-semantics`."""

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from verbs import VERBS, Verb

TESTS = Path(__file__).parents[1]
TABLE = TESTS.parent / "docs" / "semantics.md"
ENGINES = ("hooks", "eager", "aot_eager", "inductor")
COLUMNS = (*ENGINES, "beside")  # beside: tests that are not of one engine
REQUIRED = ENGINES[:3]

HEAD = """# Verbs by engines

Written by `make semantics`; `tests/test_semantics.py` fails when the table no longer fits them. A cell
has the number of tests that prove the verb on that engine. Each compares with hooks written by hand, or with the hook engine that
has been so compared. *beside* counts tests that are not of one engine: what is recorded, errors, shapes. Inductor has tests of
its own where it could differ from `aot_eager`, whose graph it gets. Rows are those of the specification (P, T, C, I, E, S: nnsight's
lineage; R: the interleaving contract; D: decisions). The killer cases of the specification are in
`tests/equivalence/test_killer_*.py`: `pytest tests -k case17`.
"""


def engine_of(test: str) -> str:
    """The engine that a test id names, if it names one."""
    named = re.split(r"[\[\]-]", test.partition("[")[2])
    if "symbolic" in named:
        return "eager"  # a captured graph that runs as it is, whoever captured it
    return next((e for e in ENGINES if e in named), "beside")


def proofs(verb: Verb, tests: Iterable[str]) -> list[str]:
    """The ids of the tests that prove a verb."""
    # brackets mean themselves: ids are full of them
    patterns = [re.compile(fnmatch.translate(p.replace("[", "[[]"))) for p in verb.proofs]
    return [t for t in tests if any(p.match(t) for p in patterns)]


def unproved(tests: list[str]) -> list[str]:
    """What is wrong with the table of verbs: patterns without a test, engines without one."""
    wrong = []
    for verb in VERBS:
        for pattern in verb.proofs:
            if not proofs(Verb(verb.name, verb.rows, (pattern,)), tests):
                wrong.append(f"{verb.name}: no test is called `{pattern}`")
        engines = {engine_of(t) for t in proofs(verb, tests)}
        wrong += [f"{verb.name}: no test on {e}" for e in REQUIRED if e not in engines and not verb.free]
    return wrong


def counts(tests: list[str]) -> dict[str, dict[str, int]]:
    """For each verb the number of its tests on each engine."""
    return {verb.name: dict(Counter(engine_of(t) for t in proofs(verb, tests))) for verb in VERBS}


def written() -> dict[str, dict[str, int]]:
    """The numbers that the committed table has."""
    found: dict[str, dict[str, int]] = {}
    for line in TABLE.read_text().splitlines():
        cells = [c.strip() for c in line.split("|")[1:-1]]
        if len(cells) == 2 + len(COLUMNS) and re.fullmatch(r"(\d|\d+ FAILED of )*", "".join(cells[2:])):
            numbers = [re.search(r"(\d+)$", c) for c in cells[2:]]
            found[cells[0]] = {e: int(n[1]) for e, n in zip(COLUMNS, numbers, strict=True) if n}
    return found


UNRUN = "they were counted and not run, which `make test` does on every change"


def table(tests: list[str], verdicts: dict[str, str]) -> str:
    """The page."""
    mine = {t for verb in VERBS for t in proofs(verb, tests)}
    ran = Counter(verdicts[t] for t in mine if t in verdicts)
    passed = f"{ran['passed']} of them ran and passed, {ran['failed']} failed (torch {torch.__version__})"
    told = (
        f"{len(mine)} tests; when this page was written " + (passed if ran["passed"] + ran["failed"] else UNRUN) + "."
    )
    lines = [HEAD, told, "", f"| verb | rows | {' | '.join(COLUMNS)} |", "| --- | --- |" + " --: |" * len(COLUMNS)]
    where = ["", "## Where they are", "", "| verb | tests |", "| --- | --- |"]
    for verb in VERBS:
        mine = proofs(verb, tests)
        cells = [_cell([verdicts.get(t) for t in mine if engine_of(t) == e]) for e in COLUMNS]
        lines.append(f"| {verb.name} | {verb.rows} | {' | '.join(cells)} |")
        files = Counter(t.partition("::")[0] for t in mine)
        where.append(f"| {verb.name} | {', '.join(f'`{f}` ({n})' for f, n in files.items())} |")
    return "\n".join([*lines, *where]) + "\n"


def _cell(verdicts: list[str | None]) -> str:
    failed, total = verdicts.count("failed"), len(verdicts)
    return f"{failed} FAILED of {total}" if failed else str(total or "")


class Collector:
    """All tests that were found, before any was deselected, and what became of those that ran."""

    def __init__(self, config: pytest.Config):
        self.config, self.tests, self.verdicts = config, [], {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = [item for item in items if item.get_closest_marker("gpu") is None]
        self.tests = [item.nodeid.removeprefix("tests/") for item in kept]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid.removeprefix("tests/").partition("@")[0]  # xdist adds a group
        if report.failed or (report.when == "call" and self.verdicts.get(test) != "failed"):
            self.verdicts[test] = "failed" if report.failed else report.outcome

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.tests = self.tests or [i.removeprefix("tests/").partition("@")[0] for i in ids]

    def pytest_sessionfinish(self) -> None:
        if self.config.getoption("--write-semantics") and not hasattr(self.config, "workerinput"):
            TABLE.write_text(table(self.tests, self.verdicts))


KEY = pytest.StashKey[Collector]()


def install(config: pytest.Config) -> None:
    config.stash[KEY] = Collector(config)
    config.pluginmanager.register(config.stash[KEY])
