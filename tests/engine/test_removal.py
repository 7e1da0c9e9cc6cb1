"""Skips and stops in the graph that all plans share: no capture of their own where the model's Python has no effects."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from cache_name import CACHE
from nnsight_fx import NNsight, assert_no_fallback
from nnsight_fx.errors import PlanMismatchError, SkipError
from nnsight_fx.plan import tree

ENGINES = ["eager", "aot_eager"]
X = torch.linspace(-1, 1, 12).reshape(3, 4)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).requires_grad_(False)


def capture(model):
    assert model._host.compiled is not None
    return model._host.compiled


def outcome(module, body, *args, engine=None, warm=True, **kwargs) -> tuple[list, int, Any]:
    """What a body saves, and how many captures it took on a model that is captured already."""
    model, found = NNsight(module), []
    if engine is not None:
        model.compile(backend=engine)
        if warm:
            with model.trace(*args, **kwargs):
                model.input.save()
    before = capture(model).captures if engine else 0
    with assert_no_fallback(), model.trace(*args, **kwargs) as tracer:
        body(model, tracer, found)
    return found, (capture(model).captures - before if engine else 0), model


def same(got, want, engine):
    exact = engine == "eager"
    torch.testing.assert_close(
        tree.flatten(got)[0], tree.flatten(want)[0], rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5
    )


def compare(build, body, engine, captures, *args, **kwargs) -> tuple[Any, Any]:
    want, _, reference = outcome(build(), body, *args, **kwargs)
    got, taken, model = outcome(build(), body, *args, engine=engine, **kwargs)
    same(got, want, engine)
    assert taken == captures
    return reference._module, model


# where nothing else happens, a plan shares the capture


def stops(m, tracer, found):
    found.append((m[1].output * 2).save())
    tracer.stop()


def stops_after_a_write(m, tracer, found):
    m[1].output = m[1].output + 1
    found.append(m[2].input.save())
    tracer.stop()


def skips(m, tracer, found):
    m[1].skip(m[1].input * 2)
    found.extend([m[1].output.save(), m[3].output.save(), tracer.result.save()])


def skips_two_and_writes(m, tracer, found):
    first = m[0].input
    m[0].skip(first + 1)
    m[1].output = m[1].output * 3
    m[2].skip(torch.where(m[2].input > 0, first, 0.0))
    found.append(m[3].output.save())


def skips_and_stops(m, tracer, found):
    m[1].skip(m[0].output)
    found.append(m[2].output.save())
    tracer.stop()


@pytest.mark.parametrize("body", [stops, stops_after_a_write, skips, skips_two_and_writes, skips_and_stops])
@pytest.mark.parametrize("engine", [*ENGINES, pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])])
def test_a_plan_shares_the_capture(engine, body):
    compare(plain, body, engine, 0, X)


def test_what_is_left_out_is_not_computed():
    calls = []

    def backend(gm, inputs):
        calls.append(sum(n.target is nn.functional.linear for n in gm.graph.nodes))
        return gm

    model = NNsight(plain())
    model.compile(backend=backend)
    with model.trace(X):
        model.output.save()
    for body, linears in ((stops, 2), (skips, 3), (skips_and_stops, 2)):
        for _ in range(2):
            found = []
            with model.trace(X) as tracer:
                body(model, tracer, found)
            same(found, outcome(plain(), body, X)[0], "eager")
        assert calls.pop() == linears
    assert capture(model).captures == 1 and calls == [4]  # a second run of a plan compiles nothing


@pytest.mark.parametrize("engine", ENGINES)
def test_the_first_plan_of_a_model_takes_a_capture_of_its_own(engine):
    got, captures, model = outcome(plain(), stops, X, engine=engine, warm=False)
    same(got, outcome(plain(), stops, X)[0], engine)
    with model.trace(X):
        model.output.save()
    found = []
    with model.trace(X) as tracer:
        stops(model, tracer, found)  # it has its own: it stays there
    assert captures == 1 and capture(model).captures == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_other_shapes(engine):
    model, reference = NNsight(plain()), NNsight(plain())
    model.compile(backend=engine)
    with model.trace(X):
        model.output.save()
    for rows in (3, 5, 7, 1):
        for body in (stops, skips):
            got, want = [], []
            with model.trace(torch.ones(rows, 4)) as tracer:
                body(model, tracer, got)
            with reference.trace(torch.ones(rows, 4)) as tracer:
                body(reference, tracer, want)
            same(got, want, engine)
    assert capture(model).captures == 3  # three rows, some rows, one row: as for plans that leave nothing out
    assert not capture(model).unfit


def llama():
    torch.manual_seed(0)
    sizes: Any = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(num_hidden_layers=3, vocab_size=100, **sizes)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


IDS = torch.arange(1, 13).reshape(2, 6)


def stops_at_a_layer(m, tracer, found):
    found.append(m.model.layers[1].output.save())
    tracer.stop()


def skips_a_layer(m, tracer, found):
    m.model.layers[1].skip(m.model.layers[1].input * 0.5)
    found.extend([m.model.layers[2].input.save(), m.lm_head.output.save()])


def skips_an_mlp(m, tracer, found):
    m.model.layers[1].mlp.skip(m.model.layers[1].mlp.input * 0.5)
    found.append(m.lm_head.output.save())


@pytest.mark.parametrize("body", [stops_at_a_layer, skips_a_layer, skips_an_mlp])
def test_a_language_model(body):
    compare(llama, body, "eager", 0, IDS, use_cache=False)


# where something does, it does not


class Batched(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.c = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.c(self.bn(self.a(x)))


def batched():
    torch.manual_seed(0)
    return Batched().requires_grad_(False).train()


@pytest.mark.parametrize("engine", ENGINES)
def test_statistics_in_the_tail_and_in_the_region(engine):
    def stops_early(m, tracer, found):
        found.append(m.a.output.save())
        tracer.stop()

    def skips_it(m, tracer, found):
        m.bn.skip(m.bn.input * 2)
        found.append(m.c.output.save())

    def stops_late(m, tracer, found):
        found.append(m.bn.output.save())
        tracer.stop()

    for body, captures, moved in ((stops_early, 1, 0), (skips_it, 1, 0), (stops_late, 0, 1)):
        reference, model = compare(batched, body, engine, captures, X)
        assert model._module.bn.num_batches_tracked - reference.bn.num_batches_tracked == 1  # by the warm-up
        assert reference.bn.num_batches_tracked == moved


def test_dropout_in_the_tail():
    def build():
        return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).train().requires_grad_(False)

    def body(m, tracer, found):
        found.append(m[0].output.save())
        tracer.stop()

    model = NNsight(build())
    model.compile(backend="eager")
    with model.trace(X):
        model.output.save()
    before, found = torch.get_rng_state(), []
    with model.trace(X) as tracer:
        body(model, tracer, found)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(found[0], model._module[0](X))
    assert capture(model).captures == 2
    model._module.eval()
    with model.trace(X):
        model.output.save()
    seen = capture(model).captures
    with model.trace(X) as tracer:
        found = [(model[0].output * 1).save()]
        tracer.stop()
    assert capture(model).captures == seen


@pytest.mark.parametrize("body", [stops_at_a_layer, skips_a_layer])
def test_a_cache_of_the_users(body):
    caches = []
    for engine in (None, "eager"):
        module = llama()
        model, cache, found = NNsight(module), DynamicCache(config=module.config), []
        if engine:
            model.compile(backend=engine)
            with model.trace(IDS, **{CACHE: DynamicCache(config=module.config)}):
                model.output.logits.save()
        with assert_no_fallback(), model.trace(IDS, **{CACHE: cache}, use_cache=True) as tracer:
            body(model, tracer, found)
        layers: Any = cache.layers
        caches.append([(layer.keys, layer.values) for layer in layers if layer.get_seq_length()])
        caches.append(found)
    torch.testing.assert_close(caches[2:], caches[:2], rtol=0, atol=0)
    assert len(caches[0]) == 2


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.seen = nn.Linear(4, 4), nn.Linear(4, 4), 0

    def forward(self, x):
        self.seen += 1
        return self.b(self.a(x))


class Appends(nn.Module):
    def forward(self, x, acc):
        acc.append(x)  # its input: nothing in the graph shows it
        return x * 2


class Accumulates(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), Appends(), nn.Linear(4, 4)

    def forward(self, x):
        acc = []
        return self.c(self.b(self.a(x), acc)) + len(acc)


class Keeps(nn.Module):
    """Another module uses what `b` computed inside."""

    class B(nn.Module):
        def forward(self, x):
            self.inner = x * 3
            return self.inner + 1

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), Keeps.B(), nn.Linear(4, 4)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def skips_b(m, tracer, found):
    m.b.skip(m.b.input * 0.5)
    found.append(m.output.save())


@pytest.mark.parametrize("build", [Remembers, Accumulates, Keeps])
@pytest.mark.parametrize("engine", ENGINES)
def test_python_that_would_notice(build, engine):
    def seeded():
        torch.manual_seed(0)
        return build().requires_grad_(False)

    reference, model = compare(seeded, skips_b, engine, 1, X)
    if build is Remembers:
        assert (reference.seen, model._module.seen) == (1, 2)  # one more: the warm-up


@pytest.mark.parametrize("kind", ["hook", "pre hook"])
def test_the_users_hooks_on_a_skipped_module(kind):
    def build():
        module: Any = plain()
        if kind == "hook":
            module[1].register_forward_hook(lambda *call: call[-1] + 1)
        else:
            module[1].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        return module

    compare(build, skips, "eager", 1, X)


def test_a_skip_value_of_another_shape():
    def body(m, tracer, found):
        m[1].skip(torch.cat([m[1].input] * 2))
        found.append(m[3].output.save())

    compare(plain, body, "eager", 1, X)


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        h = self.a(x)
        torch._dynamo.graph_break()
        return self.c(self.b(h))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_graph_break_in_front(engine):
    def seeded():
        torch.manual_seed(0)
        return Breaks().requires_grad_(False)

    want = outcome(seeded(), skips_b, X)[0]
    model = NNsight(seeded())
    model.compile(backend=engine)
    with model.trace(X):
        model.output.save()
    for _ in range(3):
        found = []
        with model.trace(X) as tracer:
            skips_b(model, tracer, found)
        same(found, want, engine)
    assert len(capture(model).unfit) == 1  # tried once


@pytest.mark.parametrize("engine", ENGINES)
def test_invokes_that_all_skip_or_some(engine):
    def run(model, everyone):
        found = []
        with model.trace() as tracer:
            for i in range(2):
                with tracer.invoke(X + i):
                    if everyone or i:
                        model[1].skip(model[1].input * (i + 2))
                    found.append(model[3].output.save())
        return found

    reference, model = NNsight(plain()), NNsight(plain())
    model.compile(backend=engine)
    run_plain = model.trace(torch.cat([X, X]))
    with run_plain:
        model.output.save()
    same(run(model, True), run(reference, True), engine)
    assert capture(model).captures == 1
    for each in (reference, model):
        with pytest.raises(SkipError, match="skipped in 1 of 2 invokes"):
            run(each, False)


def test_an_edit_of_hidden_states_by_a_skip():
    def body(m, tracer, found):
        m.model.layers[1].skip(m.model.layers[1].input * 0.5)
        found.extend(h.save() for h in m.output.hidden_states)

    compare(llama, body, "eager", 0, IDS, use_cache=False, output_hidden_states=True)


def test_what_python_reads_between_no_grad_and_its_end():
    class Quiet(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        @torch.no_grad()
        def forward(self, x):
            return self.b(self.a(x))

    def body(m, tracer, found):
        found.append(m.a.output.save())
        tracer.stop()

    def seeded():
        torch.manual_seed(0)
        return Quiet()

    compare(seeded, body, "eager", 1, X)  # the end of the mode lies in the tail
    assert torch.is_grad_enabled()


# behind a sync point it is too late for a capture half


def skips_late(m, tracer, found):
    if m.a.output.sum() > -1e9:
        m.bn.skip(m.bn.input * 2)
    found.append(m.c.output.save())


def test_a_skip_behind_a_sync_point():
    found, _, model = outcome(batched(), skips_late, X)
    module = model._module
    torch.testing.assert_close(found[0], module.c(module.a(X) * 2))
    assert module.bn.num_batches_tracked == 0 and "forward" not in vars(module.bn)
    with pytest.raises(PlanMismatchError, match=r"test_removal.py:\d+: `bn` is skipped after a sync point has begun"):
        outcome(batched(), skips_late, X, engine="eager")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("at", ["a", "bn"])
def test_a_stop_behind_a_sync_point(engine, at):
    def body(m, tracer, found):
        if m.a.output.sum() > -1e9:
            found.append((m.a if at == "a" else m.bn).output.save())
            tracer.stop()

    reference, model = compare(batched, body, engine, 0, X)
    assert reference.bn.num_batches_tracked == (0 if at == "a" else 1)
    assert model._module.bn.num_batches_tracked - reference.bn.num_batches_tracked == 1  # by the warm-up


def test_a_stop_behind_a_sync_point_that_would_lose_a_cache():
    def body(m, tracer, found):
        if m.model.layers[0].output.sum() > -1e9:
            found.append(m.model.layers[1].output.save())
            tracer.stop()

    module = llama()
    with pytest.raises(PlanMismatchError, match=r"test_removal.py:\d+: the model is stopped after a sync point"):
        outcome(module, body, IDS, engine="eager", warm=False, **{CACHE: DynamicCache(config=module.config)})


def test_a_skip_beside_a_backward_that_hooks_must_run():
    """Hooks make both, though the skip alone could have been tried in the shared graph."""
    outcomes = []
    for engine in ("hooks", "eager"):
        torch.manual_seed(0)
        module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        module[2].weight.register_hook(lambda grad: grad * 2)
        model = NNsight(module)
        if engine != "hooks":
            model.compile(backend=engine)
        with model.trace(torch.ones(2, 4)):
            model[0].output.save()
        with model.trace(torch.ones(2, 4)) as tracer:
            model[1].skip(model[0].output * 3)
            y = model.output.save()
            y.sum().backward()
        assert tracer.explain().engine == "hooks"
        outcomes.append([y, *(p.grad for p in module.parameters())])
    assert "a parameter has a gradient hook" in str(model.explain()) and module[1].weight.grad is None
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=0, atol=0)
