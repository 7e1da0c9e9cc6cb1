"""What may change, or go on, around traces: adapters, devices, flags of the process, tasks and threads."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import threading
import weakref

import accelerate
import pytest
import torch
import torch.nn as nn

import nnsight_fx
from nnsight_fx import NestedTraceError, NNsight, assert_max_compiles, assert_no_fallback

ENGINES = ["hooks", "eager", "symbolic", "aot_eager"]
engines = pytest.mark.parametrize("engine", ENGINES)


def wrap(module, engine):
    model = NNsight(module)
    if engine == "symbolic":
        model.compile(backend="eager", capture="symbolic")
    elif engine != "hooks":
        model.compile(backend=engine)
    return model


def net(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).requires_grad_(False)


def steer(model, x, at="0"):
    with model.trace(x) as tracer:
        model.get(at).output[:, 0] += 1
        inner = model.get(at).output.save()
        result = nnsight_fx.save(tracer.result)
    return [inner, result]


def steered(module, x, at="0"):
    kept = []

    def hook(m, args, out):
        out = out.clone()
        out[:, 0] += 1
        kept.append(out)
        return out

    handle = module.get_submodule(at).register_forward_hook(hook)
    result = module(x)
    handle.remove()
    return [*kept, result]


def same(got, want, engine):
    torch.testing.assert_close(got, want, **({} if engine == "aot_eager" else {"rtol": 0, "atol": 0}))


# -- adapters ---------------------------------------------------------------------------------------------------------


class LoraLinear(nn.Module):
    """In the shape of peft's `lora.Linear`: the layer inside, dicts of adapters, dropout, scaling, merging in place."""

    def __init__(self, base_layer, rank=2):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B, self.lora_dropout = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.scaling, self.merged_adapters, self._active_adapter, self._disable_adapters = {}, [], [], False
        self.r, self.width = {}, base_layer.in_features
        self.add("default", rank)

    def add(self, name, rank):
        self.r[name], self.scaling[name] = rank, 16 / rank
        self.lora_A[name] = nn.Linear(self.width, rank, bias=False).requires_grad_(False)
        self.lora_B[name] = nn.Linear(rank, self.base_layer.out_features, bias=False).requires_grad_(False)
        self.lora_dropout[name] = nn.Dropout(0.1).train(self.training)
        self._active_adapter = [name]

    @property
    def merged(self):
        return bool(self.merged_adapters)

    def delta(self, name):
        return self.lora_B[name].weight @ self.lora_A[name].weight * self.scaling[name]

    def merge(self):
        for name in self._active_adapter:
            self.base_layer.weight.data += self.delta(name)
            self.merged_adapters.append(name)

    def unmerge(self):
        while self.merged_adapters:
            self.base_layer.weight.data -= self.delta(self.merged_adapters.pop())

    def forward(self, x, *args, **kwargs):
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        kind = result.dtype
        for name in self._active_adapter:
            if name not in self.lora_A:
                continue
            x = x.to(self.lora_A[name].weight.dtype)
            result = result + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
        return result.to(kind)


