"""Killer cases 10 to 13: random draws, training, gradients, and a write that turns the model elsewhere."""

import pytest
import torch
import torch.nn as nn

from nnsight_fx import MissedSiteError, save

from .harness import Case, check, each
from .models import MLP, Breaks
from .programs import after, before, first, keep, run

# -- 10: dropout -------------------------------------------------------------------------------------------------------


class Drops(nn.Module):
    """In train mode, with a draw before and one behind `a`."""

    def __init__(self):
        super().__init__()
        self.before, self.a, self.behind = nn.Dropout(0.5), nn.Linear(16, 16), nn.Dropout(0.3)

    def forward(self, x):
        return self.behind(self.a(self.before(x)))


def dropout_untouched(m, x, out):
    with m.trace(x) as tracer:
        out["a"], out["y"] = m.a.output.save(), save(tracer.result)


def dropout_untouched_by_hand(m, x, out):
    out["y"] = run(m, x, after(m.a, keep(out, "a")))


def draw_between(m, x, out):
    """The body's draw comes between the model's two, so it moves the second mask."""
    with m.trace(x) as tracer:
        m.a.output = m.a.output + torch.randn(16)
        out["behind"], out["y"] = m.behind.output.save(), save(tracer.result)


def draw_between_by_hand(m, x, out):
    hooks = after(m.a, lambda h: h + torch.randn(16)), after(m.behind, keep(out, "behind"))
    out["y"] = run(m, x, *hooks)


def draw_in_place(m, x, out):
    with m.trace(x) as tracer:
        m.a.output.bernoulli_(0.5)
        m.behind.input[:, 0].normal_()
        out["y"] = save(tracer.result)


def draw_in_place_by_hand(m, x, out):
    def change(h):
        h[:, 0].normal_()

    with torch.no_grad():
        out["y"] = run(m, x, after(m.a, lambda h: h.bernoulli_(0.5)), before(m.behind, first(change)))


# -- 11: a steering vector that trains ---------------------------------------------------------------------------------


def train_a_vector(m, x, out):
    """With the model's own parameters: three steps of SGD over both."""
    net = getattr(m, "_module", m)
    w = torch.zeros(16, requires_grad=True)
    optimizer = torch.optim.SGD([w, *net.parameters()], lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        with m.trace(x) as tracer:
            m.blocks[1].output = m.blocks[1].output + w
            y = save(tracer.result)
        y.square().mean().backward()
        out[f"loss{step}"], out[f"grad{step}"] = y.square().mean().item(), w.grad.clone()
        optimizer.step()
    out["w"] = w.detach()


def train_a_vector_by_hand(m, x, out):
    w = torch.zeros(16, requires_grad=True)
    optimizer = torch.optim.SGD([w, *m.parameters()], lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        y = run(m, x, after(m.blocks[1], lambda h: h + w))
        y.square().mean().backward()
        out[f"loss{step}"], out[f"grad{step}"] = y.square().mean().item(), w.grad.clone()
        optimizer.step()
    out["w"] = w.detach()


# -- 12: gradients of activations --------------------------------------------------------------------------------------


def keep_gradient(found, change=lambda g: None):
    """A forward hook whose value's gradient is kept, and changed."""

    def look(h):
        def hook(g):
            found.append(g.clone())
            return change(g)

        h.register_hook(hook)

    return look


def swap_a_gradient(m, x, out):
    with m.trace(x) as tracer:
        h = m.blocks[1].output
        out["grad"] = h.grad.save()
        h.grad = h.grad * 2
        tracer.result.square().sum().backward()


def swap_a_gradient_by_hand(m, x, out):
    found = []
    run(m, x, after(m.blocks[1], keep_gradient(found, lambda g: g * 2))).square().sum().backward()
    (out["grad"],) = found


def two_backwards(m, x, out):
    with m.trace(x) as tracer:
        h = m.blocks[1].output
        loss = tracer.result.sum()
        with loss.backward(retain_graph=True):
            out["first"] = h.grad.save()
        with (loss * 2).backward():
            out["second"] = h.grad.save()
    torch.testing.assert_close(out["second"], out["first"] * 2)


def two_backwards_by_hand(m, x, out):
    found = []
    loss = run(m, x, after(m.blocks[1], keep_gradient(found))).sum()
    loss.backward(retain_graph=True)
    (loss * 2).backward()
    out["first"], out["second"] = found


def gradient_behind_its_backward(m, x, out):
    """There is no backward any more that could give it: an error, and the next trace is clean."""
    with pytest.raises(MissedSiteError, match=r"test_killer_10_13.py:\d+.*no backward follows"):
        with m.trace(x) as tracer:
            h = m.blocks[1].output
            tracer.result.sum().backward()
            h.grad.save()
    with m.trace(x) as tracer:
        y = save(tracer.result)
    out["y"] = y.detach()


def gradient_behind_its_backward_by_hand(m, x, out):
    m(x).sum().backward()
    out["y"] = m(x).detach()


# -- 13: a write that flips the model's `if` ---------------------------------------------------------------------------


def flip_the_branch(m, x, out):
    for sign in (100.0, -100.0, 50.0):
        with m.trace(x) as tracer:
            m.a.output = m.a.output * 0 + sign
            out[f"into b {sign}"], out[f"y{sign}"] = m.b.input.save(), save(tracer.result)


def flip_the_branch_by_hand(m, x, out):
    for sign in (100.0, -100.0, 50.0):
        look = before(m.b, first(keep(out, f"into b {sign}")))
        out[f"y{sign}"] = run(m, x, after(m.a, lambda h, sign=sign: h * 0 + sign), look)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        h = self.a(x)
        if h.sum() > 0:
            h = h * 2
        return self.b(h)


def flip_by_the_input(m, x, out):
    """One plan, other values: the graph of branch A is not branch B's."""
    for scale in (1.0, -1.0):
        with m.trace(x * scale) as tracer:
            m.a.output = m.a.output.abs() * x[0, 0, 0].sign() * scale
            out[f"y{scale}"] = save(tracer.result)


def flip_by_the_input_by_hand(m, x, out):
    for scale in (1.0, -1.0):
        change = after(m.a, lambda h, scale=scale: h.abs() * x[0, 0, 0].sign() * scale)
        out[f"y{scale}"] = run(m, x * scale, change)


def dropping():
    return Drops().train()


CASES = [
    Case(10, dropout_untouched, dropout_untouched_by_hand, dropping, draws=True),
    Case(10, draw_between, draw_between_by_hand, dropping, draws=True),
    Case(10, draw_in_place, draw_in_place_by_hand, dropping, draws=True),
    Case(11, train_a_vector, train_a_vector_by_hand, MLP, trains=True, fused=True),
    Case(12, swap_a_gradient, swap_a_gradient_by_hand, MLP, trains=True, fused=True),
    Case(12, two_backwards, two_backwards_by_hand, MLP, trains=True),
    Case(12, gradient_behind_its_backward, gradient_behind_its_backward_by_hand, MLP, trains=True),
    Case(13, flip_the_branch, flip_the_branch_by_hand, Breaks, breaks=True),
    Case(13, flip_by_the_input, flip_by_the_input_by_hand, Branches, breaks=True),
]


@pytest.mark.parametrize(("case", "engine"), each(CASES))
def test_killer(case, engine):
    check(case, engine)
