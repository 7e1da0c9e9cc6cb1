"""Objects in outputs (a KV cache, a result's class) that are saved are the model's own afterwards, wherever they go."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import nnsight_fx
from nnsight_fx import NNsight, UnsavedValueError

from ..equivalence.harness import ENGINES, same, wrap

IDS, NEXT = torch.tensor([[3, 5, 7, 9], [2, 4, 6, 8]]), torch.tensor([[11], [13]])


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=1))


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes))


class Plain:
    def __init__(self, h):
        self.h, self.names = h, ["a", "b"]

    def __eq__(self, other):
        return isinstance(other, Plain) and torch.equal(self.h, other.h)

    def __len__(self):
        return 7


class Slots:
    __slots__ = ("h",)

    def __init__(self, h):
        self.h = h


class Bag(dict):
    def __init__(self, h):
        super().__init__(h=h)
        self.h, self.more = h, torch.ones(1)  # data beside its items


class Inner(nn.Module):
    def __init__(self, kind: type):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(3, 3)

    def forward(self, x):
        h = self.linear(x)
        return {"state": self.kind(h), "count": 1}


class Holder(nn.Module):
    """An inner module that gives an object of a class of the user's."""

    def __init__(self, kind: type):
        super().__init__()
        self.inner = Inner(kind)

    def forward(self, x):
        return self.inner(x)["state"].h * 2


def built(make: Callable[[], nn.Module], engine: str) -> NNsight:
    torch.manual_seed(0)
    return wrap(make().eval().requires_grad_(False), engine)


def cache_of(model: NNsight, ids: torch.Tensor = IDS, **inputs) -> object:
    with torch.no_grad(), model.trace(ids, **inputs):
        cache = nnsight_fx.save(model.output.past_key_values)
    return cache


def cache_by_hand(model: NNsight, ids: torch.Tensor = IDS) -> object:
    with torch.no_grad():
        return model._module(ids).past_key_values


# -- what is done with a saved cache: `(model, cache) -> value` ---------------------------------------------------------


def into_the_next_trace(model, cache):
    with model.trace(NEXT, past_key_values=cache):
        logits = model.output.logits.save()
    return logits


def into_a_plain_forward(model, cache):
    return model._module(NEXT, past_key_values=cache).logits


def copied(model, cache):
    other = copy.copy(cache)
    return type(other), other is cache, other.layers[0].keys


def deep_copied(model, cache):
    other = copy.deepcopy(cache)
    other.layers[0].keys.zero_()
    return type(other), cache.layers[0].keys, cache.get_seq_length()


def pickled(model, cache):
    other = pickle.loads(pickle.dumps(cache))
    return type(other), other.layers[1].values, other.get_seq_length()


def looked_at(model, cache):
    return isinstance(cache, DynamicCache), type(cache), sorted(vars(cache)), len(cache), cache == cache, cache is None


def changed(model, cache):
    cache.crop(-2)
    cache.note = "mine"
    return cache.get_seq_length(), cache.note, model._module(NEXT, past_key_values=cache).logits


def weakly_held(model, cache):
    ref = weakref.ref(cache)
    return ref() is cache, {cache: 1}[cache]


def in_a_batch_of_beams(model, cache):
    cache.reorder_cache(torch.tensor([1, 0]))
    return cache.layers[0].keys


def used_twice(model, cache):
    first = copy.deepcopy(cache)
    return into_the_next_trace(model, first), into_the_next_trace(model, cache), cache.get_seq_length()


def steered_behind_it(model, cache):
    with model.trace(NEXT, past_key_values=cache):
        kept = nnsight_fx.save({"out": model.output})
    return kept["out"].logits, kept["out"].past_key_values.get_seq_length(), cache.get_seq_length()


