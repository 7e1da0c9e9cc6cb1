"""Prompts, generations and parts of a language model."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import nnsight_fx
from nnsight_fx import InvokeError, LanguageModel, ModelNotFoundError, OutOfOrderError, PromptError, UnknownModuleError
from nnsight_fx.tracing.iteration import Never

from . import table

IDS = [3, 4, 5]


def row(error, *parts, line=True):
    return table.row(error, *parts, line=line, model="language")


@row(PromptError, "prompt 0 has no tokens")
def an_empty_prompt(m):
    with m.trace(""):
        m.lm_head.output.save()


@row(PromptError, "prompt 1 has no tokens")
def an_empty_prompt_among_others(m):
    with m.trace(["a b", ""]):
        m.lm_head.output.save()


@row(PromptError, "prompt 0 has no tokens")
def no_prompts(m):
    with m.trace([]):
        m.lm_head.output.save()


@row(PromptError, "`input_ids` cannot be 5")
def a_number_for_a_prompt(m):
    with m.trace(5):
        m.lm_head.output.save()


@row(PromptError, "torch.float32", "`inputs_embeds=`")
def floats_for_tokens(m):
    with m.trace([0.5, 1.0]):
        m.lm_head.output.save()


@row(PromptError, "torch.bool")
def truths_for_tokens(m):
    with m.trace([True, False]):
        m.lm_head.output.save()


@row(PromptError, "shape (1, 2, 3)")
def tokens_of_three_dimensions(m):
    with m.trace(torch.ones(1, 2, 3).long()):
        m.lm_head.output.save()


@row(PromptError, "shape ()")
def tokens_of_no_dimension(m):
    with m.trace(torch.tensor(5)):
        m.lm_head.output.save()


@row(PromptError, "'role'")
def a_chat_for_a_prompt(m):
    with m.trace([{"role": "user", "content": "a"}]):
        m.lm_head.output.save()


@row(PromptError, "2 inputs given by position")
def two_inputs_by_position(m):
    with m.trace(IDS, IDS):
        m.lm_head.output.save()


@row(PromptError, "given by position and again by keyword")
def an_input_twice(m):
    with m.trace(IDS, input_ids=IDS):
        m.lm_head.output.save()


@row(PromptError, "`labels` has 3 rows")
def labels_of_other_rows(m):
    with m.trace([IDS, IDS], labels=torch.ones(3, 3)):
        m.lm_head.output.save()


@row(PromptError, "`attention_mask`")
def a_mask_of_another_length(m):
    with m.trace({"input_ids": [IDS], "attention_mask": [[1]]}):
        m.lm_head.output.save()


@row(PromptError, "more than `pad_to=2`")
def a_prompt_longer_than_pad_to(m):
    with m.trace(IDS, pad_to=2):
        m.lm_head.output.save()


@row(PromptError, "prompt 0 has no tokens")
def an_empty_prompt_in_an_invoke(m):
    with m.trace() as tracer:
        with tracer.invoke("a b"):
            m.lm_head.output.save()
        with tracer.invoke(""):
            m.lm_head.output.save()


@row(IndexError, "index out of range", line=False)
def a_token_that_is_not_in_the_vocabulary(m):
    with m.trace([3, 999]):
        m.lm_head.output.save()


@row(PromptError, "no tokenizer")
def text_without_a_tokenizer(m):
    with torch.random.fork_rng():
        bare = LanguageModel(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2)))
    with bare.trace("a b"):
        bare.lm_head.output.save()


@row(ModelNotFoundError, "no folder", line=False)
def a_folder_that_is_not_there(m):
    LanguageModel("./missing")


@row(TypeError, "`dtype`", "is loaded", line=False)
def loading_options_for_a_loaded_model(m):
    LanguageModel(m._module, dtype=torch.bfloat16)


@row(Never, "occurrence 9 of `lm_head.output` never came")
def a_token_too_many(m):
    with m.generate(IDS, max_new_tokens=2) as tracer:
        tracer.next(9)
        m.lm_head.output.save()


@row(OutOfOrderError, "occurrence 0 of `lm_head.output` was passed")
def a_step_behind_a_later_one(m):
    with m.generate(IDS, max_new_tokens=3) as tracer:
        for _ in tracer.iter[1]:
            m.lm_head.output.save()
        m.lm_head.output.save()


@row(KeyError, "mine", line=False)
def an_error_in_the_middle_of_a_generation(m):
    with m.generate(IDS, max_new_tokens=3) as tracer:
        for step in tracer.iter[:]:
            m.lm_head.output.save()
            if step == 1:
                raise KeyError("mine")


@row(ValueError, "max_new_token", line=False)
def a_misspelt_option_of_a_generation(m):
    with m.generate(IDS, max_new_token=3):
        m.lm_head.output.save()


@row(InvokeError, "already has an input")
def an_invoke_in_a_generation_with_a_prompt(m):
    with m.generate(IDS, max_new_tokens=2) as tracer:
        with tracer.invoke(IDS):
            pass


@row(ValueError, "head")
def patching_by_head_of_the_residual(m):
    nnsight_fx.patching.patch(m, IDS, IDS, lambda x: x.sum(), over=("layer", "head"), progress=False)


@row(ValueError, "residul")
def patching_of_an_unknown_part(m):
    nnsight_fx.patching.patch(m, IDS, IDS, lambda x: x.sum(), part="residul", progress=False)


@row(ValueError, "tokens")
def patching_of_prompts_of_other_lengths(m):
    nnsight_fx.patching.patch(m, IDS, [3, 4], lambda x: x.sum(), progress=False)


@row(ValueError, "`sample`")
def ablation_in_an_unknown_way(m):
    nnsight_fx.patching.ablate(m, IDS, lambda x: x.sum(), by="sample", progress=False)


@row(UnknownModuleError, "no module `transformer.h.9`; did you mean `transformer.h.1`", "cell layer=9")
def patching_of_a_layer_too_many(m):
    nnsight_fx.patching.patch(m, IDS, IDS, lambda x: x.sum(), layers=[9], progress=False)


@row(IndexError)
def patching_of_a_position_too_many(m):
    nnsight_fx.patching.patch(m, IDS, IDS, lambda x: x.sum(), positions=[9], progress=False)
