"""Dynamo fails on a model: told is whose fault it is, and the model runs on hooks."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight
from nnsight_fx.engine.captured import capture_half

from ..equivalence.harness import same, wrap

_LIBRARY = torch.library.Library("nnsight_fx_field", "DEF")
_LIBRARY.define("doubled(Tensor x) -> Tensor")
_LIBRARY.impl("doubled", lambda x: x * 2, "CPU")


def _refuse(x):
    raise RuntimeError("it has no shape of its own")


_LIBRARY.impl("doubled", _refuse, "Meta")


class Net(nn.Module):
    """`when` says for how many rows it calls what Dynamo's fakes cannot take."""

    def __init__(self, *when: int):
        super().__init__()
        self.first, self.last, self.when = nn.Linear(4, 4), nn.Linear(4, 4), when

    def forward(self, x):
        h = self.first(x)
        if h.shape[0] in self.when:
            h = torch.ops.nnsight_fx_field.doubled(h)
        return self.last(h)


def nothing(model):
    model.first.output.save()


def a_vector(model):
    model.first.output += 1
    model.first.output.save()


def more_rows(model):
    model.first.output = model.first.output.repeat(2, 1)
    model.first.output.save()


def another_input(model):
    model.first.input = model.first.input.repeat(2, 1)
    model.first.output.save()


def a_skip(model):
    model.first.skip(model.first.input.repeat(2, 1))


def wider(model):
    model.first.output = model.first.output.to(torch.float64).float()[:1].repeat(4, 1)


def the_last(model):
    model.last.output = model.last.output[:1]


def reason(model: NNsight) -> str:
    reasons = model.explain().to_dict()["captures"][0]["fallbacks"]
    return " ".join(reasons)


def run(model: NNsight, body) -> torch.Tensor:
    with torch.no_grad(), model.trace(torch.ones(2, 4)):
        body(model)
        out = model.output.save()
    return out


def built(engine: str, *when: int) -> NNsight:
    torch.manual_seed(0)
    return wrap(Net(*when).requires_grad_(False), engine)


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
@pytest.mark.parametrize("body", [nothing, a_vector, more_rows, another_input, a_skip, wider, the_last])
def test_a_model_that_can_be_traced(body, engine):
    model = built(engine)
    same(run(model, body), run(built("hooks"), body), engine == "eager")
    assert "could not trace" not in reason(model) and "failed" not in reason(model)


def _quietly(model: NNsight, body) -> None:
    """A trace that looks at nothing behind what is written: no scan is asked."""
    with torch.no_grad(), model.trace(torch.ones(2, 4)):
        body(model)


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
@pytest.mark.parametrize("body", [more_rows, another_input, a_skip, wider])
def test_a_write_that_dynamo_cannot_take(body, engine):
    model = built(engine, 4)
    _quietly(model, body)
    assert "could not trace the model with what was written at" in reason(model)
    assert f"{__file__}:{body.__code__.co_firstlineno + 1}" in reason(model)
    assert "it has no shape of its own" in reason(model)


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
@pytest.mark.parametrize("body", [nothing, a_vector])
def test_a_model_that_dynamo_cannot_take(body, engine):
    model = built(engine, 2)
    _quietly(model, body)
    line = Net.forward.__code__.co_firstlineno + 3
    assert f"could not trace the model itself at {__file__}:{line}" in reason(model)
    assert "written" not in reason(model)


@pytest.mark.parametrize("body", [more_rows, another_input, the_last])
def test_a_fault_of_ours(body, monkeypatch):
    monkeypatch.setattr(capture_half.DynamoInterleaver, "leaf", None)
    model = built("eager")
    with pytest.warns(UserWarning, match=r"nnsight_fx failed at .*capture_half\.py:\d+ while Dynamo traced the model"):
        got = run(model, body)
    same(got, run(built("hooks"), body), True)
    assert "its own fault (TypeError" in reason(model) and "written" not in reason(model)


def test_the_models_own_error_is_its_own():
    class Refuses(Net):
        def forward(self, x):
            h = self.first(x)
            if h.shape[0] == 4:
                raise KeyError("four rows")
            return self.last(h)

    model = wrap(Refuses().requires_grad_(False), "eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError, match="four rows") as found:
            _quietly(model, more_rows)
    line = more_rows.__code__.co_firstlineno + 1
    assert any(f"`first.output` was written at {__file__}:{line}" in note for note in found.value.__notes__)


_LIBRARY.define("halved(Tensor x) -> Tensor")
_LIBRARY.impl("halved", lambda x: x / 2, "CPU")


def _refuse_dynamo(x):
    if torch._guards.TracingContext.try_get() is not None:
        raise RuntimeError("no compiler may see it")
    return torch.empty_like(x)


_LIBRARY.impl("halved", _refuse_dynamo, "Meta")


class Hidden(Net):
    def forward(self, x):
        h = self.first(x)
        return self.last(torch.ops.nnsight_fx_field.halved(h))


@pytest.mark.parametrize("around", ["a stop", "a handler of the user's", "both"])
def test_what_was_being_handled_has_nothing_to_do_with_it(around):
    """The end of a stopped body, or an error that the user's code handles, is the context of Dynamo's."""
    torch.manual_seed(0)
    model = wrap(Hidden().requires_grad_(False), "eager")

    def traced() -> torch.Tensor:
        with torch.no_grad(), model.trace(torch.ones(2, 4)) as tracer:
            found = model.last.output.save()
            if around != "a handler of the user's":
                tracer.stop()
        return found

    if around == "a stop":
        got = traced()
    else:
        try:
            raise ZeroDivisionError("the user's own")
        except ZeroDivisionError:
            got = traced()
    line = Hidden.forward.__code__.co_firstlineno + 2
    assert f"could not trace the model itself at {__file__}:{line}" in reason(model)
    assert "no compiler may see it" in reason(model) and "its own fault" not in reason(model)
    same(got, model._module(torch.ones(2, 4)), True)
