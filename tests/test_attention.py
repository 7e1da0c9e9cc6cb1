"""Attention weights under a kernel that gives none: an error at the user's line, in every engine, that says how to get them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import nnsight_fx
from nnsight_fx import NNsight, WeightsNotComputedError
from nnsight_fx.envoys.envoy import path_of

IDS = torch.tensor([[5, 7, 11]])
ENGINES = ["hooks", "eager", "aot_eager"]


def llama(attention: str = "sdpa", engine: str = "hooks") -> NNsight:
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation=attention,
    )
    return wrapped(LlamaForCausalLM(config), engine)


def gpt2(attention: str = "sdpa", engine: str = "hooks") -> NNsight:
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=20, attn_implementation=attention)
    return wrapped(GPT2LMHeadModel(config), engine)


def wrapped(module: torch.nn.Module, engine: str) -> NNsight:
    model = NNsight(module.eval())
    if engine != "hooks":
        model.compile(backend=engine)
    return model


def attention_of(model: NNsight):
    return (
        model.transformer.h[0].attn
        if "transformer" in dict(model._module.named_children())
        else model.model.layers[0].self_attn
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", [llama, gpt2])
def test_asking_for_them_says_how_to_get_them(family, engine):
    model = family(engine=engine)
    path = path_of(attention_of(model))
    with pytest.raises(WeightsNotComputedError) as error, model.trace(IDS):
        attention_of(model).output[1].save()
    text = str(error.value)
    assert text.startswith(f"{__file__}:") or "test_attention.py:" in text.split(" ")[0]
    assert f'`{path}.output[1]` is None: attn_implementation="sdpa"' in text
    assert 'attn_implementation="eager"' in text and f"{path}.source.attention_interface_0.source." in text


@pytest.mark.parametrize("engine", ENGINES)
def test_unpacked_they_are_none_and_using_them_is_explained(engine):
    model = llama(engine=engine)
    with model.trace(IDS):
        _, weights = attention_of(model).output
        assert weights is None
    with pytest.raises(TypeError) as error, model.trace(IDS):
        _, weights = attention_of(model).output
        weights[0, 0]
    assert any('attn_implementation="eager"' in note for note in error.value.__notes__)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_output_is_the_tuple_that_it_was(engine):
    model = llama(engine=engine)
    with torch.no_grad(), model.trace(IDS):
        attention = attention_of(model).output
        assert isinstance(attention, tuple) and len(attention) == 2 and attention[1:] == (None,)
        plain = attention[0].clone().save()
        whole = nnsight_fx.save(attention_of(model).output)
        attention_of(model).output = (attention[0] * 0, *attention[1:])
        zero = attention_of(model).output[0].save()
    with pytest.raises(WeightsNotComputedError):
        whole[1]
    assert type(copy.deepcopy(whole)) is tuple
    assert torch.equal(whole[0], plain) and zero.abs().sum() == 0 and plain.abs().sum() > 0
    with torch.no_grad(), model.trace(IDS):
        attention_of(model).output = attention_of(model).output  # written back as it was read
        same = attention_of(model).output[-2].save()
    assert torch.equal(same, plain)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", [llama, gpt2])
def test_what_the_message_names_works(family, engine):
    model = family("eager", engine)
    with torch.no_grad(), model.trace(IDS):
        softmax = attention_of(model).source.attention_interface_0.source.nn_functional_softmax_0.output.save()
        weights = attention_of(model).output[1].save()
    assert weights.shape == (1, 2, 3, 3)
    torch.testing.assert_close(softmax, weights)
    kernel = family(engine=engine)
    with torch.no_grad(), kernel.trace(IDS):
        (_, query, key, *_), _ = attention_of(kernel).source.attention_interface_0.inputs
        query, key = query.save(), key.save()
    assert query.shape[-1] == key.shape[-1] == 8


@pytest.mark.parametrize("family", [llama, gpt2])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_is_switched(family, engine):
    """What a trace saw of a model is not what the next one sees, where a configuration was changed in between."""
    model = family(engine=engine)
    with torch.no_grad(), model.trace(IDS):
        before = model.output.logits.save()
    with torch.no_grad(), pytest.warns(UserWarning, match=r"py:\d+: `output_attentions=True` gives nothing: attn_imp"):
        with model.trace(IDS, output_attentions=True) as tracer:
            none = nnsight_fx.save(tracer.result.attentions)
    model.set_attn_implementation("eager")
    with torch.no_grad(), model.trace(IDS, output_attentions=True) as tracer:
        weights = attention_of(model).output[1].save()
        told = tracer.result.attentions[0].save()
        logits = model.output.logits.save()
    assert none == () and weights.shape == (1, 2, 3, 3)
    torch.testing.assert_close(told, weights)
    torch.testing.assert_close(logits, before)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_operation_that_the_kernel_hides(engine):
    model = llama(engine=engine)
    with pytest.raises(nnsight_fx.UnknownOperationError, match='load the model with `attn_implementation="eager"`'):
        with model.trace(IDS):
            attention_of(model).source.attention_interface_0.source.nn_functional_softmax_0.output.save()


def test_another_tuple_with_none_is_left_alone():
    class Attention(torch.nn.Module):
        def forward(self, x):
            return x, None

    with NNsight(Attention()).trace(torch.ones(1, 2)) as tracer:
        assert tracer.output[1] is None


@pytest.mark.parametrize("engine", ENGINES)
def test_its_output_is_called_a_tuple(engine):
    model, notes = llama(engine=engine), []
    for name in ("save", "shape"):
        with (
            pytest.raises(AttributeError, match=f"^'tuple' object has no attribute '{name}'") as error,
            model.trace(IDS),
        ):
            getattr(attention_of(model).output, name)
        notes += error.value.__notes__
    assert (
        "`nnsight_fx.save(value)`" in notes[0]
        and "a tuple of 2; its item `[0]` is a tensor: `value[0].shape`" in notes[1]
    )
    with model.trace(IDS):
        found = attention_of(model).output
        assert not hasattr(found, "save") and isinstance(copy.copy(found), tuple)
        kept = nnsight_fx.save(found)
    assert type(pickle.loads(pickle.dumps(kept))) is tuple
    with pytest.raises(TypeError, match="must be Tensor, not tuple"), model.trace(IDS):
        torch.relu(attention_of(model).output)


def test_a_misspelt_method_of_a_value():
    model = llama()
    with pytest.raises(AttributeError) as error, model.trace(IDS):
        model.lm_head.output.meen()
    assert error.value.__notes__ == ["nnsight_fx: it is a tensor of this trace; did you mean `mean`, `median`, `min`?"]
    with (
        pytest.raises(AttributeError, match="a module's value is its `.output` or `.input`: `.output.save`"),
        model.trace(IDS),
    ):
        model.lm_head.save()
    with pytest.raises(AttributeError, match="has no `save`: it is an operation, whose values are"), model.trace(IDS):
        attention_of(model).source.attention_interface_0.save()
