"""`model.program`: a recorded body gives what a trace of it gives, with other inputs each time."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn as nn
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight_fx import LanguageModel, NNsight, assert_max_compiles
from nnsight_fx.errors import MissedSiteError, NestedTraceError, NotRecordableError

ENGINES = ["hooks", "eager", "aot_eager"]
engines = pytest.mark.parametrize("engine", ENGINES)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Dropout(0.5)).eval()


def wrap(module: nn.Module, engine: str) -> NNsight:
    model = NNsight(module)
    if engine != "hooks":
        model.compile(backend=engine)
    return model


def by_hand(module: nn.Module, x, alpha, vector, position=1):
    h = torch.tanh(module[0](x) + alpha * vector)
    h = h.clone()
    h[:, position] = 0
    return h[:, 0], module[2](h)


def steer(model: NNsight):
    def body(tracer, alpha, vector, position=1):
        model[0].output = model[0].output + alpha * vector
        model[1].output[:, position] = 0
        return {"h": model[1].output[:, 0], "out": [model[2].output]}

    return body


def draw(seed: int, rows: int = 2):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 4, generator=generator),
        torch.randn((), generator=generator),
        torch.randn(4, generator=generator),
    )


def check(program, module, x, alpha, vector, **kwargs):
    got, (h, out) = program(x, alpha, vector, **kwargs), by_hand(module, x, alpha, vector, **kwargs)
    tolerance = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(got["h"], h, **tolerance)
    torch.testing.assert_close(got["out"][0], out, **tolerance)
    assert type(got["h"]) is torch.Tensor


@engines
def test_it_is_recorded_once_and_takes_other_values(engine):
    module = net()
    model = wrap(module, engine)
    program = model.program(steer(model))
    with torch.no_grad():
        check(program, module, *draw(0))
        with assert_max_compiles(0):
            for seed in range(1, 5):
                check(program, module, *draw(seed))
    assert (len(program.recordings), program.runs) == (1, {"traced": 1, "recorded": 4})
    assert program.explain() == "program body: 1 recordings, 4 runs of them, 1 traces"


@engines
def test_another_kind_is_another_recording(engine):
    module = net()
    model = wrap(module, engine)
    program = model.program(steer(model))
    x, alpha, vector = draw(0)
    with torch.no_grad():
        for _ in range(2):
            check(program, module, x, alpha, vector)
            check(program, module, x, 0.5, vector)  # a number is its value
            check(program, module, x, -1.5, vector)
            check(program, module, x, alpha, vector, position=2)
            check(program, module, x, alpha, vector[0])
    assert program.runs == {"traced": 5, "recorded": 5}


@engines
def test_rows_and_modes(engine):
    """Other rows and train mode are seen, and dropout draws what it draws in a trace."""
    module = net()
    model = wrap(module, engine)

    def body(tracer, v):
        model[0].output += v
        return model.output

    program, v = model.program(body), torch.randn(4)
    for training in (False, True, False):
        module.train(training)
        for rows in (2, 3, 2):
            x = torch.randn(rows, 4)
            torch.manual_seed(1)
            with torch.no_grad():
                got = program(x, v)
                torch.manual_seed(1)
                with model.trace(x):
                    model[0].output += v
                    want = model.output.save()
            torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert program.runs["recorded"] >= 4


@engines
def test_what_the_body_reads_from_the_model_is_as_it_is_now(engine):
    module = net()
    model = wrap(module, engine)

    def body(tracer):
        return model[1].output @ model[2].weight.T + model[0].bias

    program, x = model.program(body), torch.randn(2, 4)

    def same():
        with torch.no_grad():
            want = torch.tanh(module[0](x)) @ module[2].weight.T + module[0].bias
            torch.testing.assert_close(program(x), want, rtol=0, atol=0)

    same()
    same()
    with torch.no_grad():
        module[2].weight.mul_(2)
    same()
    module[2].weight = nn.Parameter(torch.randn(4, 4))
    same()
    module.load_state_dict({k: torch.randn_like(v) for k, v in module.state_dict().items()})
    same()
    module.double()
    x = x.double()
    same()


@engines
def test_an_argument_that_the_body_also_reads_from_outside(engine):
    model, outside = wrap(net(), engine), torch.randn(4)

    def body(tracer, v):
        return model[0].output * v + outside

    program, x = model.program(body), torch.randn(2, 4)
    with torch.no_grad():
        for v in (outside, torch.randn(4), outside.clone()):
            torch.testing.assert_close(program(x, v), model._module[0](x) * v + outside, rtol=0, atol=0)
        outside.mul_(3)
        v = torch.ones(4)
        torch.testing.assert_close(program(x, v), model._module[0](x) + outside, rtol=0, atol=0)
    assert program.runs == {"traced": 1, "recorded": 3}


@engines
def test_gradients_flow_through_what_it_gives(engine):
    module = net()
    model = wrap(module, engine)

    def body(tracer, v):
        model[0].output = model[0].output + v
        return model[2].output

    program = model.program(body)
    for seed in range(3):
        x, _, v = draw(seed)
        v.requires_grad_()
        got = torch.autograd.grad(program(x, v).pow(2).sum(), [v, module[0].weight])
        want = torch.autograd.grad(module[2](torch.tanh(module[0](x) + v)).pow(2).sum(), [v, module[0].weight])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    assert program.runs == {"traced": 1, "recorded": 2}


@engines
def test_skips_and_stops(engine):
    module = net()
    model = wrap(module, engine)

    def body(tracer, v):
        model[1].skip(model[1].input * v)
        return model[2].output

    def ends(tracer, v):
        model[1].output.save()
        tracer.stop()

    module[3].register_forward_hook(lambda m, args, out: pytest.fail("it was to stop before"))
    program = model.program(body, stop=True)
    with torch.no_grad():
        for seed in range(3):
            x, _, v = draw(seed)
            torch.testing.assert_close(program(x, v), module[2](module[0](x) * v), rtol=0, atol=0)
    assert sum(program.runs.values()) == 3
    with pytest.raises(NotRecordableError, match=r"test_program\.py:\d+: a program's body ended by `tracer.stop\(\)`"):
        model.program(ends)(x, v)


@engines
def test_what_a_recording_does_not_hold_is_traced_each_time(engine):
    model, x = wrap(net(), engine), torch.randn(2, 4)

    def looks(tracer, v):
        return model[0].output * (2 if model[0].output.sum() > v.sum() else 3)

    def differentiates(tracer, v):
        h = model[0].output
        found = h.grad
        (model[2].output * v).sum().backward()
        return found

    def changes(tracer, v):
        v.add_(1)
        return model[0].output * v

    def conditional(tracer, v):
        h = model[0].output
        with tracer.cond(h.sum() > 0):
            model[0].output = h * v
        return model[2].output

    for fn in (looks, differentiates, changes, conditional):
        program = model.program(fn)
        for seed in range(3):
            own, theirs = torch.full((4,), float(seed)), torch.full((4,), float(seed))
            with model.trace(x) as tracer:
                want = fn(tracer, theirs).save()
            torch.testing.assert_close(program(x, own), want, rtol=0, atol=0)
            assert torch.equal(own, theirs)
        assert program.runs == {"traced": 3} and "traced each time: " in program.explain(), fn.__name__


@engines
def test_errors(engine):
    model, x = wrap(net(), engine), torch.randn(2, 4)
    with pytest.raises(
        NotRecordableError, match=r"test_program\.py:\d+: a program's body returns recorded values.*a float"
    ):
        model.program(lambda tracer: (model.output, 1.0))(x)
    with pytest.raises(TypeError, match=r"test_program\.py:\d+: an argument of a program"):
        model.program(lambda tracer, many: model.output)(x, {1})
    program = model.program(lambda tracer: model.output)
    with model.trace(x):
        model.output.save()
        with pytest.raises(NestedTraceError, match=r"test_program\.py:\d+"):
            program(x)
    assert model.tracer is None

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(x) if x.sum() > 0 else self.a(x)

    module = Twice()
    branching = wrap(module, engine)
    program = branching.program(lambda tracer: branching.b.output)
    with torch.no_grad():
        x = torch.ones(2, 4)
        torch.testing.assert_close(program(x), module.b(x), rtol=0, atol=0)
        with pytest.raises(MissedSiteError, match=r"test_program\.py:\d+: `b\.output`"):
            program(-x)
        torch.testing.assert_close(program(2 * x), module.b(2 * x), rtol=0, atol=0)


@engines
def test_a_session_an_edited_model_and_a_hook(engine):
    module = net()
    model = wrap(module, engine)
    program, x, seen = model.program(lambda tracer, v: model[1].output + v), torch.randn(2, 4), []
    v = torch.randn(4)
    with torch.no_grad():
        with model.session():
            first = program(x, v)
            second = program(x, v)
        torch.testing.assert_close(first, module[:2](x) + v, rtol=0, atol=0)
        torch.testing.assert_close(second, first, rtol=0, atol=0)
        program(x, v)
        with model.edit(inplace=True):
            model[0].output *= 2
        for _ in range(2):
            torch.testing.assert_close(program(x, v), torch.tanh(2 * module[0](x)) + v, rtol=0, atol=0)
        model.clear_edits()
        handle = module[1].register_forward_hook(lambda m, args, out: seen.append(1) or out + 1)
        for _ in range(2):
            torch.testing.assert_close(program(x, v), torch.tanh(module[0](x)) + 1 + v, rtol=0, atol=0)
        handle.remove()
        torch.testing.assert_close(program(x, v), torch.tanh(module[0](x)) + v, rtol=0, atol=0)
    assert len(seen) == 2


def test_nothing_is_held():
    model = wrap(net(), "eager")
    program = model.program(lambda tracer, v: model[1].output + v)
    for _ in range(2):
        x, v = torch.randn(2, 4), torch.randn(4)
        out = program(x, v)
    held = [weakref.ref(y) for y in (x, v, out)]
    del x, v, out
    gc.collect()
    assert [r() for r in held] == [None] * 3


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_a_language_model(engine):
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50)).eval().requires_grad_(False)
    model = LanguageModel(module)
    if engine != "hooks":
        model.compile(backend=engine)

    def body(tracer, v):
        model.transformer.h[0].output[:, -1] += v
        return {"logits": model.lm_head.output[:, -1]}

    program = model.program(body, use_cache=False)
    for _ in range(3):
        ids, v = torch.randint(0, 50, (1, 5)), torch.randn(16)
        with model.trace(ids, compile=False, use_cache=False):
            model.transformer.h[0].output[:, -1] += v
            want = model.lm_head.output[:, -1].save()
        torch.testing.assert_close(program(ids, v)["logits"], want, rtol=0, atol=0)
    assert program.runs == {"traced": 1, "recorded": 2}


@pytest.mark.parametrize("engine", [None, "eager", "aot_eager"])
def test_an_argument_that_the_body_saves(engine):
    """It is no value of the model's, and is given back as it came."""
    model = NNsight(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False))
    if engine:
        model.compile(backend=engine)

    def body(tracer, v):
        kept = v.save()
        model[0].output = model[0].output + v
        return kept, model.output.save()

    program, x = model.program(body), torch.ones(2, 3)
    for scale in (1.0, 2.0, 3.0):
        v = torch.full((3,), scale)
        kept, out = program(x, v)
        assert torch.equal(kept, v)
        torch.testing.assert_close(out, model._module[1](model._module[0](x) + v))
