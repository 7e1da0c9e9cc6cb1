"""A module that is put into the tree behind the wrapper is seen: by traces, by generations, and by what was captured."""

import pytest
import torch
import torch.nn as nn
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight_fx import LanguageModel, NNsight


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) * 2


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=49)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def wrap(module):
    block = module.transformer.h[2]
    block.mlp = Twice(block.mlp)


def replace(module):
    torch.manual_seed(1)
    module.transformer.h[2].mlp.c_fc = type(module.transformer.h[2].mlp.c_fc)(64, 16)


def remove(module):
    del module.transformer.h[2]


def hook(module):
    replace(module)
    module.transformer.h[2].mlp.c_fc.register_forward_hook(lambda m, args, out: out * 3)


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("change", [wrap, replace, remove, hook])
def test_a_trace_after_a_change(change, backend):
    module, ids = gpt2(), torch.randint(1, 50, (1, 6))
    model = NNsight(module)
    if backend:
        model.compile(backend=backend)
    for _ in range(2):
        with model.trace(ids):
            model.transformer.h[1].output[0][:] += 1
            before = model.lm_head.output.save()
    change(module)
    for each in (module, model):
        if each is module:
            added = module.transformer.h[1].register_forward_hook(
                lambda m, args, out: (out[0] + 1, *out[1:]) if isinstance(out, tuple) else out + 1
            )
            wanted = module(ids).logits
            added.remove()
        else:
            with model.trace(ids):
                h = model.transformer.h[1].output
                h[:] += 1
                got = model.lm_head.output.save()
    assert not torch.equal(before, got)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("change", [wrap, replace, hook])
def test_a_generation_after_a_change(change, backend):
    module, ids = gpt2(), torch.randint(1, 50, (1, 6))
    model = LanguageModel(module)
    if backend:
        model.compile(backend=backend)
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    with model.generate(ids, **options) as tracer:
        result = tracer.result.save()
    assert torch.equal(result, module.generate(ids, **options))
    change(module)
    with model.generate(ids, **options) as tracer:
        for _ in tracer.iter[:2]:
            kept = model.transformer.h[2].output.save()
        result = tracer.result.save()
    assert kept is not None and torch.equal(result, module.generate(ids, **options))
