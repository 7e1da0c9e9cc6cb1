"""Sync points: Python that needs a number runs the model up to there, once, and every side keeps its own state."""

from __future__ import annotations

import contextvars
import inspect

import pytest
import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

import nnsight_fx
from nnsight_fx import InvokeError, NNsight, OutOfOrderError
from nnsight_fx.engine.run import Run

ENGINES = ["hooks", "eager"]
on_all = pytest.mark.parametrize("engine", ENGINES)
VARIABLE: contextvars.ContextVar = contextvars.ContextVar("variable", default="outside")


class Net(nn.Module):
    """Four layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))

    def forward(self, x):
        return self.layers(x)


def wrap(engine: str, module: nn.Module | None = None) -> NNsight:
    torch.manual_seed(0)
    model = NNsight((module or Net()).requires_grad_(False))
    if engine != "hooks":
        model.compile(backend=engine)
    return model


@pytest.fixture
def forwards(monkeypatch) -> list:
    """The runs of models in this test, on either engine: each is one `Run.forward`."""
    seen, forward = [], Run.forward

    def counting(run):
        seen.append(run)
        return forward(run)

    monkeypatch.setattr(Run, "forward", counting)
    return seen


def x() -> torch.Tensor:
    return torch.arange(6.0).view(2, 3)


def here(offset: int = 0) -> str:
    return f"{__file__}:{inspect.currentframe().f_back.f_lineno + offset}"


SYNCS = {
    "if": lambda h: bool(h.sum() > 0),
    "item": lambda h: h.sum().item(),
    "float": lambda h: float(h.sum()),
    "int": lambda h: int(h.sum()),
    "print": lambda h: print(h),
    "format": lambda h: f"{h.sum():.3f}",
    "numpy": lambda h: h.numpy().tolist(),
    "tolist": lambda h: h.tolist(),
    "index": lambda h: [10, 20, 30][h[0].argmax()],
    "equal": lambda h: torch.equal(h, h * 1),
    "contains": lambda h: 3.0 in h,
}


@on_all
@pytest.mark.parametrize("how", SYNCS)
def test_a_sync_point_runs_the_model_once(engine, how, forwards, capsys):
    model = wrap(engine)
    module = model._module
    with model.trace(x()):
        h = model.layers[1].output
        got = SYNCS[how](h)
        printed = capsys.readouterr().out
        model.layers[2].output[:] *= 2
        last = model.layers[2].output.save()
        out = model.output.save()
    h_want = module.layers[:2](x())
    assert got == SYNCS[how](h_want)
    assert printed == capsys.readouterr().out
    assert len(forwards) == 1
    want = module.layers[2](h_want) * 2
    assert torch.equal(last, want) and torch.equal(out, module.layers[3](want))


def test_each_module_is_called_once_however_often_the_body_looks():
    model = wrap("hooks")
    calls = []
    for i, layer in enumerate(model._module.layers):
        layer.register_forward_hook(lambda m, args, out, i=i: calls.append(i))
    with model.trace(x()):
        seen = [float(layer.output.sum()) for layer in model.layers]
        again = model.layers[0].output.sum().item()
        assert calls == [0, 1, 2, 3] and again == seen[0]
    assert calls == [0, 1, 2, 3]


@on_all
@pytest.mark.parametrize("positive", [False, True])
def test_an_if_follows_the_value(engine, positive):
    model = wrap(engine)
    with model.trace(x()):
        model.layers[0].output = torch.full((2, 3), 1.0 if positive else -1.0)
        h = model.layers[0].output
        if h.sum() > 0:
            model.layers[1].output[:] = 0
        out = model.layers[1].output.save()
    assert bool((out == 0).all()) is positive


@on_all
def test_many_sync_points_in_order(engine, forwards):
    model = wrap(engine)
    with model.trace(x()):
        scales = []
        for layer in model.layers:
            scales.append(layer.output.abs().max().item())
            layer.output[:] = layer.output / scales[-1]
        out = model.output.save()
    h = x()
    for layer, scale in zip(model._module.layers, scales, strict=True):
        h = layer(h)
        assert h.abs().max().item() == scale
        h = h / scale
    assert torch.equal(out, h) and len(forwards) == 1


# -- state on either side ------------------------------------------------------------------------------------------------


class Counting(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def state() -> tuple:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        [type(m) for m in torch.overrides._get_current_function_mode_stack()],
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        VARIABLE.get(),
    )


class Watching(nn.Module):
    """Notes the state in which it runs, and changes some of it for a while."""

    def __init__(self):
        super().__init__()
        self.layers, self.states = nn.ModuleList(nn.Linear(3, 3) for _ in range(3)), []

    def forward(self, x):
        self.states.append(state())
        h = self.layers[0](x)
        with torch.no_grad():
            VARIABLE.set("model")
            h = self.layers[1](h)
            self.states.append((torch.is_grad_enabled(), VARIABLE.get()))
        h = self.layers[2](h)
        self.states.append(state()[:-1])
        return h


def modes(which: str):
    return {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "function mode": Counting,
    }[which]()


class Left(Exception):
    pass


@pytest.mark.parametrize("leave", ["normally", "exception", "break"])
@pytest.mark.parametrize("which", ["no_grad", "inference", "autocast", "function mode"])
def test_each_side_keeps_its_state(which, leave):
    module = Watching()
    model = NNsight(module)
    before = state()
    for _ in range(1):
        try:
            with model.trace(x()):
                with modes(which):
                    outer = state()
                    assert outer != before
                    assert model.layers[1].output.sum().item() is not None  # the model stands inside its own no_grad
                    assert state() == outer
                    if leave == "exception":
                        raise Left
                    if leave == "break":
                        break
                assert model.layers[2].output.sum().item() is not None
        except Left:
            assert leave == "exception"
    assert state() == before
    first, *later = module.states
    assert first[:5] == before[:5] and first[6:] == before[6:]  # what held at `with model.trace(...)`
    assert not any(m is Counting for m in first[5])
    if leave == "exception":
        assert not later  # ended where it stood
    else:
        assert later[0] == (False, "model") and later[1][:5] == before[:5]
    with model.trace(x()):
        out = model.output.save()
    assert out.requires_grad and torch.equal(out, module(x()))
    VARIABLE.set("outside")  # without a sync point the model runs in the caller's own context, as in a plain call
    assert state() == before


@on_all
def test_what_the_body_sets_for_good_stays_set(engine):
    model = wrap(engine)
    try:
        with model.trace(x()):
            assert model.layers[0].output.sum().item() is not None
            torch.set_default_dtype(torch.float64)
            VARIABLE.set("body")
            assert model.layers[1].output.dtype == torch.float32
            assert model.layers[1].output.sum().item() is not None
            assert torch.get_default_dtype() == torch.float64 and VARIABLE.get() == "body"
        assert torch.get_default_dtype() == torch.float64 and VARIABLE.get() == "body"
    finally:
        torch.set_default_dtype(torch.float32)
        VARIABLE.set("outside")


@on_all
def test_the_model_runs_under_what_held_at_the_trace(engine):
    model = wrap(engine)
    model._module.requires_grad_(True)
    with torch.no_grad():
        with model.trace(x()):
            with torch.enable_grad():
                assert model.layers[0].output.sum().item() is not None
            out = model.output.save()
    assert not out.requires_grad
    with model.trace(x()):
        with torch.no_grad():
            assert model.layers[0].output.sum().item() is not None
        out = model.output.save()
    assert out.requires_grad


# -- order (SEMANTICS D1) ------------------------------------------------------------------------------------------------


def rejects(error: pytest.ExceptionInfo, *parts: str) -> None:
    for part in parts:
        assert part in str(error.value)


@on_all
def test_a_read_after_the_model_has_passed_it(engine):
    model = wrap(engine)
    with pytest.raises(OutOfOrderError) as error:
        with model.trace(x()):
            early = model.layers[0].output.save()
            ran = here(1)
            assert model.layers[2].output.sum().item() is not None
            assert early.shape == (2, 3) and early.sum().item() is not None  # read before: still there
            line = here(1)
            model.layers[1].output.save()
    rejects(error, f"{line}: `layers.1.output` was passed when {ran} ran the model to `layers.2.output`", "read before")


@on_all
@pytest.mark.parametrize("verb", ["written", "skipped"])
def test_a_write_after_the_model_has_passed_it(engine, verb):
    model = wrap(engine)
    with pytest.raises(OutOfOrderError) as error:
        with model.trace(x()):
            ran = here(1)
            assert model.layers[2].output.sum().item() is not None
            line = here(2 if verb == "written" else 4)
            if verb == "written":
                model.layers[1].output = torch.zeros(2, 3)
            else:
                model.layers[1].skip(torch.zeros(2, 3))
    name = "layers.1.output" if verb == "written" else "layers.1.input"
    rejects(error, f"{line}: `{name}` was passed when {ran} ran", "`layers.2.output`", f"{verb} before that line")


@on_all
def test_a_write_of_what_comes_later(engine):
    model = wrap(engine)
    with pytest.raises(OutOfOrderError) as error:
        with model.trace(x()):
            later = model.layers[2].output * 2
            line = here(1)
            model.layers[0].output = later
    rejects(error, f"{line}: `layers.0.output` is written with a value that depends on `layers.2.output`", "two traces")


@on_all
def test_a_read_of_an_earlier_site_is_fine_until_the_model_has_run(engine):
    model = wrap(engine)
    with model.trace(x()):
        last = model.layers[3].output.save()
        first = model.layers[0].output.save()
    module = model._module
    assert torch.equal(first, module.layers[0](x())) and torch.equal(last, module(x()))


@on_all
def test_the_same_site_may_be_changed_after_it_was_looked_at(engine):
    model = wrap(engine)
    with model.trace(x()):
        assert model.layers[1].output.sum().item() is not None
        model.layers[1].output[:] = 0
        out = model.layers[2].input.save()
    assert (out == 0).all()


def test_a_second_forward_that_would_move_state_is_refused():
    model = NNsight(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    with pytest.raises(InvokeError) as error:
        with model.trace() as tracer:
            with tracer.invoke(x()):
                assert model[0].output.sum().item() is not None
            line = here(1)
            with tracer.invoke(x()):
                model[0].output.save()
    rejects(error, line, "`1` is in train mode", "tracer.batch(p1, p2)")


# -- leaving a trace with a run in the middle ----------------------------------------------------------------------------


class Cleans(nn.Module):
    """Has a `finally` and a `with` around its second layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.log = nn.Linear(3, 3), nn.Linear(3, 3), []

    def forward(self, x):
        try:
            with torch.no_grad():
                return self.second(self.first(x))
        except Exception:
            self.log.append("except")
            raise
        finally:
            self.log.append("finally")


