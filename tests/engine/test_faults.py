"""Faults: each exception, raised at each stage of a run, comes out as itself; then a clean trace is a fresh model's."""

from __future__ import annotations

import contextlib
import threading
import weakref

import greenlet
import pytest
import torch
import torch.nn as nn
from transformers import GPT2Config, GPT2LMHeadModel

import nnsight_fx
from nnsight_fx import LanguageModel, NNsight

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Fault(Exception):
    """An ordinary error of somebody's code."""


class Halt(StopIteration):
    """Looks like the end of a loop."""


class Kill(BaseException):
    """No `Exception` at all."""


FAULTS = [
    Fault("mine"),
    torch.OutOfMemoryError("out of memory"),
    KeyboardInterrupt(),
    SystemExit(3),
    GeneratorExit(),
    StopIteration(),
    Halt(),
    AttributeError("theirs"),
    Kill(),
]


FEW = [FAULTS[0], FAULTS[2], FAULTS[5]]  # an error, an interrupt, the end of a loop


class Fuse(nn.Module):
    """Hands its input on, from outside captured code; raises once it is armed, in the forward or in the backward."""

    def __init__(self):
        super().__init__()
        self.forward_fault: BaseException | None = None
        self.backward_fault: BaseException | None = None
        self.calls = 0  # left before it blows

    @torch.compiler.disable
    def forward(self, x):
        self.calls -= 1
        if self.forward_fault is not None and self.calls < 0:
            raise self.forward_fault
        if self.backward_fault is not None:
            x.register_hook(self.blow)
        return x

    def blow(self, grad):
        raise self.backward_fault  # type: ignore[misc]


class Net(nn.Module):
    def __init__(self, fuse: nn.Module):
        super().__init__()
        self.first, self.fuse, self.norm, self.last = nn.Linear(4, 4), fuse, nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.norm(self.fuse(torch.tanh(self.first(x)))))


def build(fused: bool) -> nn.Module:
    torch.manual_seed(0)
    net = Net(Fuse() if fused else nn.Identity())
    net.norm.eval()
    return net


def wrap(engine: str, module: nn.Module) -> NNsight:
    model = NNsight(module)
    if engine != "hooks":
        model.compile(backend=engine)
    return model


# -- the stages: each runs until the fault is raised -----------------------------------------------------------------


def blow(fault):
    raise fault


def at_the_first_line(model, fault):
    with model.trace(X):
        raise fault


def behind_a_write(model, fault):
    with model.trace(X):
        model.first.output[:] = 0
        model.last.output.save()
        raise fault


def in_an_invoke(model, fault):
    with model.trace() as tracer:
        with tracer.invoke(X):
            model.first.output.save()
        with tracer.invoke(X):
            model.first.output[:] = 0
            raise fault


def behind_a_sync_point(model, fault):
    with model.trace(X):
        model.first.output[:] = 0
        assert float(model.first.output.detach().sum()) == 0
        model.last.output[:] = 0
        raise fault


def behind_a_sync_point_at_the_end(model, fault):
    with model.trace(X):
        assert model.output.sum() == model.output.sum()
        raise fault


def in_a_callable(model, fault):
    with model.trace(X) as tracer:
        tracer.apply(lambda h: blow(fault), model.first.output)


def under_other_modes(model, fault):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), model.trace(X):
        assert float(model.first.output.detach().sum()) is not None
        with torch.enable_grad():
            raise fault


def in_a_gradient_block(model, fault):
    with model.trace(X):
        h = model.first.output
        h.grad.save()
        model.output.sum().backward()
        raise fault


def in_a_callable_on_a_gradient(model, fault):
    with model.trace(X) as tracer:
        grad = model.first.output.grad
        model.output.sum().backward()
        tracer.apply(lambda g: blow(fault), grad)


def in_a_scan(model, fault):
    with model.scan(X):
        model.first.output.save()
        raise fault


def between_the_traces_of_a_session(model, fault):
    with model.session():
        with model.trace(X):
            h = model.first.output
        with model.trace(X):
            model.first.output[:] = h
        raise fault


def in_the_second_trace_of_a_session(model, fault):
    with model.session():
        with model.trace(X):
            h = model.first.output
        with model.trace(X):
            model.first.output[:] = h
            raise fault


def in_the_block_of_a_backward(model, fault):
    with model.trace(X):
        h = model.first.output
        with model.output.sum().backward():
            h.grad[:] = 0
            raise fault


def in_a_loop_over_calls(model, fault):
    with model.trace(X) as tracer:
        for _ in tracer.iter[:]:
            model.first.output[:] = 0
            raise fault


def behind_a_stop(model, fault):
    with model.trace(X) as tracer:
        model.first.output.save()
        try:
            tracer.stop()
        finally:
            raise fault


def behind_a_skip(model, fault):
    with model.trace(X):
        model.norm.skip(model.norm.input)
        model.last.output.save()
        raise fault


def behind_a_cache(model, fault):
    with model.trace(X) as tracer:
        tracer.cache()
        raise fault


