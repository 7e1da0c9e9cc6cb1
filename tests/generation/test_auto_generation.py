"""A generation that begins on hooks goes on compiled, where compiling pays in the middle of it: the same tokens."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nnsight_fx import NNsight
from nnsight_fx.engine import worth
from nnsight_fx.engine.run import Run

IDS = torch.tensor([[3, 1, 4]])


def gpt2():
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=23, n_positions=32, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config).eval(), "transformer.h.0"


def llama():
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval(), "model.layers.0"


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True, "temperature": 1.3}, {"cache_implementation": "static"}],
    ids=["greedy", "sampled", "static cache"],
)
def test_it_goes_on_where_it_was(monkeypatch, build, options):
    torch.manual_seed(0)
    module, block = build()

    def generated(model):
        torch.manual_seed(1)
        with model.generate(IDS, max_new_tokens=8, pad_token_id=0, eos_token_id=None, **options) as tracer:
            for _ in tracer.iter[:]:
                model.get(block).output[:, -1] += 1
            out = tracer.result.save()
        return out

    want, model = generated(NNsight(module)), NNsight(module)
    monkeypatch.setattr(worth, "EXACT", ())
    monkeypatch.setattr(worth, "estimate", lambda module: 1e6)
    model.compile(backend="eager", auto=True)
    (capture,) = model._host.captures.values()
    ran, forward = [], Run.forward

    def counted(run):
        forward(run)
        ran.append(type(run))
        if len(ran) == 4:
            capture.hooks_s = 1e9

    monkeypatch.setattr(Run, "forward", counted)
    assert torch.equal(generated(model), want)
    assert ran[:4] == [Run] * 4 and Run not in ran[4:] and len(ran) == 8
