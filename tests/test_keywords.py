"""Keywords that nobody takes, on models whose `forward` swallows any; `help()` of the verbs."""

from __future__ import annotations

import pydoc
from typing import Any

import pytest
import torch
import torch.nn as nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from nnsight_fx import LanguageModel, NNsight

IDS = torch.tensor([[3, 4, 5]])


def gpt2() -> nn.Module:
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 50}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)).eval().requires_grad_(False)


def llama() -> nn.Module:
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval().requires_grad_(False)


def t5() -> nn.Module:
    sizes = {"num_layers": 1, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "vocab_size": 50}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes)).eval().requires_grad_(False)


class Shell(nn.Module):
    """Hands everything on."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def body(tracer: Any, scale: float) -> torch.Tensor:
    model = tracer.model
    return model.output.logits * scale


def nothing(model: Any, **kwargs: Any) -> None:
    with model.trace(IDS, **kwargs):
        pass


def invoked(model: Any, **kwargs: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(IDS, **kwargs):
            pass


MISSPELT = {
    "trace": (lambda m: nothing(m, compil=False), "`compil=` is no keyword of `trace` .* did you mean `compile`"),
    "the model's": (lambda m: nothing(m, use_cach=False), "did you mean `use_cache`"),
    "generate's": (
        lambda m: nothing(m, do_sample=True),
        "`do_sample=` .*`do_sample` is `generate`'s: `with model.generate",
    ),
    "of another tool": (lambda m: nothing(m, remote=True), "`remote=` is no keyword of `trace`"),
    "invoke": (lambda m: invoked(m, attenion_mask=IDS), "`invoke` .* did you mean `attention_mask`"),
    "sweep": (lambda m: m.sweep(body, IDS, over={"scale": [1.0]}, strore="x"), "`sweep` .* did you mean `store`"),
    "harvest": (lambda m: m.harvest([[3, 4]], "lm_head", "x", batchsize=2), "`harvest` .* did you mean `batch_size`"),
    "program": (lambda m: m.program(body, stopp=True), "`program` .* did you mean `stop`"),
    "scan": (lambda m: m.scan(IDS, pad_too=4), "`scan` .* did you mean `pad_to`"),
    "trace=False": (lambda m: m.trace(IDS, trace=False, compil=1), "did you mean `compile`"),
}


OF_THE_MODEL = {"the model's", "generate's", "of another tool", "invoke"}  # a shell may do with them what it likes


@pytest.mark.parametrize("make", [gpt2, lambda: Shell(gpt2()), llama], ids=["gpt2", "a shell", "llama"])
@pytest.mark.parametrize("name", list(MISSPELT))
def test_a_keyword_that_nobody_takes(name: str, make: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    do, told = MISSPELT[name]
    model = LanguageModel(make())
    if name in OF_THE_MODEL and isinstance(model._module, Shell):
        return
    with pytest.raises(TypeError, match=rf"^[^:]*test_keywords\.py:\d+: .*{told}"):
        do(model)
    assert model.tracer is None and not list(tmp_path.iterdir())
    nothing(model)


def test_keywords_that_are_taken() -> None:
    for make in (gpt2, llama, lambda: Shell(gpt2())):
        nothing(LanguageModel(make()), use_cache=False, output_attentions=False, return_dict=True, position_ids=IDS * 0)
    nothing(LanguageModel(t5()), decoder_input_ids=IDS, output_hidden_states=True)
    model = LanguageModel(gpt2())
    with model.trace({"input_ids": IDS, "of_my_own": 3}):  # what is among the inputs is nobody's keyword
        pass


class Halves(nn.Linear):
    def half(self, x: torch.Tensor) -> torch.Tensor:
        return self(x) / 2


def test_a_method_that_is_traced() -> None:
    model, x = NNsight(Halves(3, 3)), torch.ones(1, 3)
    with pytest.raises(TypeError, match="`y=` is no keyword of `trace` and none of the model's `half`; .*`x`"):
        with model.trace(x, fn="half", y=1):
            pass
    with model.trace(fn="half", x=x):
        out = model.output.save()
    assert out.shape == (1, 3)


def test_help_lists_all_options() -> None:
    model = NNsight(nn.Linear(2, 2))
    for verb, names in {
        "sweep": ("store", "seed", "executor", "chunk"),
        "harvest": ("shard_size", "positions", "dtype"),
    }.items():
        text = pydoc.plain(pydoc.render_doc(getattr(model, verb)))
        assert all(f"{name}:" in text.split("\n    ")[0] for name in names) and "Raises:" in text


def generated(model: Any, **kwargs: Any) -> None:
    with model.generate(IDS, **kwargs):
        pass


def cached(model: Any, **kwargs: Any) -> None:
    with model.trace(IDS) as tracer:
        tracer.cache(**kwargs)


OURS = {
    "generate, one letter": (
        lambda m: generated(m, max_new_token=3),
        "`max_new_token=` .*`generate`; did you mean `max_new",
    ),
    "generate, two letters": (
        lambda m: generated(m, do_smaple=True),
        "`do_smaple=` .*`generate`; did you mean `do_sample`",
    ),
    "generate, ours": (lambda m: generated(m, compil=False), "`compil=` .* did you mean `compile`"),
    "nearly generate's": (lambda m: nothing(m, do_smaple=True), "`do_sample` is `generate`'s: `with model.generate"),
    "compile": (lambda m: m.compile(bakend="eager"), "`bakend=` is no keyword of `compile`; did you mean `backend`"),
    "a dict": (
        lambda m: nothing(m, compile={"bakend": "eager"}),
        "`bakend=` is no keyword of `compile`; did you mean `ba",
    ),
    "a dict of a sweep": (
        lambda m: m.sweep(body, IDS, over={"scale": [1.0]}, compile={"bakend": "eager"}, progress=False),
        "`bakend=` is no keyword of `compile`; did you mean `backend`",
    ),
    "no dict": (
        lambda m: nothing(m, compile="eager"),
        "`compile=` is `False`, `True`, `\"auto\"`, or a dict .* it is 'eager'",
    ),
    "cache": (lambda m: cached(m, module=["lm_head"]), "`module=` is no keyword of `cache`; did you mean `modules`"),
    "edit": (lambda m: m.edit(inplac=True), "`inplac=` is no keyword of `edit`; did you mean `inplace`"),
    "session": (lambda m: m.session(seed=3), "`seed=` is no keyword of `session`"),
}


@pytest.mark.parametrize("name", list(OURS))
def test_a_keyword_that_a_verb_does_not_have(name: str) -> None:
    do, told = OURS[name]
    model = LanguageModel(gpt2())
    with pytest.raises((TypeError, ValueError), match=rf"^[^:]*test_keywords\.py:\d+: .*{told}"):
        do(model)
    assert model.tracer is None
    nothing(model)


def test_keywords_that_generate_takes() -> None:
    model = LanguageModel(gpt2())
    generated(
        model, max_new_tokens=2, do_sample=True, temperature=0.5, attention_mask=torch.ones_like(IDS), use_cache=False
    )
    with pytest.raises(ValueError, match="xyzzy"):  # which transformers itself refuses
        generated(model, max_new_tokens=2, xyzzy=2)


@pytest.mark.parametrize("backend", [None, 3, ["eager"]])
def test_what_is_no_backend(backend: object) -> None:
    model = NNsight(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"py:\d+: a backend is a name, or a function"):
        model.compile(backend=backend)
    assert model.compile(backend="eager") is None


def test_a_backend_that_torch_does_not_know() -> None:
    model = LanguageModel(gpt2())
    for do in (lambda: model.compile(backend="indcutor"), lambda: nothing(model, compile={"backend": "indcutor"})):
        with pytest.raises(ValueError, match=r"py:\d+: torch knows no backend `indcutor`; did you mean `inductor`\?"):
            do()
    model.compile(backend="aot_eager_decomp_partition", disable="read_positions")
    nothing(model)
