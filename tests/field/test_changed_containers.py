"""A container of the model's is changed in the body, and what comes next runs the model: `tracer.apply`, a look, a cache."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn as nn

import nnsight_fx

from ..equivalence.harness import ENGINES, same, wrap


@dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor


class State:
    def __init__(self, h):
        self.h = h


class Part(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 4)

    def forward(self, x):
        h = self.linear(x)
        if self.kind == "list":
            return [h, h * 2]
        if self.kind == "dict":
            return {"first": h, "second": h * 2}
        return Pair(h, h * 2)


class Net(nn.Module):
    """Two parts that give their values in a container, and one that gives an object."""

    def __init__(self, kind: str):
        super().__init__()
        self.one, self.two, self.last = Part(kind), Part(kind), Last()

    def forward(self, x):
        for part in (self.one, self.two):
            x = sum(values(part(x)))
        return self.last(x)["state"].h * 3


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return {"state": State(self.linear(x)), "count": 2}


def values(got) -> list:
    return got if isinstance(got, list) else list((got if isinstance(got, dict) else vars(got)).values())


def change(got, by: float) -> None:
    """Replace the first value of a container."""
    if isinstance(got, list):
        got[0] = got[0] + by
    elif isinstance(got, dict):
        got["first"] = got["first"] + by
    else:
        got.first = got.first + by


def by_hand(module: nn.Module, x: torch.Tensor, *by: float) -> dict:
    """The same without hooks: `by` is added to the first value of each part."""
    seen = {}
    for name, part, more in zip(("one", "two"), (module.one, module.two), (*by, 0.0, 0.0), strict=False):
        got = part(x)
        if more:
            change(got, more)
        seen[name] = values(got)
        x = sum(values(got))
    seen["state"] = module.last(x)["state"].h
    return seen | {"out": seen["state"] * 3}


# -- bodies: `(model, tracer) -> what they keep`, and the part of the reference that it equals ---------------------------


def applied(model, tracer):
    change(model.one.output, 1.0)
    return tracer.apply(lambda h: h.sum(), values(model.two.output)[1])


def applied_to_the_container(model, tracer):
    got = model.one.output
    change(got, 1.0)
    return tracer.apply(lambda got: sum(x.sum() for x in values(got)), got)


def applied_to_nothing(model, tracer):
    change(model.one.output, 1.0)
    return tracer.apply(lambda: 7)


def number(model, tracer):
    change(model.one.output, 1.0)
    return values(model.two.output)[0].sum().item()


def choice(model, tracer):
    change(model.one.output, 1.0)
    if values(model.two.output)[0].sum() < 1e6:
        change(model.two.output, 2.0)
    return 1


def looked_at_twice(model, tracer):
    change(model.one.output, 1.0)
    first = values(model.one.output)[0].sum().item()
    change(model.two.output, 2.0)
    return first, tracer.apply(torch.sum, values(model.two.output)[0])


def object_looked_at(model, tracer):
    change(model.one.output, 1.0)
    got = model.last.output
    got["count"] = 5
    return got["state"].h.sum()


def object_applied(model, tracer):
    change(model.one.output, 1.0)
    return tracer.apply(lambda state: state.h.sum(), model.last.output["state"])


def logged(model, tracer):
    change(model.one.output, 1.0)
    tracer.log("seen", values(model.two.output)[0].shape)
    return 1


def object_saved(model, tracer):
    change(model.one.output, 1.0)
    return nnsight_fx.save([model.last.output["state"]])


def cached(model, tracer):
    cache = tracer.cache(modules=["two.linear"])
    change(model.one.output, 1.0)
    applied = tracer.apply(lambda h: h.sum(), values(model.two.output)[1])
    return cache, applied


def results(body, kept, want) -> tuple:
    """What a body kept, and what it must be."""
    if body is applied:
        return kept, want["two"][1].sum()
    if body is applied_to_the_container:
        return kept, sum(x.sum() for x in want["one"])
    if body is number:
        return torch.tensor(kept), want["two"][0].sum()
    if body is looked_at_twice:
        return (torch.tensor(kept[0]), kept[1]), (want["one"][0].sum(), want["two"][0].sum())
    if body in (object_looked_at, object_applied):
        return kept, want["state"].sum()
    if body is object_saved:
        return kept[0].h, want["state"]
    if body is cached:
        return (kept[0]["model.two.linear"].output, kept[1]), (want["two"][1] / 2, want["two"][1].sum())
    return kept, 7 if body is applied_to_nothing else 1


BODIES = (
    *(applied, applied_to_the_container, applied_to_nothing, number, choice, looked_at_twice, object_looked_at),
    *(object_applied, logged, object_saved, cached),
)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["list", "dict", "dataclass"])
def test_the_change_comes_first(kind, engine, capsys):
    torch.manual_seed(0)
    model = wrap(Net(kind).requires_grad_(False), engine)
    for body in BODIES if kind == "dict" or engine == "hooks" else BODIES[:6]:
        for seed in range(2):
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
            with model.trace(x) as tracer:
                kept = body(model, tracer)
                out = model.output.save()
            want = by_hand(model._module, x, 1.0, 2.0 if body in (choice, looked_at_twice) else 0.0)
            got, expected = results(body, kept, want)
            same((out, got), (want["out"], expected), engine != "aot_eager", body.__name__)
