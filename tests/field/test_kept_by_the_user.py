"""What a body does to a value that it saves (`retain_grad`, hooks, weak references, attributes, views) holds after the trace."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn as nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from nnsight_fx import NNsight

from ..equivalence.harness import ENGINES, same, wrap


class Gated(nn.Module):
    """Two ways of one value, so that its gradient is a sum."""

    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.up(x)
        return self.down(torch.sigmoid(self.gate(h)) * h)


class Tagged(nn.Module):
    """Its inner module leaves a note on the tensor, which the outer one reads."""

    def __init__(self):
        super().__init__()
        self.inner = Tagging()

    def forward(self, x):
        h = self.inner(x)
        return h * h.scale


class Tagging(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        h = self.linear(x)
        h.scale = 3
        return h


class Retaining(Gated):
    """The model itself retains the gradient, as those that draw saliency maps do."""

    def forward(self, x):
        h = self.up(x)
        h.retain_grad()
        self.seen = h
        return self.down(h * h)


def inputs(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))


def built(make: type, engine: str) -> NNsight:
    torch.manual_seed(0)
    return wrap(make(), engine)


class ByHand:
    """The values of a forward by plain hooks."""

    def __init__(self, module: nn.Module, path: str, x: torch.Tensor):
        seen = []
        handle = module.get_submodule(path).register_forward_hook(lambda m, a, out: seen.append(out))
        self.out = module(x)
        handle.remove()
        self.h = seen[0]


# -- `(model, x) -> values`, and the same on the raw module -------------------------------------------------------------


def backward_behind_the_trace(model, x):
    with model.trace(x):
        h = model.up.output.save()
        h.retain_grad()
        out = model.output.save()
    out.sum().backward()
    return h.grad, h.retains_grad, h.is_leaf


def by_hand_behind(module, x):
    at = ByHand(module, "up", x)
    at.h.retain_grad()
    at.out.sum().backward()
    return at.h.grad, True, False


def retained_before_it_is_saved(model, x):
    with model.trace(x):
        h = model.up.output
        h.retain_grad()
        h.retain_grad()
        h.save()
        out = model.output.save()
    out.sum().backward(retain_graph=True)
    first = h.grad.clone()
    out.sum().backward()
    return first, h.grad


def by_hand_twice(module, x):
    at = ByHand(module, "up", x)
    at.h.retain_grad()
    at.out.sum().backward(retain_graph=True)
    first = at.h.grad.clone()
    at.out.sum().backward()
    return first, at.h.grad


def backward_in_the_body(model, x):
    with model.trace(x):
        h = model.up.output.save()
        h.retain_grad()
        model.output.sum().backward(retain_graph=True)
        out = model.output.save()
    first = h.grad.clone()
    out.sum().backward()
    return first, h.grad


def gradient_by_autograd(model, x):
    with model.trace(x):
        h = model.up.output.save()
        h.retain_grad()
        out = model.output.save()
    return torch.autograd.grad(out.sum(), h)[0]


def by_hand_autograd(module, x):
    at = ByHand(module, "up", x)
    return torch.autograd.grad(at.out.sum(), at.h)[0]


def a_steered_value(model, x):
    with model.trace(x):
        h = (model.up.output * 2).save()
        h.retain_grad()
        model.up.output = h
        out = model.output.save()
    out.sum().backward()
    return h, h.grad


def by_hand_steered(module, x):
    seen = []

    def steer(m, args, out):
        seen.append(out * 2)
        seen[0].retain_grad()
        return seen[0]

    handle = module.up.register_forward_hook(steer)
    module(x).sum().backward()
    handle.remove()
    return seen[0], seen[0].grad


def after_a_look(model, x):
    with model.trace(x):
        h = model.up.output.save()
        assert h.sum().item() is not None
        h.retain_grad()
        out = model.output.save()
    out.sum().backward()
    return h.grad, h.retains_grad, h.is_leaf


def by_a_function(model, x):
    with model.trace(x) as tracer:
        h = model.up.output.save()
        tracer.apply(lambda value: value.retain_grad(), h)
        out = model.output.save()
    out.sum().backward()
    return h.grad, h.retains_grad, h.is_leaf


def a_hook(model, x):
    seen = []
    with model.trace(x):
        h = model.up.output.save()
        handle = h.register_hook(seen.append)
        out = model.output.save()
    out.sum().backward(retain_graph=True)
    assert type(handle) is RemovableHandle
    handle.remove()
    out.sum().backward()
    return seen


def by_hand_hook(module, x):
    seen = []
    at = ByHand(module, "up", x)
    handle = at.h.register_hook(seen.append)
    at.out.sum().backward(retain_graph=True)
    handle.remove()
    at.out.sum().backward()
    return seen


def a_hook_that_changes(model, x):
    with model.trace(x):
        h = model.up.output.save()
        h.register_hook(lambda g: g * 2)
        out = model.output.save()
    out.sum().backward()
    return model._module.up.weight.grad.clone()


def by_hand_change(module, x):
    at = ByHand(module, "up", x)
    at.h.register_hook(lambda g: g * 2)
    at.out.sum().backward()
    return module.up.weight.grad.clone()


def a_hook_removed_in_the_body(model, x):
    seen = []
    with model.trace(x):
        h = model.up.output.save()
        handle = h.register_hook(seen.append)
        handle.remove()
        out = model.output.save()
    out.sum().backward()
    return seen, h


def by_hand_removed(module, x):
    return [], ByHand(module, "up", x).h


PROGRAMS = [
    (backward_behind_the_trace, by_hand_behind),
    (retained_before_it_is_saved, by_hand_twice),
    (backward_in_the_body, by_hand_twice),
    (gradient_by_autograd, by_hand_autograd),
    (a_steered_value, by_hand_steered),
    (after_a_look, by_hand_behind),
    (by_a_function, by_hand_behind),
    (a_hook, by_hand_hook),
    (a_hook_that_changes, by_hand_change),
    (a_hook_removed_in_the_body, by_hand_removed),
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("program", "by_hand"), PROGRAMS, ids=[p.__name__ for p, _ in PROGRAMS])
def test_gradients_that_a_body_keeps(program, by_hand, engine):
    model = built(Gated, engine)
    plain = built(Gated, "hooks")._module
    for seed in range(2):
        same(program(model, inputs(seed)), by_hand(plain, inputs(seed)), engine != "aot_eager", program.__name__)
        model._module.zero_grad()
        plain.zero_grad()


@pytest.mark.parametrize("engine", ENGINES)
def test_each_invoke_retains_the_gradient_of_its_rows(engine):
    model = built(Gated, engine)
    with model.trace() as tracer:
        with tracer.invoke(inputs(0)):
            h = model.up.output.save()
            h.retain_grad()
            one = model.output.save()
        with tracer.invoke(inputs(1)):
            k = model.up.output.save()
            assert not k.retains_grad
            two = model.output.save()
    (one.sum() + 3 * two.sum()).backward()
    want = by_hand_behind(built(Gated, "hooks")._module, inputs(0))[0]
    torch.testing.assert_close(h.grad, want)
    if engine != "hooks":
        assert "an invoke retains the gradient of its rows" in str(model.explain())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_retains_gradients_itself(engine):
    model = built(Retaining, engine)
    with model.trace(inputs()):
        h = model.up.output.save()
        h.retain_grad()
        out = model.output.save()
    out.sum().backward()
    plain = built(Retaining, "hooks")._module
    plain(inputs()).sum().backward()
    torch.testing.assert_close(h.grad, plain.seen.grad)
    torch.testing.assert_close(model._module.seen.grad, plain.seen.grad)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_does_not_require_grad_retains_none(engine):
    model = wrap(Gated().requires_grad_(False), engine)
    with pytest.raises(RuntimeError, match="can't retain_grad on Tensor that has requires_grad=False"):
        with model.trace(inputs()):
            model.up.output.retain_grad()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("grad", [False, True])
def test_attributes_weak_references_and_views(grad, engine):
    torch.manual_seed(0)
    model, gone = wrap(Gated().requires_grad_(grad), engine), []
    known = WeakIdKeyDictionary()
    with model.trace(inputs()):
        h = model.up.output.save()
        h.note = "mine"
        ref, known[h] = weakref.ref(h), 1
        weakref.finalize(h, gone.append, 1)
        view = h[:, :2].save()
        turned = h.t().save()
    assert type(h) is torch.Tensor and vars(h) == {"note": "mine"}
    assert ref() is h and known[h] == 1 and not gone
    assert h.data_ptr() == view.data_ptr() == turned.data_ptr() and turned.stride() == (1, 4)
    with torch.no_grad():
        h.fill_(5)
    assert (view == 5).all() and (turned == 5).all()
    del h, view, turned  # a view holds its base
    assert gone == [1]


@pytest.mark.parametrize("grad", [False, True])
def test_attributes_that_the_model_leaves_on_its_tensors(grad):
    """The model goes on with them, and whoever saved the tensor has them."""
    torch.manual_seed(0)
    model = wrap(Tagged().requires_grad_(grad), "hooks")
    with model.trace(inputs()):
        h = model.inner.output.save()
        out = model.output.save()
    assert torch.equal(out, h * 3) and h.scale == 3
