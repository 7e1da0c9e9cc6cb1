"""The ready-made interventions: each on every engine against a hook written by hand, trained, saved, and on plain tensors.

A row is a module, how a body calls it on a site's values and another run's, and the same as plain arithmetic.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight, assert_max_compiles, assert_no_fallback
from nnsight_fx import interventions as iv

D = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, 16), nn.GELU(), nn.Linear(16, D)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(D, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class JumpReLU(torch.autograd.Function):
    """A custom backward, as SAEs have: the threshold's gradient is not autograd's."""

    @staticmethod
    def forward(ctx, x, threshold):
        ctx.save_for_backward(x, threshold)
        return x * (x > threshold)

    @staticmethod
    def backward(ctx, grad):
        x, threshold = ctx.saved_tensors
        near = ((x - threshold).abs() < 0.5).to(grad)
        return grad * (x > threshold), -(grad * threshold * near).sum((0, 1))


class SAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(D, 24), nn.Linear(24, D)
        self.threshold = nn.Parameter(torch.full((24,), 0.1))

    def encode(self, x):
        return JumpReLU.apply(self.inner(x), self.threshold)

    def decode(self, features):
        return self.outer(features)


def double_first(features):
    return torch.cat([features[..., :1] * 2, features[..., 1:]], -1)


def spliced_by_hand(sae, h):
    features = JumpReLU.apply(h @ sae.inner.weight.T + sae.inner.bias, sae.threshold)
    decode = sae.outer
    return decode(double_first(features)) + (h - decode(features).detach())


class Row(NamedTuple):
    make: Callable
    call: Callable  # (module, values, other values)
    by_hand: Callable
    trains: bool = False
    exact: bool = True  # is the arithmetic by hand in the same order


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def exchanged(R, h, s, mask=1.0):
    """The rotated space, exchanged coordinate by coordinate, and back: pyvene's formula."""
    return ((1 - mask) * (h @ R.T) + mask * (s @ R.T)) @ R


def first_coordinates(k):
    return (torch.arange(D) < k).float()


def boundary(m):
    at = torch.arange(D)
    return torch.sigmoid(at / 50) * torch.sigmoid((m.boundary * D - at) / 50)


ROWS = {
    "add": Row(
        lambda: iv.Add(seeded(D)), lambda m, h, s: m(h, scale=3.0), lambda m, h, s: h + m.vector * 3.0, trains=True
    ),
    "noise": Row(lambda: iv.Noise(0.3), lambda m, h, s: m(h), lambda m, h, s: h + torch.randn_like(h) * 0.3),
    "zero": Row(iv.Zero, lambda m, h, s: m(h), lambda m, h, s: torch.zeros(h.shape)),
    "mean": Row(lambda: iv.Mean(seeded(D)), lambda m, h, s: m(h), lambda m, h, s: seeded(D).repeat(*h.shape[:-1], 1)),
    "resample from samples": Row(
        lambda: iv.Resample(seeded(6, 3, D)),
        lambda m, h, s: m(h),
        lambda m, h, s: seeded(6, 3, D)[torch.randint(6, (4,))],
    ),
    "resample from the batch": Row(iv.Resample, lambda m, h, s: m(h), lambda m, h, s: h[torch.randperm(4)]),
    "interchange": Row(iv.Interchange, lambda m, h, s: m(h, s), lambda m, h, s: s.clone()),
    "interchange of features": Row(
        lambda: iv.Interchange(slice(2, 5)),
        lambda m, h, s: m(h, s),
        lambda m, h, s: torch.cat([h[..., :2], s[..., 2:5], h[..., 5:]], -1),
    ),
    "project out of a direction": Row(
        lambda: iv.Projection(seeded(D)),
        lambda m, h, s: m(h),
        lambda m, h, s: h - (h @ seeded(D))[..., None] * seeded(D) / (seeded(D) @ seeded(D)),
        exact=False,
    ),
    "project onto a subspace": Row(
        lambda: iv.Projection(torch.cat([seeded(2, D), seeded(2, D).sum(0, keepdim=True)]), onto=True),
        lambda m, h, s: m(h),
        lambda m, h, s: h @ seeded(2, D).pinverse() @ seeded(2, D),
        exact=False,
    ),
    "rotated": Row(
        lambda: iv.RotatedInterchange(D, 3),
        lambda m, h, s: m(h, s),
        lambda m, h, s: exchanged(m.rotation.weight, h, s, first_coordinates(3)),
        trains=True,
        exact=False,
    ),
    "low rank": Row(
        lambda: iv.LowRankInterchange(D, 2),
        lambda m, h, s: m(h, s),
        lambda m, h, s: h + ((s - h) @ m.rotation.weight.T) @ m.rotation.weight,
        trains=True,
    ),
    "boundless": Row(
        lambda: iv.BoundlessInterchange(D),
        lambda m, h, s: m(h, s),
        lambda m, h, s: exchanged(m.rotation.weight, h, s, boundary(m)),
        trains=True,
        exact=False,
    ),
    "sigmoid mask": Row(
        lambda: iv.SigmoidMask(D, temperature=0.5),
        lambda m, h, s: m(h, s),
        lambda m, h, s: h + (s - h) * torch.sigmoid(m.logits / 0.5),
        trains=True,
    ),
    "sae": Row(
        lambda: iv.SAESplice(SAE()),
        lambda m, h, s: m(h, double_first),
        lambda m, h, s: spliced_by_hand(m.sae, h),
        trains=True,
    ),
    "sae without error": Row(
        lambda: iv.SAESplice(SAE(), error=False),
        lambda m, h, s: m(h),
        lambda m, h, s: m.sae.decode(m.sae.encode(h)),
        trains=True,
    ),
}
rows = pytest.mark.parametrize("row", ROWS.values(), ids=[n.replace(" ", "-") for n in ROWS])
engines = pytest.mark.parametrize("wrapped", ["hooks", "eager", "aot_eager"], indirect=True)


