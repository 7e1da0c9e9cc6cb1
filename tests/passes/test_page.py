"""docs/passes.md is what the passes' docstrings say, and its example runs."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

from nnsight_fx import passes

from .measured import measure
from .page import FIGURES, FORKED, OWN, PAGE, page, row


def test_the_page_is_the_passes() -> None:
    assert PAGE.read_text() == page(), "run `python tests/passes/page.py`"


def test_every_pass_says_what_it_does_and_when_not() -> None:
    for step in passes.PIPELINE:
        _, what, never, _ = row(step).split(" | ")
        assert what.strip() and never.strip(), step


def test_every_pass_has_a_measured_effect() -> None:
    figures = json.loads(FIGURES.read_text())
    assert list(figures) == [step.__name__ for step in (*passes.PIPELINE, *FORKED)]
    worse = [name for name, each in figures.items() if each["counts"] and each["with"] >= each["without"]]
    assert not worse, f"passes that are worth nothing: {worse}"


@pytest.mark.parametrize("name", ["splice", "erase", "prune"])
def test_a_figure_is_what_is_measured(name) -> None:
    assert json.loads(FIGURES.read_text())[name] == measure(name), "run `python tests/passes/measured.py`"


def test_its_example_runs() -> None:
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(compile(OWN, str(PAGE), "exec"), {"__name__": "example"})
    assert "fold: 3 rewrites" in told.getvalue()
