"""A forward's cache under both of its names, and no warning of transformers' of calls that are ours."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cache_name import CACHE
from nnsight_fx import LanguageModel, assert_no_fallback


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, bos_token_id=None, eos_token_id=None)
    )


def llama():
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=50,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("engine", ["hooks", "eager"])
@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_cache_by_name(make, name, engine):
    torch.manual_seed(0)
    net, ids = make().eval(), torch.tensor([[5, 7, 11, 13]])
    with torch.no_grad():
        want = net(ids).logits[:, -1]
    model = LanguageModel(net)
    if engine != "hooks":
        model.compile(backend=engine)
    cache = DynamicCache(config=net.config)
    with warnings.catch_warnings():
        if name != CACHE:  # the user's own call
            warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
        with assert_no_fallback(), torch.no_grad():
            for tokens in (ids[:, :2], ids[:, 2:3], ids[:, 3:]):
                with model.trace(tokens, **{name: cache}, use_cache=True):
                    logits = model.lm_head.output[:, -1].save()
    assert cache.get_seq_length() == 4
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_generation_warns_of_nothing(engine):
    torch.manual_seed(0)
    model = LanguageModel(llama().eval())
    if engine != "hooks":
        model.compile(backend=engine)
    with torch.no_grad(), model.generate([[5, 7, 11], [3, 2]], max_new_tokens=3) as tracer:
        kept = [model.lm_head.output[:, -1].save() for _ in tracer.iter[:]]
    assert len(kept) == 3  # warnings are errors in this suite
