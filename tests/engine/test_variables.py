"""Modules' calls while Dynamo traces: what is done on its variables is what the text says that it would read."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.fx as fx
import torch.nn as nn
from transformers.utils.generic import ModelOutput

from nnsight_fx import NNsight, assert_max_compiles, compat
from nnsight_fx.capture import markers, marking, variables
from nnsight_fx.capture.marker import close, site

Pair = namedtuple("Pair", "a b")


@dataclass
class Data:
    x: torch.Tensor
    n: int


@dataclass
class Out(ModelOutput):
    x: torch.Tensor | None = None
    more: tuple | None = None


class Gives(nn.Module):
    """What it is called with, as it is."""

    def forward(self, *args, **kwargs):
        return args[0] if len(args) == 1 and not kwargs else (*args, *kwargs.values())


KINDS = {
    "a tensor": lambda x: [(x,), {}],
    "keywords": lambda x: [(), {"x": x, "n": None, "y": x + 1}],
    "names of our own": lambda x: [(), {"path": x, "tx": x, "module": 1, "collectors": (x,), "function": x, "_": 2}],
    "numbers and names": lambda x: [(1, x, 2.5, "a", True, None), {}],
    "nested tuples": lambda x: [((x, (None, (x * 2, 3))),), {"pair": (x, x)}],
    "a tuple of none": lambda x: [((1, None),), {"pair": ()}],
    "no argument": lambda x: [(), {}],
    "a list": lambda x: [([x, 1, x + 1],), {}],
    "dicts": lambda x: [({"a": x, "b": [x, (x,)]},), {"o": OrderedDict(z=x)}],
    "a named tuple": lambda x: [(Pair(x, 1), x), {"p": Pair(1, (x, 2))}],
    "a dataclass": lambda x: [(Data(x, 3),), {"d": Data(x + 1, 4)}],
    "a ModelOutput": lambda x: [(Out(x=x, more=(x, x)),), {}],
    "sizes and dtypes": lambda x: [(x.shape, x.dtype, x), {"device": x.device}],
}


class Calls(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first, self.inner, self.kind = nn.Identity(), Gives(), kind

    def forward(self, x):
        x = self.first(x)
        args, kwargs = KINDS[self.kind](x)
        self.inner(*args, **kwargs)
        for held in args:
            if isinstance(held, list):
                x = x + held[0]  # as the module's hook left it
        return x * 2


def marked(kind: str, half: bool = False) -> list[tuple]:
    """The markers of a capture; with a capture half one that says nothing of `inner`."""
    model, x = NNsight(Calls(kind)), torch.randn(2, 3)
    model.compile(backend="eager", fullgraph=True)
    with model.trace(x):
        if half:
            model.first.output = model.first.output[:1]
        out = model.output.save()
    torch.testing.assert_close(out, Calls(kind)(x[:1] if half else x))
    (segment,) = captured
    return [n.args[1:] for n in segment.gm.graph.nodes if n.target is site]


captured: list = []


@pytest.fixture(autouse=True)
def segments(monkeypatch):
    from nnsight_fx.engine.captured.capture import Capture

    captured.clear()
    add = Capture.add
    monkeypatch.setattr(Capture, "add", lambda self, segment: (captured.append(segment), add(self, segment))[1])


@pytest.mark.parametrize("half", [False, True], ids=["", "beside a capture half"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_markers_are_those_of_the_text(kind, half, monkeypatch):
    ours = marked(kind, half)
    captured.clear()
    monkeypatch.setattr(variables, "among", lambda tx, /, *a, **k: compat.variables.inlined(tx, markers.among, *a, **k))
    assert marked(kind, half) == ours


@pytest.mark.parametrize("half", [False, True], ids=["", "beside a capture half"])
def test_no_text_is_read_for_what_is_common(half, monkeypatch):
    read = []
    inlined = compat.variables.inlined
    monkeypatch.setattr(
        compat.variables, "inlined", lambda tx, f, *a, **k: (read.append(f), inlined(tx, f, *a, **k))[1]
    )
    for kind in ("a tensor", "keywords", "numbers and names", "nested tuples", "a tuple of none", "no argument"):
        captured.clear()
        marked(kind, half)
    assert read == []
    captured.clear()
    marked("dicts", half)
    assert set(read) == {marking.mark if half else marking.mark_inside}


def test_a_number_that_passes_by_is_not_guarded():
    class Passes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Gives()

        def forward(self, x, n):
            return self.inner(x, n)[0] * 2

    model, x = NNsight(Passes()), torch.ones(2)
    model.compile(backend="eager")
    for n in ("a", "b", "c"):
        with model.trace(x, n):
            out = model.output.save()
        assert out.tolist() == [2, 2]
    assert len(captured) == 1


def test_a_module_mode_of_the_user_holds_inside():
    class Inner(nn.Module):
        def forward(self, x):
            return x + torch.ones(2).to(x.dtype)

    class Moded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            with torch.device("cpu"):
                return self.inner(x)

    model = NNsight(Moded())
    model.compile(backend="eager")
    with assert_max_compiles(1), model.trace(torch.zeros(2)):
        model.inner.output += 1
        out = model.output.save()
    assert out.tolist() == [2, 2]


def test_close_says_which_marker_is_the_last():
    graph = fx.Graph()
    x = graph.placeholder("x")
    for path, kind, leaf, left in [("l", "input", 0, 0), ("l", "input", 2, -1), ("l", "output", 0, 1)]:
        graph.call_function(site, (x, path, kind, leaf, left))
    for leaf, left in [(0, 2), (1, 1)]:  # counted
        graph.call_function(site, (x, "l", "input", leaf, left))
    graph.call_function(site, (x, "m", "input", 1, 0))
    close(graph)
    assert [n.args[4] for n in graph.find_nodes(op="call_function", target=site)] == [
        False,
        True,
        True,
        False,
        True,
        True,
    ]
