"""Custom functions whose running call is hard to tell: from torch 2.14 on only the frame of their `forward` says what `apply` was given."""

from __future__ import annotations

import contextlib
import functools
from types import BuiltinMethodType

import pytest
import torch
import torch.nn as nn
from torch.autograd import Function

from nnsight_fx import NNsight
from nnsight_fx.errors import NotRecordableError


class Base(Function):
    @staticmethod
    def backward(ctx, grad):
        return (grad * 10, *[None] * (len(ctx.needs_input_grad) - 1))  # not the derivative: seen where it is lost


class Shifts(Base):
    @staticmethod
    def forward(ctx, x, scale=None, shift=0):
        by = 2.0 if scale is None else scale
        y = x * by
        shift = shift + 1
        return y + shift


class Rebinds(Base):
    @staticmethod
    def forward(ctx, x, scale=None, shift=0):
        if scale is None:
            scale = 2.0
        shift = shift + 1
        return x * scale + shift


class RebindsItsTensor(Base):
    @staticmethod
    def forward(ctx, x, times):
        kept, x = x, times
        return kept * x


class TakesAll(Base):
    @staticmethod
    def forward(ctx, *args):
        return args[0] * args[1]


class Cast(Base):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, scale):
        return x * scale


class Separate(Base):
    @staticmethod
    def forward(x, scale=3.0):
        return x * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def logged(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


class Decorated(Separate):
    @staticmethod
    @logged
    def forward(x, scale):
        return x * scale


class DecoratedToo(Separate):
    @staticmethod
    @logged
    def forward(x, scale):
        return x * scale + 1


class Inherits(TakesAll):
    pass


class Outer(Base):
    @staticmethod
    def forward(ctx, x):
        return Shifts.apply(x, 4.0) * 2


class SetsTheGradMode(Base):
    @staticmethod
    def forward(ctx, x):
        with torch.enable_grad():
            y = x * 3
        return y.detach() + 1


CALLS = {
    "defaults": lambda h: Shifts.apply(h),
    "some defaults": lambda h: Shifts.apply(h, None, 5),
    "takes *args": lambda h: TakesAll.apply(h, 3.0),
    "custom_fwd": lambda h: Cast.apply(h, 3.0),
    "setup_context and a default": lambda h: Separate.apply(h),
    "one decorator": lambda h: Decorated.apply(h, 2.0),
    "one decorator on two": lambda h: Decorated.apply(h, 2.0) + DecoratedToo.apply(h, 3.0),
    "inherits its forward": lambda h: Inherits.apply(h, 3.0),
    "one inside the other": lambda h: Outer.apply(h),
    "sets the grad mode": lambda h: SetsTheGradMode.apply(h),
    "called by hand": lambda h: Separate.forward(h, 2.0),
    "by hand, with the grad mode set": lambda h: _by_hand(h),
}


def _by_hand(h):
    with torch.no_grad():
        kept = Separate.forward(h, 2.0)
    return h * 2 + kept


@pytest.mark.parametrize("engine", ["hooks", "eager", "aot_eager"])
@pytest.mark.parametrize("name", CALLS)
def test_it_is_recorded_as_it_was_called(name, engine):
    torch.manual_seed(0)
    net, call, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), CALLS[name], torch.randn(2, 4)
    h = net[0](x)
    h.retain_grad()
    want = net[2](net[1](call(h)))
    want.square().sum().backward()
    model = NNsight(net)
    if engine != "hooks":
        model.compile(backend=engine)
    with model.trace(x):
        made = model[0].output
        grad = made.grad.save()
        model[0].output = call(made)
        out = model[2].output.save()
        out.square().sum().backward()
    torch.testing.assert_close(out.detach(), want.detach())
    torch.testing.assert_close(grad, h.grad)


ASSIGN = {
    "numbers": (lambda h: Rebinds.apply(h), "scale"),
    "its tensor": (lambda h: RebindsItsTensor.apply(h, 3.0), "x"),
}


@pytest.mark.parametrize("call, name", ASSIGN.values(), ids=ASSIGN)
def test_arguments_that_are_assigned_to(call, name):
    """Where `apply` is C, nobody knows what the argument was: an error that says so, and never another value."""
    net, x = nn.Linear(4, 4), torch.ones(2, 4)
    told = isinstance(Rebinds.apply, BuiltinMethodType)
    says = f"assigns to its argument `{name}` before its first operation"
    with pytest.raises(NotRecordableError, match=says) if told else contextlib.nullcontext():
        model = NNsight(net)
        with model.trace(x):
            out = call(model.output).save()
        torch.testing.assert_close(out, call(net(x)))
