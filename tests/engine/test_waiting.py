"""`compile(warm=...)`, and the line on a terminal while a trace captures or compiles."""

import io
import sys
import time

import pytest
import torch
import torch.nn as nn

from nnsight_fx import CONFIG, NNsight, save
from nnsight_fx.engine import clock, waiting
from nnsight_fx.engine.captured.watch import assert_max_compiles

X = torch.linspace(-1, 1, 6).reshape(2, 3)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, left, right=None):
        return self.linear(left if right is None else left + right)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Puts a terminal in place of stderr, and returns it: in the test, as pytest puts its own there before."""

    def place():
        monkeypatch.setattr(waiting, "AFTER", 0.05)
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return place


@pytest.mark.parametrize("given", [X, {"left": X, "right": X}, {"left": X}])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_warm_model_captures_and_compiles_nothing_more(given, backend):
    model = NNsight(Keywords().requires_grad_(False))
    model.compile(backend=backend, warm=given)
    with assert_max_compiles(0), model.trace(**given) if isinstance(given, dict) else model.trace(given) as tracer:
        save(tracer.result)
    assert model.explain().to_dict()["captures"][0]["compiles"] == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_warm_model_has_its_whole_result(backend):
    """Nobody takes what the model returns in most traces, and what computes that alone is left out there."""
    model = NNsight(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False))
    with torch.no_grad():
        model.compile(backend=backend, warm=X)
        with assert_max_compiles(0), model.trace(X) as tracer:
            result = tracer.result.save()
    torch.testing.assert_close(result, model._module(X))


def test_what_is_wrong_with_a_warm_input_is_told_at_once():
    model = NNsight(Keywords())
    with pytest.raises(TypeError, match="wrong"):
        model.compile(backend="eager", warm={"wrong": X})


def test_a_long_wait_is_shown_and_taken_away(terminal):
    screen = terminal()
    with clock.doing("compiling (region 1 of 2)"):
        time.sleep(0.3)
    shown = screen.getvalue()
    assert "nnsight_fx: compiling (region 1 of 2): 00:0" in shown and shown.endswith("\r")


def test_a_short_wait_shows_nothing(terminal):
    screen = terminal()
    with clock.doing("compiling"):
        pass
    time.sleep(0.1)
    assert screen.getvalue() == ""


def test_an_error_ends_the_line(terminal):
    screen = terminal()
    with pytest.raises(ValueError, match="mine"), clock.doing("capturing the model"):
        time.sleep(0.2)
        raise ValueError("mine")
    shown = screen.getvalue()
    time.sleep(0.2)
    assert shown and screen.getvalue() == shown


@pytest.mark.parametrize("off", ["setting", "no terminal"])
def test_it_can_be_off(terminal, monkeypatch, off):
    screen = terminal()
    if off == "setting":
        monkeypatch.setattr(CONFIG.APP, "PROGRESS", False)
    else:
        monkeypatch.setattr(screen, "isatty", lambda: False)
    with clock.doing("compiling"):
        time.sleep(0.2)
    assert screen.getvalue() == ""