@pytest.mark.parametrize("leave", ["exception", "order"])
def test_leaving_a_trace_ends_a_suspended_run(leave):
    module = Cleans()
    model = NNsight(module)
    with pytest.raises(Left if leave == "exception" else OutOfOrderError):
        with model.trace(x()):
            assert model.second.input.sum().item() is not None
            assert module.log == []  # suspended in front of `second`
            if leave == "exception":
                raise Left
            model.first.output.save()
    assert module.log == ["finally"] and torch.is_grad_enabled()  # ended at once, and by no exception of the model's
    with model.trace(x()):
        out = model.output.save()
    assert torch.equal(out, module(x())) and not module.second._forward_hooks


@pytest.mark.parametrize("leave", ["return", "stop"])
def test_leaving_normally_or_by_stop_ends_the_run(leave):
    module = Cleans()
    model = NNsight(module)

    def body():
        with model.trace(x()) as tracer:
            h = model.first.output.save()
            assert h.sum().item() is not None
            if leave == "stop":
                tracer.stop()
            return h

    if leave == "stop":
        with model.trace(x()) as tracer:
            h = model.first.output.save()
            assert h.sum().item() is not None
            tracer.stop()
    else:
        h = body()
    assert torch.equal(h, module.first(x())) and module.log[-1] == "finally" and torch.is_grad_enabled()


