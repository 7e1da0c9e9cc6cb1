"""Generation, against plain transformers with hand-written forward hooks."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn as nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import nnsight_fx
from nnsight_fx import LanguageModel, MissedSiteError, OutOfOrderError, assert_max_compiles, assert_no_fallback
from nnsight_fx.capture.hook_tables import KEY
from nnsight_fx.engine.captured.watch import watch

pytestmark = pytest.mark.xdist_group("generation")  # one worker: one capture of a model
ENGINES = ["hooks", "eager", pytest.param("aot_eager", marks=pytest.mark.slow)]  # `make test-slow`
STEPS = 5


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=100, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


MODELS = {"llama": llama, "gpt2": gpt2}


@functools.cache
def shared(family: str) -> nn.Module:
    """One module for all tests that leave it as it is: what is captured for one of them is there for the next."""
    return MODELS[family]()


def blocks(module: nn.Module) -> nn.ModuleList:
    return module.model.layers if hasattr(module, "model") else module.transformer.h


def ids(rows: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def options(**more):
    return {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}


@functools.cache
def wrap(module: nn.Module, engine: str) -> LanguageModel:
    model = LanguageModel(module)
    if engine != "hooks":
        model.compile(backend=engine)
    return model


def plain(module: nn.Module, x: torch.Tensor, **kwargs):
    return module.generate(x, attention_mask=torch.ones_like(x), **options(**kwargs))


VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(3)) * 3


class Hooks:
    """The reference: hooks that know which forward they are in."""

    def __init__(self, module: nn.Module):
        self.module, self.step, self.handles = module, -1, []
        self.handles.append(module.register_forward_pre_hook(self._begins))

    def _begins(self, *_):
        self.step += 1

    def steer(self, at: nn.Module, steps: set[int]):
        def hook(m, args, out):
            if self.step not in steps:
                return None
            return out + VECTOR if isinstance(out, torch.Tensor) else (out[0] + VECTOR, *out[1:])

        self.handles.append(at.register_forward_hook(hook))
        return self

    def keep(self, at: nn.Module) -> list:
        kept = []
        self.handles.append(at.register_forward_hook(lambda m, args, out: kept.append(out)))
        return kept

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def steer(block) -> None:
    out = block.output
    if isinstance(out, torch.Tensor):
        block.output = out + VECTOR
    else:
        block.output = (out[0] + VECTOR, *out[1:])


def same(got, want, engine):
    exact = engine in ("hooks", "eager")
    torch.testing.assert_close(got, want, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)


# loops


@pytest.mark.parametrize("which", [slice(None), slice(1, 3), 2, [0, 3], slice(3, 99)], ids=str)
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("engine", ENGINES)
def test_interventions_on_chosen_steps(engine, family, which):
    module = shared(family)
    steps = [which] if isinstance(which, int) else which if isinstance(which, list) else range(STEPS)[which]
    with Hooks(module).steer(blocks(module)[1], set(steps)) as hooks:
        logits = hooks.keep(module.lm_head)
        want = plain(module, ids())
    model = wrap(module, engine)
    for _ in range(2):
        with assert_no_fallback(), model.generate(ids(), **options()) as tracer:
            kept, seen = nnsight_fx.save([]), []
            for step in tracer.iter[which]:
                seen.append(step)
                steer(blocks(model)[1])
                kept.append(model.lm_head.output)
            got = tracer.result.save()
        assert torch.equal(got, want)
        assert seen == list(steps)
        assert type(got) is torch.Tensor and all(type(x) is torch.Tensor for x in kept)
        same(kept, [logits[i] for i in steps], engine)
    assert not torch.equal(want, plain(module, ids()))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("engine", ENGINES)
def test_captures_do_not_grow_with_the_steps(engine, family, static):
    module = MODELS[family]()
    more = {"max_new_tokens": 9} | ({"cache_implementation": "static"} if static else {})
    with Hooks(module).steer(blocks(module)[0], set(range(9))):
        want = plain(module, ids(), **more)
    model = wrap(module, engine)
    with assert_no_fallback(), assert_max_compiles(2):
        for _ in range(2):
            with model.generate(ids(), **options(**more)) as tracer:
                for _ in tracer.all():
                    steer(blocks(model)[0])
                got = tracer.result.save()
            assert torch.equal(got, want)
    if engine != "hooks":
        facts = model.explain().to_dict()["captures"][0]
        assert facts["captures"] == 2
        assert facts["compiles"] + facts["hits"] == 18


@pytest.mark.parametrize("static", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_captures_do_not_grow_with_chosen_steps_and_batches(family, static):
    """Dynamo sees a second batch size and makes it a symbol, for the prompt and for a step: two captures more, the last."""
    module = MODELS[family]()
    more = {"max_new_tokens": 9} | ({"cache_implementation": "static"} if static else {})
    model, expected = wrap(module, "eager"), {2: 2, 3: 4, 5: 4}
    for rows, captures in expected.items():
        for which in ([0, 3], 2, slice(1, None, 2), slice(None)):
            steps = [which] if isinstance(which, int) else which if isinstance(which, list) else range(9)[which]
            with Hooks(module).steer(blocks(module)[0], set(steps)):
                want = plain(module, ids(rows), **more)
            with assert_no_fallback(), model.generate(ids(rows), **options(**more)) as tracer:
                for _ in tracer.iter[which]:
                    steer(blocks(model)[0])
                got = tracer.result.save()
            assert torch.equal(got, want)
            assert model.explain().to_dict()["captures"][0]["captures"] == captures


@pytest.mark.parametrize("engine", ENGINES)
def test_a_body_without_a_loop_is_for_the_prompts_forward(engine):
    module = shared("llama")
    with Hooks(module).steer(module.model.layers[0], {0}):
        want = plain(module, ids())
    assert not torch.equal(want, plain(module, ids()))  # the write is in the cached keys and values of later steps
    model = wrap(module, engine)
    with assert_no_fallback(), model.generate(ids(), **options()):
        steer(model.model.layers[0])
        got = model.generator.output.save()
    assert torch.equal(got, want)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_touched_is_plain_generate(engine):
    module = shared("gpt2")
    model = wrap(module, engine)
    with assert_no_fallback(), model.generate(ids(), **options()) as tracer:
        got = tracer.result.save()
    assert torch.equal(got, plain(module, ids()))
    assert torch.equal(model.generate(ids(), trace=False, **options()), got)
    with model.trace(ids(), fn="generate", **options()):
        again = model.generator.output.save()
    assert torch.equal(again, got)
    assert "_compiled_call_impl" not in vars(module)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("engine", ENGINES)
def test_values_flow_to_later_steps(engine):
    """Step k gets what step k - 1 had: a running mean, say."""
    module = shared("llama")
    kept = []

    def hook(m, args, out):
        kept.append(out[:, -1:])
        return out if len(kept) == 1 else out + kept[-2] * 0.5

    handle = module.model.layers[0].register_forward_hook(hook)
    want = plain(module, ids())
    handle.remove()
    assert not torch.equal(want, plain(module, ids()))
    model = wrap(module, engine)
    with assert_no_fallback(), assert_max_compiles(6), model.generate(ids(), **options()) as tracer:
        before, seen = None, []
        for _ in tracer.iter[:]:
            out = model.model.layers[0].output
            if before is not None:
                model.model.layers[0].output = out + before * 0.5
            before = out[:, -1:]
            seen.append(before)
        stacked = torch.cat(seen, 1).save()  # behind the loop, on values of all steps
        got = tracer.result.save()
    assert torch.equal(got, want)
    same(stacked, torch.cat(kept, 1), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_next(engine):
    module = shared("gpt2")
    with Hooks(module) as hooks:
        logits = hooks.keep(module.lm_head)
        plain(module, ids())
    model = wrap(module, engine)
    with assert_no_fallback(), model.generate(ids(), **options()) as tracer:
        first = model.lm_head.output.save()
        second = model.lm_head.next().output.save()
        tracer.next()
        third = model.lm_head.output.save()
        tracer.next(2)
        fifth = model.lm_head.output.save()
    same([first, second, third, fifth], [logits[i] for i in (0, 1, 2, 4)], engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_python_that_looks_at_values(engine):
    """Sync points in a step; what the body does next depends on the numbers."""
    module = shared("llama")
    with Hooks(module) as hooks:
        logits = hooks.keep(module.lm_head)
        plain(module, ids(1))
    model = wrap(module, engine)
    seen, norms = [], []
    with model.generate(ids(1), **options()) as tracer:
        for _ in tracer.iter[:]:
            norms.append(model.model.layers[0].output.norm().item())
            seen.append(int(model.lm_head.output[:, -1].argmax(-1)))
        got = tracer.result.save()
    assert seen == [int(x[:, -1].argmax(-1)) for x in logits] == got[0, 7:].tolist()
    assert len(norms) == STEPS


# ends


@pytest.mark.parametrize("engine", ENGINES)
def test_an_end_by_eos(engine):
    module = shared("llama")
    full = plain(module, ids(1))[0, 7:].tolist()
    end = next(i for i, t in enumerate(full) if t not in full[:i] and i > 0)
    eos = full[end]
    want = plain(module, ids(1), eos_token_id=eos)
    assert want.shape[1] == 7 + end + 1 < 7 + STEPS
    model = wrap(module, engine)
    for which in (slice(None), slice(0, STEPS)):
        with assert_no_fallback(), model.generate(ids(1), **options(eos_token_id=eos)) as tracer:
            kept, seen = nnsight_fx.save([]), nnsight_fx.save([])
            for step in tracer.iter[which]:
                seen.append(step)
                kept.append(model.lm_head.output[:, -1].argmax(-1))
            behind = "ran"
            got = tracer.result.save()
        assert torch.equal(got, want) and behind == "ran"
        assert seen == list(range(end + 1))
        assert torch.equal(torch.cat(kept), want[0, 7:])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_never_comes(engine):
    model = wrap(shared("gpt2"), engine)
    with model.generate(ids(), **options()) as tracer:
        kept = nnsight_fx.save([])
        with tracer.iter[STEPS]:
            kept.append(model.lm_head.output)
        for _ in tracer.iter[STEPS]:
            kept.append(model.lm_head.output)
        got = tracer.result.save()
    assert kept == [] and got.shape == (2, 7 + STEPS)
    with (
        pytest.raises(MissedSiteError, match=r"occurrence 9 of `lm_head.output` never came: there were 5"),
        model.generate(ids(), **options()) as tracer,
    ):
        first = model.lm_head.output.save()
        tracer.next(9)
        model.lm_head.output.save()
    assert type(first) is torch.Tensor
    with pytest.raises(OutOfOrderError, match=r"occurrence 0 of `lm_head.output` was passed"):
        with model.generate(ids(), **options()) as tracer:
            for _ in tracer.iter[1]:
                model.lm_head.output.save()
            model.lm_head.output.save()


@pytest.mark.parametrize("engine", ENGINES)
def test_stop_ends_the_generation(engine):
    module = llama()
    with Hooks(module) as hooks:
        want = hooks.keep(module.model.layers[0])
        plain(module, ids())
    model, forwards = wrap(module, engine), []
    handle = module.model.layers[1].register_forward_hook(lambda *_: forwards.append(1))
    with model.generate(ids(), **options()) as tracer:
        kept = nnsight_fx.save([])
        for step in tracer.iter[:]:
            kept.append(model.model.layers[0].output)
            if step == 1:
                tracer.stop()
    handle.remove()
    same(kept, want[:2], engine)
    assert len(forwards) == 1
    with model.generate(ids(), **options()) as tracer:  # nothing stayed behind
        got = tracer.result.save()
    assert torch.equal(got, plain(module, ids()))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_in_a_body_leaves_nothing(engine):
    module = shared("gpt2")
    model = wrap(module, engine)
    with pytest.raises(KeyError, match="mine"), model.generate(ids(), **options()) as tracer:
        for step in tracer.iter[:]:
            model.lm_head.output.save()
            if step == 2:
                raise KeyError("mine")
    assert torch.is_grad_enabled() and "_compiled_call_impl" not in vars(module)
    assert not any(KEY in m._forward_hooks or KEY in m._forward_pre_hooks for m in module.modules())
    for _ in range(3):  # a loop left by `break`
        with model.generate(ids(), **options()) as tracer:
            for step in tracer.iter[:]:
                last = model.lm_head.output.save()
                if step == 2:
                    break
            got = tracer.result.save()
    assert torch.equal(got, plain(module, ids())) and type(last) is torch.Tensor


# ways to generate


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_sampling_draws_what_transformers_draws(engine):
    module = shared("llama")
    model = wrap(module, engine)
    torch.manual_seed(7)
    want = plain(module, ids(), do_sample=True, top_k=20)
    with assert_no_fallback():
        torch.manual_seed(7)
        with model.generate(ids(), **options(do_sample=True, top_k=20)) as tracer:
            for _ in tracer.iter[:]:
                model.lm_head.output.save()
            got = tracer.result.save()
    assert torch.equal(got, want)
    torch.manual_seed(8)
    assert not torch.equal(plain(module, ids(), do_sample=True, top_k=20), want)


@pytest.mark.parametrize("engine", ENGINES)
def test_beams(engine):
    module = shared("gpt2")
    with Hooks(module).steer(module.transformer.h[0], {1, 2}):
        want = plain(module, ids(), num_beams=3)
    model = wrap(module, engine)
    with assert_no_fallback(), model.generate(ids(), **options(num_beams=3)) as tracer:
        for _ in tracer.iter[1:3]:
            steer(model.transformer.h[0])
            rows = model.lm_head.output.shape[0]
        got = tracer.result.save()
    assert torch.equal(got, want) and rows == 6
    assert not torch.equal(want, plain(module, ids(), num_beams=3))


class Collects:
    def __init__(self):
        self.given, self.ended = [], 0

    def put(self, value):
        self.given.append(value)

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("engine", ENGINES)
def test_streamers(engine):
    module, users = shared("llama"), Collects()
    want = plain(module, ids())
    model = wrap(module, engine)
    with assert_no_fallback(), model.generate(ids(), streamer=users, **options()) as tracer:
        prompt = model.generator.streamer.output.save()
        tokens, chosen = nnsight_fx.save([]), nnsight_fx.save([])
        for _ in tracer.iter[:]:
            chosen.append(model.lm_head.output[:, -1].argmax(-1))
            tokens.append(model.generator.streamer.output)
    assert torch.equal(prompt, ids())
    assert torch.equal(torch.stack(tokens, 1), want[:, 7:]) and torch.equal(torch.stack(chosen, 1), want[:, 7:])
    assert users.ended == 1 and torch.equal(torch.stack(users.given[1:], 1), want[:, 7:])
    with model.generate(ids(), **options()) as tracer:
        occurrences = nnsight_fx.save([])
        for _ in tracer.iter[:3]:
            occurrences.append(model.generator.streamer.output)
    assert torch.equal(occurrences[0], ids())
    assert torch.equal(torch.stack(occurrences[1:], 1), want[:, 7:9])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_result_with_more_in_it(engine):
    module = gpt2()  # transformers leaves hooks of its own, which should come after ours
    more = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    with Hooks(module).steer(module.transformer.h[0], set(range(STEPS))):
        want = plain(module, ids(), **more)
    model = wrap(module, engine)
    with assert_no_fallback(), model.generate(ids(), **options(**more)) as tracer:
        for _ in tracer.iter[:]:
            steer(model.transformer.h[0])
        got = nnsight_fx.save(tracer.result)
    assert type(got) is type(want)
    assert torch.equal(got.sequences, want.sequences)
    same(got.scores, want.scores, engine)
    same(got.hidden_states, want.hidden_states, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_prompts_of_different_lengths(engine):
    module = shared("llama")
    prompts = [[5, 6, 7, 8], [9, 10]]
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    x = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    with Hooks(module).steer(module.model.layers[0], {1, 2}):
        want = module.generate(x, attention_mask=mask, **options())
    model = wrap(module, engine)
    with assert_no_fallback(), model.generate(prompts, **options()) as tracer:
        for _ in tracer.iter[1:3]:
            steer(model.model.layers[0])
        got = tracer.result.save()
    assert torch.equal(got[:, 4:], want[:, 4:])


# shapes that grow, writes that change what Python sees


@pytest.mark.parametrize("engine", ENGINES)
def test_sites_whose_size_grows(engine):
    module = gpt2()
    module.set_attn_implementation("eager")
    with Hooks(module) as hooks:
        want = hooks.keep(module.transformer.h[0].attn)
        plain(module, ids())
    model = wrap(module, engine)
    for _ in range(2):
        with assert_no_fallback(), model.generate(ids(), **options()) as tracer:
            kept, sizes = nnsight_fx.save([]), []
            for _ in tracer.iter[:]:
                weights = model.transformer.h[0].attn.output[1]
                sizes.append(weights.shape[-1])
                kept.append(weights)
        same(kept, [out[1] for out in want], engine)
        assert sizes == [7, 8, 9, 10, 11]


@pytest.mark.parametrize("engine", ENGINES)
def test_skipping_a_layer_at_one_step(engine):
    module = shared("llama")
    layer, calls = module.model.layers[1].mlp, []
    forward = layer.forward
    layer.forward = lambda x: (calls.append(1), x * 2 if len(calls) == 2 else forward(x))[1]
    want = plain(module, ids())
    del layer.forward
    model = wrap(module, engine)
    with model.generate(ids(), **options()) as tracer:
        for _ in tracer.iter[1]:
            model.model.layers[1].mlp.skip(model.model.layers[1].mlp.input * 2)
        got = tracer.result.save()
    assert torch.equal(got, want) and len(calls) == STEPS


# economy


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_steps_free_what_no_name_holds(engine):
    model = wrap(shared("gpt2"), engine)
    with model.generate(ids(), **options(max_new_tokens=20)) as tracer:
        for _ in tracer.iter[:]:
            hidden = model.transformer.h[0].output

            held = sum(len(w.run.env) for w in tracer.waves if w.run is not None)
        assert held <= 4
        last = hidden.save()
    assert last[0].shape[0] in (1, 2) and type(last) is torch.Tensor


def test_other_lengths_take_no_new_captures():
    module = llama()
    model = wrap(module, "eager")
    for length in (5, 9, 12):
        if length == 12:
            before = watch.compiles
        with assert_no_fallback(), model.generate(ids(2, length), **options()) as tracer:
            for _ in tracer.iter[:]:
                model.model.layers[0].output[:, -1] += VECTOR
            got = tracer.result.save()
        with Hooks(module):
            assert got.shape == (2, length + STEPS)
    assert watch.compiles == before


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_an_edit_holds_in_every_forward(engine):
    module, vector = shared("gpt2"), torch.randn(32) * 3
    handle = module.transformer.h[0].register_forward_hook(lambda m, args, out: out + vector)
    want = plain(module, ids())
    handle.remove()
    assert not torch.equal(want, plain(module, ids()))
    model = wrap(module, engine)
    with model.edit() as edited:
        edited.transformer.h[0].output = edited.transformer.h[0].output + vector
    with edited.generate(ids(), **options()) as tracer:
        kept = nnsight_fx.save([])
        for _ in tracer.iter[:]:
            kept.append(edited.lm_head.output[:, -1].argmax(-1))
        got = tracer.result.save()
    assert torch.equal(got, want) and torch.equal(torch.stack(kept, 1), want[:, 7:])


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_a_cache_sees_every_forward(engine):
    """C3: one visit for each forward, those behind the body's last line too, each as the interventions left it."""
    module = shared("gpt2")
    with Hooks(module).steer(module.transformer.h[0], {1}) as hooks:
        blocks, logits = hooks.keep(module.transformer.h[0]), hooks.keep(module.lm_head)
        want = plain(module, ids())
    model = wrap(module, engine)
    with assert_no_fallback(), model.generate(ids(), **options()) as tracer:
        cache = tracer.cache([model.transformer.h[0], "model.lm_head"], include_inputs=True)
        for _ in tracer.iter[1]:
            steer(model.transformer.h[0])
        got = tracer.result.save()
    assert torch.equal(got, want)
    assert [x.shape[1] for x in cache.transformer.h[0].output] == [7, 1, 1, 1, 1]
    same(cache.transformer.h[0].output, blocks, engine)
    same(cache["model.lm_head"].output, logits, engine)
    assert len(cache["model.lm_head"]) == STEPS and cache["model.lm_head"][2].input.shape == (2, 1, 32)