@pytest.fixture(autouse=True)
def _same_start_for_every_test():
    """In place of the suite's own, which makes Dynamo forget the wrapped model after every test."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def wrapped(request):
    torch.manual_seed(1)
    model = NNsight(Net())
    if request.param != "hooks":
        model.compile(backend=request.param)
    yield model, request.param
    torch._dynamo.reset()


def traced(model, row, module, x, other):
    with model.trace(x):
        block = model.blocks[1]
        block.output = row.call(module, block.output, other)
        return model.output.save()


def hooked(model, row, module, x, other, fn=None):
    handle = model.blocks[1]._module.register_forward_hook(lambda m, a, h: (fn or row.by_hand)(module, h, other))
    try:
        return model._module(x)
    finally:
        handle.remove()


def close(got, want, exact=True):
    torch.testing.assert_close(got, want, **({"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}))


@rows
@engines
def test_it_equals_a_hook_written_by_hand(row, wrapped):
    (model, engine), module = wrapped, row.make()
    for again in range(2):
        x, other = torch.randn(4, 3, D), torch.randn(4, 3, D)
        torch.manual_seed(5 + again)
        with assert_no_fallback(), assert_max_compiles(0 if again or engine == "hooks" else 9):
            got = traced(model, row, module, x, other)
        torch.manual_seed(5 + again)
        want = hooked(model, row, module, x, other)
        close(got, want, row.exact and engine != "aot_eager")
        assert not torch.equal(want, model._module(x))


@pytest.mark.parametrize(
    ("name", "engine"), [("low rank", "eager"), *((name, "aot_eager") for name, row in ROWS.items() if row.trains)]
)
def test_twenty_steps_of_adam_equal_those_with_hooks(name, engine):
    row, model = ROWS[name], NNsight(Net().requires_grad_(False))
    model.compile(backend=engine)
    module = row.make()
    reference, start = copy.deepcopy(module), copy.deepcopy(module.state_dict())
    data = [(torch.randn(4, 3, D), torch.randn(4, 3, D), torch.randn(4, 3, 5)) for _ in range(20)]

    def train(module, forward):
        adam = torch.optim.Adam(module.parameters(), lr=0.05)
        for step, (x, other, target) in enumerate(data):
            with assert_no_fallback(), assert_max_compiles(0 if step else 9):
                out = forward(module, x, other)
            (out - target).square().mean().backward()
            adam.step()
            adam.zero_grad()
        return module.state_dict()

    got = train(module, lambda m, x, other: traced(model, row, m, x, other))
    want = train(reference, lambda m, x, other: hooked(model, row, m, x, other, row.call))
    for key in want:
        close(got[key], want[key], exact=engine == "eager")
    assert all(not torch.equal(p, start[n]) for n, p in module.named_parameters())


@rows
def test_its_state_dict_restores_it(row, tmp_path):
    module, other = row.make(), row.make()
    x, s = torch.randn(4, 3, D), torch.randn(4, 3, D)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.manual_seed(0)
    want = row.call(module, x, s)
    torch.manual_seed(0)
    close(row.call(other, x, s), want)


@rows
def test_it_keeps_the_dtype_and_what_it_was_given(row):
    h, s = torch.randn(4, 3, D, dtype=torch.bfloat16), torch.randn(4, 3, D, dtype=torch.bfloat16)
    before = h.clone(), s.clone()
    module = row.make()
    if not isinstance(module, iv.SAESplice):  # whose autoencoder has a dtype of its own
        assert row.call(module, h, s).dtype == torch.bfloat16
    row.call(module, h.float(), s.float())
    assert torch.equal(h, before[0]) and torch.equal(s, before[1])


@engines
def test_a_source_from_another_invoke(wrapped):
    (model, _), das = wrapped, iv.LowRankInterchange(D, 2)
    clean, corrupted = torch.randn(2, 3, D), torch.randn(2, 3, D)
    with model.trace() as tracer:
        with tracer.invoke(clean):
            source = model.blocks[0].output[:, -1]
        with tracer.invoke(corrupted):
            h = model.blocks[0].output
            h[:, -1] = das(h[:, -1], source)
            got = model.output.save()
    seen = []
    handle = model.blocks[0]._module.register_forward_hook(lambda m, a, h: seen.append(h))
    model._module(clean)
    handle.remove()

    def change(m, a, h):
        R = das.rotation.weight
        h = h.clone()
        h[:, -1] = h[:, -1] + ((seen[0][:, -1] - h[:, -1]) @ R.T) @ R
        return h

    handle = model.blocks[0]._module.register_forward_hook(change)
    want = model._module(corrupted)
    handle.remove()
    torch.testing.assert_close(got, want)


def test_the_rotation_stays_orthonormal():
    das = iv.LowRankInterchange(D, 3)
    adam = torch.optim.Adam(das.parameters(), lr=0.1)
    for _ in range(5):
        das(torch.randn(4, D), torch.randn(4, D)).square().sum().backward()
        adam.step()
    torch.testing.assert_close(das.rotation.weight @ das.rotation.weight.T, torch.eye(3))


def test_a_projection_and_its_complement_add_up():
    directions, h = torch.randn(3, D), torch.randn(5, D)
    out, onto = iv.Projection(directions), iv.Projection(directions, onto=True)
    torch.testing.assert_close(out(h) + onto(h), h)
    torch.testing.assert_close(out(h) @ directions.T, torch.zeros(5, 3), atol=1e-5, rtol=0)


def test_an_unedited_splice_is_the_models_own_value_and_its_features_have_their_effect():
    sae, h = SAE(), torch.randn(2, 3, D)
    torch.testing.assert_close(iv.SAESplice(sae)(h), h)
    features = []
    out = iv.SAESplice(sae)(h, lambda f: features.append(f) or f)
    (effect,) = torch.autograd.grad(out.sum(), features[0])
    torch.testing.assert_close(effect, sae.outer.weight.sum(0).expand_as(effect))


def test_other_coordinates_of_one_rotation():
    m, h, s = iv.RotatedInterchange(D, 2), torch.randn(4, D), torch.randn(4, D)
    both = m(m(h, s), s, coordinates=slice(2, D))
    torch.testing.assert_close(both, s)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: iv.LowRankInterchange(4, 5), ValueError, "rank 5 of 4 features"),
        (lambda: iv.Projection(torch.zeros(2, 4)), ValueError, "all zero"),
        (lambda: iv.Projection(torch.zeros(2, 4, 4)), ValueError, r"\(k, features\)"),
        (lambda: iv.SAESplice(nn.Linear(2, 2)), TypeError, "no `encode` and no `decode`"),
    ],
)
def test_what_cannot_be_made_says_why(make, error, text):
    with pytest.raises(error, match=text):
        make()
