"""`auto`: traces run on hooks until compiling pays, and compiled from then on."""

import pytest
import torch
import torch.nn as nn
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight_fx import NNsight, assert_max_compiles, assert_no_fallback
from nnsight_fx.engine import worth

X = torch.linspace(-1, 1, 24).reshape(2, 3, 4)


@pytest.fixture
def pays(monkeypatch):
    """`pays(seconds)`: compiling, with backend `eager`, is said to pay when hooks have cost so much."""

    def at(seconds):
        monkeypatch.setattr(worth, "EXACT", ())
        monkeypatch.setattr(worth, "estimate", lambda module: seconds * worth.SAVED)

    return at


def chain():
    torch.manual_seed(0)
    return NNsight(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).eval())


def traced(model, scale=2.0, **options):
    with model.trace(X, **options):
        model[1].output[:, -1] *= scale
        found = model.output.save()
    return found


def engine(model):
    return model.explain().to_dict()["trace"]["engine"]


def test_it_runs_on_hooks_until_compiling_pays(pays):
    pays(1e6)
    model = chain()
    want = traced(model)
    model.compile(backend="eager", auto=True)
    (capture,) = model._host.captures.values()
    with assert_no_fallback(), assert_max_compiles(0):
        for _ in range(3):
            assert torch.equal(traced(model), want)
    assert engine(model) == "hooks" and 0 < capture.hooks_s < 10
    assert "on hooks: the traces so far took" in str(model.explain()) and "it begins at" in str(model.explain())
    spent, capture.hooks_s = capture.hooks_s, 2e6
    assert torch.equal(traced(model), want)
    assert engine(model) == "spliced" and capture.begun and spent > 0
    capture.hooks_s = 0.0  # it stays so
    assert torch.equal(traced(model, 3.0), traced(chain(), 3.0))
    assert engine(model) == "spliced"


def test_a_trace_can_wait_and_not_wait(pays):
    pays(1e6)
    model = chain()
    want = traced(model)
    assert torch.equal(traced(model, compile="auto"), want)  # of the default options, which are not compiled for
    assert engine(model) == "hooks"
    model.compile(backend="eager")
    assert torch.equal(traced(model, compile="auto"), want) and engine(model) == "hooks"
    assert torch.equal(traced(model), want) and engine(model) == "spliced"
    assert torch.equal(traced(model, compile="auto"), want) and engine(model) == "spliced"  # it is captured by now
    model = chain()
    model.compile(backend="eager", auto=True)
    assert torch.equal(traced(model, compile=True), want) and engine(model) == "spliced"


def test_what_takes_no_time_to_compile_is_not_waited_with():
    model = chain()
    model.compile(backend="eager", auto=True)
    traced(model)
    assert engine(model) == "spliced"


def test_warm_compiles_now(pays):
    pays(1e6)
    model = chain()
    model.compile(backend="eager", auto=True, warm=X)
    with assert_max_compiles(1):
        traced(model)
    assert engine(model) == "spliced"


def test_sessions_wait_together(pays):
    pays(1e6)
    model = chain()
    model.compile(backend="eager", auto=True)
    (capture,) = model._host.captures.values()

    def all_of():
        with torch.no_grad(), model.session() as session:
            found = [traced(model, scale) for scale in (1.0, 2.0, 3.0)]
        return found, session.explain().to_dict()["groups"][-1]["strategy"]

    (first, how), spent = all_of(), capture.hooks_s
    assert how == "batched" and spent > 0
    capture.hooks_s = 2e6
    second, how = all_of()
    assert how == "forked"
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_a_sweep_decides_by_its_cells(pays, monkeypatch):
    pays(1e6)
    model = chain()
    model.compile(backend="eager", auto=True)

    def body(tracer, scale):
        model[1].output[:, -1] *= scale
        return model.output[:, -1]

    over = {"scale": [i / 8 for i in range(24)]}
    found = model.sweep(body, X, over, progress=False, engine="compiled")["result"]
    assert [g["strategy"] for g in model.explain().to_dict()["run"]["groups"]] == ["forked"]
    torch.testing.assert_close(found, chain_swept(over))
    traced(model)  # what was compiled is there
    assert engine(model) == "spliced"


def chain_swept(over):
    model = chain()

    def body(tracer, scale):
        model[1].output[:, -1] *= scale
        return model.output[:, -1]

    return model.sweep(body, X, over, progress=False)["result"]


def test_generation_and_programs_wait(pays):
    pays(1e6)
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=23, n_positions=32, bos_token_id=None, eos_token_id=None
    )
    model = NNsight(GPT2LMHeadModel(config).eval())
    ids = torch.tensor([[3, 1, 4]])

    def generated():
        with model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) as tracer:
            for _ in tracer.iter[:]:
                model.transformer.h[0].output[:, -1] += 1
            out = tracer.result.save()
        return out

    want = generated()
    model.compile(backend="eager", auto=True)
    (capture,) = model._host.captures.values()
    assert torch.equal(generated(), want) and capture.hooks_s > 0 and not capture.captures
    capture.hooks_s = 2e6
    assert torch.equal(generated(), want) and capture.captures

    model = chain()
    program = model.program(lambda tracer: model.output * 2)
    want = program(X)
    model.compile(backend="eager", auto=True)
    (capture,) = model._host.captures.values()
    for _ in range(3):
        assert torch.equal(program(X), want)
    assert not capture.captures and capture.hooks_s > 0
    capture.hooks_s = 2e6
    assert torch.equal(program(X), want) and capture.captures


def test_an_unknown_word_is_told():
    with pytest.raises(TypeError, match=r'`compile=` is `False`, `True`, `"auto"`, or a dict'):
        traced(chain(), compile="later")
