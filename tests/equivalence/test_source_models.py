"""Operations inside modules on ten architectures: the engines name the same ones, and read and write them as a monkeypatch does."""

import contextlib
import functools

import pytest
import torch
import transformers as tf

from nnsight_fx import NNsight, assert_max_compiles, assert_no_fallback
from nnsight_fx.engine.run import Run

SMALL: dict = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 99,
}
GROUPED: dict = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}


def gpt2():
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=99, n_positions=64))


def opt():
    config = {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    return tf.OPTForCausalLM(tf.OPTConfig(**config))


def t5():
    return tf.T5EncoderModel(tf.T5Config(num_layers=2, d_model=32, d_ff=64, num_heads=4, d_kv=8, vocab_size=99))


def vit():
    config = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    return tf.ViTModel(tf.ViTConfig(**config, image_size=16, patch_size=8), add_pooling_layer=False)


# model, the second layer's attention, the function that it calls there (`None`: the scores are made in its own frame), the scores,
# the activation of the second layer
LAYERS = "model.layers.1"
HELPER = ("attention_interface_0", "nn_functional_softmax_0")
ROWS = {
    "gpt2": (gpt2, "transformer.h.1.attn", *HELPER, "transformer.h.1.mlp", "self_act_0"),
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)), f"{LAYERS}.self_attn", *HELPER, f"{LAYERS}.mlp", "self_act_fn_0"),
    "neox": (
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL)),
        *("gpt_neox.layers.1.attention", *HELPER, "gpt_neox.layers.1.mlp", "self_act_0"),
    ),
    "bert": (
        lambda: tf.BertModel(tf.BertConfig(**SMALL), add_pooling_layer=False),
        *("encoder.layer.1.attention.self", *HELPER, "encoder.layer.1.intermediate", "self_intermediate_act_fn_0"),
    ),
    "opt": (opt, "model.decoder.layers.1.self_attn", *HELPER, "model.decoder.layers.1", "self_activation_fn_0"),
    "mistral": (lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED)), f"{LAYERS}.self_attn", *HELPER, f"{LAYERS}.mlp", "self_act_fn_0"),
    "gemma2": (lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED)), f"{LAYERS}.self_attn", *HELPER, f"{LAYERS}.mlp", "self_act_fn_0"),
    "qwen2": (lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL, num_key_value_heads=2)), f"{LAYERS}.self_attn", *HELPER, f"{LAYERS}.mlp", "self_act_fn_0"),
    "t5": (t5, "encoder.block.1.layer.0.SelfAttention", *HELPER, "encoder.block.1.layer.1.DenseReluDense", "self_act_0"),
    "vit": (vit, "layers.1.attention", *HELPER, "layers.1.mlp", "self_activation_fn_0"),
}  # fmt: skip
QUICK = {"gpt2", "t5"}  # the other eight take minutes, and differ only in names
SOME = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]


@functools.cache
def build(name):
    torch.manual_seed(0)
    model = ROWS[name][0]().eval().requires_grad_(False)
    model.set_attn_implementation("eager")
    return model


def given(name):
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 16, 16, generator=g) if name == "vit" else torch.randint(1, 99, (2, 5), generator=g)


def final(result):
    return next(x for x in result.values() if isinstance(x, torch.Tensor))


@contextlib.contextmanager
def patched(owner, name, function):
    """`owner.name` replaced by `function` of what it was."""
    old = getattr(owner, name)
    setattr(owner, name, function(old))
    try:
        yield
    finally:
        setattr(owner, name, old)


def by_hand(name, model, x, scale):
    """Scores and activation, read and written by a `softmax` patched while that attention runs, and by another activation."""
    _, attn, *_, mlp, act = ROWS[name]
    attention, inside = model.get_submodule(attn), model.get_submodule(mlp)
    seen = {}

    def softmax(old):
        def new(*args, **kwargs):
            out = old(*args, **kwargs)
            seen["scores"] = out.clone()
            out[:, 0] = scale[0]
            return out

        return new

    def within(old):
        def new(*args, **kwargs):
            with patched(torch.nn.functional, "softmax", softmax):
                return old(*args, **kwargs)

        return new

    class Activation(torch.nn.Module):
        def __init__(self, old):
            super().__init__()
            self.__dict__["old"] = old

        def forward(self, h):
            seen["act"] = self.__dict__["old"](h).clone()
            return seen["act"] * scale[1]

    with (
        patched(attention, "forward", within),
        patched(inside, act.removeprefix("self_").removesuffix("_0"), Activation),
    ):
        out = final(model(x))
    del attention.forward
    return seen["scores"], seen["act"], out


@pytest.mark.parametrize("name", SOME)
def test_every_engine_reads_and_writes_scores_and_activations(name):
    raw, x = build(name), given(name)
    _, attn, helper, scores, mlp, act = ROWS[name]
    for engine in ("hooks", "eager", *(["aot_eager"] if name in ("gpt2", "llama", "t5") else [])):
        model = NNsight(raw)
        if engine != "hooks":
            model.compile(backend=engine, fullgraph=True)
        for turn in range(2):
            scale = (torch.full((), 0.25 * (turn + 1)), torch.full((), 2.0 + turn))
            compiles = 1 if turn == 0 and engine != "hooks" else 0
            with assert_no_fallback(), assert_max_compiles(compiles), model.trace(x) as tracer:
                inner = model.get(attn).source
                inner = getattr(inner, helper).source if helper else inner
                found = getattr(inner, scores).output.clone().save()
                getattr(inner, scores).output[:, 0] = scale[0]
                op = getattr(model.get(mlp).source, act)
                value = op.output.clone().save()
                op.output = op.output * scale[1]
                out = tracer.result
                last = final(out).save()
            exact = {} if engine == "aot_eager" else {"rtol": 0, "atol": 0}
            torch.testing.assert_close((found, value, last), by_hand(name, raw, x, scale), **exact)
        assert not any("forward" in m.__dict__ for m in raw.modules())


@pytest.mark.parametrize("name", SOME)
def test_the_engines_pass_the_same_operations_in_the_same_order(name, monkeypatch):
    """Names on the live model are what its run passed; on the captured one what lies in the graph."""
    raw, x = build(name), given(name)
    _, attn, helper, _, mlp, act = ROWS[name]
    passed, pass_site = [], Run.pass_site

    def spy(self, path, kind, value):
        passed.append((path, kind))
        return pass_site(self, path, kind, value)

    for engine in ("hooks", "eager"):
        model = NNsight(raw)
        if engine == "eager":
            model.compile(backend=engine, fullgraph=True)
        with monkeypatch.context() as patch:
            if engine == "hooks":
                patch.setattr(Run, "pass_site", spy)
            with model.trace(x):
                inner = getattr(model.get(attn).source, helper)
                inner.source.torch_matmul_0.output.save()
                getattr(model.get(mlp).source, act).output.save()
        if engine == "eager":
            marked = [s for segment in model._host.compiled.segments for s in segment.sites]
    inside = [attn + ".source.", mlp + ".source."]
    lived, spliced = ([s for s in sites if s[0].startswith(tuple(inside))] for sites in (passed, marked))
    assert lived == spliced and len(lived) > 20
    listed = {f"{attn}.source.{n}" for n in model.get(attn).source.names} | {
        f"{mlp}.source.{n}" for n in model.get(mlp).source.names
    }
    top = {path for path, _ in lived if path.count(".source.") == 1}
    assert top <= listed and len(top) > 0.6 * len(listed)  # the rest are on branches not taken
