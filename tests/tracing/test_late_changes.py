"""A change in place of a value that was asked for behind a later site: an error, since the model may have used it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

from nnsight_fx import MissedSiteError, NNsight, OutOfOrderError

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def model(engine: str) -> Any:
    torch.manual_seed(0)
    made = NNsight(nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4)).requires_grad_(False))
    if engine != "hooks":
        made.compile(backend=engine)
    return made


def item(first: Any) -> None:
    first.output[:] = 0


def augmented(first: Any) -> None:
    first.output += 1


def view(first: Any) -> None:
    first.output[:, 1:].mul_(2)


@pytest.mark.parametrize("engine", ["hooks", "eager", "aot_eager"])
@pytest.mark.parametrize("change", [item, augmented, view])
@pytest.mark.parametrize("read_before", [False, True])
def test_it_is_an_error(change: Callable[[Any], None], engine: str, read_before: bool) -> None:
    made = model(engine)
    for _ in range(2):  # the second recording follows the steps of the first
        with pytest.raises(
            OutOfOrderError, match=r"`0.output` is changed in place behind `2.output`, which .*:\d+ has"
        ):
            with made.trace(X):
                if read_before:
                    made[0].output.save()
                made[2].output.save()
                change(made[0])
    with made.trace(X):
        change(made[0])
        out = made[2].output.save()
    assert not torch.equal(out, made._module(X))


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_what_is_in_time_is_made(engine: str) -> None:
    made = model(engine)
    with made.trace(X):  # what was read in time may be changed for oneself
        first, last = made[0].output, made[2].output
        first += 1
        mine, last = first.save(), last.save()
    assert torch.equal(last, made._module(X)) and torch.equal(mine, made._module[0](X) + 1)
    with made.trace(X):  # a result of one's own
        last = made[2].output.save()
        mine = made[0].output * 2
        mine[:] = 0
        mine = mine.save()
    assert torch.equal(last, made._module(X)) and not mine.any()
    with made.trace(X):  # another name of the same tensor
        made[1].output
        made[0].output[:] = 0
        last = made[2].output.save()
    assert torch.equal(last, made._module[2](torch.zeros(2, 4)))
    with made.trace(X):  # assigned, where the value is there
        made[2].output.save()
        made[0].output = torch.zeros(2, 4)
        last = made[2].output.save()
    assert torch.equal(last, made._module[2](torch.zeros(2, 4)))


def test_a_late_write_says_that_it_is_late() -> None:
    made = model("hooks")
    with pytest.raises(
        MissedSiteError, match="was written, but it came too late: its value is computed behind a later"
    ):
        with made.trace(X):
            made[2].output.save()
            made[0].output = made[0].output * 2


def test_a_container_has_no_save() -> None:
    made = NNsight(nn.LSTM(4, 4).requires_grad_(False))
    with pytest.raises(AttributeError, match="'tuple' object has no attribute 'save'") as error:
        with made.trace(X):
            made.output.save()
    assert error.value.__notes__ == [
        "nnsight_fx: `.save()` is a method of tensors; a container is saved with `nnsight_fx.save(value)`."
    ]
