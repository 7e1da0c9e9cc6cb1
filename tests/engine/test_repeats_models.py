"""Models of transformers whose blocks repeat one another: the numbers are those of hooks, to the bit."""

import pytest
import torch
import transformers as tf

import nnsight_fx
from nnsight_fx import NNsight, assert_no_fallback

SMALL = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=4)
LLAMA = dict(**SMALL, num_key_value_heads=2)
T5 = dict(vocab_size=64, d_model=16, d_ff=32, num_layers=6, num_heads=4, d_kv=4)

MODELS = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)), "model.layers"),
    "gemma2": (
        lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**LLAMA, head_dim=4, sliding_window=4, query_pre_attn_scalar=4)),
        "model.layers",
    ),
    "mixtral": (lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**LLAMA, num_local_experts=2)), "model.layers"),
    "qwen3": (lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLAMA, head_dim=4)), "model.layers"),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=6, n_head=4)), "transformer.h"),
    "t5": (lambda: tf.T5EncoderModel(tf.T5Config(**T5)), "encoder.block"),
    "bert": (lambda: tf.BertModel(tf.BertConfig(**SMALL)), "encoder.layer"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model(name):
    made, path = MODELS[name]
    module = made().eval().requires_grad_(False)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    given, found = {"input_ids": torch.randint(1, 64, (2, 7))}, []
    if name not in ("t5", "bert"):
        given["use_cache"] = False
    for backend in (None, "eager"):
        model = NNsight(module)
        if backend:
            model.compile(backend=backend)
        with assert_no_fallback(), torch.no_grad(), model.trace(**given):
            outs = nnsight_fx.save([])
            for i, block in enumerate(model.get(path)):
                h = block.output[0] if isinstance(block.output, tuple) else block.output
                if i in (1, 4):
                    h[:, -1] += 1.0
                outs.append(h.clone())
        found.append(outs)
    assert model.explain().to_dict()["captures"][-1]["segments"][0]["repeated"] >= 4
    assert len(found[0]) == 6 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
