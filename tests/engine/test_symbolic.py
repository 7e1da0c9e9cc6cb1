"""`model.compile(capture="symbolic")`: what a symbolic capture holds, what it looks at again, and what it refuses, by name and line."""

from __future__ import annotations

import copy
import random
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import nnsight_fx
from nnsight_fx import FallbackError, NNsight, assert_max_compiles, assert_no_fallback
from nnsight_fx.capture.state import ModuleState
from nnsight_fx.engine.captured import symbolic

FILE = re.escape(__file__)


class Attention(nn.Module):
    """Sizes that are computed, views, a mask made in the forward, grad mode switched in it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, 2, width // 2).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        with torch.no_grad():
            scale = (q.shape[-1] + 0 * k.mean()) ** -0.5
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm, self.drop = Attention(), nn.LayerNorm(16), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        x = x + self.drop(self.attention(self.norm(x)))
        return x + self.down(F.gelu(self.up(x)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.embed, self.layers, self.head = (
            nn.Embedding(10, 16),
            nn.ModuleList(Layer() for _ in range(2)),
            nn.Linear(16, 10),
        )

    def forward(self, ids, scale: float = 1.0):
        self.passes += 1
        x = self.embed(ids) * scale
        x[:, 0] = x[:, 0] + 0.01 * torch.randn(16)
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.head(x), "length": ids.shape[1], "layers": [x, "last"]}

    def encode(self, ids):
        return self.layers[0](self.embed(ids))


def ids(rows=2, length=5):
    return torch.randint(0, 10, (rows, length), generator=torch.Generator().manual_seed(rows * length))


def wrap(module, backend="eager", **options):
    model = NNsight(module)
    model.compile(backend=backend, capture="symbolic", **options)
    return model


def transformer():
    torch.manual_seed(0)
    return Transformer().train()


def program(model, x, vector, **kwargs):
    """A write, a read of what it changed, gradients, and the result."""
    torch.manual_seed(3)
    with model.trace(x, **kwargs):
        model.layers[0].output[:, -1] += vector
        inner = model.layers[1].attention.out.output.save()
        result = nnsight_fx.save(model.output)
    result["logits"].square().mean().backward()
    return [inner, result, vector.grad.clone(), torch.rand(())]


def by_hand(module, x, vector, **kwargs):
    torch.manual_seed(3)
    kept = []

    def add(m, args, out):
        out = out.clone()
        out[:, -1] += vector
        return out

    handles = [
        module.layers[0].register_forward_hook(add),
        module.layers[1].attention.out.register_forward_hook(lambda m, args, out: kept.append(out)),
    ]
    result = module(x, **kwargs)
    for handle in handles:
        handle.remove()
    result["logits"].square().mean().backward()
    return [kept[0], result, vector.grad.clone(), torch.rand(())]


def steering():
    return torch.linspace(-1, 1, 16).requires_grad_()


def tensors(value):
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])]
)
def test_a_transformer_in_train_mode(backend):
    """Dropout, a draw, a buffer that counts, a dict with numbers, keywords, two shapes; gradients of every parameter."""
    module, plain = transformer(), transformer()
    model = wrap(module, backend, fullgraph=True)
    exact = {"rtol": 0, "atol": 0} if backend == "eager" else {"rtol": 1e-4, "atol": 1e-5}
    for turn in range(2):
        for x, options in ((ids(), {}), (ids(3, 4), {"scale": 0.5})):
            with assert_no_fallback(), assert_max_compiles(0 if turn else 2):
                got = program(model, x, steering(), **options)
            want = by_hand(plain, x, steering(), **options)
            if backend == "eager":  # a compiler draws in another order
                torch.testing.assert_close(tensors(got), tensors(want), **exact)
                for (name, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
                    torch.testing.assert_close(p.grad, q.grad, **exact, msg=lambda m, name=name: f"{name}: {m}")
            assert (got[1]["length"], got[1]["layers"][1]) == (x.shape[1], "last")
            assert module.passes == plain.passes
    assert (capture := model.explain().to_dict()["captures"][0])["options"]["capture"] == "symbolic"
    assert capture["captures"] == 2 and not capture["fallbacks"] and capture["segments"][0]["break"] is None


def test_a_method_a_part_a_cut_and_a_session():
    model, plain, x = wrap(transformer().eval()), transformer().eval(), ids()
    with assert_no_fallback(), torch.no_grad():
        with model.trace(x, fn="encode"):
            encoded = model.layers[0].output.save()
        torch.testing.assert_close(encoded, plain.encode(x), rtol=0, atol=0)
        with model.layers[1].trace(encoded):
            part = model.layers[1].norm.output.save()
        torch.testing.assert_close(part, plain.layers[1].norm(encoded), rtol=0, atol=0)
        with model.trace(x, fn="encode"):  # a sync point cuts the graph, and the tail goes on
            low = model.embed.output.min().item()
            model.layers[0].up.output[:] = low
            cut = model.layers[0].down.output.save()
        want = plain.layers[0].down(F.gelu(torch.full((2, 5, 32), low)))
        torch.testing.assert_close(cut, want, rtol=0, atol=0)
        with model.session():
            kept = []
            for rows in (2, 3):
                with model.trace(ids(rows), fn="encode"):
                    kept.append(model.layers[0].output.save())
        for rows, got in zip((2, 3), kept, strict=True):
            torch.testing.assert_close(got, plain.encode(ids(rows)), rtol=0, atol=0)


# -- what is looked at before a graph is used again -------------------------------------------------------------------


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.scale, self.how, self.plain = nn.Linear(4, 4), 2.0, {"bias": [1, 2.0]}, torch.ones(4)
        self.config = type("Config", (), {})()
        self.config.act = "relu"

    def forward(self, x):
        x = self.a(x) * self.scale + self.how["bias"][1] + self.plain
        return getattr(torch, self.config.act)(x)


def set_(module, path, value):
    *where, name = path.split(".")
    for each in where:
        module = getattr(module, each)
    setattr(module, name, value)


CHANGES = {
    "an attribute": lambda m: set_(m, "scale", 3.0),
    "its type": lambda m: set_(m, "scale", 2),
    "in a container": lambda m: m.how["bias"].__setitem__(1, -1.0),
    "of an object": lambda m: set_(m, "config.act", "tanh"),
    "a module of the same kind": lambda m: set_(m, "a", nn.Linear(4, 4)),
    "a module": lambda m: set_(m, "a", nn.Sequential(copy.deepcopy(m.a), nn.ReLU())),
    "a forward": lambda m: set_(m.a, "forward", lambda x: x * 0),
}
SAME_GRAPH = {
    "weights in place": lambda m: m.a.weight.data.mul_(-1),
    "weights set": lambda m: set_(m, "a.weight", nn.Parameter(m.a.weight.detach() * -1)),
    "a tensor that is no buffer": lambda m: set_(m, "plain", torch.full((4,), 7.0)),
    "weights loaded": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("change", {**CHANGES, **SAME_GRAPH})
def test_what_changes_between_traces_is_seen(change):
    module, x = Holds(), torch.randn(3, 4)
    model = wrap(module)

    def output():
        with model.trace(x) as tracer:
            return nnsight_fx.save(tracer.result)

    torch.testing.assert_close(output(), module(x), rtol=0, atol=0)
    before = module(x)
    {**CHANGES, **SAME_GRAPH}[change](module)
    if change != "its type":
        assert not torch.equal(module(x), before)
    torch.testing.assert_close(output(), module(x), rtol=0, atol=0)
    assert model.explain().to_dict()["captures"][0]["captures"] == (
        1 if change in SAME_GRAPH or "forward" in change else 2
    )


def test_the_state_of_a_module_is_what_it_holds():
    one, other = Holds(), Holds()
    assert ModuleState(one).facts == ModuleState(one).facts
    other.load_state_dict(one.state_dict())
    other.config, other.how = one.config, {"bias": [1, 2.0]}
    assert ModuleState(one).facts == ModuleState(other).facts
    assert [id(t) for t in ModuleState(one).tensors] == [id(t) for t in (one.a.weight, one.a.bias, one.plain)] or len(
        ModuleState(one).tensors
    ) == 3
    other.a.requires_grad_(False)
    assert ModuleState(one).facts != ModuleState(other).facts


# -- what is refused --------------------------------------------------------------------------------------------------


class Does(nn.Module):
    """Calls `forward` of the table on itself, between two layers."""

    def __init__(self, does):
        super().__init__()
        self.a, self.b, self.does, self.seen = nn.Linear(4, 4), nn.Linear(4, 4), does, []
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x, *args, **kwargs):
        return self.b(self.does(self, self.a(x), *args, **kwargs))


OUTSIDE = torch.ones(4)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad * 5


def branches(m, h):
    return h if h.sum() > 0 else h * -2


def rebinds(m, h):
    m.mean = m.mean * 0.9 + h.mean((0, 1) if h.dim() == 3 else 0).detach()
    return h


def remembers(m, h):
    m.seen.append(1)
    return h


def counts(m, h):
    m.calls = getattr(m, "calls", 0) + 1
    return h * m.calls


def casts(m, h):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.b(h).float()


def watches(m, h):
    h.register_hook(lambda grad: grad * 2)
    return h


def prints(m, h):
    print(f"{h}", end="")
    return h


def rolls(m, h):
    return h * random.random()


def seeds(m, h):
    torch.manual_seed(0)
    return h + torch.rand(4)


REFUSED = {
    "if": (branches, "`__bool__` needs the values of a tensor"),
    "item": (lambda m, h: h * h.mean().item(), "`item` needs the values of a tensor"),
    "tolist": (lambda m, h: h * h[0].tolist()[0], "needs the values of a tensor"),
    "an outer number": (lambda m, h: h * len(list(h[h > 0])), "GuardOnDataDependentSymNode"),
    "print": (prints, "needs the values of a tensor"),
    "a tensor from outside": (lambda m, h: h + OUTSIDE, "neither an argument"),
    "an attribute set": (counts, "it sets `calls`"),
    "a list appended to": (remembers, "it sets `seen`"),
    "a buffer bound anew": (rebinds, "it sets `mean`"),
    "autocast": (casts, "autocast"),
    "a tensor hook": (watches, "`register_hook` on a tensor"),
    "python's random": (rolls, "random numbers"),
    "a seed": (seeds, "random numbers, or sets a seed"),
    "autograd.Function": (lambda m, h: Twice.apply(h), "an `autograd.Function`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_traced_runs_on_hooks_and_is_named(name, capsys):
    does, text = REFUSED[name]
    torch.manual_seed(0)
    module = Does(does)
    plain, x = copy.deepcopy(module), torch.randn(3, 4)
    model = wrap(module)
    line = rf"{FILE}:\d+"
    for _ in range(2):
        torch.manual_seed(1), random.seed(1)
        with model.trace(x) as tracer:
            model.a.output += 1
            got = nnsight_fx.save(tracer.result)
        torch.manual_seed(1), random.seed(1)
        handle = plain.a.register_forward_hook(lambda m, args, out: out + 1)
        want = plain(x)
        handle.remove()
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert (len(module.seen), getattr(module, "calls", 0)) == (len(plain.seen), getattr(plain, "calls", 0))
        torch.testing.assert_close(module.mean, plain.mean, rtol=0, atol=0)
    (why,) = model.explain().to_dict()["captures"][0]["fallbacks"]
    assert why.startswith("hook engine: the model could not be traced symbolically: ") and text in why, why
    if name not in ("an attribute set", "a list appended to", "a buffer bound anew", "python's random", "a seed"):
        assert re.search(line, why), why
    assert why in str(model.explain())
    with pytest.raises(FallbackError, match="under `fullgraph=True` nothing may run on hooks"):
        strict = wrap(module, fullgraph=True)
        with strict.trace(x):
            strict.a.output.save()


class Thing:
    scale = 2.0


ARGUMENTS = {
    "an object": (lambda m, h, thing: h * thing.scale, lambda: Thing(), "it is called with a Thing"),
    "a list that it fills": (lambda m, h, kept: kept.append(h) or h, lambda: [], "a list, dict or object"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_a_graph_cannot_take(name):
    does, make, text = ARGUMENTS[name]
    module, x = Does(does), torch.randn(3, 4)
    model = wrap(module)
    mine, theirs = make(), make()
    with model.trace(x, mine) as tracer:
        got = nnsight_fx.save(tracer.result)
    torch.testing.assert_close(got, module(x, theirs), rtol=0, atol=0)
    if isinstance(mine, list):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert text in str(model.explain())


def test_containers_of_tensors_are_arguments():
    module, x = Does(lambda m, h, pair, named: h * pair[0] + named["by"]), torch.randn(3, 4)
    model, pair, named = wrap(module, fullgraph=True), [torch.randn(4), 1], {"by": torch.randn(4)}
    with assert_no_fallback(), model.trace(x, pair, named=named) as tracer:
        seen = model.inputs[0][1][0].save()
        got = nnsight_fx.save(tracer.result)
    torch.testing.assert_close(got, module(x, pair, named), rtol=0, atol=0)
    torch.testing.assert_close(seen, pair[0], rtol=0, atol=0)


def test_hooks_that_come_and_go():
    """They fire once at each forward also where a graph was captured before, which is used again when they have gone."""
    module, x, fired = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4).requires_grad_(), []
    model = wrap(module)
    makers = {
        "`1` has hooks": lambda hook: module[1].register_forward_hook(hook),
        "`0` has hooks": lambda hook: module[0].register_forward_pre_hook(hook),
        "`the model` has hooks": lambda hook: module.register_full_backward_hook(hook),
        "hooks on all modules": lambda hook: nn.modules.module.register_module_forward_hook(hook),
    }
    for text, register in {"": None, **makers}.items():
        handle = register(lambda *args: fired.append(1)) if register else None
        with model.trace(x) as tracer:
            hooked = nnsight_fx.save(tracer.result)
        hooked.sum().backward()
        count = len(fired)
        if handle:
            handle.remove()
            assert count == (3 if "all" in text else 1) and text in str(model.explain()), text
        fired.clear()
        with assert_no_fallback(), model.trace(x) as tracer:
            clean = nnsight_fx.save(tracer.result)
        torch.testing.assert_close(clean, hooked, rtol=0, atol=0)
    assert model.explain().to_dict()["captures"][0]["captures"] == 1


def test_attention_that_has_a_fast_path():
    """Traced it would take the slow one, and differ by rounding."""
    module, x = (
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval().requires_grad_(False),
        torch.randn(2, 5, 16),
    )
    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        try:
            model, found = wrap(module), []
            for compile in (False, None):
                with model.trace(x, compile=compile) as tracer:
                    model.self_attn.output[0][:, 0] += 1
                    found.append(nnsight_fx.save(tracer.result))
            torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
            assert ("`self_attn` has a fast path" in str(model.explain())) == enabled
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def test_graphs_are_bounded(monkeypatch):
    monkeypatch.setattr(symbolic, "GRAPHS", 3)
    model = wrap(nn.Linear(4, 4))
    for rows in (1, 2, 3, 4, 5, 6, 5, 1):
        with assert_no_fallback(), model.trace(torch.ones(rows, 4)):
            out = model.output.save()
        assert out.shape == (rows, 4)
    (capture,) = model._host.captures.values()
    assert len(capture.segments) == 3 and capture.captures == 7


def test_options():
    model = NNsight(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=rf'{FILE}:\d+: `capture=.fx.` is unknown; there is "dynamo" and "symbolic"'):
        model.compile(capture="fx")
    with pytest.raises(ValueError, match=rf"{FILE}:\d+: a symbolic capture is for the sizes"):
        model.compile(capture="symbolic", dynamic=True)
    model.compile(capture="symbolic", backend="eager")
    with model.trace(torch.ones(2, 4), compile={"backend": "eager"}):
        out = model.output.save()
    assert out.shape == (2, 4)
    assert [c.options.capture for c in model._host.captures.values()] == ["symbolic", "dynamo"]


def test_source_is_looked_at_on_hooks():
    model, x = wrap(transformer().eval()), ids()
    with model.trace(x):
        found = model.layers[0].source.F_gelu_0.output.save()
    assert found.shape == (2, 5, 32) and "`.source`" in str(model.explain())


def test_tracing_moves_nothing():
    """A capture that fails halfway, and one that does not: no random stream, no buffer, no attribute, no mode."""
    for does in (branches, lambda m, h: F.dropout(h)):
        module, x = Does(does), torch.randn(3, 4)
        model, state = wrap(module), copy.deepcopy(module.state_dict())
        torch.manual_seed(2), random.seed(2)
        want = module(x)
        after = torch.rand(()), random.random()
        torch.manual_seed(2), random.seed(2)
        with model.trace(x) as tracer:
            got = nnsight_fx.save(tracer.result)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert (torch.rand(()), random.random()) == after
        torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)
        assert torch.is_grad_enabled() and not any(m._forward_hooks or "forward" in vars(m) for m in module.modules())
