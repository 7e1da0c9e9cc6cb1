"""Tensors of the user's that lie in one memory, of which a body changes one in place: compiled code sees it as eager does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(8.0).reshape(2, 4) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.tanh(self.a(x))) + self.table


def wrapped(engine: str) -> Any:
    torch.manual_seed(0)
    model = NNsight(nn.Sequential(*[Block() for _ in range(3)]).requires_grad_(False))
    if engine != "hooks":
        model.compile(backend=engine)
    return model


def a_part_of_it_behind_its_write(m: Any, x: torch.Tensor, t: torch.Tensor) -> None:
    m[0].output = t
    m[0].output[:, 1:].mul_(3)


def a_row_and_the_whole(m: Any, x: torch.Tensor, t: torch.Tensor) -> None:
    row = t[0]
    m[0].output[1] = row
    row.zero_()
    m[1].output = t


def the_whole_and_a_row(m: Any, x: torch.Tensor, t: torch.Tensor) -> None:
    row = t[0]
    m[0].output = t
    t.mul_(2)
    m[1].output[0] = row


def two_views(m: Any, x: torch.Tensor, t: torch.Tensor) -> None:
    left, right = t[:, :3], t[:, 1:]
    m[0].output[:, :3] = left
    left.add_(1)
    m[1].output[:, 1:] = right
    right.mul_(-1)
    m[2].input[:, :3] += left


def transposed(m: Any, x: torch.Tensor, t: torch.Tensor) -> None:
    turned = t.T
    m[0].output = t
    turned[0] = 5
    m[1].output += turned.sum()


def other_dtype(m: Any, x: torch.Tensor, t: torch.Tensor) -> None:
    bits = t.view(torch.int32)
    m[0].output = t
    t.zero_()
    m[1].output += bits.sum()


def an_input_of_the_model(m: Any, x: torch.Tensor, t: torch.Tensor) -> None:
    m[0].output = x
    m[0].output[:, 0] = 9


def a_view_of_the_models_input(m: Any, x: torch.Tensor, t: torch.Tensor) -> None:
    first = x[:1]
    m[0].output[:1] = first
    first.zero_()
    m[1].output += x


def a_buffer_of_the_model(m: Any, x: torch.Tensor, t: torch.Tensor) -> None:
    table = m._module[2].table
    m[0].output = table
    m[0].output[0] = 3


def detached(m: Any, x: torch.Tensor, t: torch.Tensor) -> None:
    other = t.detach()
    m[0].output = t
    other.mul_(2)
    m[1].output += other


def of_numpy(m: Any, x: torch.Tensor, t: torch.Tensor) -> None:
    other = torch.from_numpy(t.numpy())
    m[0].output = t
    other.mul_(2)
    m[1].output += t


PROGRAMS = [
    a_part_of_it_behind_its_write,
    a_row_and_the_whole,
    the_whole_and_a_row,
    two_views,
    transposed,
    other_dtype,
    an_input_of_the_model,
    a_view_of_the_models_input,
    a_buffer_of_the_model,
    detached,
    of_numpy,
]


@torch.no_grad()
def run(engine: str, program: Callable) -> list[torch.Tensor]:
    """What comes of two traces: the result, and what the user's tensors and the model's buffer are then."""
    model, found = wrapped(engine), []
    x, t = torch.randn(2, 4), torch.randn(2, 4)
    for _ in range(2):
        with warnings.catch_warnings(action="ignore"), model.trace(x):
            program(model, x, t)
            out = model.output.save()
        found += [out, x.clone(), t.clone(), model._module[2].table.clone()]
    return found


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_it_is_what_hooks_see(program: Callable, engine: str) -> None:
    torch.manual_seed(1)
    want = run("hooks", program)
    torch.manual_seed(1)
    got = run(engine, program)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda m, i=i: f"{i}: {m}")


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_through_inductor(program: Callable) -> None:
    test_it_is_what_hooks_see(program, "inductor")
