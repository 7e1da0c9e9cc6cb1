"""Tensors of other classes: as weights they are the model's business, as values they are supported or refused by name."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor, init_device_mesh

import nnsight_fx
from nnsight_fx import NNsight, NotRecordableError, assert_no_fallback

ENGINES = {
    "hooks": False,
    "eager": {"backend": "eager"},
    "aot_eager": {"backend": "aot_eager"},
    "symbolic": {"backend": "eager", "capture": "symbolic"},
}
engines = pytest.mark.parametrize("engine", ENGINES)


class Int8(torch.Tensor):
    """A quantised weight, as torchao has them: `linear` multiplies what it stands for."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype, device=numbers.device)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Int8(inner["numbers"], inner["scale"])

    def __repr__(self):
        return "Int8(...)"

    def dequantize(self):
        return self.numbers.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, *bias = args
            return func(x, weight.dequantize(), *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func.overloadpacket in (
            torch.ops.aten.detach,
            torch.ops.aten.clone,
            torch.ops.aten.alias,
            torch.ops.aten.view,
        ):
            return Int8(func(args[0].numbers, *args[1:]), args[0].scale)
        raise NotImplementedError(func)


class Packs(nn.Module):
    """Its value between the layers is of another kind: quantised, sparse."""

    def __init__(self, pack, unpack):
        super().__init__()
        self.a, self.q, self.b, self.pack, self.unpack = nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4), pack, unpack

    def forward(self, x):
        return self.b(self.unpack(self.q(self.pack(self.a(x)))))


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).requires_grad_(False)


def int8():
    module = plain()
    for layer in (module[0], module[2]):
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        layer.weight = nn.Parameter(Int8((layer.weight / scale).round().to(torch.int8), scale), requires_grad=False)
    return module


def dynamic():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao says where it moves to
        return torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear}, dtype=torch.qint8)


def steer(model, compile, x):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # a copy of a packed weight goes by TypedStorage
        with model.trace(x, compile=compile) as tracer:
            model[0].output[:, 1:] += 1
            inner = model[1].output.save()
            result = nnsight_fx.save(tracer.result)
    return inner, result


@engines
@pytest.mark.parametrize("make", [int8, dynamic])
def test_quantised_weights(make, engine):
    module, x = make(), torch.randn(2, 4)
    model = NNsight(module)
    for _ in range(2):
        with contextlib.nullcontext() if engine == "symbolic" else assert_no_fallback():
            inner, result = steer(model, ENGINES[engine], x)
        h = module[0](x)
        h[:, 1:] += 1
        exact = {"rtol": 0, "atol": 0} if engine != "aot_eager" else {}
        torch.testing.assert_close([inner, result], [module[1](h), module[2](module[1](h))], **exact)
    if engine == "symbolic":
        text = "it uses a Int8" if make is int8 else "an operation is called with a ScriptObject"
        assert f"could not be traced symbolically: {text}" in str(model.explain())


@engines
def test_values_of_another_layout(engine):
    module = Packs(lambda h: h.relu().to_sparse(), lambda h: h.to_dense()).requires_grad_(False)
    model, x = NNsight(module), torch.randn(2, 4)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # nothing of it may be captured
        with model.trace(x, compile=ENGINES[engine]) as tracer:
            kept = model.q.output.save()
            dense = model.q.output.to_dense().save()
            result = nnsight_fx.save(tracer.result)
    want = module.pack(module.a(x))
    assert kept.layout is torch.sparse_coo
    torch.testing.assert_close(
        [kept.to_dense(), dense, result], [want.to_dense(), want.to_dense(), module(x)], rtol=0, atol=0
    )


@engines
def test_quantised_values_are_refused_by_name_and_what_is_behind_them_is_not(engine):
    module = Packs(
        lambda h: torch.quantize_per_tensor(h, 0.1, 0, torch.qint8), lambda h: h.dequantize()
    ).requires_grad_(False)
    model, x = NNsight(module), torch.randn(2, 4)
    with torch.no_grad():
        with pytest.raises(
            NotRecordableError, match=rf"{__file__}:\d+: `q.output` holds a quantised tensor \(torch.qint8\)"
        ):
            with model.trace(x, compile=ENGINES[engine]):
                model.q.output.save()
        with model.trace(x, compile=ENGINES[engine]):
            model.a.output += 1
            inner, result = model.b.input.save(), model.output.save()
        want = module.pack(module.a(x) + 1).dequantize()
    torch.testing.assert_close([inner, result], [want, module.b(want)], rtol=0, atol=0)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def refuses(model, x, engine, kind):
    text = rf"{__file__}:\d+: `0.output` holds a {kind}, a tensor of a class of its own.*register_forward_hook"
    with pytest.raises(NotRecordableError, match=text), torch.no_grad():
        with model.trace(x, compile=ENGINES[engine]):
            model[0].output.save()
    assert not any(m._forward_hooks for m in model._module.modules())


@engines
def test_a_dtensor_is_refused_by_name(engine, mesh):
    module = distribute_module(plain(), mesh)
    x = distribute_tensor(torch.randn(2, 4), mesh, [Shard(0)])
    refuses(NNsight(module), x, engine, "DTensor")
    assert isinstance(module(x), DTensor)


@engines
def test_a_nested_tensor_is_refused_by_name(engine):
    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    refuses(NNsight(plain()), x, engine, "NestedTensor")


class Tagged(torch.Tensor):
    """A tensor with another name."""


@engines
def test_an_input_of_a_class_of_its_own_runs_on_hooks(engine):
    module, x = plain(), torch.randn(2, 4)
    model = NNsight(module)
    inner, result = steer(model, ENGINES[engine], x.as_subclass(Tagged))
    h = module[0](x)
    h[:, 1:] += 1
    torch.testing.assert_close([inner, result], [module[1](h), module[2](module[1](h))], rtol=0, atol=0)
    assert ("called with a Tagged" in str(model.explain())) == (engine != "hooks")
