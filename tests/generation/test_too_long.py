"""Prompts and generations that a model has no positions for: an error with the numbers, before the forward runs."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from nnsight_fx import LanguageModel
from nnsight_fx.errors import PromptError

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
PROPHET = {"hidden_size": 16, "num_encoder_layers": 1, "num_decoder_layers": 1, "num_encoder_attention_heads": 2}
PROPHET |= {"num_decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
SPECIAL = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}

MODELS = {  # and how many tokens it has places for
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, **SPECIAL)), 16),
    "opt": (lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=32, max_position_embeddings=16, word_embed_proj_dim=16, **SPECIAL)), 16),
    "bert": (lambda: BertModel(BertConfig(**SIZES, max_position_embeddings=16)), 16),
    "roberta": (lambda: RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=18, pad_token_id=1)), 16),
    "bart": (lambda: BartForConditionalGeneration(BartConfig(vocab_size=40, **BART, max_position_embeddings=16)), 16),
    "mpnet": (lambda: hf.MPNetModel(hf.MPNetConfig(**SIZES, max_position_embeddings=18)), 16),
    "longformer": (lambda: hf.LongformerModel(hf.LongformerConfig(**SIZES, attention_window=[4, 4], max_position_embeddings=18)), 16),
    "gpt_bigcode": (lambda: hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)), 16),
    "prophetnet": (lambda: hf.ProphetNetModel(hf.ProphetNetConfig(vocab_size=40, **PROPHET, max_position_embeddings=16)), None),  # it clamps them
    "deberta": (lambda: hf.DebertaV2Model(hf.DebertaV2Config(**SIZES, relative_attention=True, position_biased_input=False, max_position_embeddings=16)), None),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=16, **SPECIAL)), None),
}  # fmt: skip
engines = pytest.mark.parametrize("engine", ["hooks", "eager"])


def wrapped(name: str, engine: str) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(MODELS[name][0]().eval())
    if engine != "hooks":
        model.compile(backend=engine)
    return model


def prompt(length: int) -> torch.Tensor:
    return torch.arange(length)[None] % 30 + 5


@engines
@pytest.mark.parametrize("name", MODELS)
def test_prompts(name: str, engine: str) -> None:
    model, most = wrapped(name, engine), MODELS[name][1]
    decodes = {"decoder_input_ids": prompt(4)} if model._module.config.is_encoder_decoder else {}
    for length in (16, 20):
        if most is None or length <= most:
            with torch.no_grad(), model.trace(prompt(length), **decodes) as tracer:
                found = tracer.result[0].save()
            assert found.shape[:2] == (1, 4 if decodes else length)
            continue
        with pytest.raises(
            PromptError, match=r"test_too_long.*: a prompt has 20 tokens, and this model has 16 positions"
        ):
            model.trace(prompt(length), trace=False, **decodes)
        with pytest.raises((IndexError, RuntimeError)):  # as the model says it
            model._module(prompt(length), **decodes)


@engines
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
@pytest.mark.filterwarnings("ignore")
def test_generations(name: str, engine: str) -> None:
    model, most = wrapped(name, engine), MODELS[name][1]
    options = {"do_sample": False, "pad_token_id": 1}
    with model.generate(prompt(12), max_new_tokens=5, **options) as tracer:  # the last token is nobody's input
        tokens = tracer.result.save()
    assert tokens.shape == (1, 17)
    if most is None:
        return
    with (
        pytest.raises(PromptError, match="a generation has come to 17 tokens, and this model has 16 positions"),
        model.generate(prompt(12), max_new_tokens=6, **options) as tracer,
    ):
        tracer.result.save()
    with pytest.raises(PromptError, match="a generation has come to 17 tokens") as told:
        model.sweep(lambda tracer, s: None, [prompt(12)], over={"s": [1, 2]}, generate={"max_new_tokens": 6, **options})
    assert "in the sweep's cell" in "".join(told.value.__notes__)
    with model.generate(prompt(12), max_new_tokens=5, **options) as tracer:  # nothing is left of it
        again = tracer.result.save()
    assert torch.equal(again, tokens)


@engines
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_padding_takes_no_position(name: str, engine: str) -> None:
    """Rows of 12 tokens with two of padding in front: the width passes the table's end, the positions do not."""
    model, options = wrapped(name, engine), {"do_sample": False, "pad_token_id": 1}
    ids = torch.cat([torch.ones(2, 2, dtype=torch.long), prompt(12).repeat(2, 1)], 1)
    mask = torch.cat([torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)], 1)
    wide, marked = torch.cat([ids[:, :2], ids], 1), torch.cat([mask[:, :2], mask], 1)
    wide, marked = torch.cat([wide, prompt(4).repeat(2, 1)], 1), torch.cat([marked, mask[:, -4:]], 1)
    with torch.no_grad(), model.trace(wide, attention_mask=marked):  # 20 wide, 16 of them tokens
        assert model.output[0].save().shape[1] == 20
    want = model._module.generate(ids, attention_mask=mask, max_new_tokens=5, **options)
    with model.generate(ids, attention_mask=mask, max_new_tokens=5, **options) as tracer:
        got = tracer.result.save()
    assert torch.equal(got, want) and got.shape[1] == 19
    with (
        pytest.raises(PromptError, match="a generation has come to 17 tokens"),
        model.generate(ids, attention_mask=mask, max_new_tokens=6, **options) as tracer,
    ):
        tracer.result.save()
