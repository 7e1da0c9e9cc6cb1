"""Backward passes in a body, on every engine, against tensor hooks written by hand.

Each program runs twice, on inputs of its own: what was baked in shows, and the second run compiles nothing. Values,
the gradients that the body took and `.grad` of every parameter must be equal to the bit.
"""

import contextlib
import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nnsight_fx import MissedSiteError, NNsight, NotRecordableError, assert_max_compiles, assert_no_fallback, save
from nnsight_fx.scan.scanner import Scanner

ENGINES = ("hooks", "eager", "aot_eager")


class Net(nn.Module):
    """Linear layers with a residual, and a tied head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.a(x)
        return self.a(self.c(h + torch.relu(self.b(torch.tanh(h)))))


def tapped(module, x, **hooks):
    """A forward by hand: `hooks` gives, for each child, what its output becomes (`None`: the same)."""
    handles = [
        getattr(module, name).register_forward_hook(lambda m, args, out, f=f: f(out)) for name, f in hooks.items()
    ]
    try:
        return module(x)
    finally:
        for handle in handles:
            handle.remove()


def keeping(found, name):
    """A hook that keeps the gradient of the first value that it sees."""

    def hook(out):
        if name not in found:
            found[name] = None
            out.register_hook(lambda g: found.__setitem__(name, g.clone()))

    return hook


# -- programs: (recorded, by hand), both of (model or module, x) -> values ---------------------------------------------


def before(m, x):
    with m.trace(x):
        g = m.b.output.grad.save()
        loss = m.c.output.square().sum().save()
        loss.backward()
    return g, loss.detach()


def before_by_hand(m, x):
    found, c = {}, []
    tapped(m, x, b=keeping(found, "b"), c=lambda out: c.append(out))
    loss = c[0].square().sum()
    loss.backward()
    return found["b"], loss.detach()


def inside(m, x):
    with m.trace(x) as tracer:
        b, h = m.b.output, m.a.output
        loss = tracer.result.sum()
        with loss.backward():
            gb = b.grad.save()
            scaled = (h.grad * 2).save()
    return gb, scaled


def inside_by_hand(m, x):
    found = {}
    tapped(m, x, a=keeping(found, "a"), b=keeping(found, "b")).sum().backward()
    return found["b"], found["a"] * 2


def replaced(m, x):
    with m.trace(x) as tracer:
        h = m.b.output
        loss = tracer.result.square().sum()
        with loss.backward():
            h.grad = h.grad * 3 + 1
            g = h.grad.save()
    return (g,)


def replaced_by_hand(m, x):
    found = {}

    def hook(out):
        def change(g):
            found["b"] = g * 3 + 1
            return found["b"]

        out.register_hook(change)

    tapped(m, x, b=hook).square().sum().backward()
    return (found["b"],)


def in_place(m, x):
    with m.trace(x) as tracer:
        h = m.b.output
        with tracer.result.sum().backward():
            h.grad[:, 0] = 0
            h.grad.mul_(0.5)
            g = h.grad.save()
    return (g,)


def in_place_by_hand(m, x):
    found = {}

    def hook(out):
        def change(g):
            g = g.clone()
            g[:, 0] = 0
            found["b"] = g * 0.5
            return found["b"]

        out.register_hook(change)

    tapped(m, x, b=hook).sum().backward()
    return (found["b"],)


def twice(m, x):
    """P3: with loss2 = 2 * loss1, grad2 == 2 * grad1; each backward has its own."""
    with m.trace(x) as tracer:
        h = m.b.output
        first = h.grad.save()
        loss = tracer.result.sum()
        loss.backward(retain_graph=True)
        second = h.grad.save()
        (2 * loss).backward()
    torch.testing.assert_close(second, 2 * first)
    return first, second


def twice_by_hand(m, x):
    found = []
    loss = tapped(m, x, b=lambda out: out.register_hook(lambda g: found.append(g)) and None).sum()
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    return tuple(found)


def functional(m, x):
    with m.trace(x) as tracer:
        values = [m.a.output, m.b.output]
        found = torch.autograd.grad(tracer.result.square().sum(), values)
        for g in found:
            g.save()
    return found


def functional_by_hand(m, x):
    kept = []
    hooks = {n: lambda out: kept.append(out) if len(kept) < 2 else None for n in ("a", "b")}
    return torch.autograd.grad(tapped(m, x, **hooks).square().sum(), kept)


def of_rows(m, x):
    """Each invoke has the gradients of its own rows."""
    with m.trace() as tracer:
        with tracer.invoke(x):
            h = m.b.output
            first = h.grad.save()
            m.c.output.square().sum().backward(retain_graph=True)
        with tracer.invoke(-x):
            h = m.b.output
            with m.c.output.sum().backward():
                h.grad[:, 1] = 4
                second = h.grad.save()
    return first, second


def of_rows_by_hand(m, x):
    n, found, c = len(x), [], []

    def hook(out):
        def change(g):
            if not found:
                found.append(g[:n].clone())
                return None
            g = g.clone()
            g[n:, 1] = 4
            found.append(g[n:])
            return g

        out.register_hook(change)

    tapped(m, torch.cat([x, -x]), b=hook, c=lambda out: c.append(out))
    c[0][:n].square().sum().backward(retain_graph=True)
    c[0][n:].sum().backward()
    return tuple(found)


def early(m, x):
    """A probe's loss in the middle of the model, whose gradient steers what comes after."""
    with m.trace(x) as tracer:
        h = m.b.output
        (g,) = torch.autograd.grad(h.square().sum(), [h], retain_graph=True)
        m.c.output = m.c.output - 0.1 * g
        y = save(tracer.result)
        tracer.result.sum().backward(retain_graph=True)
    return (y.detach(),)


