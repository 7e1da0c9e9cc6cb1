"""`model.generate` with several invokes: each is a generation of its own, in step with its body."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import nnsight_fx
from nnsight_fx import InvokeError, LanguageModel, OutOfOrderError

from ..equivalence.harness import ENGINES, same, wrap

SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
A, B, SHORT = [3, 4, 5, 6], [7, 8, 9, 10], [11, 12]


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, **SPECIAL))


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, **SPECIAL))


def t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    special = {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, **sizes, **special))


def built(make, engine: str) -> LanguageModel:
    torch.manual_seed(0)
    return wrap(make().eval().requires_grad_(False), engine, LanguageModel)


def by_hand(model: LanguageModel, prompt: list[int], steer: dict[int, float] | None = None, **options):
    """The tokens and the logits of each step of one prompt alone; `steer` adds to the last layer at chosen steps."""
    module, logits, layer = model._module, [], model._module.lm_head

    def hook(m, args, out):
        out = out + (steer or {}).get(len(logits), 0.0) * torch.arange(out.shape[-1])
        logits.append(out[:, -1])
        return out

    handle = layer.register_forward_hook(hook)
    ids = torch.tensor([prompt])
    tokens = module.generate(ids, attention_mask=torch.ones_like(ids), **options)
    handle.remove()
    return tokens, logits


@pytest.mark.parametrize("engine", ENGINES)
def test_each_invoke_has_its_own_steps(engine):
    """Ranges of steps, steering, a value of an earlier invoke, a container saved in front of them all."""
    model = built(gpt2, engine)
    slope = torch.arange(50.0)
    for options in ({"max_new_tokens": 3}, {"max_new_tokens": 4}):
        with model.generate(**options) as tracer:
            seen = nnsight_fx.save([])
            with tracer.invoke(A):
                for _ in tracer.iter[:2]:
                    model.lm_head.output += 0.5 * slope
                    seen.append(model.lm_head.output[:, -1])
                first = tracer.result.save()
            with tracer.invoke(SHORT):
                for _ in tracer.iter[1:]:
                    seen.append(model.lm_head.output[:, -1] - seen[0])
                second = tracer.result.save()
            with tracer.invoke():
                both = tracer.result.save()
        tokens, logits = by_hand(model, A, {0: 0.5, 1: 0.5}, **options)
        other, later = by_hand(model, SHORT, **options)
        want = [*logits[:2], *(x - logits[0] for x in later[1:])]
        same(seen, want, engine != "aot_eager")
        assert torch.equal(first, tokens) and torch.equal(second, other)
        padded = torch.tensor([[0, 0]])
        assert torch.equal(both, torch.cat([tokens, torch.cat([padded, other], 1)]))


@pytest.mark.parametrize("make", [gpt2, llama, t5])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5},
        {"num_beams": 2, "do_sample": True},
        {"eos_token_id": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 30]},
    ],
    ids=str,
)
def test_beams_and_sampling(make, options):
    model, options = built(make, "hooks"), {"max_new_tokens": 4, **options}
    torch.manual_seed(1)
    with model.generate(**options) as tracer:
        found = nnsight_fx.save([])
        for prompt in (A, B, SHORT):
            with tracer.invoke(prompt):
                steps = nnsight_fx.save([])
                for _ in tracer.iter[:]:
                    steps.append(model.lm_head.output[:, -1])
                found.append((tracer.result, steps))
    torch.manual_seed(1)
    same(found, [by_hand(model, prompt, **options) for prompt in (A, B, SHORT)], True)


def test_inputs_given_first():
    model = built(gpt2, "hooks")
    with model.generate(max_new_tokens=3) as tracer:
        a, b = tracer.batch(A, SHORT)
        with a:
            one = tracer.result.save()
        with b:
            length = model.transformer.h[0].output.shape[1]
            two = tracer.result.save()
    assert length == 2
    for got, prompt in ((one, A), (two, SHORT)):
        assert torch.equal(got, by_hand(model, prompt, max_new_tokens=3)[0])


def test_a_stop_ends_one_generation():
    model = built(gpt2, "hooks")
    with model.generate(max_new_tokens=3) as tracer:
        with tracer.invoke(A):
            h = model.transformer.h[0].output.save()
            tracer.stop()
        with tracer.invoke(B):
            tokens = tracer.result.save()
    assert h.shape == (1, 4, 32) and torch.equal(tokens, by_hand(model, B, max_new_tokens=3)[0])


def test_in_a_session_and_with_an_edit():
    model = built(gpt2, "hooks")
    with model.edit() as (tracer, edited):
        edited.lm_head.output += 0.5 * torch.arange(50.0)
    with edited.session():
        with edited.generate(max_new_tokens=2) as tracer:
            with tracer.invoke(A):
                one = tracer.result.save()
            with tracer.invoke(B):
                two = tracer.result.save()
    for got, prompt in ((one, A), (two, B)):
        assert torch.equal(got, by_hand(model, prompt, {0: 0.5, 1: 0.5}, max_new_tokens=2)[0])


def test_what_cannot_be():
    model = built(gpt2, "hooks")
    with pytest.raises(InvokeError, match="there is none yet"), model.generate(max_new_tokens=2) as tracer:
        with tracer.invoke():
            tracer.result.save()
    with pytest.raises(OutOfOrderError, match="was passed"), model.generate(max_new_tokens=2) as tracer:
        with tracer.invoke(A):
            tracer.result.save()
        with tracer.invoke():
            model.lm_head.output.save()
    with pytest.raises(InvokeError, match="no common shape"):
        with model.generate(max_new_tokens=2, return_dict_in_generate=True) as tracer:
            with tracer.invoke(A):
                kept = nnsight_fx.save(tracer.result)
            with tracer.invoke():
                tracer.result  # noqa: B018
    del kept


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", ["invokes", "batch"])
def test_the_models_own_keywords_reach_every_invoke(form, engine):
    """Those of `trace` itself, which has no input then."""
    model = built(gpt2, engine)
    with model.trace(output_hidden_states=True) as tracer:
        kept = nnsight_fx.save([])
        first, second = tracer.batch(A, B) if form == "batch" else (tracer.invoke(A), tracer.invoke(B))
        for invoke in (first, second):
            with invoke:
                kept.append(model.output.hidden_states[1])
    want = model._module(torch.tensor([A, B]), output_hidden_states=True).hidden_states[1]
    same(kept, [want[:1], want[1:]], engine != "aot_eager")
