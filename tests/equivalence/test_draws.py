"""What a body draws at random is the same on every engine: in traces, in steps of a generation, in cells of a sweep of any chunk size."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import nnsight_fx
from nnsight_fx import LanguageModel, NNsight
from nnsight_fx.interventions import Noise

pytestmark = pytest.mark.xdist_group("draws")
ENGINES = ["eager", "aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])]
QUICK = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]

DRAWS = {
    "randn_like": lambda h: h + torch.randn_like(h),
    "rand_like": lambda h: h + torch.rand_like(h),
    "randint_like": lambda h: h + torch.randint_like(h, 5),
    "randn": lambda h: h + torch.randn(8),
    "rand": lambda h: h + torch.rand(3, 8),
    "randint": lambda h: h + torch.randint(0, 9, (8,)),
    "randperm": lambda h: h[:, torch.randperm(8)],
    "normal": lambda h: torch.normal(h, 0.5),
    "bernoulli": lambda h: h * torch.bernoulli(torch.sigmoid(h)),
    "poisson": lambda h: torch.poisson(h.abs()),
    "multinomial": lambda h: h * torch.multinomial(torch.softmax(h, -1), 1),
    "dropout": lambda h: F.dropout(h, 0.5),
    "alpha_dropout": lambda h: F.alpha_dropout(h, 0.5, training=True),
    "feature_dropout": lambda h: F.dropout1d(h[..., None], 0.5)[..., 0],
    "rrelu": lambda h: F.rrelu(h, training=True),
    "gumbel_softmax": lambda h: F.gumbel_softmax(h),
    "normal_": lambda h: h + torch.empty(3, 8).normal_(),
    "uniform_": lambda h: h + torch.zeros(8).uniform_(-1, 1),
    "exponential_": lambda h: h + torch.empty(8).exponential_(),
    "bernoulli_": lambda h: h * torch.empty(8).bernoulli_(0.5),
    "log_normal_": lambda h: h + torch.empty(8).log_normal_(),
    "cauchy_": lambda h: h + torch.empty(8).cauchy_(),
    "geometric_": lambda h: h + torch.empty(8).geometric_(0.5),
    "several": lambda h: h * torch.rand_like(h) + torch.randn(8) - F.dropout(h, 0.2) * torch.randn_like(h[:1]),
}


@functools.cache
def net(engine: str) -> NNsight:
    torch.manual_seed(0)
    model = NNsight(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).requires_grad_(False))
    if engine != "hooks":
        model.compile(backend=engine)
    return model


X = torch.arange(24.0).reshape(3, 8).sin()


def drawn(model: NNsight, draw: Any) -> torch.Tensor:
    torch.manual_seed(3)
    with model.trace(X):
        model[0].output = draw(model[0].output)
        out = model.output.save()
    return torch.stack([out, model(X) + torch.rand(1)])  # what is drawn behind the trace is the same, too


@pytest.mark.parametrize("engine", ENGINES)
def test_draws_in_a_trace(engine: str) -> None:
    for name, draw in DRAWS.items():
        got, want = drawn(net(engine), draw), drawn(net("hooks"), draw)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


UNUSED = {
    "another of its kind": lambda h: (torch.randn_like(h), h + torch.randn_like(h))[1],
    "a module's": lambda h: (Noise(0.5)(h), Noise(0.5)(h))[1],
    "names no value": lambda h: (torch.rand(3), h + torch.rand(8))[1],
    "behind the used one": lambda h: (h + torch.rand_like(h), torch.randn(4))[0],
    "dropout": lambda h: (F.dropout(h, 0.5), F.dropout(h, 0.5))[1],
    "computed with": lambda h: ((torch.randn_like(h) * 2).exp().sum(), h + torch.randn_like(h))[1],
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_draw_that_nobody_uses_moves_the_generator(engine: str) -> None:
    """Compilers take it for dead code; without it every later draw would be another."""
    for name, draw in UNUSED.items():
        got, want = drawn(net(engine), draw), drawn(net("hooks"), draw)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_unused_draw_where_values_are_differentiable(engine: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model, hooks = NNsight(module), NNsight(module)
    if engine != "hooks":
        model.compile(backend=engine)
    for draw in UNUSED.values():
        torch.testing.assert_close(drawn(model, draw), drawn(hooks, draw), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", QUICK)
def test_draws_in_a_sweep_whatever_its_chunks(engine: str) -> None:
    def swept(model: NNsight, name: str, chunk: int) -> torch.Tensor:
        def body(tracer: Any, scale: float) -> torch.Tensor:
            model[0].output = DRAWS[name](model[0].output) * scale
            return model.output

        found = model.sweep(body, X, over={"scale": [0.5, 1.0, 2.0, 3.0, 4.0]}, seed=1, chunk=chunk, progress=False)
        return torch.as_tensor(found.array.values)

    for name in ("randn_like", "several"):
        want = swept(net("hooks"), name, 5)
        for chunk in (2, 5):
            torch.testing.assert_close(swept(net(engine), name, chunk), want, rtol=1e-5, atol=1e-5)


@functools.cache
def gpt2(engine: str) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    model = LanguageModel(
        GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)).eval().requires_grad_(False)
    )
    if engine != "hooks":
        model.compile(backend=engine)
    return model


@pytest.mark.parametrize("engine", ENGINES)
def test_draws_in_a_generation(engine: str) -> None:
    def generated(model: LanguageModel) -> tuple[torch.Tensor, list]:
        torch.manual_seed(5)
        options = {"max_new_tokens": 4, "do_sample": True, "eos_token_id": None, "pad_token_id": 0}
        with model.generate(torch.tensor([[3, 4, 5]]), **options) as tracer:
            seen = nnsight_fx.save([])
            for _ in tracer.iter[:]:
                h = model.transformer.h[0].output
                h[:, -1] += torch.randn(16)
                seen.append(h[:, -1].clone())
            ids = tracer.result.save()
        return ids, seen

    (got, steps), (want, others) = generated(gpt2(engine)), generated(gpt2("hooks"))
    assert torch.equal(got, want) and len(steps) == 4
    torch.testing.assert_close(steps, others, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_models_own_dropout(engine: str) -> None:
    def run(backend: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = NNsight(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.1)).train())
        if backend != "hooks":
            model.compile(backend=backend)
        with model.trace(X):
            model[0].output += torch.randn(8)
            out = model.output.save()
        return out.detach()

    torch.testing.assert_close(run(engine), run("hooks"), rtol=1e-5, atol=1e-5)
