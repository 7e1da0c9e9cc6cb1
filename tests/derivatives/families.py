"""Small models of families, with the sites that the tests of derivatives are about. Weights are random, the same each time."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn as nn
import transformers as hf

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 31}
GROUPED = SIZES | {"num_key_value_heads": 2, "use_cache": False}
IDS = torch.arange(8).view(2, 4) + 3


class Family(NamedTuple):
    """How to make a model, the modules whose outputs are the sources, and the one whose output is the target."""

    make: Callable[[], nn.Module]
    sources: Callable
    target: str = "lm_head"
    inputs: dict = {"input_ids": IDS}


def of_llama(model):
    return [*model.model.layers, model.model.layers[1].mlp, model.model.layers[0].self_attn]


def experts(kind, config, **more):
    return kind(config(**GROUPED, **more, experts_implementation="eager"))


FAMILIES = {
    "gpt2": Family(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                n_embd=16,
                n_layer=2,
                n_head=2,
                vocab_size=31,
                n_positions=8,
                use_cache=False,
                bos_token_id=0,
                eos_token_id=0,
            )
        ),
        lambda model: [*model.transformer.h, model.transformer.h[1].mlp, model.transformer.h[0].attn],
    ),
    "llama": Family(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)), of_llama),
    "gemma2": Family(lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=8, pad_token_id=0)), of_llama),
    "mixtral": Family(
        lambda: experts(hf.MixtralForCausalLM, hf.MixtralConfig, num_local_experts=3),
        of_llama,
    ),
    "qwen3_moe": Family(
        lambda: experts(
            *(hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig),
            **{"head_dim": 8, "moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2},
        ),
        of_llama,
    ),
    "t5": Family(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                d_model=16,
                d_kv=8,
                d_ff=24,
                num_layers=2,
                num_decoder_layers=1,
                num_heads=2,
                vocab_size=31,
                feed_forward_proj="gated-gelu",
                use_cache=False,
            )
        ),
        lambda model: [model.encoder.block[0], model.encoder.block[1].layer[1], model.decoder.block[0].layer[2]],
        inputs={"input_ids": IDS, "decoder_input_ids": IDS.flip(1)},
    ),
    "bert": Family(
        lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES, max_position_embeddings=8)),
        lambda model: [*model.bert.encoder.layer, model.bert.encoder.layer[1].intermediate],
        target="cls",
    ),
}


ENGINES = ("hooks", "eager", "aot_eager")


def rows_of(cases: list[tuple]) -> list:
    """`(id, family, ...)` on each engine. What takes long is left to `make test-slow`: captured, the others than GPT-2 and Llama."""
    return [
        pytest.param(
            *(name, *more, engine),
            id=f"{row}-{engine}",
            marks=[pytest.mark.slow] if engine != "hooks" and name not in ("gpt2", "llama") else [],
        )
        for row, name, *more in cases
        for engine in ENGINES
    ]


def built(name: str, dtype: torch.dtype = torch.double) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[name].make().to(dtype).eval().requires_grad_(False)


def first(value: object) -> torch.Tensor:
    return value[0] if isinstance(value, tuple | list) else value


def read(name: str, model: object) -> tuple:
    """The body of a derivative of a family: the target at the last position, and the sources."""
    return model.get(FAMILIES[name].target).output[:, -1], [first(m.output) for m in FAMILIES[name].sources(model)]


def by_hand(name: str, module: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same by hand-written hooks: values on autograd's graph."""
    family, kept = FAMILIES[name], {}

    def keep(m, args, out):
        value = first(out)
        kept[m] = value if value.requires_grad else value.requires_grad_()

    sources, target = family.sources(module), module.get_submodule(family.target)
    handles = [m.register_forward_hook(keep) for m in [*sources, target]]
    module(**family.inputs)
    for handle in handles:
        handle.remove()
    return kept[target][:, -1], [kept[m] for m in sources]


def looped(target: torch.Tensor, sources: list[torch.Tensor], cotangents: torch.Tensor) -> list[torch.Tensor]:
    """One `torch.autograd.grad` for each cotangent."""
    rows = [torch.autograd.grad(target, sources, c, retain_graph=True) for c in cotangents]
    return [torch.stack(each) for each in zip(*rows, strict=True)]
