"""Whatever is on disk: modules that Dynamo cannot capture, or that other libraries have changed.

Each is read around what breaks the graph and inside it, down to grandchildren; what one segment gives is written into another; the
hook engine and the spliced graph both equal forward hooks; and what was not captured is named by `explain()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import nnsight_fx
from nnsight_fx import NNsight, assert_no_fallback

from .harness import data, same, wrap
from .models import Block

ENGINES = ["hooks", "eager", pytest.param("aot_eager", marks=pytest.mark.slow)]


class Around(nn.Module):
    """Blocks before and behind `mid`, and two inside it; `between` is what breaks the graph there."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor], mid: type[nn.Module] | None = None):
        super().__init__()
        self.first, self.mid, self.last = Block(), (mid or Mid)(between), Block()

    def forward(self, x):
        return self.last(self.mid(self.first(x)))


class Mid(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = Block(), Block(), between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


class Disabled(Mid):
    forward = torch.compiler.disable(Mid.forward)


class Hooking(Mid):
    """As the libraries do that watch a module for the length of one call."""

    def forward(self, x):
        seen = []
        handle = self.a.down.register_forward_hook(lambda module, args, out: seen.append(out.mean()))
        x = self.a(x)
        handle.remove()
        return self.b(x * seen[0])


class Packs(Mid):
    def __init__(self, between):
        super().__init__(between)
        self.lstm = nn.LSTM(16, 16, batch_first=True)

    def forward(self, x):
        packed = pack_padded_sequence(self.a(x), torch.tensor([7, 5, 2]), batch_first=True)
        out, _ = self.lstm(packed)
        return self.b(pad_packed_sequence(out, batch_first=True)[0])


class Routed(Mid):
    """A mixture of experts whose experts get the rows that were routed to them, or are not called."""

    def __init__(self, between):
        super().__init__(between)
        self.router, self.experts = nn.Linear(16, 3), nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        x = self.a(x)
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = torch.where(chosen == i)
            if rows[0].numel():
                out[rows] = expert(x[rows])
        return self.b(out)


def branch(x):
    return x * 2 if x.sum() > 0 else x * -3


def item(x):
    return x * x.sum().item()


def tolist(x):
    return x * sum(x.flatten().tolist()[:3])


def array(x):
    return torch.from_numpy(x.detach().numpy() * 2)


def prints(x):
    print("mean", x.mean())
    return x + 1


@torch.compiler.disable
def disabled(x):
    return x + 1


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad


@torch.library.custom_op("anything::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@doubled.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op("anything::no_fake", mutates_args=())
def no_fake(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@dataclass(frozen=True)
class Thing:
    name: str
    make: Callable[[], nn.Module]
    breaks: str | None = None  # what `explain()` says of it
    live: tuple[str, ...] = ()  # sites that no graph holds, and that `explain()` names
    inputs: Callable[[int], Any] = data(3, 7, 16)
    reads: tuple[str, ...] = ("first.act", "mid.a.up", "mid.a.act", "mid.a", "mid.b.up", "mid.b", "mid", "last.down")
    source: str = "mid.a.up"
    target: str = "last.up"


THINGS = [
    Thing("branch", lambda: Around(branch), "data-dependent"),
    Thing("item", lambda: Around(item), "item"),
    Thing("tolist", lambda: Around(tolist), "tolist"),
    Thing("numpy", lambda: Around(array), "numpy"),
    Thing("print", lambda: Around(prints), "print"),
    Thing("disabled-function", lambda: Around(disabled), "disable"),
    Thing("disabled-module", lambda: Around(branch, Disabled), "disable", live=("mid.a.up.output",)),
    Thing("autograd-function", lambda: Around(Clip.apply)),
    Thing("custom-op", lambda: Around(doubled)),
    Thing("custom-op-without-a-fake", lambda: Around(no_fake), "fake"),
    Thing("hooks-in-forward", lambda: Around(branch, Hooking), "hook"),
    Thing("packed-sequences", lambda: Around(branch, Packs), "pack"),
    Thing("experts", lambda: Around(branch, Routed), "nonzero"),
]


def program(thing: Thing, model: NNsight, x: Any) -> list[torch.Tensor]:
    with torch.no_grad(), model.trace(x) as tracer:
        found = nnsight_fx.save([])
        for path in thing.reads:
            value = model.get(path).output
            if path == thing.source:
                h = value
            found.append(value)
            if path == thing.reads[-2]:
                late = model.get(thing.target).output
                model.get(thing.target).output = late + h
        found.append(tracer.result)
    return list(found)


def by_hand(thing: Thing, module: nn.Module, x: Any) -> list[torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def hook(path):
        def keep(_, args, out):
            found[path] = out
            return out + found[thing.source] if path == thing.target else None

        return keep

    paths = dict.fromkeys([*thing.reads, thing.target])
    handles = [module.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        with torch.no_grad():
            out = module(x)
    finally:
        for handle in handles:
            handle.remove()
    return [*(found[path] for path in thing.reads), out]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("thing", THINGS, ids=lambda t: t.name)
def test_anything(thing, engine, capsys):
    torch.manual_seed(0)
    module = thing.make().requires_grad_(False)
    model = wrap(module, engine)
    for seed in range(2):
        with contextlib.nullcontext() if thing.breaks else assert_no_fallback():
            got = program(thing, model, thing.inputs(seed))
        same(got, by_hand(thing, module, thing.inputs(seed)), engine != "aot_eager")
    if engine != "hooks":
        said = str(model.explain())
        assert ("graph break" in said) == (thing.breaks is not None), said
        assert (thing.breaks or "") in said, said
        for site in thing.live:
            assert f"live, between segments: {site}" in said, said
