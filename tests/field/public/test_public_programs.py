"""Programs that users posted in public trackers, written anew: each on every engine against plain hooks.

`python -m tests.field.public` writes docs/field.md.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch.utils import _pytree

from . import PAGE, PROGRAMS, page
from .models import LANGUAGE, MODULES, net, wrapped
from .program import Program

ENGINES = ["hooks", "eager", "aot_eager"]
pytestmark = pytest.mark.xdist_group("public programs")  # they share models, and what was captured of them


@functools.cache
def wanted(program: Program) -> Any:
    return program.plain(net(program.model))


def same(got: Any, want: Any, exact: bool) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
    ours, form = _pytree.tree_flatten(got)
    plain, plain_form = _pytree.tree_flatten(want)
    assert form == plain_form, f"{form} is not {plain_form}"
    for i, (a, b) in enumerate(zip(ours, plain, strict=True)):
        if isinstance(b, torch.Tensor):
            assert type(a) is type(b), type(a)
            torch.testing.assert_close(a, b, **tolerance, msg=lambda m, i=i: f"value {i}: {m}")
        else:
            assert a == b, f"value {i}"


def cells() -> list[Any]:
    """Each program on each engine; captures take seconds, so most of them are for `make test-slow`."""
    quick = [
        (n, e) for n in range(1, len(PROGRAMS) + 1) for e in ENGINES if e == "hooks" or (e == "eager" and n % 30 == 3)
    ]
    every = [(n, e) for n in range(1, len(PROGRAMS) + 1) for e in ENGINES]
    return [pytest.param(*c, marks=() if c in quick else pytest.mark.slow, id=f"{c[0]}-{c[1]}") for c in every]


@pytest.mark.parametrize(("number", "engine"), cells())
def test_it_is_what_plain_torch_gives(number: int, engine: str, request: pytest.FixtureRequest) -> None:
    program = PROGRAMS[number - 1]
    if program.fails:
        request.applymarker(pytest.mark.xfail(strict=True, reason=program.fails))
    got = program.ours(wrapped(program.model, engine))
    same(got, wanted(program), program.exact and engine != "aot_eager")


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text() == page(), "run `python -m tests.field.public`"


def test_the_table_is_wide() -> None:
    sources = [p.source for p in PROGRAMS]
    assert len(PROGRAMS) >= 60 and len(set(sources)) == len(sources) == len({p.what for p in PROGRAMS})
    assert all(re.fullmatch(r"https://[\w./-]+", s) for s in sources)
    trackers = {tuple(s.split("/")[2:5]) for s in sources}
    assert len(trackers) >= 12 and {p.model for p in PROGRAMS} <= LANGUAGE.keys() | MODULES.keys()
    assert len({p.model for p in PROGRAMS}) >= 15
