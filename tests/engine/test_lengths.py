"""Text has another length each time: one compile serves all lengths, and one all numbers of rows from two on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nnsight_fx import LanguageModel, assert_max_compiles, assert_no_fallback

WORDS = ["?", "a", "the", "cat", "dog", "sat", "on", "mat", "red"]
ONE = ["the cat sat", "a red dog sat on the mat", "the cat", "a dog sat on the mat"]
SEVERAL = [["the cat sat", "a dog"], ["a", "cat sat", "on the red mat"], ["the cat sat on the mat", "dog"] * 3]


def wrap(backend="eager", **options):
    torch.manual_seed(0)
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="?", padding_side="left")
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
    }
    raw = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=12, eos_token_id=None)).eval().requires_grad_(False)
    model = LanguageModel(raw, tokenizer=tokenizer)
    model.compile(backend=backend, **options)
    return model


def steered(model, text, **options):
    with torch.no_grad(), model.trace(text, **options):
        model.model.layers[0].output[:, -1] += 1
        logits = model.lm_head.output[:, -1].save()
    return logits


def generated(model, text, **options):
    with model.generate(text, max_new_tokens=4, min_new_tokens=4, do_sample=False, **options) as tracer:
        for _ in tracer.iter[:]:
            model.model.layers[0].output[:, -1] += 1
        ids = tracer.result.save()
    return ids


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("prompts", [ONE, SEVERAL], ids=["one", "several"])
def test_one_compile_for_all_lengths_and_rows(backend, prompts):
    model = wrap(backend)
    for n, text in enumerate(prompts):
        with assert_no_fallback(), assert_max_compiles(0 if n else 1):
            got = steered(model, text)
        torch.testing.assert_close(got, steered(model, text, compile=False), rtol=0, atol=1e-6)
    assert model.explain().to_dict()["captures"][0]["captures"] == 1


@pytest.mark.inductor
@pytest.mark.slow
def test_inductor_too():
    model = wrap("inductor")
    for n, text in enumerate(ONE[:3]):
        with assert_no_fallback(), assert_max_compiles(0 if n else 1):
            got = steered(model, text)
        torch.testing.assert_close(got, steered(model, text, compile=False))


def test_a_generation_has_two_compiles_whatever_came_before():
    """The prompt's, and a step's: what is cached grows, and is known to."""
    model = wrap()
    for n, text in enumerate(ONE):
        with assert_no_fallback(), assert_max_compiles(0 if n else 2):
            got = generated(model, text)
        assert torch.equal(got, generated(model, text, compile=False))
    ids = torch.tensor([[3, 4, 5, 6, 7, 2, 1]])
    with assert_max_compiles(0):  # what text has compiled serves ids
        generated(model, ids)


def test_token_ids_have_one_length_until_there_is_another():
    """A single shape is compiled for what it is; `dynamic=` is the user's word."""
    model, ids = wrap(), torch.tensor([[3, 4, 5]])
    with assert_max_compiles(1):
        steered(model, ids)
    with pytest.raises(Exception, match="1 graphs were compiled"), assert_max_compiles(0):
        steered(model, torch.tensor([[3, 4, 5, 6]]))
    assert not hasattr(ids, "_dynamo_weak_dynamic_indices")
    model = wrap(dynamic=False)
    for text in ONE[:2]:
        with assert_max_compiles(1):
            steered(model, text)
    assert model.explain().to_dict()["captures"][0]["captures"] == 2


def test_a_length_that_is_the_number_of_rows():
    model = wrap()
    for text in (["the cat sat", "a dog", "on mat"], ["a", "cat sat on mat"], ["a dog", "mat"]):
        got = steered(model, text)
        torch.testing.assert_close(got, steered(model, text, compile=False), rtol=0, atol=1e-6)
