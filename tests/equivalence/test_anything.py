"""Whatever is on disk: modules that Dynamo cannot capture, or that other libraries have changed.

Each is read around what breaks the graph and inside it, down to grandchildren; what one segment gives is written into another; the
hook engine and the spliced graph both equal forward hooks; and what was not captured is named by `explain()`.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accelerate
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import nnsight_fx
from nnsight_fx import NNsight, assert_no_fallback

from .harness import data, same, wrap
from .models import Block

ENGINES = ["hooks", "eager", *(pytest.param(e, marks=pytest.mark.slow) for e in ("symbolic", "aot_eager"))]


class Around(nn.Module):
    """Blocks before and behind `mid`, and two inside it; `between` is what breaks the graph there."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor], mid: type[nn.Module] | None = None):
        super().__init__()
        self.first, self.mid, self.last = Block(), (mid or Mid)(between), Block()

    def forward(self, x):
        return self.last(self.mid(self.first(x)))


class Mid(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = Block(), Block(), between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


class Disabled(Mid):
    forward = torch.compiler.disable(Mid.forward)


class Hooking(Mid):
    """As the libraries do that watch a module for the length of one call."""

    def forward(self, x):
        seen = []
        handle = self.a.down.register_forward_hook(lambda module, args, out: seen.append(out.mean()))
        x = self.a(x)
        handle.remove()
        return self.b(x * seen[0])


class Packs(Mid):
    def __init__(self, between):
        super().__init__(between)
        self.lstm = nn.LSTM(16, 16, batch_first=True)

    def forward(self, x):
        packed = pack_padded_sequence(self.a(x), torch.tensor([7, 5, 2]), batch_first=True)
        out, _ = self.lstm(packed)
        return self.b(pad_packed_sequence(out, batch_first=True)[0])


class Routed(Mid):
    """A mixture of experts whose experts get the rows that were routed to them, or are not called."""

    def __init__(self, between):
        super().__init__(between)
        self.router, self.experts = nn.Linear(16, 3), nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        x = self.a(x)
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = torch.where(chosen == i)
            if rows[0].numel():
                out[rows] = expert(x[rows])
        return self.b(out)


class Grouped(Mid):
    """Experts in one call, as transformers' mixtures have them."""

    def __init__(self, between):
        super().__init__(between)
        self.router, self.experts = nn.Linear(16, 3), nn.Parameter(torch.randn(3, 16, 16))

    def forward(self, x):
        rows = self.a(x).flatten(0, 1)
        chosen, order = self.router(rows).argmax(-1).sort()
        ends = torch.bincount(chosen, minlength=3).cumsum(0).to(torch.int32)
        out = torch.zeros_like(rows).index_copy(0, order, torch._grouped_mm(rows[order], self.experts, offs=ends))
        return self.b(out.view_as(x))


class Int8Linear(nn.Linear):
    """Weights as int8 buffers and a scale for each row, as the loaders of quantised checkpoints keep them."""

    def __init__(self, of):
        super().__init__(of.in_features, of.out_features)
        scale = of.weight.abs().amax(1, keepdim=True) / 127
        del self.weight
        self.register_buffer("weight", (of.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class LoRA(nn.Module):
    """What peft puts in a layer's place: the layer, and two small ones beside it."""

    def __init__(self, base_layer, rank=2):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, bias=False)})
        self.active = ["default"]

    def forward(self, x, *args, **kwargs):
        out = self.base_layer(x, *args, **kwargs)
        for name in self.active:
            out = out + self.lora_B[name](self.lora_A[name](x)) * 0.5
        return out


def linears(module, make):
    """`module` with `make(linear)` for each linear layer in `mid`."""
    for path, m in list(module.named_modules()):
        if isinstance(m, nn.Linear) and path.startswith("mid."):
            module.set_submodule(path, make(m))
    return module


def quantised(module):
    return linears(module, Int8Linear)


def adapted(module):
    return linears(module, LoRA)


def offloaded(module):
    """Its weights on the meta device, brought in by accelerate for the length of each call."""
    return accelerate.cpu_offload(module, execution_device=torch.device("cpu"))


def optimized(module, path):
    """`torch.compile` in a part's place."""
    module.set_submodule(path, torch.compile(module.get_submodule(path), backend="eager"))
    return module


def compiled_forward(module, path):
    part = module.get_submodule(path)
    part.forward = torch.compile(part.forward, backend="eager")
    return module


def compiled(module, path=""):
    module.get_submodule(path).compile(backend="eager")
    return module


def halves(seed):
    return data(3, 7, 16)(seed).bfloat16()


def branch(x):
    return x * 2 if x.sum() > 0 else x * -3


