"""By what a second block differs from the first though the guards on the first hold for it."""

import pytest
import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

import nnsight_fx
from nnsight_fx import NNsight

D, N, ODD = 4, 6, 3


class Thing:
    """What holds a value, and is no module."""

    def __init__(self, value=1.0):
        self.value = value


KEPT = Thing()
SEEN: list = []
MARKED: set = set()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(D, D), nn.Linear(D, D), 1.0

    def by(self, x):
        return self.scale

    def forward(self, x):
        return x + self.down(self.up(x)) * self.by(x)


class Stack(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(N))

    def before(self, x):
        return x

    def call(self, i, x):
        return self.blocks[i](x)

    def forward(self, x):
        x = self.before(x * 1.5)
        for i in range(N):
            x = self.call(i, x)
        return x


def block(by):
    """Blocks that do what `by(block, x)` says."""
    return type("Made", (Block,), {"by": by})


def each(change):
    """A model of which block by block is changed: `change(model, block, odd one?)`."""

    def changed(model):
        for i, b in enumerate(model.blocks):
            change(model, b, i == ODD)

    return changed


def made(kind, whole, change):
    torch.manual_seed(0)
    KEPT.__init__()
    SEEN.clear()
    MARKED.clear()
    model = whole(kind).requires_grad_(False)
    change(model)
    return model


def compared(kind, whole=Stack, change=lambda model: None, later=None):
    """How many blocks repeat another one; the numbers are those of hooks, before and after `later`."""
    torch.manual_seed(1)
    x, results, model = torch.randn(2, 3, D), [], None
    for backend in (None, "eager"):
        model = NNsight(made(kind, whole, change))
        if backend:
            model.compile(backend=backend)
        for step in (None, *([later] if later else [])):
            if step is not None:
                step(model._module)
            with model.trace(x):
                results.append(nnsight_fx.save([*(b.output for b in model.blocks), model.output]))
    for one, other in zip(results[: len(results) // 2], results[len(results) // 2 :], strict=True):
        assert all(torch.allclose(a, b) for a, b in zip(one, other, strict=True))
    captures = model.explain().to_dict()["captures"]
    return [s["repeated"] for capture in captures for s in capture["segments"]][0]


# -- changed before the blocks are called: the guards on a block say nothing of it -------------------------------


class Sets(Stack):
    def before(self, x):
        for i, b in enumerate(self.blocks):
            b.scale = float(i)
        return x


class SetsTensors(Stack):
    def before(self, x):
        for i, b in enumerate(self.blocks):
            b.scale = x[0, 0, 0] * i
        return x


class SetsElsewhere(Stack):
    def before(self, x):
        SEEN[ODD].value = 5.0
        return x


class Keeps(Stack):
    def before(self, x):
        KEPT.value = x
        return x


class KeepsInList(Stack):
    def before(self, x):
        SEEN[:] = [x]
        return x


def _things(model, b, odd):
    b.thing = Thing()
    SEEN.append(b.thing)


@pytest.mark.parametrize(
    "whole, by, change",
    [
        (Sets, lambda b, x: b.scale, None),
        (SetsTensors, lambda b, x: b.scale, None),
        (SetsElsewhere, lambda b, x: b.thing.value, each(_things)),
        (Keeps, lambda b, x: KEPT.value, None),
        (Keeps, lambda b, x: 2.0 if x is KEPT.value else 3.0, None),
        (KeepsInList, lambda b, x: SEEN[0], None),
    ],
)
def test_what_was_changed_before(whole, by, change):
    assert compared(block(by), whole, change or (lambda model: None)) == 0


# -- identity: a constant to Dynamo ------------------------------------------------------------------------------


def _owner(model, b, odd):
    b.owner = (model,)


def _mark(model, b, odd):
    if odd:
        MARKED.add(b)
        SEEN.append(b)


def _one_thing(model, b, odd):
    b.one = Thing()
    b.other = b.one if odd else Thing()


def _tie(model, b, odd):
    if odd:
        b.up.weight = b.down.weight


def _kept_thing(model, b, odd):
    b.thing = Thing(3.0) if odd else KEPT


def _listed_thing(model, b, odd):
    b.thing = Thing()
    if odd:
        SEEN.append(b.thing)


def _share(model, b, odd):
    if odd:
        b.up = b.down


class ReadsKept(Stack):
    def before(self, x):
        return x * KEPT.value


@pytest.mark.parametrize(
    "by, change, whole, repeated",
    [
        (lambda b, x: 2.0 if b is b.owner[0].blocks[-1] else 1.0, _owner, Stack, 0),
        (lambda b, x: 2.0 if b in MARKED else 1.0, _mark, Stack, N - 2),
        (lambda b, x: 2.0 if b is SEEN[0] else 1.0, _mark, Stack, N - 2),
        (lambda b, x: 2.0 if b.thing is SEEN[0] else 1.0, _listed_thing, Stack, N - 2),
        (lambda b, x: 2.0 if b.one is b.other else 1.0, _one_thing, Stack, N - 2),
        (lambda b, x: 2.0 if b.up.weight is b.down.weight else 1.0, _tie, Stack, N - 2),
        (lambda b, x: 2.0 if b.up is b.down else 1.0, _share, Stack, N - 2),
        (lambda b, x: b.thing.value, _kept_thing, ReadsKept, N - 2),  # Dynamo does not guard what is at `b.thing`
    ],
)
def test_what_is_one_object(by, change, whole, repeated):
    assert compared(block(by), whole, each(change)) == repeated


# -- values that are equal, and are not the same -----------------------------------------------------------------


def _set(name, plain, odd):
    return each(lambda model, b, is_odd: setattr(b, name, odd if is_odd else plain))


def _only(name, value):
    return each(lambda model, b, is_odd: setattr(b, name, value) if is_odd else None)


def _sine(b, x):
    return b.how(x)


@pytest.mark.parametrize(
    "by, change",
    [
        (lambda b, x: 2.0 if b.pair[0] is True else 3.0, _set("pair", (1,), (True,))),
        (lambda b, x: (1 / torch.full((1,), b.zero)).clamp(-2, 2), _set("zero", 0.0, -0.0)),
        (_sine, _set("how", torch.Tensor.sin, torch.Tensor.cos)),
        (lambda b, x: b.__dict__.get("extra", 1.0), _only("extra", 3.0)),
    ],
)
def test_what_guards_hold_for(by, change):
    assert compared(block(by), change=change) == N - 2


class Ordered(Stack):
    def call(self, i, x):
        return self.blocks[i](x, q=3.0, p=2.0) if i == ODD else self.blocks[i](x, p=2.0, q=3.0)


class InOrder(Block):
    def forward(self, x, **kwargs):
        h = self.down(self.up(x))
        for name, value in kwargs.items():
            h = h * value if name == "p" else h + value
        return h


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {})) * (2 if func is torch.sin else 1)


