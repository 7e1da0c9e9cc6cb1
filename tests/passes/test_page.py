"""docs/passes.md is what the passes' docstrings say, and its example runs."""

from __future__ import annotations

import contextlib
import io

from nnsight_fx import passes

from .page import OWN, PAGE, page, row


def test_the_page_is_the_passes() -> None:
    assert PAGE.read_text() == page(), "run `python tests/passes/page.py`"


def test_every_pass_says_what_it_does_and_when_not() -> None:
    for step in passes.PIPELINE:
        _, what, never, _ = row(step).split(" | ")
        assert what.strip() and never.strip(), step


def test_its_example_runs() -> None:
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(compile(OWN, str(PAGE), "exec"), {"__name__": "example"})
    assert "fold: 3 rewrites" in told.getvalue()
