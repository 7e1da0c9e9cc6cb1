"""Occurrences in one forward: a module that is called several times."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

import nnsight_fx
from nnsight_fx import MissedSiteError, NNsight, assert_no_fallback

ENGINES = ["hooks", "eager", pytest.param("aot_eager", marks=pytest.mark.slow)]  # `make test-slow`


class Twice(nn.Module):
    """`l` runs twice, `once` in between, `head` at the end."""

    def __init__(self):
        super().__init__()
        self.l, self.once, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.l(self.once(self.l(x).relu())))


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


def wrapped(engine: str) -> NNsight:
    torch.manual_seed(0)
    model = NNsight(Twice().requires_grad_(False))
    if engine != "hooks":
        model.compile(backend=engine, fullgraph=True)
    return model


def hooked(module: nn.Module, at: nn.Module, chosen: set[int], add: float) -> torch.Tensor:
    """The reference: a forward hook that counts its calls."""
    calls = []

    def hook(m, args, out):
        calls.append(1)
        return out + add if len(calls) - 1 in chosen else None

    handle = at.register_forward_hook(hook)
    out = module(X)
    handle.remove()
    return out


def same(got, want, engine):
    exact = engine in ("hooks", "eager")
    torch.testing.assert_close(got, want, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


CHOICES = [(0, {0}), (1, {1}), ([1], {1}), (slice(None), {0, 1}), (slice(1, None), {1}), (slice(0, 5), {0, 1})]


@pytest.mark.parametrize("which, calls", CHOICES, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_loop_over_the_calls_of_one_module(engine, which, calls):
    model = wrapped(engine)
    want = hooked(model._module, model._module.l, calls, 5.0)
    for _ in range(2):
        with assert_no_fallback(), model.trace(X) as tracer:
            steps = []
            for step in tracer.iter[which]:
                steps.append(step)
                model.l.output += 5.0
            out = model.head.output.save()  # behind the loop
        same(out, want, engine)
        assert set(steps) == calls


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plain_write_is_for_call_0(engine):
    model = wrapped(engine)
    with model.trace(X):
        model.l.output += 5.0
        out = model.head.output.save()
    same(out, hooked(model._module, model._module.l, {0}, 5.0), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_next_moves_on(engine):
    model = wrapped(engine)
    want = hooked(model._module, model._module.l, {1}, 5.0)
    with model.trace(X):
        model.l.next().output += 5.0
        once = model.once.output.save()  # its own count did not move
        out = model.head.output.save()
    same(out, want, engine)
    assert once.shape == (2, 4)
    with model.trace(X) as tracer:
        first = model.l.output.save()
        tracer.next()
        model.l.output += 5.0
        out = model.head.output.save()  # called once: the rest follows the model
    same(out, want, engine)
    same(first, model._module.l(X), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_rest_of_a_body_stays_with_its_first_site(engine):
    model = wrapped(engine)
    with model.trace(X) as tracer, tracer.iter[1]:
        inner = model.l.input.save()
        outer = model.l.output.save()
        head = model.head.input.save()
    module = model._module
    same(inner, module.once(module.l(X).relu()), engine)
    same(outer, module.l(inner), engine)
    same(head, outer, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_skipping_one_call(engine):
    model = wrapped(engine)
    with model.trace(X) as tracer:
        with tracer.iter[1]:
            model.l.skip(model.l.input * 2)
        out = model.head.output.save()
    module = model._module
    same(out, module.head(module.once(module.l(X).relu()) * 2), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_occurrence_that_never_comes(engine):
    model = wrapped(engine)
    with model.trace(X) as tracer:
        kept = nnsight_fx.save([])
        out = model.head.output.save()
        for step in tracer.iter[2:]:
            kept.append(step)
        with tracer.iter[2]:
            kept.append(torch.ones(1))
            kept.append(model.once.output)
        behind = model.l.output.save()
    same(out, model._module(X), engine)
    same(behind, model._module.l(X), engine)
    assert len(kept) == 1 and kept[0].shape == (1,)
    with pytest.raises(MissedSiteError, match=r"occurrence 2 of `l.output` never came: there were 2"), model.trace(X):
        first = model.l.output.save()
        model.l.next(2).output.save()
    same(first, model._module.l(X), engine)


def test_counting_is_from_0():
    model = wrapped("hooks")
    with pytest.raises(ValueError, match="counts from 0"), model.trace(X) as tracer:
        tracer.iter[-1]


@pytest.mark.parametrize("engine", ENGINES)
def test_each_invoke_counts_for_itself(engine):
    model = wrapped(engine)
    with assert_no_fallback(), model.trace() as tracer:
        with tracer.invoke(X[:1]):
            for _ in tracer.iter[:]:
                model.l.output += 5.0
            a = model.head.output.save()
        with tracer.invoke(X[1:]):
            for _ in tracer.iter[1]:
                model.l.output += 5.0
            b = model.head.output.save()
    module = model._module
    torch.testing.assert_close(a, hooked(module, module.l, {0, 1}, 5.0)[:1])
    torch.testing.assert_close(b, hooked(module, module.l, {1}, 5.0)[1:])