def early_by_hand(m, x):
    kept = []

    def steer(out):
        (g,) = torch.autograd.grad(kept[0].square().sum(), [kept[0]], retain_graph=True)
        return out - 0.1 * g

    y = tapped(m, x, b=lambda out: kept.append(out), c=steer)
    y.sum().backward(retain_graph=True)
    return (y.detach(),)


def frozen(m, x):
    """Attribution on a frozen model: an activation is where grad begins."""
    module = getattr(m, "_module", m)
    module.requires_grad_(False)
    with m.trace(x) as tracer:
        h = m.b.output.requires_grad_()
        c = m.c.output
        loss = tracer.result.square().sum()
        with loss.backward():
            found = [(v * v.grad).save() for v in (h, c)]
    return tuple(found)


def frozen_by_hand(m, x):
    m.requires_grad_(False)
    kept = {}

    def hook(name):
        def look(out):
            if name == "b":
                out.requires_grad_()
            kept[name] = out
            out.retain_grad()

        return look

    tapped(m, x, b=hook("b"), c=hook("c")).square().sum().backward()
    return tuple((kept[n] * kept[n].grad).detach() for n in ("b", "c"))


def accumulated(m, x):
    """`.grad` of the parameters grows, as it does in eager; `inputs=` chooses."""
    with m.trace(x) as tracer:
        tracer.result.sum().backward()
    with m.trace(x * 2) as tracer:
        tracer.result.square().sum().backward(inputs=[getattr(m, "_module", m).b.weight])
    return ()


def accumulated_by_hand(m, x):
    m(x).sum().backward()
    m(x * 2).square().sum().backward(inputs=[m.b.weight])
    return ()


PROGRAMS = [
    (before, before_by_hand),
    (inside, inside_by_hand),
    (replaced, replaced_by_hand),
    (in_place, in_place_by_hand),
    (twice, twice_by_hand),
    (functional, functional_by_hand),
    (of_rows, of_rows_by_hand),
    (frozen, frozen_by_hand),
    (accumulated, accumulated_by_hand),
]


def outcome(program, model, module, x):
    values = [v.clone() for v in program(model, x)]
    return values, {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def compare(program, by_hand, engine, whole=True):
    module, plain = Net(), Net()
    model = NNsight(module)
    if engine != "hooks":
        model.compile(backend=engine)
    for i in range(2):
        x = torch.arange(8.0).view(2, 4).cos() + i
        captured = assert_no_fallback() if engine != "hooks" and whole else contextlib.nullcontext()
        with captured, assert_max_compiles(0 if i else 9):
            got = outcome(program, model, module, x)
        want = outcome(by_hand, plain, plain, x)
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=0)
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=0)
        assert all(type(v) is torch.Tensor and not v.requires_grad for v in got[0])
    assert not any(p._backward_hooks for p in module.parameters())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("program", "by_hand"), PROGRAMS, ids=[p.__name__ for p, _ in PROGRAMS])
def test_it_equals_tensor_hooks(program, by_hand, engine):
    compare(program, by_hand, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_no_graph_can_hold_runs_on_hooks_and_says_so(engine):
    """A graph that is kept, and a saved value that can still be differentiated."""
    compare(early, early_by_hand, engine, whole=False)
    if engine != "hooks":
        module = Net()
        model = NNsight(module)
        model.compile(backend=engine)
        early(model, torch.ones(2, 4))
        assert "retain_graph=True" in str(model.explain())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_freed_graph_is_freed(engine):
    model = NNsight(Net())
    if engine != "hooks":
        model.compile(backend=engine)
    with model.trace(torch.ones(2, 4)) as tracer:
        y = save(tracer.result)
        y.sum().backward()
    assert y.requires_grad
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@pytest.mark.parametrize("engine", ENGINES)
def test_attribution_at_every_layer_of_a_frozen_llama(engine):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=31, use_cache=False
    )
    module = LlamaForCausalLM(config).eval().requires_grad_(False)
    model = NNsight(copy.deepcopy(module))
    if engine != "hooks":
        model.compile(backend=engine)
    ids = torch.arange(12).view(2, 6) % 31
    with assert_no_fallback() if engine != "hooks" else contextlib.nullcontext(), model.trace(ids):
        start = model.model.embed_tokens.output.requires_grad_()
        layers = [layer.output for layer in model.model.layers]
        loss = model.lm_head.output[:, -1, 3].sum()
        with loss.backward():
            found = [(h * h.grad).save() for h in (start, *layers)]
    kept = []
    handles = [module.model.embed_tokens.register_forward_hook(lambda m, a, out: kept.append(out.requires_grad_()))]
    for layer in module.model.layers:
        handles.append(layer.register_forward_hook(lambda m, a, out: kept.append(out) or out.retain_grad()))
    module(ids).logits[:, -1, 3].sum().backward()
    for got, value in zip(found, kept, strict=True):
        torch.testing.assert_close(got, (value * value.grad).detach(), rtol=1e-5, atol=1e-8)
    assert all(p.grad is None for p in model._module.parameters())


