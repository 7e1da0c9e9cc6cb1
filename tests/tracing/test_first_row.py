"""`layers[5].output[0]` of old tutorials: under `CONFIG.APP.DEBUG` it is told that this is the first prompt alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

from nnsight_fx import CONFIG, NNsight

X = torch.randn(2, 3, 4)


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple:
        return x * 2, x.sum()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.pair = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)]), Pair()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.pair(x)[0]


@pytest.fixture(params=["hooks", "eager", "aot_eager"])
def model(request: pytest.FixtureRequest) -> Any:
    made: Any = NNsight(Net().requires_grad_(False))
    if request.param != "hooks":
        made.compile(backend=request.param)
    return made


def read(m: Any) -> None:
    m.layers[0].output[0].save()


def changed(m: Any) -> None:
    m.layers[0].output[0][:] = 0


def replaced(m: Any) -> None:
    m.layers[0].output[0] = 0


@pytest.mark.parametrize("body", [read, changed, replaced], ids=lambda f: f.__name__)
def test_it_is_told_at_the_line(body: Callable, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with model.trace(X):
        body(model)  # not without DEBUG
    monkeypatch.setattr(CONFIG.APP, "DEBUG", True)
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"`layers.0.output` is a tensor, so its `\[0\]` is the first prompt"
        ) as told:
            with model.trace(X):
                body(model)
        assert [(w.filename, w.lineno) for w in told] == [(__file__, body.__code__.co_firstlineno + 1)]


def test_what_means_something_else_is_not(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONFIG.APP, "DEBUG", True)
    with model.trace(X):
        model.layers[0].output[0, -1].save()
        model.layers[0].output[1].save()
        model.layers[0].output[:1].save()
        model.layers[1].input[0].save()
        model.pair.output[0].save()