def in_a_sweep(model, fault):
    def body(tracer, by):
        model.first.output = model.first.output * by
        if by > 1:
            raise fault
        return model.last.output

    model.sweep(body, X, {"by": [0.5, 2.0]}, chunk=1, progress=False)


def in_a_session_behind_its_traces(model, fault):
    with model.session():
        with model.trace(X):
            kept = model.first.output.save()
        assert kept.shape == (2, 4)
        raise fault


def in_an_edit(model, fault):
    with model.edit():
        model.first.output[:] = 0
        raise fault


BODY = [
    at_the_first_line,
    behind_a_write,
    in_an_invoke,
    behind_a_sync_point,
    behind_a_sync_point_at_the_end,
    in_a_callable,
    under_other_modes,
    in_a_gradient_block,
    in_a_callable_on_a_gradient,
    in_a_scan,
    between_the_traces_of_a_session,
    in_the_second_trace_of_a_session,
    in_the_block_of_a_backward,
    in_a_loop_over_calls,
    behind_a_stop,
    behind_a_skip,
    behind_a_cache,
    in_a_sweep,
    in_a_session_behind_its_traces,
    in_an_edit,
]


@contextlib.contextmanager
def armed(fuse, **faults):
    for name, value in faults.items():
        setattr(fuse, name, value)
    try:
        yield
    finally:
        fuse.forward_fault = fuse.backward_fault = None


def in_the_model(model, fault):
    with armed(model._module.fuse, forward_fault=fault), model.trace(X):
        model.first.output[:] = 0
        model.last.output.save()


def in_the_model_behind_a_sync_point(model, fault):
    with armed(model._module.fuse, forward_fault=fault), model.trace(X):
        assert float(model.first.output.detach().sum()) is not None
        model.last.output.save()


def in_the_model_at_a_sync_point(model, fault):
    with armed(model._module.fuse, forward_fault=fault), model.trace(X):
        float(model.last.output.detach().sum())


def in_the_backward(model, fault):
    with armed(model._module.fuse, backward_fault=fault), model.trace(X):
        model.output.sum().backward()


def in_the_gradients_of_a_body(model, fault):
    with armed(model._module.fuse, backward_fault=fault), model.trace(X):
        model.last.output.grad.save()
        model.first.output.grad[:] = 0
        model.output.sum().backward()


def in_the_model_of_two_invokes(model, fault):
    with armed(model._module.fuse, forward_fault=fault), model.trace() as tracer:
        with tracer.invoke(X):
            model.first.output[:] = 0
        with tracer.invoke(X):
            model.last.output.save()


def in_the_model_with_an_edit(model, fault):
    with model.edit() as edited:
        edited.first.output[:] = 0
    with armed(model._module.fuse, forward_fault=fault), edited.trace(X):
        edited.last.output.save()


def in_the_model_of_a_sweep(model, fault):
    def body(tracer, by):
        model.first.output = model.first.output * by
        return model.last.output

    with armed(model._module.fuse, forward_fault=fault, calls=0):
        model.sweep(body, X, {"by": [0.5, 2.0]}, chunk=1, progress=False)


def in_a_session_of_failing_models(model, fault):
    with armed(model._module.fuse, forward_fault=fault, calls=1), model.session():
        with model.trace(X):
            h = model.first.output
        with model.trace(X):
            model.first.output[:] = h
            model.last.output.save()


MODEL = [
    in_the_model,
    in_the_model_behind_a_sync_point,
    in_the_model_at_a_sync_point,
    in_the_backward,
    in_the_gradients_of_a_body,
    in_the_model_of_two_invokes,
    in_the_model_with_an_edit,
    in_the_model_of_a_sweep,
    in_a_session_of_failing_models,
]


SWEEPS = [in_a_sweep, in_the_model_of_a_sweep]
BACKWARD = [in_the_backward, in_the_gradients_of_a_body, in_a_callable_on_a_gradient]


# -- what must hold afterwards ---------------------------------------------------------------------------------------


def ambient() -> tuple:
    return (
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        [t.name for t in threading.enumerate() if t.name != "tqdm_monitor"],
        len(torch.overrides._get_current_function_mode_stack()),
        len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
        getattr(nnsight_fx.capture.marker.active, "run", None),
        list(nnsight_fx.tracing.saving._open.stack),
    )


def state(module: nn.Module) -> dict:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_untouched(module: nn.Module, before: dict, flags: list) -> None:
    assert (
        all(torch.equal(before[k], v) for k, v in module.state_dict().items())
        and before.keys() == dict(module.state_dict()).keys()
    )
    assert flags == [m.training for m in module.modules()]
    assert all(p.grad is None for p in module.parameters())
    for m in module.modules():
        assert "forward" not in m.__dict__
        hooks = [*m._forward_hooks.values(), *m._forward_pre_hooks.values(), *m._backward_hooks.values()]
        assert not [h for h in hooks if not h.__module__.startswith("transformers.")]  # which has some of its own


@pytest.fixture(autouse=True)
def _greenlets_are_seen():
    """Every greenlet that a test switches to; a sync point has one, and so has a generation."""
    SEEN.clear()
    before = greenlet.settrace(lambda event, args: SEEN.add(args[1]))
    yield
    greenlet.settrace(before)


