"""Models and bodies whose course values decide: loops, counts, indices behind a look, stops."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn as nn

import nnsight_fx
from nnsight_fx import MissedSiteError, NNsight, OutOfOrderError
from nnsight_fx.scan import shapes

ENGINES = ["hooks", "eager", "aot_eager"]
pytestmark = pytest.mark.xdist_group("decided")


@pytest.fixture(autouse=True)
def _a_scan_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that values decide is scanned for as many turns as there are experts: seconds."""
    monkeypatch.setattr(shapes, "TURNS", 60)


def wrap(module: nn.Module, engine: str) -> NNsight:
    model = NNsight(module)
    if engine != "hooks":
        model.compile(backend=engine)
    return model


def seeded(cls: Any, *args: Any) -> nn.Module:
    torch.manual_seed(0)
    return cls(*args).eval().requires_grad_(False)


@contextlib.contextmanager
def hooked(module: nn.Module, fn: Any) -> Any:
    handle = module.register_forward_hook(lambda m, a, o: fn(o))
    try:
        yield
    finally:
        handle.remove()


def x(scale: float = 1.0) -> torch.Tensor:
    return torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(2)) * scale


# -- indices behind a look --------------------------------------------------------------------------------------------


class Indexes(nn.Module):
    """What stands behind `lin` indexes tensors, by one of the ways below."""

    def __init__(self, way: str):
        super().__init__()
        self.way, self.lin, self.out = way, nn.Linear(4, 4), nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(5, 2, 4))
        self.register_buffer("buffer", torch.randn(4, 2, 4))

    def forward(self, v):
        h = self.lin(v)
        i = (h.sum((-1, -2)) > 0).long()
        parts = {
            "a column": lambda: h[:, 0],
            "a row of a parameter": lambda: h + self.table[1],
            "rows by computed numbers": lambda: h + self.table[i],
            "rows of a buffer by a list": lambda: h + self.buffer[[0, 2]].sum(0),
            "an index of an index": lambda: self.table[i][:, 0],
            "the input itself": lambda: v[:, 0] + h[:, 1],
            "a slice": lambda: h[:, :1],
            "a mask": lambda: torch.where(h > 0, h, 0.0)[h[:, 0, 0] > 0],
            "an element of a tuple": lambda: h.max(1)[0],
            "a size": lambda: h * h.shape[1],
        }
        return self.out(parts[self.way]())


WAYS = [
    "a column", "a row of a parameter", "rows by computed numbers", "rows of a buffer by a list", "an index of an index",
    "the input itself", "a slice", "a mask", "an element of a tuple", "a size",
]  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", WAYS)
def test_a_look_and_then_an_index(way: str, engine: str) -> None:
    module = seeded(Indexes, way)
    model = wrap(module, engine)
    with hooked(module.lin, lambda o: o * 2):
        want = module(x())
    with model.trace(x()):
        h = model.lin.output
        if h.sum() > -1e9:
            h[:] = h * 2
        out = model.out.output.save()
    assert torch.equal(out, want)


# -- numbers and loops ------------------------------------------------------------------------------------------------


class Refine(nn.Module):
    """Halves its input until it is small; says how often."""

    def forward(self, h):
        n = 0
        while h.norm() > 1.0:
            h, n = h * 0.5, n + 1
        return h, n


class Refined(nn.Module):
    def __init__(self):
        super().__init__()
        self.refine, self.out = Refine(), nn.Linear(4, 4)

    def forward(self, v):
        h, n = self.refine(v)
        return {"out": self.out(h), "steps": n, "more": [n / 2, n > 3, "halves"]}


@pytest.mark.parametrize("engine", ENGINES)
def test_numbers_are_the_runs(engine: str) -> None:
    module = seeded(Refined)
    model = wrap(module, engine)
    for scale in (50.0, 3.0, 0.01):
        want = module(x(scale))
        with model.trace(x(scale)) as tracer:
            refined = nnsight_fx.save(model.refine.output)
            result = nnsight_fx.save(tracer.result)
        assert refined[1] == want["steps"] and result["steps"] == want["steps"] and result["more"] == want["more"]
        assert torch.equal(result["out"], want["out"])


class Loop(nn.Module):
    def __init__(self, counted: bool = False):
        super().__init__()
        self.counted, self.lin, self.out = counted, nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

    def forward(self, h):
        n, turns = 0, int(h.norm().log2().clamp(0, 6)) if self.counted else 0
        while n < turns if self.counted else h.norm() > 1.0:
            h, n = self.lin(h) * 0.7, n + 1
        return self.out(h)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("counted", [False, True], ids=["while", "a number of turns"])
def test_as_many_occurrences_as_happen(counted: bool, engine: str) -> None:
    module = seeded(Loop, counted)
    model = wrap(module, engine)
    for scale in (50.0, 5.0):
        calls: list[torch.Tensor] = []
        with hooked(module.lin, lambda o, calls=calls: calls.append(o.clone())):
            want = module(x(scale))
        assert len(calls) > 1
        for stop in (None, 2, len(calls) + 3):
            with model.trace(x(scale)) as tracer:
                got = nnsight_fx.save([])
                for _ in tracer.iter[:stop]:
                    got.append(model.lin.output)
                out = nnsight_fx.save([model.out.output] if stop == 2 else [])
            assert len(got) == len(calls[:stop]) and all(map(torch.equal, got, calls))
            assert not out or torch.equal(out[0], want)


