"""Prompts of several lengths as ids, without a tokenizer: each has the numbers that it has alone, or is refused by name."""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.nn as nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nnsight_fx import LanguageModel
from nnsight_fx.errors import PromptError
from nnsight_fx.model.padding import padding_of

from .families import FAMILIES, Architecture

SHORT, LONG = [11, 12, 13], [21, 22, 23, 24, 25, 26, 27]
REFUSED = {"RWKV", "RecurrentGemma", "Funnel", "MobileBERT", "Nystromformer", "ConvBERT", "SqueezeBERT", "YOSO"}
RIGHT = {"RoFormer", "BART", "Marian", "Pegasus", "mBART", "Blenderbot", "LED", "ProphetNet"}


@functools.cache
def built(family: Architecture) -> nn.Module:
    torch.manual_seed(0)
    module = family.build().eval().requires_grad_(False)
    for p in module.parameters():  # far from the small initial values, with which all rows look alike
        p.add_(torch.randn_like(p) * 0.05)
    return module


def hidden(out: Any) -> torch.Tensor:
    for name in ("encoder_last_hidden_state", "logits", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    return out if isinstance(out, torch.Tensor) else out[0]


def given(module: nn.Module) -> dict[str, Any]:
    pair = "decoder_input_ids" in inspect.signature(module.forward).parameters
    return {"decoder_input_ids": torch.tensor([[2, 9, 4]])} if pair else {}


@torch.no_grad()
def own_values(model: Any, module: nn.Module, more: dict[str, Any], left: bool) -> None:
    alone = []
    for prompt in (SHORT, LONG):
        with model.trace(prompt, **more) as tracer:
            result = hidden(tracer.result)[0].save()
        alone.append(result)
    with model.trace() as tracer:
        with tracer.invoke(SHORT, **more):
            a = hidden(tracer.result)[0].save()
        with tracer.invoke(LONG, **more):
            b = hidden(tracer.result)[0].save()
    torch.testing.assert_close(b, alone[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a[-3:] if left else a[:3], alone[0], rtol=1e-4, atol=1e-4)
    rows = {k: v.repeat(2, 1) for k, v in more.items()}
    with model.trace([SHORT, LONG], **rows) as tracer:
        both = hidden(tracer.result).save()
    torch.testing.assert_close(both[0, -3:] if left else both[0, :3], alone[0], rtol=1e-4, atol=1e-4)


# `make test` has one of each kind.
FAST = {
    "GPT-2",
    "Llama",
    "BLOOM",
    "Mamba",
    "RWKV",
    "BERT",
    "RoBERTa",
    "ESM",
    "MPNet",
    "T5",
    "BART",
    "Pegasus",
    "MobileBERT",
}


@pytest.mark.parametrize(
    "family", [pytest.param(f, id=f.name, marks=[] if f.name in FAST else [pytest.mark.slow]) for f in FAMILIES]
)
def test_every_family(family: Architecture) -> None:
    module = built(family)
    model = LanguageModel(module)
    if family.name not in REFUSED:
        return own_values(model, module, given(module), family.name not in RIGHT)
    with pytest.raises(
        PromptError, match=r"the prompts have 3, 7 tokens, and padding on the left would change their numbers: `"
    ):
        with model.trace([SHORT, LONG]):
            pass
    with pytest.raises(PromptError, match="would change their numbers"):
        with model.trace() as tracer:
            with tracer.invoke(SHORT):
                pass
            with tracer.invoke(LONG):
                hidden(tracer.result).save()
    with model.trace(SHORT) as tracer:  # nothing stays behind
        hidden(tracer.result).save()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_key_value_heads": 1,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()  # fmt: skip


def peft(inner: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(inner, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=2, target_modules=["c_attn"])).eval()  # fmt: skip


def prompts(inner: nn.Module) -> nn.Module:
    from peft import PromptTuningConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(inner, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()


class Hands(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, **kwargs: Any) -> Any:
        return self.inner(**kwargs)


class Names(Hands):
    """Hands on what it names, and nothing else."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return self.inner(input_ids, attention_mask=attention_mask)


class Some(Hands):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **more: Any) -> Any:
        return self.inner(input_ids, attention_mask=attention_mask, **more)


class Own(nn.Module):
    """A transformer of one's own, with a table of positions."""

    def __init__(self):
        super().__init__()
        self.embed, self.pos_emb = nn.Embedding(32, 16), nn.Parameter(torch.randn(32, 16))
        self.head = nn.Linear(16, 32)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.embed(input_ids) + self.pos_emb[: input_ids.shape[1]])


SHELLS = {
    "PEFT": lambda: peft(gpt2()),
    "torch.compile": lambda: torch.compile(gpt2(), backend="eager"),
    "hands on everything": lambda: Hands(gpt2()),
    "hands on some and the rest": lambda: Some(gpt2()),
    "shell in a shell": lambda: Hands(Some(peft(gpt2()))),
    "names its arguments, rotary inside": lambda: Names(llama()),
    "compiled shell": lambda: torch.compile(Hands(gpt2()), backend="eager"),
}


@pytest.mark.parametrize("name", list(SHELLS))
def test_the_innermost_model_decides(name: str) -> None:
    module = SHELLS[name]()
    own_values(LanguageModel(module), module, {}, left=True)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Names(gpt2()), "`Names` does not hand `position_ids` on to `GPT2LMHeadModel`"),
        (lambda: Hands(Names(gpt2())), "does not hand `position_ids` on to `GPT2LMHeadModel`"),
        (lambda: prompts(gpt2()), "the adapter puts tokens of its own in front of the prompt"),
    ],
    ids=["a shell that hands none on", "the same inside another", "prompt tuning"],
)
def test_what_cannot_be_padded_on_the_left_is_refused(make: Any, why: str) -> None:
    model = LanguageModel(make())
    with pytest.raises(PromptError, match=why):
        with model.trace([[5, 6], [7, 8, 9]]):
            pass


def test_a_model_of_ones_own_with_a_table_of_positions_is_padded_behind() -> None:
    assert padding_of(Own()).left.startswith("`Own` counts positions from the first column")
    torch.manual_seed(0)
    own_values(LanguageModel(Own()), Own(), {}, left=False)