def test_a_generator_that_is_dropped_ends_its_run():
    module = Cleans()
    model = NNsight(module)

    def rows():
        with model.trace(x()):
            for row in model.first.output:
                yield row.sum().item()

    steps = rows()
    next(steps)
    assert module.log == []
    steps.close()
    assert module.log == ["finally"] and model.tracer is None and torch.is_grad_enabled()
    assert not torch.overrides._get_current_function_mode_stack()


def test_an_exception_of_the_model_reaches_the_body_at_the_sync_point():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            h = self.a(x)
            raise Left(self.b(h).sum())

    model = NNsight(Fails())
    with pytest.raises(Left):
        with model.trace(x()):
            assert model.a.output.sum().item() is not None
            model.output.sum().item()
    assert model.tracer is None and not nnsight_fx.tracing.saving._open.stack


class Parallel(nn.Module):
    """What is written before the sync point is used behind it, with no site in between."""

    def __init__(self):
        super().__init__()
        self.attn, self.pair, self.mlp = nn.Linear(3, 3), Pair(), nn.Linear(3, 3)

    def forward(self, x):
        attn, (left, right), mlp = self.attn(x), self.pair(x), self.mlp(x)
        return attn + 2 * left + 3 * right + mlp


class Pair(nn.Module):
    def forward(self, x):
        return x + 1, x * 2