PROGRAMS = (
    *(into_the_next_trace, into_a_plain_forward, copied, deep_copied, pickled, looked_at, changed, weakly_held),
    *(in_a_batch_of_beams, used_twice, steered_behind_it),
)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_saved_cache_is_the_models_own(make, engine):
    model = built(make, engine)
    with torch.no_grad():
        for program in PROGRAMS:
            got, want = program(model, cache_of(model)), program(model, cache_by_hand(model))
            same(got, want, engine != "aot_eager", program.__name__)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cache_in_a_cache(engine):
    model = built(t5, engine)
    with torch.no_grad():
        with model.trace(input_ids=IDS, decoder_input_ids=NEXT):
            cache = nnsight_fx.save(model.output.past_key_values)
            states = model.output.encoder_last_hidden_state.save()
        assert type(cache) is EncoderDecoderCache and cache.get_seq_length() == 1
        want = model._module(input_ids=IDS, decoder_input_ids=NEXT)
        again = {"decoder_input_ids": NEXT, "encoder_outputs": (states,)}
        got = model._module(past_key_values=copy.deepcopy(cache), **again).logits
        torch.testing.assert_close(got, model._module(past_key_values=want.past_key_values, **again).logits)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cache_flows_through_a_session(engine):
    model = built(gpt2, engine)
    with torch.no_grad(), model.session():
        with model.trace(IDS):
            cache = model.output.past_key_values
        with model.trace(NEXT, past_key_values=cache):
            logits = model.output.logits.save()
        length = cache.get_seq_length()
    with torch.no_grad():
        want = model._module(NEXT, past_key_values=cache_by_hand(model)).logits
    torch.testing.assert_close(logits, want)
    assert length == 5


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cache_that_its_session_saves(engine):
    model = built(gpt2, engine)
    with torch.no_grad(), model.session():
        kept = nnsight_fx.save([])
        with model.trace(IDS):
            kept.append(model.output.past_key_values)
    assert type(kept[0]) is DynamicCache and copy.deepcopy(kept[0]).get_seq_length() == 4


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [Plain, Slots, Bag])
def test_objects_of_any_class(kind, engine):
    """Where Python cannot change an object's class, it passes everything on."""
    model, x = built(lambda: Holder(kind), engine), torch.randn(2, 3)
    with model.trace(x):
        state = model.inner.output["state"].save()
        out = model.output.save()
        deep = copy.deepcopy(model.inner.output["state"])
    assert isinstance(state, kind)
    for each in (state, deep, copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert isinstance(each, kind) and torch.equal(each.h * 2, out)
    want = model._module.inner(x)["state"]
    assert torch.equal(state.h, want.h) and bool(state) is bool(want)
    if kind is not Slots:
        assert len(state) == len(want) and not callable(state)
    state.h = 3
    assert state.h == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_an_object_is_an_argument_of_a_function(engine):
    model, x = built(lambda: Holder(Plain), engine), torch.randn(2, 3)
    with model.trace(x) as tracer:
        state = model.inner.output["state"]
        kind = tracer.apply(lambda s: (type(s), s.h.sum()), state)
        out = model.output.save()
    assert kind[0] is Plain and torch.allclose(kind[1] * 2, out.sum())


@pytest.mark.parametrize("engine", ENGINES)
def test_an_object_is_written_back(engine):
    """A tree that holds an object of its own site is written: the object stays the model's."""
    model, x = built(lambda: Holder(Plain), engine), torch.randn(2, 3)
    with model.trace(x):
        model.inner.output = {**model.inner.output, "count": 5}
        kept = nnsight_fx.save(model.inner.output)
        out = model.output.save()
    assert kept["count"] == 5 and type(kept["state"]) is Plain and torch.equal(kept["state"].h * 2, out)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "do",
    [len, copy.copy, copy.deepcopy, pickle.dumps, lambda s: s.h],
    ids=["len", "copy", "deepcopy", "pickle", "attribute"],
)
def test_what_was_not_saved_says_so(do, engine):
    model = built(lambda: Holder(Plain), engine)
    with model.trace(torch.randn(2, 3)):
        state = model.inner.output["state"]
    with pytest.raises(UnsavedValueError, match=r"`inner.output`, made at .* not saved"):
        do(state)
    with model.scan(torch.randn(2, 3)):
        state = nnsight_fx.save(model.inner.output["state"])
    with pytest.raises(UnsavedValueError, match=r"a scan, which runs nothing"):
        do(state)
