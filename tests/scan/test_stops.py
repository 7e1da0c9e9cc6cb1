"""Where a trace stops the model: told from the scan alone as a forward on fakes with the plan in it would tell it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import nnsight_fx
from nnsight_fx import NNsight
from nnsight_fx.scan.wave_sites import WaveSites

X = torch.linspace(-1, 1, 32).reshape(4, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def blocks() -> NNsight:
    torch.manual_seed(0)
    model = NNsight(nn.Sequential(*(Block() for _ in range(4))).requires_grad_(False))
    model.compile(backend="eager")
    return model


def written(model: Any, tracer: Any) -> Any:
    model[1].up.output[:, 0] = 0
    found = model[2].output.save()
    tracer.stop()
    return found


def read(model: Any, tracer: Any) -> Any:
    found = model[1].down.input.save()
    tracer.stop()
    return found


def changed_in_place(model: Any, tracer: Any) -> Any:
    h = model[1].output
    h.mul_(2)
    found = h.sum().save()
    tracer.stop()
    return found


def reshaped(model: Any, tracer: Any) -> Any:
    model[1].output = model[1].output[:2]
    found = model[2].output.save()
    tracer.stop()
    return found


def skipped(model: Any, tracer: Any) -> Any:
    model[1].skip(model[0].output)
    found = model[2].output.save()
    tracer.stop()
    return found


def called(model: Any, tracer: Any) -> Any:
    found = model[3].up(model[0].output).save()
    tracer.stop()
    return found


BODIES: dict[str, tuple[Callable, bool]] = {  # and does it take a forward on fakes
    "written": (written, False),
    "read": (read, False),
    "changed in place": (changed_in_place, False),
    "reshaped": (reshaped, True),
    "skipped": (skipped, True),
    "a module is called": (called, False),
}


@pytest.mark.parametrize("name", BODIES)
def test_the_same_site(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, replays = BODIES[name]
    model, told, ran = blocks(), [], []
    original, replay = WaveSites.stop_site, WaveSites.replay

    def stop_site(self: Any, tape: Any, plan: Any, values: Any) -> Any:
        found = original(self, tape, plan, values)
        told.append((found, replay(self, tape, plan, values).stop_site))
        return found

    def counted(self: Any, *args: Any) -> Any:
        ran.append(args)
        return replay(self, *args)

    monkeypatch.setattr(WaveSites, "stop_site", stop_site)
    monkeypatch.setattr(WaveSites, "replay", counted)
    results = []
    for _ in range(2):
        with model.trace(X) as tracer:
            results.append(nnsight_fx.save(body(model, tracer)))
    plain = NNsight(model._module)
    with plain.trace(X) as tracer:
        want = nnsight_fx.save(body(plain, tracer))
    assert told and all(found == wanted for found, wanted in told)
    assert sum(len(args) == 3 for args in ran) == replays  # once, for both traces
    for result in results:
        assert torch.equal(result, want)
    assert "spliced" in str(model.explain())
