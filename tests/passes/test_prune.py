"""`prune`: what nobody reads is not computed."""

import pytest
import torch
import torch.nn as nn
from transformers import LlamaConfig, LlamaForCausalLM

import nnsight_fx
from nnsight_fx import NNsight, assert_max_compiles, assert_no_fallback, passes
from nnsight_fx.passes.job import CutSite

from .graphs import graph, targets
from .test_lift_constants import job_for

X, W = torch.linspace(-1, 1, 12).reshape(3, 4), torch.linspace(0, 1, 16).reshape(4, 4)


def by_hand(function, given=1, **options):
    """A graph that gives its first value as its own, and `given` more to the plan."""
    gm, job = graph(function), job_for(unread=True, **options)
    job.own = len(gm.graph.output_node().args[0]) - given
    return gm, job


def run(gm):
    gm.graph.lint()
    gm.recompile()
    return gm(X.clone(), W)


def test_fires():
    gm, job = by_hand(lambda x, w: (torch.relu(x @ w) @ w, x @ w))
    assert passes.prune(gm, job) == 4 and job.own == 0
    assert len(targets(gm)) == 1 and torch.equal(run(gm)[0], X @ W)


def test_leaves_what_is_shared():
    def function(x, w):
        h = x @ w
        return torch.relu(h), h, torch.tanh(h)

    gm, job = by_hand(function, given=2)
    assert passes.prune(gm, job) == 2
    assert torch.tanh in targets(gm) and torch.relu not in targets(gm)
    assert torch.equal(run(gm)[1], torch.tanh(X @ W))


@pytest.mark.parametrize("case", ["read", "cut"])
def test_does_not_fire(case):
    gm, job = by_hand(lambda x, w: (torch.relu(x), x @ w))
    job.unread = case != "read"
    job.cut = CutSite(("a", "output", 0), 0, []) if case == "cut" else None
    assert passes.prune(gm, job) == 0 and len(run(gm)) == 2


@pytest.mark.parametrize(
    "function, kept",
    [
        (lambda x, w: (torch.relu(x.add_(1) @ w), w + 1), ["add_"]),
        (lambda x, w: (torch.relu(torch.rand_like(x) @ w), w + 1), [torch.rand_like]),
        (lambda x, w: (torch.nn.functional.dropout(torch.relu(x), 0.5), w + 1), [torch.relu, nn.functional.dropout]),
    ],
)
def test_side_effects_stay_with_what_they_need(function, kept):
    gm, job = by_hand(function)
    passes.prune(gm, job)
    assert targets(gm)[:-1] == kept and len(run(gm)) == 1


# -- in traces -------------------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """Counts its rows in a buffer, behind its middle layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.register_buffer("rows", torch.zeros(()))

    def forward(self, x):
        h = self.b(torch.relu(self.a(x)))
        self.rows.add_(h.shape[0])
        return self.c(nn.functional.dropout(h, 0.5, self.training))


def pruned(model):
    return dict((name, n) for name, n, _ in model._host.compiled.last[-1])["prune"]


def test_the_tail_of_a_model_is_left_out():
    module = Counted().eval()
    model, hooks = NNsight(module), NNsight(module)
    model.compile(backend="eager")

    def first(model):
        with torch.no_grad(), model.trace(X):
            found = model.a.output.save()
        return found

    with assert_no_fallback():
        assert torch.equal(first(model), first(hooks))
    assert pruned(model) == 5  # what is behind it, but for the count
    assert module.rows == 6  # each counted once
    program = model.program(lambda tracer: model.a.output)
    with torch.no_grad(), assert_max_compiles(0):
        for _ in range(3):
            assert torch.equal(program(X), first(hooks))
    assert module.rows == 6 + 18


def test_random_numbers_are_drawn_as_in_eager():
    module = Counted().train()
    model, hooks = NNsight(module), NNsight(module)
    model.compile(backend="eager")
    after = []
    for each in (model, hooks):
        torch.manual_seed(0)
        with each.trace(X):
            each.a.output.save()
        after.append(torch.rand(3))
    assert torch.equal(*after)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_results_that_are_read_are_computed(backend):
    """By its site, as the result, or in a later plan over the same graph."""
    module = Counted().eval()
    model, hooks = NNsight(module), NNsight(module)
    model.compile(backend=backend)

    def read(model, what):
        with torch.no_grad(), model.trace(X) as tracer:
            found = nnsight_fx.save([model.a.output])
            if what == "output":
                found.append(model.output)
            elif what == "result" or (what == "sync" and model.a.output.sum() < 1e9):
                found.append(tracer.result)
        return found

    for what in ("none", "output", "result", "sync", "none", "result"):
        for got, want in zip(read(model, what), read(hooks, what), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6 if backend == "inductor" else 0)


def test_a_language_model_with_a_cache():
    """Whose layers store keys and values in an object that it returns; generation reads what the model returns."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    module = LlamaForCausalLM(config).eval()
    model, hooks = nnsight_fx.LanguageModel(module), nnsight_fx.LanguageModel(module)
    model.compile(backend="eager")

    def trace(model, read):
        with torch.no_grad(), model.trace([[5, 7, 11]]) as tracer:
            found = nnsight_fx.save([model.model.layers[1].output[:, -1]])
            if read:
                found += [tracer.result.past_key_values, tracer.result.logits]
        return found

    with assert_no_fallback():
        assert torch.equal(trace(model, False)[0], trace(hooks, False)[0])
    assert pruned(model) > 50
    for got, want in zip(trace(model, True), trace(hooks, True), strict=True):
        if isinstance(got, torch.Tensor):
            assert torch.equal(got, want)
        else:
            assert all(torch.equal(a.keys, b.keys) for a, b in zip(got.layers, want.layers, strict=True))

    def generate(model):
        with torch.no_grad(), model.generate([[5, 7, 11]], max_new_tokens=3, do_sample=False) as tracer:
            model.model.layers[0].output[:] += 1
            made = tracer.result.save()
        return made

    assert torch.equal(generate(model), generate(hooks))
