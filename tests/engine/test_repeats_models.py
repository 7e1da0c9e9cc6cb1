"""Models of transformers whose blocks repeat one another: the numbers are those of hooks, to the bit."""

import pytest
import torch
import transformers as tf

import nnsight_fx
from nnsight_fx import NNsight, assert_no_fallback

SMALL = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=4)
LLAMA = dict(**SMALL, num_key_value_heads=2)
MIXED = ["sliding_attention", "full_attention"] * 3
T5 = dict(vocab_size=64, d_model=16, d_ff=32, num_layers=6, num_heads=4, d_kv=4)

MODELS = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)), "model.layers"),
    "gemma2": (
        lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**LLAMA, head_dim=4, sliding_window=4, query_pre_attn_scalar=4)),
        "model.layers",
    ),
    "gemma3": (
        lambda: tf.Gemma3ForCausalLM(
            tf.Gemma3TextConfig(**LLAMA, head_dim=4, sliding_window=4, query_pre_attn_scalar=4, layer_types=MIXED)
        ),
        "model.layers",
    ),
    "mistral": (lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLAMA, sliding_window=4)), "model.layers"),
    "mixtral": (lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**LLAMA, num_local_experts=2)), "model.layers"),
    "qwen3": (lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLAMA, head_dim=4)), "model.layers"),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=6, n_head=4)), "transformer.h"),
    "t5": (lambda: tf.T5EncoderModel(tf.T5Config(**T5)), "encoder.block"),
    "bert": (lambda: tf.BertModel(tf.BertConfig(**SMALL)), "encoder.layer"),
}


def weights(made):
    module = made().eval().requires_grad_(False)
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return module


def told(x):
    """All that a cache holds."""
    if isinstance(x, list | tuple):
        return [told(i) for i in x]
    if isinstance(x, dict):
        return [(k, told(v)) for k, v in x.items()]
    if isinstance(x, torch.Tensor):
        return x.dtype, x.tolist(), x.stride()
    return (type(x), told(vars(x))) if hasattr(x, "__dict__") and not isinstance(x, type) else x


def blocks_of(model, path):
    """A run of the body: block by block, two of them changed."""
    outs = nnsight_fx.save([])
    for i, block in enumerate(model.get(path)):
        h = block.output[0] if isinstance(block.output, tuple) else block.output
        if i in (1, 4):
            h[:, -1] += 1.0
        outs.append(h.clone())
    return outs


def both(module):
    """The model on hooks, and captured."""
    wanted, model = NNsight(module), NNsight(module)
    return wanted, model.compile(backend="eager") or model


def repeated(model):
    return model.explain().to_dict()["captures"][-1]["segments"][0]["repeated"]


@pytest.mark.parametrize("name", MODELS)
def test_a_model(name):
    made, path = MODELS[name]
    given, found = {"input_ids": torch.randint(1, 64, (2, 7))}, []
    if name not in ("t5", "bert"):
        given["use_cache"] = False
    for model in both(weights(made)):
        with assert_no_fallback(), torch.no_grad(), model.trace(**given):
            outs = blocks_of(model, path)
        found.append(outs)
    assert repeated(model) >= 4
    assert len(found[0]) == 6 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("t5", "bert")])
def test_a_model_that_fills_a_cache(name):
    made, path = MODELS[name]
    given, found = {"input_ids": torch.randint(1, 64, (2, 7))}, []
    for model in both(weights(made)):
        with assert_no_fallback(), torch.no_grad(), model.trace(**given):
            outs = blocks_of(model, path)
            out = nnsight_fx.save(model.output)
        last = torch.randint(1, 64, (2, 1), generator=torch.Generator().manual_seed(0))
        held = told(out.past_key_values)
        with torch.no_grad():  # what was cached is good to go on with
            more = model._module(last, past_key_values=out.past_key_values).logits
        found.append(([*outs, out.logits, more], held))
    assert repeated(model) >= 4
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == found[1][1]


def test_an_encoder_and_a_decoder():
    module, found = weights(lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5))), []
    given = {"input_ids": torch.randint(1, 64, (2, 7)), "decoder_input_ids": torch.randint(1, 64, (2, 5))}
    for model in both(module):
        with assert_no_fallback(), torch.no_grad(), model.trace(**given):
            outs = blocks_of(model, "decoder.block")
            out = nnsight_fx.save(model.output)
        found.append(([*outs, out.logits], told(out.past_key_values)))
    assert repeated(model) >= 4  # of the encoder
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == found[1][1]


class Counted(tf.DynamicCache):
    calls = 0

    def update(self, *args, **kwargs):
        self.calls += 1
        keys, values = super().update(*args, **kwargs)
        return keys * self.calls, values


def _static(config):
    return tf.StaticCache(config=config, max_cache_len=16)


@pytest.mark.parametrize("made", [lambda config: tf.DynamicCache(), lambda config: Counted(config=config), _static])
def test_a_cache_that_is_handed_in(made):
    module, found = weights(MODELS["llama"][0]), []
    ids = torch.randint(1, 64, (2, 7))
    for model in both(module):
        cache = made(module.config)
        for _ in range(2):
            with torch.no_grad(), model.trace(input_ids=ids, past_key_values=cache):
                outs = blocks_of(model, "model.layers")
            found.append((outs, told(cache)))
    for one, other in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
        assert one[1] == other[1]
