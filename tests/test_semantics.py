"""docs/semantics.md is what the tests say: every verb has a test on every engine, and the table counts them."""

import subprocess
import sys
from pathlib import Path

import pytest

import semantics

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tests(request):
    """The ids of all tests, whatever this run was asked for."""
    asked = [Path(a).resolve() for a in request.config.args]
    if any(a in (ROOT, ROOT / "tests") for a in asked):
        return request.config.stash[semantics.KEY].tests
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests",
        "--collect-only",
        "-q",
        "-m",
        "not gpu",
        "-p",
        "no:cacheprovider",
    ]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    return [line.removeprefix("tests/") for line in found.stdout.splitlines() if "::" in line]


def test_every_verb_has_tests_on_every_engine(tests):
    assert semantics.unproved(tests) == []


def test_the_table_is_the_tests(tests):
    """A cell that has tests, and one that has none, is told so; how many it has may be out of date."""
    written, counted = (
        {verb: {engine for engine, n in cells.items() if n} for verb, cells in table.items()}
        for table in (semantics.written(), semantics.counts(tests))
    )
    assert written == counted, "run `make semantics`"
    assert "FAILED" not in semantics.TABLE.read_text().partition("|")[2]


def test_a_verb_without_a_test_shows(tests):
    without = [t for t in tests if "-skip]" not in t]
    assert any("-skip]" in wrong for wrong in semantics.unproved(without))
    only = [t for t in tests if semantics.engine_of(t) != "aot_eager"]
    assert "write them: no test on aot_eager" in semantics.unproved(only)