def test_many_reads_behind_what_requires_grad_scan_once(monkeypatch):
    scans = []
    run = Scanner.run
    monkeypatch.setattr(Scanner, "run", lambda self, *a, **k: (scans.append(a), run(self, *a, **k))[1])
    model = NNsight(nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)]).requires_grad_(False))
    with model.trace(torch.ones(2, 4)):
        model[0].input.requires_grad_()
        outputs = [layer.output for layer in model]
        with outputs[-1].sum().backward():
            grads = save([h.grad for h in outputs[::-1]])
    assert len(grads) == 6 and all(g.shape == (2, 4) for g in grads)
    assert len(scans) == 2  # the model as it is, and with what requires grad


@pytest.mark.parametrize("engine", [*ENGINES, pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])])
def test_a_vector_trains_by_the_bodys_own_backward(engine):
    """20 Adam steps, one compile, equal to 20 with hooks."""
    module = Net().requires_grad_(False)
    plain = copy.deepcopy(module)
    model = NNsight(module)
    if engine != "hooks":
        model.compile(backend=engine)
    v, w = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    mine, theirs = torch.optim.Adam([v], lr=0.1), torch.optim.Adam([w], lr=0.1)
    for step in range(20):
        x = torch.full((2, 4), step / 10)
        with assert_max_compiles(0 if step else 9), model.trace(x) as tracer:
            model.b.output = model.b.output + v
            (tracer.result - 1).square().mean().backward()
        (tapped(plain, x, b=lambda out: out + w) - 1).square().mean().backward()
        for optimizer in (mine, theirs):
            optimizer.step()
            optimizer.zero_grad()
    exact = {} if engine == "inductor" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(v, w, **exact)
    assert v.abs().sum() > 0.1


# -- errors ------------------------------------------------------------------------------------------------------------


class Turned(nn.Linear):
    def forward(self, x):
        return super().forward(x).T


@pytest.mark.parametrize("engine", ENGINES)
def test_a_view_changed_through_another(engine):
    """torch's own `register_hook` crashes there (pytorch/pytorch#196459)."""
    module, x = Turned(4, 4), torch.ones(2, 4)
    model = NNsight(module)
    if engine != "hooks":
        model.compile(backend=engine)
    with model.trace(x):
        h = model.output
        h[:, 0] += 1
        loss = h.square().sum()
        with loss.backward():
            g = h.grad.save()
    want = module(x).detach()
    want[:, 0] += 1
    torch.testing.assert_close(g, 2 * want, rtol=0, atol=0)


def test_no_grad_without_anything_that_requires_it():
    model = NNsight(Net().requires_grad_(False))
    with (
        pytest.raises(NotRecordableError, match=r"test_gradients.py:\d+: `b.output` does not require grad"),
        model.trace(torch.ones(2, 4)),
    ):
        model.b.output.grad  # noqa: B018
    with (
        pytest.raises(RuntimeError, match=r"test_gradients.py:\d+: this loss does not require grad"),
        model.trace(torch.ones(2, 4)),
    ):
        model.b.output.sum().backward()
    with pytest.raises(RuntimeError, match="only for scalar outputs"), NNsight(Net()).trace(torch.ones(2, 4)) as tracer:
        tracer.result.backward()


def test_a_gradient_that_no_backward_gives():
    model = NNsight(Net())
    with pytest.raises(MissedSiteError, match="no backward follows it"), model.trace(torch.ones(2, 4)):
        model.b.output.grad.save()
    with pytest.raises(MissedSiteError, match="not on the way from the loss"), model.trace(torch.ones(2, 4)):
        h = model.c.output
        g = h.grad.save()
        y = model.b.output.save()
        y.sum().backward()
    assert type(y) is torch.Tensor and type(g) is not torch.Tensor
    with (
        pytest.raises(RuntimeError, match=r"has shape \(2, 4\); it was set to a tensor of shape \(3,\)"),
        model.trace(torch.ones(2, 4)),
    ):
        model.b.output.grad = torch.zeros(3)


def test_a_parameters_grad_is_read_after_the_trace():
    module = Net()
    model = NNsight(module)
    with pytest.raises(NotRecordableError, match="Read it after the"), model.trace(torch.ones(2, 4)) as tracer:
        tracer.result.sum().backward()
        module.b.weight.grad  # noqa: B018
    assert not any(m._forward_hooks for m in module.modules())