def zeros(h: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(h)


def _swap(model):
    left, right = model.pair.output
    model.pair.output = (right, left)


WRITES_BEFORE = {
    "a value": (lambda m: setattr(m.attn, "output", m.attn.output * 2), lambda a, p: (a * 2, p)),
    "the model's input": (lambda m: setattr(m.attn, "output", m.attn.input), lambda a, p: (x(), p)),
    "a row": (lambda m: m.attn.output.__setitem__(0, 7.0), lambda a, p: (torch.cat([a[:1] * 0 + 7, a[1:]]), p)),
    "another dtype": (lambda m: setattr(m.attn, "output", m.attn.output.double()), lambda a, p: (a.double(), p)),
    "a skip": (lambda m: m.attn.skip(m.attn.input * 5), lambda a, p: (x() * 5, p)),
    "a leaf": (lambda m: m.pair.output[1].mul_(4), lambda a, p: (a, (p[0], p[1] * 4))),
    "a swap": (_swap, lambda a, p: (a, (p[1], p[0]))),
    "a skipped pair": (
        lambda m: m.pair.skip((m.attn.output, zeros(m.attn.output))),
        lambda a, p: (a, (a, zeros(a))),
    ),
    "twice": (
        lambda m: (setattr(m.attn, "output", m.attn.output + 1), setattr(m.attn, "output", m.attn.output * 3)),
        lambda a, p: ((a + 1) * 3, p),
    ),
}


@pytest.mark.parametrize("write", WRITES_BEFORE)
@pytest.mark.parametrize("engine", [*ENGINES, "aot_eager"])
def test_what_is_written_before_is_used_behind(engine, write):
    model = wrap(engine, Parallel())
    module, (do, expected) = model._module, WRITES_BEFORE[write]
    attn, pair = expected(module.attn(x()), (x() + 1, x() * 2))

    for _ in range(2):
        with model.trace(x()):
            do(model)
            assert bool(model.mlp.output.isfinite().all())
            out = model.output.save()

    torch.testing.assert_close(out, attn + 2 * pair[0] + 3 * pair[1] + module.mlp(x()), rtol=0, atol=0)