def item(x):
    return x * x.sum().item()


def tolist(x):
    return x * sum(x.flatten().tolist()[:3])


def array(x):
    return torch.from_numpy(x.detach().numpy() * 2)


def prints(x):
    print("mean", x.mean())
    return x + 1


class Uncopyable:
    """Holds what no copy can be made of, as clients and loggers do."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, x):
        return x + 1


@torch.compiler.disable
def disabled(x):
    return x + 1


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad


@torch.library.custom_op("anything::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@doubled.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op("anything::no_fake", mutates_args=())
def no_fake(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@dataclass(frozen=True)
class Thing:
    name: str
    make: Callable[[], nn.Module]
    breaks: str | None = None  # what `explain()` says of it
    whole: bool = False  # the whole trace runs on hooks
    live: tuple[str, ...] = ()  # sites that no graph holds, and that `explain()` names
    inputs: Callable[[int], Any] = data(3, 7, 16)
    reads: tuple[str, ...] = ("first.act", "mid.a.up", "mid.a.act", "mid.a", "mid.b.up", "mid.b", "mid", "last.down")
    source: str = "mid.a.up"
    target: str = "last.up"


LORA_READS = (
    "first.act",
    "mid.a.up.base_layer",
    "mid.a.up.lora_A.default",
    "mid.a.up",
    "mid.b.down",
    "mid",
    "last.down",
)
INSIDE = ("first.act", "mid._orig_mod.a.up", "mid._orig_mod.a", "mid._orig_mod.b", "mid._orig_mod", "mid", "last.down")
THINGS = [
    Thing("branch", lambda: Around(branch), "Data-dependent branching", live=("mid.output",)),
    Thing("item", lambda: Around(item), "Tensor.item()", live=("mid.output",)),
    Thing("tolist", lambda: Around(tolist), "tolist()", live=("mid.output",)),
    Thing("numpy", lambda: Around(array), ".numpy() is not supported", whole=True),
    Thing("print", lambda: Around(prints), "Failed to trace builtin operator", live=("mid.output",)),
    Thing("disabled-function", lambda: Around(disabled), "disable", live=("mid.output",)),
    Thing("disabled-module", lambda: Around(branch, Disabled), "disable", live=("mid.a.output", "mid.output")),
    Thing("autograd-function", lambda: Around(Clip.apply)),
    Thing("custom-op", lambda: Around(doubled)),
    Thing("custom-op-without-a-fake", lambda: Around(no_fake), "no_fake", whole=True),
    Thing("hooks-in-forward", lambda: Around(branch, Hooking), "hook"),
    Thing("packed-sequences", lambda: Around(branch, Packs), "zeros(): argument 'size'", whole=True),
    Thing("experts", lambda: Around(branch, Routed), "Dynamic shape operator", live=("mid.a.output", "mid.b.output")),
    Thing("experts-in-bfloat16", lambda: Around(branch, Routed).bfloat16(), "Dynamic shape operator", inputs=halves),
    Thing("grouped-experts", lambda: Around(branch, Grouped).bfloat16(), "Dynamic shape operator", inputs=halves),
    Thing("int8-weights", lambda: quantised(Around(torch.tanh))),
    Thing("offloaded", lambda: offloaded(Around(torch.tanh)), "accelerate/utils/modeling.py", whole=True),
    Thing("lora", lambda: adapted(Around(torch.tanh)), source="mid.a.up.base_layer", reads=LORA_READS),
    Thing("compiled", lambda: compiled(Around(torch.tanh))),
    Thing("compiled-block", lambda: compiled(Around(torch.tanh), "mid.a")),
    Thing("compiled-forward", lambda: compiled_forward(Around(torch.tanh), "mid.a")),
    Thing("torch.compile", lambda: optimized(Around(torch.tanh), "mid"), source="mid._orig_mod.a.up", reads=INSIDE),
    Thing("a-copy-cannot-be-made", lambda: Around(Uncopyable())),
]


UNTRACED = {
    "branch",
    "item",
    "tolist",
    "numpy",
    "print",
    "disabled-module",
    "custom-op-without-a-fake",
    "packed-sequences",
}
UNTRACED |= {"experts", "experts-in-bfloat16", "offloaded"}


def program(thing: Thing, model: NNsight, x: Any) -> list[torch.Tensor]:
    with torch.no_grad(), model.trace(x) as tracer:
        found = nnsight_fx.save([])
        for path in thing.reads:
            value = model.get(path).output
            if path == thing.source:
                h = value
            found.append(value)
            if path == thing.reads[-2]:
                late = model.get(thing.target).output
                model.get(thing.target).output = late + h
        found.append(tracer.result)
    return list(found)


def by_hand(thing: Thing, module: nn.Module, x: Any) -> list[torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def hook(path):
        def keep(_, args, out):
            found[path] = out
            return out + found[thing.source] if path == thing.target else None

        return keep

    paths = dict.fromkeys([*thing.reads, thing.target])
    handles = [module.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        with torch.no_grad():
            out = module(x)
    finally:
        for handle in handles:
            handle.remove()
    return [*(found[path] for path in thing.reads), out]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("thing", THINGS, ids=lambda t: t.name)
def test_anything(thing, engine, capsys):
    torch.manual_seed(0)
    module = thing.make().requires_grad_(False)
    model = wrap(module, engine)
    for seed in range(2):
        falls = thing.name in UNTRACED if engine == "symbolic" else thing.breaks
        with contextlib.nullcontext() if falls else assert_no_fallback():
            got = program(thing, model, thing.inputs(seed))
        same(got, by_hand(thing, module, thing.inputs(seed)), engine != "aot_eager")
    if engine == "symbolic":  # one graph, or none
        said = str(model.explain())
        assert "graph break" not in said and "live, between" not in said, said
        assert ("fallback: hook engine" in said) == (thing.name in UNTRACED), said
    elif engine != "hooks":
        said = str(model.explain())
        assert ("graph break" in said) == (thing.breaks is not None and not thing.whole), said
        assert ("fallback: hook engine" in said) == thing.whole, said
        assert (thing.breaks or "") in said, said
        for site in thing.live:
            assert f"live, between segments: {site}" in said, said


def test_a_scan_knows_experts_in_float32():
    """torch 2.13 tells the shape of `_grouped_mm` in bfloat16 only, and its CPU kernels take float32."""
    module, x = Around(torch.tanh, Grouped).requires_grad_(False), data(3, 7, 16)(0)
    model = NNsight(module)
    with model.scan(x) as tracer:
        found = nnsight_fx.save([model.mid.b.output, tracer.result])
    assert [tuple(v.shape) for v in found] == [(3, 7, 16), (3, 7, 16)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", ["mid", ""])
def test_what_torch_compile_returned_is_a_module_like_any(engine, path):
    """Written, skipped and stopped at; also as the whole model. Afterwards it is what it was."""
    plain, x = Around(torch.tanh).requires_grad_(False), data(3, 7, 16)(0)
    module = copy.deepcopy(plain)
    module = optimized(module, path) if path else torch.compile(module, backend="eager")
    inside = module.get_submodule(path)
    model = wrap(module, engine)
    envoy = model.get(path) if path else model
    for _ in range(2):
        with assert_no_fallback():
            with model.trace(x) as tracer:
                envoy.input = envoy.input * 2
                envoy.output = envoy.output + 1
                written = nnsight_fx.save(tracer.result)
            with model.trace(x) as tracer:
                envoy.skip(envoy.input * 3)
                skipped = nnsight_fx.save(tracer.result)
            with model.trace(x) as tracer:
                stopped = envoy.input.save()
                tracer.stop()
        if path:
            first = plain.first(x)
            want = [plain.last(plain.mid(first * 2) + 1), plain.last(first * 3), first]
        else:
            want = [plain(x * 2) + 1, x * 3, x]
        same([written, skipped, stopped], want, engine != "aot_eager")
    assert type(inside) is type(torch.compile(nn.Linear(2, 2))) and inside.forward is not inside._orig_mod.forward
    same(module(x), plain(x), True)


def test_what_the_user_compiled_is_his_again_after_the_trace():
    module, x = compiled_forward(compiled(Around(torch.tanh), "mid.b"), "mid.a"), data(3, 7, 16)(0)
    was = (module.mid.a.forward, module.mid.b._compiled_call_impl)
    model = NNsight(module)
    with model.trace(x):
        model.mid.b.up.output.save()
    assert (module.mid.a.forward, module.mid.b._compiled_call_impl) == was


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_two_wrappers_on_one_module(engine):
    """Each sees its own run only, also where one runs inside the other's body."""
    torch.manual_seed(0)
    module, x = Around(branch).requires_grad_(False), data(3, 7, 16)(0)
    one, two = wrap(module, engine), wrap(module, engine)
    clean = module(x)
    for _ in range(2):
        with one.trace(x):
            one.mid.a.output[:] = 0
            with two.trace(x):
                inner = two.output.save()
            outer = one.output.save()
        same(inner, clean, True)
        assert not torch.equal(outer, clean)
        with two.trace(x):
            again = two.output.save()
        same(again, clean, True)