class PeftModel(nn.Module):
    """What peft wraps a model in: two levels, and attributes that are looked up inside."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model").model, name)

    def forward(self, *args, **kwargs):
        return self.base_model.model(*args, **kwargs)


def adapted():
    module = net().eval()
    for i in (0, 2):
        module[i] = LoraLinear(module[i])
    return PeftModel(module).eval()


def each(module, change):
    for m in module.modules():
        if isinstance(m, LoraLinear):
            change(m)


def deactivate(m):
    m._disable_adapters = True


def activate(m):
    m._disable_adapters = False


CHANGES = {
    "as it is": lambda m: None,
    "merged": LoraLinear.merge,
    "unmerged": LoraLinear.unmerge,
    "scaled": lambda m: m.scaling.update(default=3.0),
    "a second adapter": lambda m: m.add("second", 3),
    "disabled": deactivate,
    "enabled": activate,
    "trained in place": lambda m: m.lora_B["second"].weight.add_(1),
}


@engines
@pytest.mark.parametrize(
    "at",
    [
        "base_model.model.0",
        pytest.param("base_model.model.0.lora_A.default", marks=pytest.mark.slow),
        pytest.param("base_model.model.0.base_layer", marks=pytest.mark.slow),
    ],
)
def test_a_peft_model_and_all_that_happens_to_its_adapters(engine, at):
    """At the adapter, around it and in it; after each change the next trace is that of the changed model."""
    torch.manual_seed(1)
    module, x = adapted(), torch.randn(3, 8)
    model, outputs = wrap(module, engine), []
    for name, change in CHANGES.items():
        torch.manual_seed(2)
        each(module, change)
        if "lora_A" in at and name in ("merged", "a second adapter", "disabled", "enabled", "trained in place"):
            continue  # the adapter is not called
        for again in range(2):
            with assert_no_fallback(), assert_max_compiles(0 if again else 9):
                got = steer(model, x, at)
            same(got, steered(module, x, at), engine)
        outputs.append(got[1])
    assert len({tuple(y.flatten().tolist()) for y in outputs}) > (1 if "lora_A" in at else 4)


# -- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_a_device_map(engine, kind, tmp_path):
    """Parts dispatched by accelerate: on the CPU, or on disk and brought in for each call."""
    plain, x = net(), torch.randn(3, 8)
    device_map = {"0": "cpu", "1": "cpu", "2": kind}
    module = accelerate.dispatch_model(net(), device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert next(module[2].parameters()).device.type == ("cpu" if kind == "cpu" else "meta")
    model = wrap(module, engine)
    for at in ("0", "2"):
        same(steer(model, x, at), steered(plain, x, at), engine)
    assert next(module[2].parameters()).device.type == ("cpu" if kind == "cpu" else "meta")
    if kind == "disk" and engine != "hooks":
        assert "fallback: hook engine" in str(model.explain())


# -- the process ------------------------------------------------------------------------------------------------------


@engines
def test_deterministic_mode(engine):
    """Seen by the model, in both orders, and as it was afterwards; an operation that has no such kernel is eager's error."""

    class Looks(nn.Module):
        def forward(self, x):
            return x * (2 if torch.are_deterministic_algorithms_enabled() else 3)

    module, x = nn.Sequential(nn.Linear(8, 8), Looks()).requires_grad_(False), torch.randn(3, 8)
    model = wrap(module, engine)
    for on in (False, True, False):
        torch.use_deterministic_algorithms(on)
        try:
            same(steer(model, x), steered(module, x), engine)
            assert torch.are_deterministic_algorithms_enabled() == on
        finally:
            torch.use_deterministic_algorithms(False)


@engines
def test_a_server_keeps_a_lock_a_model(engine):
    """Tasks and threads that share a model: without a lock the second trace is refused, and harms neither; with one both are right."""
    module = net()
    model, x = wrap(module, engine), torch.randn(2, 3, 8)
    steer(model, x[0])
    line = rf"{re.escape(__file__)}:\d+: .*{re.escape(__file__.rpartition('/')[2])}:\d+"

    async def request(i, lock):
        async with lock or contextlib.AsyncExitStack():
            with model.trace(x[i]) as tracer:
                await asyncio.sleep(0)  # the other task's turn
                model[0].output[:, 0] += 1
                inner = model[0].output.save()
                result = nnsight_fx.save(tracer.result)
            return [inner, result]

    async def serve(lock):
        return await asyncio.gather(request(0, lock), request(1, lock), return_exceptions=True)

    first, second = asyncio.run(serve(None))
    same(first, steered(module, x[0]), engine)
    assert isinstance(second, NestedTraceError) and re.search(line, str(second)), second
    for i, got in enumerate(asyncio.run(serve(asyncio.Lock()))):
        same(got, steered(module, x[i]), engine)
    raised: list[BaseException] = []

    def other():
        try:
            steer(model, x[1])
        except NestedTraceError as error:
            raised.append(error)

    with model.trace(x[0]) as tracer:
        thread = threading.Thread(target=other)
        thread.start(), thread.join()
        model[0].output[:, 0] += 1
        result = nnsight_fx.save(tracer.result)
    assert len(raised) == 1 and re.search(line, str(raised[0]))
    same([result], steered(module, x[0])[1:], engine)