class ModeForOne(Stack):
    def call(self, i, x):
        if i != ODD:
            return self.blocks[i](x)
        with Doubled():
            return self.blocks[i](x)


@pytest.mark.parametrize(
    "kind, whole, repeated",
    [(InOrder, Ordered, N - 2), (block(lambda b, x: torch.sin(x)), ModeForOne, ODD - 1)],  # a mode counts as a change
)
def test_how_one_is_called(kind, whole, repeated):
    assert compared(kind, whole) == repeated


class Mapped(Stack):
    """Inside of `torch.func` tensors are no plain ones: nothing is repeated, and nothing fails."""

    def forward(self, x):
        return torch.func.vmap(super().forward)(x)


def test_blocks_inside_of_a_transform():
    x, results = torch.randn(2, 3, D), []
    for backend in (None, "eager"):
        model = NNsight(made(Block, Mapped, lambda model: None))
        if backend:
            model.compile(backend=backend)
        with model.trace(x):
            results.append(model.output.save())
    assert torch.allclose(*results)
    assert compared(Block) >= N - 2  # still


@pytest.mark.parametrize(
    "by, odd",
    [
        (lambda b, x: float(b.t.dim()), torch.ones(2, 2)),
        (lambda b, x: float(b.t.shape[0]), torch.ones(3)),
        (lambda b, x: 2.0 if b.t.dtype == torch.int64 else 1.0, torch.ones(2, dtype=torch.int64)),
        (lambda b, x: 2.0 if b.t.requires_grad else 1.0, torch.ones(2, requires_grad=True)),
    ],
)
def test_a_tensor_that_is_looked_at_only(by, odd):
    change = _set("t", torch.ones(2), torch.ones(2))
    assert compared(block(by), change=change, later=lambda model: setattr(model.blocks[4], "t", odd)) >= N - 2