@pytest.mark.parametrize("engine", ENGINES)
def test_behind_a_loop_without_an_end_the_model_has_run(engine: str) -> None:
    model = wrap(seeded(Loop), engine)
    with pytest.raises(
        OutOfOrderError,
        match=r"`out.output` was passed when .* ran the model to its end: values decide how often `lin.output`",
    ):
        with model.trace(x(5.0)) as tracer:
            for _ in tracer.iter[:]:
                _ = model.lin.output
            model.out.output.save()
    with model.trace(x(5.0)) as tracer:
        for _ in tracer.iter[:2]:
            _ = model.lin.output
        model.out.output.save()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_occurrence_that_does_not_happen(engine: str) -> None:
    model = wrap(seeded(Loop), engine)
    with pytest.raises(MissedSiteError), model.trace(x(5.0)) as tracer:
        with tracer.iter[40]:
            model.lin.output.save()
        _ = model.lin.next(40).output.save()


@pytest.mark.parametrize("engine", ENGINES)
def test_writing_some_turns_of_a_loop(engine: str) -> None:
    module = seeded(Loop, True)
    model, n = wrap(module, engine), [0]

    def second(o: torch.Tensor) -> torch.Tensor:
        n[0] += 1
        return o + 1 if n[0] == 2 else o

    with hooked(module.lin, second):
        want = module(x(50.0))
    with model.trace(x(50.0)) as tracer:
        for step in tracer.iter[:3]:
            if step == 1:
                model.lin.output += 1
        out = model.out.output.save()
    assert torch.equal(out, want)


class Halves(nn.Module):
    """Calls `lin` until its input is small."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4, bias=False)

    def forward(self, h):
        while h.norm() > 1.0:
            h = self.lin(h) * 0.7
        return h


class Decodes(nn.Module):
    """A generation whose forwards call a module as often as values decide."""

    def __init__(self):
        super().__init__()
        self.step, self.out = Halves(), nn.Linear(4, 4)

    def forward(self, h):
        return self.out(self.step(h))

    def generate(self, h, steps=3, streamer=None, disable_compile=None):
        for _ in range(steps):
            h = self(h) * 30
        return h


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_loops_that_values_decide_in_the_generations_of_two_invokes(engine: str) -> None:
    module = seeded(Decodes)
    model = wrap(module, engine)
    got: list[tuple[list, Any]] = []
    with model.trace(fn="generate") as tracer:
        for scale in (20.0, 5.0):
            with tracer.invoke(x(scale)):
                calls = nnsight_fx.save([])
                for _ in tracer.iter[:]:
                    calls.append(model.step.lin.output)
                got.append((calls, tracer.result.save()))
    for scale, (calls, result) in zip((20.0, 5.0), got, strict=True):
        seen: list[torch.Tensor] = []
        with hooked(module.step.lin, lambda o, seen=seen: seen.append(o.clone())):
            want = module.generate(x(scale))
        assert len(calls) == len(seen) > 3 and all(map(torch.equal, calls, seen)) and torch.equal(result, want)


# -- stops and other models in a body ---------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("written", [False, True], ids=["read", "written"])
def test_a_stop_that_a_look_decides(written: bool, engine: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).requires_grad_(False)
    model = wrap(module, engine)
    with model.trace(x()) as tracer:
        h = model[1].output.save()
        if written:
            h[:] = h * 2
        if h.mean() > -1e9:
            k = model[2].output.save()
            tracer.stop()
        model[3].output.save()
    first = module[:2](x()) * (2 if written else 1)
    assert torch.equal(h, first) and torch.equal(k, module[2](first))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("how", "training"),
    [
        ("trace", False),
        ("trace", True),
        ("session", False),
        ("session", True),
        ("look", False),
        ("look", True),
        ("call", False),
    ],
)
def test_another_model_in_a_body(how: str, training: bool, engine: str) -> None:
    """It has dropout; the body's own model and later traces are untouched."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).requires_grad_(False).train(training)
    model, other = wrap(module, engine), wrap(inner, engine)
    torch.manual_seed(3)
    want = inner(x())
    torch.manual_seed(3)
    with model.trace(x()):
        h = model[0].output
        if how == "call":
            y = inner(x())
        else:
            with other.session() if how == "session" else contextlib.nullcontext():
                with other.trace(x()):
                    y = other[2].output.save()
                    if how == "look":
                        assert other[0].output.isfinite().all()
        model[0].output = h + y
        z = model[1].output.save()
    assert torch.equal(y, want) and torch.equal(z, module[1](module[0](x()) + want))
    with model.trace(x()):
        later = model[1].output.save()
    assert torch.equal(later, module(x()))
