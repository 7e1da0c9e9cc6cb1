"""More captures than are kept: the one that was used last stays, and nothing of those that go is held."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight, assert_max_compiles
from nnsight_fx.engine.captured import entries
from nnsight_fx.engine.captured import watch as watching
from nnsight_fx.engine.captured.watch import watch

from ..equivalence.harness import same, wrap


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x):
        for part in self.parts:
            x = torch.tanh(part(x))
        return x.sum(-1) * x.shape[0]


def steered(model, x):
    with model.trace(x):
        model.parts[1].output += 1
        out = model.output.save()
    return out


def fewer_rows(model, x):
    with model.trace(x):
        model.parts[0].output = model.parts[0].output[:1]
        out = model.output.save()
    return out


def more_rows(model, x):
    with model.trace(x):
        model.parts[1].output = model.parts[1].output.repeat(3, 1)
        out = model.output.save()
    return out


def doubled(model, x):
    with model.trace(x):
        model.parts[2].output = model.parts[2].output.repeat(1, 2)
        out = model.output.save()
    return out


def wider(model, x):
    with model.trace(x):
        model.parts[2].output = model.parts[2].output.to(torch.float64)
        out = model.output.save()
    return out


def one_row_more(model, x):
    with model.trace(x):
        h = model.parts[0].output
        model.parts[0].output = torch.cat([h, h[:1]])
        out = model.output.save()
    return out


def without_a_part(model, x):
    with model.trace(x):
        model.parts[1].skip(torch.cat([model.parts[1].input, model.parts[1].input]))
        out = model.output.save()
    return out


def another_input(model, x):
    with model.trace(x):
        model.parts[1].input = model.parts[1].input[:, None].expand(-1, 2, -1)
        out = model.output.save()
    return out


def stopped(model, x):
    with model.trace(x) as tracer:
        model.parts[0].output = model.parts[0].output[:1]
        h = model.parts[1].output.save()
        tracer.stop()
    return h


def inside(model, x):
    with model.trace(x):
        model.source.torch_tanh_0.output = model.source.torch_tanh_0.output[:1]
        out = model.output.save()
    return out


PROGRAMS = (
    *(fewer_rows, more_rows, doubled, wider, one_row_more, without_a_part, another_input, stopped, inside),
    steered,
)


def built(engine: str) -> NNsight:
    torch.manual_seed(0)
    return wrap(Net().requires_grad_(False), engine)


@pytest.mark.parametrize("engine", ["eager", "aot_eager", "symbolic"])
def test_few_are_kept_and_all_are_right(engine, monkeypatch):
    monkeypatch.setattr(entries, "ENTRIES", 3)
    model, plain, order = built(engine), built("hooks"), random.Random(0)
    seen = []
    (capture,) = model._host.captures.values()
    for program in order.choices(PROGRAMS, k=16 if engine == "eager" else 12):
        x = torch.randn(2, 4)
        same(program(model, x), program(plain, x), engine != "aot_eager", program.__name__)
        seen += [weakref.ref(s) for s in capture.segments]
        assert len(capture.entries) <= 3
        assert all(steady.entry in capture.entries.values() for steady in capture.steady.values())
    torch._dynamo.reset()
    gc.collect()
    kept = {id(s) for s in capture.segments}
    assert len(capture.segments) <= 3 and all(s() is None or id(s()) in kept for s in seen)


def test_what_runs_as_a_call_is_used(monkeypatch):
    """A plan that runs again and again, as a call, keeps its capture while others come and go."""
    monkeypatch.setattr(entries, "ENTRIES", 3)
    model = built("eager")
    for _ in range(3):
        steered(model, torch.randn(2, 4))
    for program in PROGRAMS[:-1]:
        program(model, torch.randn(2, 4))
        with assert_max_compiles(0):
            steered(model, torch.randn(2, 4))


def test_reasons_are_bounded(monkeypatch):
    monkeypatch.setattr(watching, "REASONS", 4)
    model = built("eager")
    (capture,) = model._host.captures.values()
    before = watch.fell
    for i in range(9):
        capture.fall_back(f"reason {i}")
        capture.fall_back(f"reason {i}")
    assert watch.fell - before == 18 and capture.fallbacks == [f"reason {i}" for i in range(5, 9)]
    assert watch.since(before + 16) == ["reason 8", "reason 8"] and len(watch.reasons) <= watch.reasons.maxlen
