"""Random programs on random models: the spliced graph gives what the hook engine gives, to the bit.

`make test` runs `PROGRAMS` of them, always the same; `make fuzz` runs 2,000, others each time, and writes what it found to
docs/equivalence.md. What it ever found is a row of `FOUND`.
"""

from __future__ import annotations

import logging
import os
import time

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings

from . import figures
from .compare import Figures, check
from .draw import PER_CASE, THEMES, cases
from .found import FOUND as FIRST
from .found_kinds import FOUND_KINDS

FOUND = {**FIRST, **FOUND_KINDS}
FULL = os.environ.get("NNSIGHT_FX_FUZZ") == "full"
PROGRAMS = int(os.environ.get("NNSIGHT_FX_FUZZ_PROGRAMS", "2000" if FULL else "80"))

settings.register_profile(
    "fuzz",
    deadline=None,
    derandomize=not FULL,
    print_blob=FULL,
    database=None,
    max_examples=-(-PROGRAMS // (len(THEMES) * PER_CASE)),
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink] if FULL else [Phase.generate],
)


@pytest.fixture(autouse=True)
def _quiet_fakes(monkeypatch):
    """Dynamo's fakes print a page for each error of a model, which these programs provoke."""
    monkeypatch.setattr(logging.getLogger("torch._subclasses.fake_tensor"), "disabled", True)


@pytest.mark.parametrize("theme", THEMES)
def test_a_random_program_is_the_same_on_both_engines(theme):
    total, start = Figures(), time.process_time()

    @settings.get_profile("fuzz")
    @given(cases(theme))
    def run(case):
        found = Figures()
        try:
            found = check(case)
        except BaseException:
            total.failed += 1
            raise
        finally:
            torch._dynamo.reset()
            total.add(found)
        for verb in found.verbs:
            event(verb)

    try:
        run()
    finally:
        total.seconds = time.process_time() - start
        figures.keep(theme, total)
    assert total.ran >= 0.5 * total.programs, f"too many programs only raise: {total.errors}"


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name):
    found = check(FOUND[name])
    assert found.ran + found.agreed + found.refused >= found.programs
