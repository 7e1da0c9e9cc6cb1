"""The adversarial table: where splicing and hooking could differ, and must not.

Each row runs the same program on the hook engine and on captured graphs. `fused` rows also go through Inductor.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import nnsight_fx
from cache_name import CACHE
from nnsight_fx import NNsight, assert_max_compiles, assert_no_fallback

SPLICED = ["eager", "aot_eager"]
SLOW_AOT = pytest.param("aot_eager", marks=pytest.mark.slow)  # `make test-slow`
INDUCTOR = pytest.param("inductor", marks=pytest.mark.inductor)
LATER = pytest.param(
    "inductor", marks=[pytest.mark.inductor, pytest.mark.slow]
)  # `make test` has 15 Inductor programs at most
FUSED = [*SPLICED, INDUCTOR]
FUSED_LATER = [*SPLICED, LATER]
ALL = ["hooks", *SPLICED]


def llama(layers: int = 3, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False).to(dtype)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=100, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def ids(rows: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def wrap(module: nn.Module, engine: str, **options) -> NNsight:
    """The model on one engine; a row whose model breaks the graph says `fullgraph=False`."""
    model = NNsight(module)
    if engine != "hooks":
        model.compile(backend=engine, **{"fullgraph": True, **options})
    return model


def same(got, want, engine: str) -> None:
    """Bit-equal where the graph runs as it is, to rounding where a compiler fuses it."""
    exact = engine in ("hooks", "eager")
    torch.testing.assert_close(got, want, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)


def cache_of(cache: DynamicCache) -> list:
    return [(layer.keys, layer.values) for layer in cache.layers if layer.get_seq_length()]


# 1, 2: stop and skip with the user's own cache


@pytest.mark.parametrize("engine", FUSED)
def test_stop_leaves_the_cache_as_eager_does(engine):
    def run(model, cache):
        with assert_no_fallback(), torch.no_grad(), model.trace(ids(), **{CACHE: cache}) as tracer:
            h = model.model.layers[1].output.save()
            tracer.stop()
        return h

    module = llama()
    want, got = DynamicCache(config=module.config), DynamicCache(config=module.config)
    h = run(wrap(module, "hooks"), want)
    same(run(wrap(module, engine), got), h, engine)
    same(cache_of(got), cache_of(want), engine)
    assert len(cache_of(got)) == 2


@pytest.mark.parametrize("engine", FUSED_LATER)
def test_skip_leaves_the_cache_as_eager_does(engine):
    def run(model, cache):
        with assert_no_fallback(), torch.no_grad(), model.trace(ids(), **{CACHE: cache}, use_cache=True):
            layer = model.model.layers[1]
            layer.skip(layer.input * 2)
            after = layer.output.save()
            logits = model.lm_head.output.save()
        return after, logits

    module = llama()
    want, got = DynamicCache(config=module.config), DynamicCache(config=module.config)
    reference = run(wrap(module, "hooks"), want)
    same(run(wrap(module, engine), got), reference, engine)
    same(cache_of(got), cache_of(want), engine)
    assert got.layers[1].get_seq_length() == 0


# 3: dtypes


@pytest.mark.parametrize("engine", FUSED_LATER)
def test_an_fp32_vector_into_a_bf16_model(engine):
    def run(model):
        with assert_no_fallback(), torch.no_grad(), model.trace(ids()):
            layer = model.model.layers[0]
            layer.output = layer.output + torch.ones(32)  # fp32: promotes
            logits = model.lm_head.output.save()
        return logits

    module = llama(dtype=torch.bfloat16)
    outcomes = []
    for name in ("hooks", engine):
        try:
            outcomes.append(run(wrap(module, name)).dtype)
        except Exception as e:
            outcomes.append(type(e))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("engine", SPLICED)
def test_a_write_that_changes_the_dtype_for_the_whole_rest(engine):
    class Promotes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Identity()

        def forward(self, x):
            h = self.a(x)
            scale = 2 if h.dtype is torch.float64 else 1  # Python that depends on the write
            return self.b(h * scale)

    def run(model):
        with assert_no_fallback(), model.trace(torch.ones(2, 3)):
            model.a.output = model.a.output.double()
            b = model.b.output.save()
        return b

    want = run(wrap(Promotes(), "hooks"))
    assert want.dtype is torch.float64 and (want == 2).all()
    same(run(wrap(Promotes(), engine)), want, engine)


# 4: one plan at many shapes and positions


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("engine", [SLOW_AOT, INDUCTOR])
def test_one_plan_many_shapes_and_positions(engine, dynamic):
    module = gpt2()
    hooks, compiled = wrap(module, "hooks"), wrap(module, engine, dynamic=dynamic)

    def run(model, x, position):
        with assert_no_fallback(), torch.no_grad(), model.trace(x, use_cache=False):
            model.transformer.h[0].output[:, position] += 3.0
            logits = model.lm_head.output.save()
        return logits

    seen = []
    with assert_max_compiles(2):
        for rows, length in ((2, 7), (3, 9), (4, 12)):
            for position in (0, 1, 5, -1):
                want = run(hooks, ids(rows, length), position)
                same(run(compiled, ids(rows, length), position), want, engine)
                seen.append(want)
    assert all(not torch.equal(a, b) for a in seen for b in seen if a is not b and a.shape == b.shape)


# 5, 6: what is saved


@pytest.mark.parametrize("engine", [*ALL, INDUCTOR])
def test_saving_an_input_leaves_the_callers_tensor_alone(engine):
    x = torch.randn(2, 4)
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), engine)
    with model.trace(x):
        kept = model[0].input.save()
    assert type(x) is torch.Tensor and type(kept) is torch.Tensor and kept is not x
    assert torch.equal(kept, x) and kept.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("engine", FUSED)
def test_saves_in_grad_mode_with_trainable_parameters(engine):
    def run(engine):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        model = wrap(module, engine)
        with assert_no_fallback(), model.trace(torch.ones(3, 4)):
            h = model[1].output.save()
            model[1].output = h * 3
            out = model.output.save()
        assert h.requires_grad and out.grad_fn is not None
        (out.sum() + h.sum()).backward()
        return h.detach(), out.detach(), [p.grad for p in module.parameters()]

    same(run(engine), run("hooks"), engine)


# 7: custom autograd functions


class STE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bandwidth):
        ctx.save_for_backward(x)
        return (x > bandwidth).to(x.dtype) * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 0.5 + x, None


class SAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, h):
        return self.down(STE.apply(self.up(h), 0.1))


@pytest.mark.parametrize("engine", FUSED_LATER)
def test_an_sae_with_a_custom_autograd_function(engine):
    def run(engine):
        torch.manual_seed(0)
        module, sae = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).requires_grad_(False), SAE()
        model = wrap(module, engine)
        with assert_no_fallback(), model.trace(torch.ones(3, 4)):
            model[0].output = sae(model[0].output)
            out = model.output.save()
        out.sum().backward()
        return [p.grad for p in sae.parameters()]

    want = run("hooks")
    same(run(engine), want, engine)
    sae = SAE()
    torch.manual_seed(0)
    module, sae = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).requires_grad_(False), SAE()
    module[1](sae(module[0](torch.ones(3, 4)))).sum().backward()
    same([p.grad for p in sae.parameters()], want, "hooks")


# 8: modes around a sync point


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", "?"))
        return func(*args, **(kwargs or {}))


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "function_mode": Seen,
}


@pytest.mark.parametrize("leave", ["normally", "exception", "break"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ALL)
def test_modes_around_a_sync_point(engine, mode, leave):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model, x = wrap(module, engine), torch.ones(2, 4)
    before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    for _ in range(1):
        try:
            with model.trace(x):
                with MODES[mode]() as entered:
                    total = model[0].output.sum().item()
                    if leave == "exception":
                        raise KeyError("mine")
                    if leave == "break":
                        break
                if mode == "function_mode":
                    assert "linear" not in entered.names  # the model's own operations are not the body's
                out = model.output.save()
        except KeyError:
            assert leave == "exception"
    assert (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
    ) == before
    assert total == module[0](x).sum().item() or engine == "aot_eager"
    if leave == "normally":
        same(out, module(x), engine)
        assert out.requires_grad and out.dtype is torch.float32
    with model.trace(x):  # nothing stayed behind
        again = model.output.save()
    same(again, module(x), engine)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


# 9: a block that the user compiled


@pytest.mark.parametrize("engine", ["hooks", *SPLICED, LATER])
def test_an_intervention_into_a_block_that_the_user_compiled(engine):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    x = torch.randn(2, 4)
    clean = module(x)
    module[1].compile(backend="aot_eager")
    module(x)
    model = wrap(module, engine)
    with model.trace(x):
        model[1].output[:] = 0
        out = model.output.save()
    assert (out == 0).all()
    same(module(x), clean, "aot_eager")
    with model.trace(x):
        again = model.output.save()
    same(again, clean, "aot_eager")


# 10: containers and caches keep their identity


class Appends(nn.Module):
    def forward(self, x, acc):
        acc.append(x * 2)
        return x + 1


class Accumulates(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Appends(), Appends()

    def forward(self, x):
        acc = []
        return self.b(self.a(x, acc), acc), len(acc), acc[1]


@pytest.mark.parametrize("engine", ["hooks", *FUSED_LATER])
def test_a_module_that_appends_to_a_list_argument(engine):
    model = wrap(Accumulates(), engine)
    with assert_no_fallback(), model.trace(torch.ones(2)) as tracer:
        model.a.output = model.a.output * 10
        result = nnsight_fx.save(tracer.result)
    assert result[1] == 2
    same(result[2], torch.full((2,), 40.0), engine)


@pytest.mark.parametrize("engine", ["hooks", *FUSED_LATER])
def test_a_cache_that_is_registered_as_a_pytree(engine):
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()
    module = llama()
    want = DynamicCache(config=module.config)
    with torch.no_grad():
        module(ids(), **{CACHE: want})
    got = DynamicCache(config=module.config)
    model = wrap(module, engine)
    with assert_no_fallback(), torch.no_grad(), model.trace(ids(), **{CACHE: got}):
        model.model.layers[1].output.save()
    same(cache_of(got), cache_of(want), engine)


# 11: transformers' own collecting hooks


@pytest.mark.parametrize("engine", ["hooks", "eager", SLOW_AOT, LATER])
def test_an_edit_shows_in_output_hidden_states_every_time(engine):
    model = wrap(llama(), engine)
    for _ in range(2):
        for replace in (False, True):
            with (
                assert_no_fallback(),
                torch.no_grad(),
                model.trace(ids(), output_hidden_states=True) as tracer,
            ):
                if replace:
                    model.model.layers[1].output = torch.zeros(2, 7, 32)
                else:
                    model.model.layers[1].output[:] = 0
                hidden = nnsight_fx.save(tracer.result.hidden_states)
            assert (hidden[2] == 0).all() and (hidden[1] != 0).any()


# 12: many models


@pytest.mark.parametrize("engine", ["eager", SLOW_AOT])
def test_fourteen_models_in_one_process(engine):
    for n in range(14):
        module = nn.Sequential(*[nn.Linear(4, 4) for _ in range(n + 1)]).requires_grad_(False)
        model = wrap(module, engine)
        with assert_no_fallback(), model.trace(torch.ones(2, 4)):
            out = model[n].output.save()
        same(out, module(torch.ones(2, 4)), engine)
        assert model._host.compiled.captures == 1


# 13: side effects of a tail that no result needs


@pytest.mark.parametrize("engine", ["hooks", *FUSED_LATER])
def test_batchnorm_statistics_after_a_tail_that_no_result_needs(engine):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)).train()

    plain, module = build(), build()
    plain(torch.ones(3, 4).cumsum(0))
    model = wrap(module, engine)
    with assert_no_fallback(), model.trace(torch.ones(3, 4).cumsum(0)):
        model[0].output.save()
    same([module[i].running_mean for i in (1, 3)], [plain[i].running_mean for i in (1, 3)], engine)
    assert module[3].num_batches_tracked == 1
    with model.trace(torch.ones(3, 4).cumsum(0)) as tracer:
        model[0].output.save()
        tracer.stop()
    assert module[3].num_batches_tracked == 1


# 14: views


@pytest.mark.parametrize("engine", FUSED_LATER)
def test_a_row_changed_through_a_view(engine):
    module = gpt2()
    hooks, model = wrap(module, "hooks"), wrap(module, engine)

    def run(model, p):
        with assert_no_fallback(), torch.no_grad(), model.trace(ids(), use_cache=False):
            h = model.transformer.h[0].output
            row = h[:, p]
            row += torch.ones(32) * 2
            kept = h.save()
            logits = model.lm_head.output.save()
        return kept, logits

    with assert_max_compiles(1):
        for p in (0, 1, 3, 6, -1):
            same(run(model, p), run(hooks, p), engine)


# 15: an `if` of the model that the intervention flips


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x):
        h = self.a(x)
        h = h * 2 if h.sum().item() > 0 else h * -3
        return self.c(self.b(h))


@pytest.mark.parametrize("engine", ["hooks", *SPLICED, LATER])
def test_an_if_in_the_model_that_the_intervention_flips(engine):
    model = wrap(Branches(), engine, fullgraph=False)
    for _ in range(2):
        for sign, want in ((1.0, 2.0), (-1.0, 3.0)):
            with assert_no_fallback(), model.trace(torch.ones(2, 2)):
                model.a.output = model.a.output * sign
                b = model.b.output
                model.c.output = b + b
                out, b = model.output.save(), b.save()
            assert (b == want).all() and (out == 2 * want).all()


# 16: two invokes of different lengths


@dataclasses.dataclass
class Tokens:
    """What a tokenizer gives, for a model wrapped without one."""

    first: torch.Tensor
    second: torch.Tensor


@pytest.mark.parametrize("engine", ["hooks", "eager", SLOW_AOT])
def test_two_invokes_of_different_lengths_with_shapes_and_a_sync(engine):
    module = gpt2()
    tokens = Tokens(ids(1, 5, 1), ids(1, 9, 2))

    def model_for(engine):
        model = nnsight_fx.LanguageModel(module)
        if engine != "hooks":
            model.compile(backend=engine)
        return model

    def run(model, sync):
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(tokens.first):
                h = model.transformer.h[0].output
                h[:, -1] += torch.zeros(h.shape)[:, -1] + 1
                if sync and h[:, -1].sum() > -1e9:
                    h[:, -1] *= 2
                first = model.lm_head.output[:, -1].save()
            with tracer.invoke(tokens.second):
                second = model.lm_head.output[:, -1].save()
        return first, second

    def alone(sync):
        model = nnsight_fx.LanguageModel(module)
        with torch.no_grad(), model.trace(tokens.first):
            h = model.transformer.h[0].output
            h[:, -1] += 1
            if sync:
                h[:, -1] *= 2
            first = model.lm_head.output[:, -1].save()
        with torch.no_grad(), model.trace(tokens.second):
            second = model.lm_head.output[:, -1].save()
        return first, second

    for sync in (False, True):
        got, want = run(model_for(engine), sync), alone(sync)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
