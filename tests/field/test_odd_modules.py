"""Modules that are quantised or offloaded, called on values in a body; and modules that are copied after a trace."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn as nn
from transformers import GPT2Config, GPT2LMHeadModel

import nnsight_fx
from nnsight_fx import NNsight

from ..equivalence.harness import ENGINES, same, wrap


class Rounded(nn.Module):
    """Eight bits a weight; the scale is a plain attribute."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("rounded", torch.round(weight / self.scale).to(torch.int8))
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x):
        return nn.functional.linear(x, self.rounded.float() * self.scale, self.bias)


class Packed(nn.Parameter):
    """A parameter of a class of its own, with state, as four-bit weights are."""

    def __new__(cls, data, state=None):
        made = torch.Tensor._make_subclass(cls, data, False)
        made.state = state
        return made

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), type(self)(self.data.clone(), self.state))

    def __reduce_ex__(self, protocol):
        return type(self), (torch.Tensor(self.data.float()).to(torch.int8), self.state)


class FourBit(nn.Module):
    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = float(weight.abs().max() / 7)
        self.weight, self.bias = Packed(torch.round(weight / scale).to(torch.int8), scale), linear.bias

    def forward(self, x):
        if type(self.weight) is not Packed:
            raise TypeError("the weight is not packed")
        return nn.functional.linear(x, self.weight.data.float() * self.weight.state, self.bias)


def dynamic(linear: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)


def offloaded(linear: nn.Linear) -> nn.Module:
    from accelerate import cpu_offload

    module = nn.Sequential(linear)
    cpu_offload(module, execution_device=torch.device("cpu"))
    return module


class Net(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), make(nn.Linear(4, 4))

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


MAKES = {"plain": lambda m: m, "rounded": Rounded, "four bits": FourBit, "dynamic": dynamic, "offloaded": offloaded}


def built(kind: str, engine: str) -> NNsight:
    torch.manual_seed(0)
    net = Net(MAKES[kind]).eval()
    for p in net.parameters():
        p.requires_grad_(False)
    return wrap(net, engine)


# -- `(model, x) -> value`, and the same by hand -----------------------------------------------------------------------


def called(model, x):
    with model.trace(x):
        found = model.head(model.body.output * 2).save()
    return found


def called_in_sight(model, x):
    with model.trace(x):
        found = model.head(model.body.output * 2, hook=True).save()
    return found


def called_twice(model, x):
    with model.trace(x):
        found = model.head(model.head(model.body.output))
        found = (found + 1).save()
    return found


def written_back(model, x):
    with model.trace(x):
        model.body.output = model.head(model.body.output)
        found = model.output.save()
    return found


def of_each_invoke(model, x):
    with model.trace() as tracer:
        a, b = tracer.batch(x, x + 1)
        with a:
            one = model.head(model.body.output).save()
        with b:
            two = model.head(model.body.output * 3).save()
    return one, two


def read_and_written(model, x):
    with model.trace(x):
        model.body.output = model.body.output * 2
        model.head.output += 1
        found = model.head.output.save()
    return found


PROGRAMS = {
    called: lambda m, x: m.head(m.body(x) * 2),
    called_in_sight: lambda m, x: m.head(m.body(x) * 2),
    called_twice: lambda m, x: m.head(m.head(m.body(x))) + 1,
    written_back: lambda m, x: m.head(torch.tanh(m.head(m.body(x)))),
    of_each_invoke: lambda m, x: (m.head(m.body(x)), m.head(m.body(x + 1) * 3)),
    read_and_written: lambda m, x: m.head(torch.tanh(m.body(x) * 2)) + 1,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", MAKES)
def test_a_module_on_values(kind, engine):
    model = built(kind, engine)
    with torch.no_grad():
        for program, by_hand in PROGRAMS.items():
            for seed in range(2):
                x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
                got, want = program(model, x), by_hand(model._module, x)
                torch.testing.assert_close(got, want, msg=lambda m, p=program: f"{p.__name__}: {m}")


@pytest.mark.parametrize("kind", ["rounded", "four bits"])
def test_a_shape_that_does_not_fit_is_the_models_error(kind):
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model = built(kind, "hooks")
        with model.trace(torch.randn(2, 4)):
            model.head(model.body.output[:, :3])


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=1))


def steer(model, x):
    model.transformer.h[0].output += 1


def reshape(model, x):
    model.lm_head.output = model.lm_head.output[:, -1:]


def skip(model, x):
    model.transformer.h[1].skip(model.transformer.h[1].input)


def look(model, x):
    model.transformer.h[0].output.sum().item()


def inside(model, x):
    model.transformer.h[0].mlp.source.self_act_0.output.save()


@pytest.mark.parametrize("engine", [*ENGINES, "symbolic"])
def test_a_module_is_copied_after_a_trace(engine):
    """The model is what it was: it can be pickled, copied, saved, and its copies are wrapped."""
    torch.manual_seed(0)
    model, ids = wrap(gpt2().eval().requires_grad_(False), engine), torch.tensor([[3, 5, 7]])
    plain = model._module
    want = plain(ids).logits
    before = {name: sorted(vars(m)) for name, m in plain.named_modules()}
    for body in (steer, reshape, skip, look, inside) if engine != "symbolic" else (steer, reshape, skip):
        with model.trace(ids):
            body(model, ids)
            kept = nnsight_fx.save(model.transformer.h[0].output)
        copies = [copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))]
        for each in copies:
            same(each(ids).logits, want, True, body.__name__)
        assert {name: sorted(vars(m)) for name, m in plain.named_modules()} == before
    again = wrap(copies[1], engine)
    with again.trace(ids):
        steer(again, ids)
        found = again.transformer.h[0].output.save()
    with model.trace(ids):
        steer(model, ids)
        kept = model.transformer.h[0].output.save()
    same(found, kept, engine != "aot_eager")
