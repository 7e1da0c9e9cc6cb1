"""A tensor of the user's that is written to a site is the model's value: changes of the site change it, and that is told."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight

ENGINES = ["hooks", "eager", "aot_eager"]
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.tanh(self.a(x)))


def wrapped(engine: str) -> Any:
    torch.manual_seed(0)
    model = NNsight(nn.Sequential(*[Block() for _ in range(3)]).requires_grad_(False))
    if engine != "hooks":
        model.compile(backend=engine)
    return model


def item(model: Any, k: int, value: torch.Tensor) -> torch.Tensor:
    model[1].b.input = value
    model[1].b.input[:, k] = 0
    return model.output


def augmented(model: Any, k: int, value: torch.Tensor) -> torch.Tensor:
    model[1].output = value
    model[1].output += k + 1
    return model.output


def a_view_of_it(model: Any, k: int, value: torch.Tensor) -> torch.Tensor:
    model[1].output = value
    model[1].output[:, k:].mul_(3)
    return model.output


def at_the_next_site(model: Any, k: int, value: torch.Tensor) -> torch.Tensor:
    model[0].output = value
    model[1].input[:, k] = 7
    return model.output


def skipped(model: Any, k: int, value: torch.Tensor) -> torch.Tensor:
    model[1].skip(value)
    model[1].output[:, k] = 5
    return model.output


def the_tensor_itself(model: Any, k: int, value: torch.Tensor) -> torch.Tensor:
    model[1].output = value
    model[1].output[:, k] = 2
    return value * 1


def a_view_taken_before(model: Any, k: int, value: torch.Tensor) -> torch.Tensor:
    column = value[:, k]
    model[1].output = value
    model[1].output[:, k] = 2
    return model.output + column[:, None]


def a_view_taken_behind(model: Any, k: int, value: torch.Tensor) -> torch.Tensor:
    model[1].output = value
    model[1].output[:, k] = 2
    column = value[:, k]
    return model.output + column[:, None]


def behind_a_look(model: Any, k: int, value: torch.Tensor) -> torch.Tensor:
    model[1].output = value
    if model[1].a.output.sum() > 1e9:
        return model.output
    model[1].output[:, k] = 2
    return model.output


CELLS = [
    item,
    augmented,
    a_view_of_it,
    at_the_next_site,
    skipped,
    the_tensor_itself,
    a_view_taken_before,
    a_view_taken_behind,
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cell", CELLS, ids=lambda f: f.__name__)
@torch.no_grad()
def test_no_cell_of_a_sweep_sees_another(cell: Callable, engine: str) -> None:
    model, value = wrapped(engine), torch.randn(2, 4)
    before = value.clone()
    found = model.sweep(lambda m, k: cell(model, k, value), X, over={"k": [0, 1, 2, 3]}, progress=False)
    assert torch.equal(value, before)
    plain = wrapped("hooks")
    for k in range(4):
        with warnings.catch_warnings(action="ignore"), plain.trace(X):
            want = cell(plain, k, before.clone()).save()
        torch.testing.assert_close(torch.as_tensor(found.array.values[k]), want)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cell", [item, augmented, a_view_of_it, skipped], ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_trace_names_both_lines(cell: Callable, engine: str) -> None:
    model, value = wrapped(engine), torch.randn(2, 4)
    before, start = value.clone(), cell.__code__.co_firstlineno
    with pytest.warns(UserWarning, match="changes it in place") as told:
        with model.trace(X):
            cell(model, 1, value)
    assert len(told) == 1 and told[0].filename == __file__ and told[0].lineno == start + 2
    assert re.search(
        rf"{re.escape(__file__)}:{start + 2}: `1\.(b\.input|output)` was written .* at .*:{start + 1}",
        str(told[0].message),
    )
    assert not torch.equal(value, before)  # as in eager code


class Adds(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1)


class Inplace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu_()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("by_the_model", [False, True])
@torch.no_grad()
def test_what_changes_it_behind_its_site_is_told_at_the_write(by_the_model: bool, engine: str) -> None:
    model, value = wrapped(engine), torch.randn(2, 4)
    if by_the_model:
        model = NNsight(nn.Sequential(nn.Linear(4, 4), Inplace()).requires_grad_(False))
        if engine != "hooks":
            model.compile(backend=engine)
    before, line = value.clone(), inspect.currentframe().f_lineno + 3  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="`0.output` is written with a tensor of yours, which the model, or") as told:
        with model.trace(X):
            model[0].output = value
            if not by_the_model:
                model[1].input[:, 0] = 7
            model.output.save()
    assert [(w.filename, w.lineno) for w in told] == [(__file__, line)]
    assert not torch.equal(value, before)


@pytest.mark.parametrize("engine", ENGINES)
@torch.no_grad()
def test_a_tensor_that_the_body_made_is_nobody_elses(engine: str) -> None:
    model, value = wrapped(engine), torch.randn(2, 4)
    before = value.clone()
    with model.trace(X):
        model[0].output = value.clone()
        model[0].output[:, 0] = 1
        model[1].output = torch.zeros(2, 4)
        model[1].output += 1
        model[2].output = value
        out = model.output.save()
    assert torch.equal(value, before) and torch.equal(out, before)


@pytest.mark.parametrize("engine", ENGINES)
@torch.no_grad()
def test_a_model_that_changes_it_in_place_gives_every_cell_the_same(engine: str) -> None:
    model, value = NNsight(nn.Sequential(nn.Linear(4, 4), Adds()).requires_grad_(False)), torch.randn(2, 4)
    if engine != "hooks":
        model.compile(backend=engine)
    before = value.clone()

    def cell(m: Any, k: int) -> torch.Tensor:
        model[0].output = value
        return model.output * k

    found = model.sweep(cell, X, over={"k": [1, 2, 3]}, progress=False)
    with model.session():
        kept = []
        for k in (1, 2, 3):
            with model.trace(X):
                kept.append(cell(model, k).save())
    for k, one in zip((1, 2, 3), kept, strict=True):
        torch.testing.assert_close(torch.as_tensor(found.array.values[k - 1]), (before + 1) * k)
        torch.testing.assert_close(one, (before + 1) * k)
    assert torch.equal(value, before)


@torch.no_grad()
def test_a_change_of_the_users_own_in_a_cell_is_his() -> None:
    model, total = wrapped("hooks"), torch.zeros(2, 4)

    def cell(m: Any, k: int) -> torch.Tensor:
        total.add_(model[k].output)
        return model.output

    model.sweep(cell, X, over={"k": [0, 1]}, progress=False)
    assert total.abs().sum() > 0