@pytest.mark.parametrize("reader", ["1", "2"])
def test_what_nobody_saves_is_freed_when_its_last_reader_is_done(reader):
    """A value that is used at an earlier site than the one that looks is gone by then; one that is used there is not."""
    module, x, refs, alive = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), torch.randn(2, 8), [], []
    module.requires_grad_(False)[0].register_forward_hook(lambda m, args, out: refs.append(weakref.ref(out)))

    def look(m, args):
        gc.collect()
        alive.append(refs[-1]() is not None)

    module[2].register_forward_pre_hook(look)
    model = NNsight(module)
    with model.trace(x):
        h = model[0].output
        model.get(reader).output = model.get(reader).output + h
        out = model.output.save()
    assert alive == [reader == "2"]
    h0 = module[0](x)
    h1 = module[1](h0) + (h0 if reader == "1" else 0)
    torch.testing.assert_close(out, module[3](module[2](h1) + (h0 if reader == "2" else 0)), rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["eager", "symbolic"])
def test_a_graph_gives_out_what_is_saved_and_nothing_else(engine):
    model = wrap(net(), engine)
    with model.trace(torch.randn(2, 8)):
        h = model[0].output * 2
        model[2].output = model[2].output + h
        saved = (h + 1).save()
    (capture,) = model._host.captures.values()
    ((variant,),) = capture.segments[0].variants.values()
    assert len(variant.gives) == 1 and saved.shape == (2, 8)


class Told(nn.Module):
    """A module that puts something on an activation, and one behind a border that looks for it."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.first, self.second = kind, nn.Linear(8, 8), Listens()

    def forward(self, x):
        given = x
        x = self.first(x)
        if self.kind == "flag":
            x.flag = True
        elif self.kind == "tensor":
            x.shift = x.mean(0, keepdim=True)
        elif self.kind == "the input's":
            x.flag = getattr(given, "flag", False)
        return self.second(x)


class Listens(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(x)
        if getattr(x, "flag", False):
            y = y + 100
        return y + x.shift if hasattr(x, "shift") else y


@engines
@pytest.mark.parametrize("kind", ["flag", "tensor", "the input's", "none"])
def test_what_the_model_puts_on_an_activation(kind, engine):
    """A marker gives another tensor, which has none of it: told, and run on hooks."""
    torch.manual_seed(0)
    module, x = Told(kind).requires_grad_(False), torch.randn(4, 8)
    if kind == "the input's":
        x.flag = True
    model = wrap(module, engine)
    with model.trace(x) as tracer:
        out = nnsight_fx.save(tracer.result)
        inner = model.second.linear.output.save()
    torch.testing.assert_close(out, module(x))
    torch.testing.assert_close(inner, module.second.linear(module.first(x)))
    assert ("would be lost" in str(model.explain())) == (engine != "hooks" and kind != "none")


def test_what_torch_puts_on_a_tensor_is_no_attribute_of_the_models():
    x, model = torch.randn(4, 8), wrap(net(), "eager")
    for mark in (torch._dynamo.mark_dynamic, torch._dynamo.maybe_mark_dynamic, torch._dynamo.mark_static):
        mark(x, 0)
    with assert_no_fallback(), model.trace(x):
        out = model[0].output.save()
    torch.testing.assert_close(out, model._module[0](x))


@pytest.mark.parametrize("engine", ["hooks", "eager", "symbolic"])
def test_an_input_that_gets_an_attribute_later(engine):
    """Also where a plan has been seen so often that it runs as a call, in programs, sessions and sweeps."""
    torch.manual_seed(0)
    module = nn.Sequential(Listens(), nn.Linear(8, 8)).requires_grad_(False)
    model, x = wrap(module, engine), torch.randn(4, 8)
    y = x.clone()
    y.flag = True

    def traced(value):
        with model.trace(value):
            return model.get("1").output.save()

    program = model.program(lambda tracer: model.get("1").output)
    for run in (traced, program):
        for value in (x, x, x, y, x, y):
            torch.testing.assert_close(run(value), module(value))
    found = []
    with model.session():
        for value in (x, y, x, y):
            with model.trace(value):
                found.append(model.get("1").output.save())
    for got, value in zip(found, (x, y, x, y), strict=True):
        torch.testing.assert_close(got, module(value))
    swept = model.sweep(lambda tracer, n: model.get("1").output * n, [x, y], over={"n": [1.0, 2.0]}, progress=False)
    for row, value in zip(swept["result"], (x, y), strict=True):
        torch.testing.assert_close(row, torch.stack([module(value), 2 * module(value)]))