SEEN: weakref.WeakSet = weakref.WeakSet()


def suspended() -> list:
    """Runs that somebody left in the middle of a forward."""
    return [g for g in SEEN if g is not greenlet.getcurrent() and g and not g.dead]


def probe(model) -> list[torch.Tensor]:
    """A clean trace: reads, a write, a number, a gradient."""
    model._module.zero_grad(set_to_none=True)
    with model.trace(X):
        h = model.first.output
        h[:, 1] = 2.0
        kept = h.save()
        grad = h.grad.save()
        out = model.output.save()
        out.sum().backward()
    found = [kept.detach().clone(), grad.clone(), out.detach().clone()]
    found += [p.grad.clone() for p in model._module.parameters()]
    model._module.zero_grad(set_to_none=True)
    return found


def check(engine: str, stage, fused: bool, faults: list) -> None:
    module = build(fused)
    model = wrap(engine, module)
    want = probe(wrap("hooks", build(fused)))
    before, flags, around = state(module), [m.training for m in module.modules()], ambient()
    for fault in faults:
        with pytest.raises(BaseException) as error:  # noqa: PT011  (which one is what the next line asks)
            stage(model, fault)
        got = error.value
        if isinstance(fault, StopIteration) and stage in SWEEPS:  # Python's own rule for generators (PEP 479)
            assert type(got) is RuntimeError
            got = got.__cause__
        assert got is fault, f"{fault!r} became {error.value!r}"
        fault.__traceback__ = fault.__context__ = None
        error = got = None
        if stage in BACKWARD:  # as in torch, parameters that were reached before have theirs
            module.zero_grad(set_to_none=True)
        assert ambient() == around, repr(fault)
        assert_untouched(module, before, flags)
        assert not suspended(), repr(fault)
        assert model.tracer is None
        got = probe(model)
        assert len(got) == len(want) and all(map(torch.equal, got, want)), repr(fault)
        if not fused:
            continue
        with model.trace(X) as tracer:  # what the fault did to a scan, it did to that trace alone
            model.last.output.save()
        assert "sync point" not in str(tracer.explain()) and "fallback" not in str(tracer.explain()), repr(fault)


@pytest.mark.parametrize(
    ("engine", "faults"),
    [
        pytest.param("hooks", FAULTS, id="hooks"),
        pytest.param("eager", FEW, id="eager"),
        pytest.param("eager", FAULTS, id="eager-all", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("stage", [*BODY, *MODEL], ids=lambda s: s.__name__)
def test_a_fault(engine, stage, faults):
    check(engine, stage, stage in MODEL, faults)


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if not isinstance(f, Exception) or isinstance(f, RuntimeError)], ids=repr
)
def test_a_fault_of_the_compiler_that_is_no_failure_to_compile(fault):
    """Other exceptions of a compiler cost speed only: tests/engine/test_compiler_fails.py."""
    module = build(False)
    model, calls = NNsight(module), []

    def backend(gm, inputs, **options):
        calls.append(gm)
        if len(calls) == 1:
            raise fault
        return gm

    model.compile(backend=backend)
    before, flags, around = state(module), [m.training for m in module.modules()], ambient()
    with pytest.raises(type(fault)) as error:
        with model.trace(X):
            model.last.output.save()
    assert error.value is fault
    assert ambient() == around
    assert_untouched(module, before, flags)
    assert all(map(torch.equal, probe(model), probe(wrap("hooks", build(False)))))
    assert len(calls) > 1  # the next trace compiled


# -- generation ------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[5, 6, 7, 8]])


def language_model(engine: str) -> LanguageModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=32, bos_token_id=0, eos_token_id=0)
    module = GPT2LMHeadModel(config).eval().requires_grad_(False)
    module.transformer.h[0].mlp.dropout = Fuse()
    model = LanguageModel(module)
    if engine != "hooks":
        model.compile(backend=engine)
    return model


def generate(model, at=None, fault=None) -> torch.Tensor:
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with model.generate(IDS, **options) as tracer:
        for step in tracer.iter[:4]:
            model.transformer.h[0].output[:, -1] += 0.5
            if at == "body" and step == 2:
                raise fault
            if at == "callable" and step == 2:
                tracer.apply(lambda h: blow(fault), model.lm_head.output)
        out = tracer.result.save()
    return out


@pytest.mark.parametrize("engine", ["hooks", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("at", ["body", "callable", "model"])
def test_a_fault_in_a_generation(engine, at):
    model = language_model(engine)
    fuse = model._module.transformer.h[0].mlp.dropout
    want = generate(language_model("hooks"))
    before, flags, around = state(model._module), [m.training for m in model._module.modules()], ambient()
    for fault in FAULTS[:4]:
        with pytest.raises(type(fault)) as error, armed(fuse, calls=2, forward_fault=fault if at == "model" else None):
            generate(model, at, fault)
        assert error.value is fault
        fault.__traceback__ = fault.__context__ = None
        error = None
        assert ambient() == around
        assert_untouched(model._module, before, flags)
        assert not suspended()
        assert torch.equal(generate(model), want)
