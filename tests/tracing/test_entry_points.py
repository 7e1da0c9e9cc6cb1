"""The ways Python and torch reach into a tensor, one row each, as functions of a value `h` that is only recorded.

Each row has one of three outcomes: *recorded* (nothing runs in the body; after the trace the result is eager's), *synced*
(the model runs up to there and the body sees the real thing), or *refused* (an error of ours at the user's line).
"""

import builtins
import copy
import functools
import io
import json
import math
import operator
import pickle
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import einops
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Float
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import nnsight_fx
from nnsight_fx import NNsight, NotRecordableError

ROWS, FEATURES = 5, 6
FILE = __file__


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, FEATURES), nn.Tanh(), nn.Linear(FEATURES, 3))
    return layers.requires_grad_(False)


def x() -> torch.Tensor:
    return torch.linspace(-1, 1, ROWS * 4).reshape(ROWS, 4)


# -- functions that need more than an expression -------------------------------------------------------------------


def in_place(h):
    h += 1
    h[:, 0] *= 2
    h.clamp_(max=2)[0, 0] = 7.0
    h.T[1] = 3
    return h


def row_view(h):
    row = h[:, 2]
    row += 10
    return h, row


def out_argument(h):
    into = torch.zeros(ROWS, FEATURES)
    torch.add(h, 1, out=into)
    return into * 2


def real_tensor_changed(h):
    total = torch.zeros(ROWS, FEATURES)
    view = total[0]
    total += h
    total[1] = 5
    return total * 2, total, view


def iteration(h):
    first, second, *rest = h
    return [first, second, rest, [row.sum() for row in h], list(zip(*h.split(2, dim=1), strict=True))]


def scatter(h):
    return h.scatter_(1, torch.zeros(ROWS, 1, dtype=torch.long), 9.0), h.index_fill(0, torch.tensor([2]), 0)


def helper(h):
    return torch.relu(h) * 2


compiled_helper = torch.compile(helper, backend="eager")


def numpy_on_the_left(h):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's `__array_wrap__`, in eager too
        return np.add(np.ones(FEATURES), h)


def scripted(h):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function = torch.jit.script(helper)
    return function(h)


class Straight(torch.autograd.Function):
    """A straight-through estimator, old style."""

    @staticmethod
    def forward(ctx, h, scale):
        ctx.scale = scale
        return torch.round(h * scale)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.scale, None


class TwoOutputs(torch.autograd.Function):
    """Two outputs, new style."""

    @staticmethod
    def forward(h):
        s = h.sin()
        return s, s * 0 + h.cos()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, a, b):
        (h,) = ctx.saved_tensors
        return a * h.cos() * 10 - b * h.sin() * 100


@torch.library.custom_op("nnsight_fx_tests::with_fake", mutates_args=())
def with_fake(h: torch.Tensor) -> torch.Tensor:
    return h * 2


@torch.library.custom_op("nnsight_fx_tests::no_fake", mutates_args=())
def no_fake(h: torch.Tensor) -> torch.Tensor:
    return h * 3


with_fake.register_fake(torch.empty_like)


def in_a_thread(fn):
    def call(h):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(fn, h).result()

    return call


def as_weight(h):
    layer = nn.Linear(FEATURES, ROWS, bias=False)
    layer.weight = nn.Parameter(h, requires_grad=False)
    return layer(torch.ones(2, FEATURES))


def hooked(h):
    layer = nn.Tanh()
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer(h)


class Logged(torch.Tensor):
    """A user's subclass with a `__torch_function__` of its own."""

    calls: list[str] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


class Pair(NamedTuple):
    low: Any
    high: Any


def parameter(h):
    made = nn.Parameter(h, requires_grad=False)
    return isinstance(made, nn.Parameter), made * 2


def with_lazy_weight(h):
    layer = nn.Linear(FEATURES, ROWS, bias=False)
    return torch.func.functional_call(layer, {"weight": h}, (torch.ones(2, FEATURES),))


def under_no_grad(h):
    with torch.no_grad():
        return h * 2


def under_autocast(h):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return h @ h.T


def under_inference_mode(h):
    with torch.inference_mode():
        return h + 1


def drawing(h):
    noise = torch.randn(ROWS, FEATURES)
    mask = torch.zeros(ROWS, FEATURES).bernoulli_(0.5)
    return h + noise, F.dropout(h, 0.5), torch.rand_like(h), mask, noise


def sorted_by_python(h):
    return sorted(h[0]), max(h[0]), builtins.sum(h[0])


def distribution(h):
    return torch.distributions.Categorical(logits=h, validate_args=True).log_prob(torch.zeros(ROWS, dtype=torch.long))


def holders(h):
    held = {h: 1}
    return held[h], weakref.ref(h)() is h, h in [h], len({h, h}), hash(h) == hash(h)


def facts(h):
    return (
        len(h),
        h.shape,
        h.size(-1),
        h.ndim,
        h.dtype,
        h.device,
        h.numel(),
        h.stride(),
        h.is_floating_point(),
        h.layout,
    )


def branch(h):
    return "low" if h.sum() < 0 else "high"


def numbers(h):
    return (
        bool(h[0, 0] > 0),
        int(h[0, 0] * 100),
        float(h[0, 1]),
        complex(h[0, 1]),
        h[0, 0].item(),
        round(h[0, 0].item(), 3),
    )


def saved_to_file(h):
    torch.save(h, io.BytesIO())


# -- the table ----------------------------------------------------------------------------------------------------

RECORDED: dict[str, Callable] = {
    "facts": facts,
    "isinstance": lambda h: (
        isinstance(h, torch.Tensor),
        torch.is_tensor(h),
        isinstance(h, Float[torch.Tensor, "b f"]),
    ),
    "jaxtyping wrong shape": lambda h: isinstance(h, Float[torch.Tensor, "b f c"]),
    "dict key, weakref, identity in list": holders,
    "einops rearrange": lambda h: einops.rearrange(h, "(a b) (c d) -> a c (b d)", a=1, c=2),
    "einops reduce": lambda h: einops.reduce(h, "b f -> f", "mean"),
    "einops einsum": lambda h: einops.einsum(h, h, "b f, c f -> b c"),
    "einops pack": lambda h: einops.pack([h, h], "* f")[0],
    "einsum": lambda h: torch.einsum("bf,cf->bc", h, h),
    "operators": lambda h: (
        1 - h,
        h**2,
        -h,
        abs(h),
        h @ h.T,
        2 / (h + 3),
        h // 0.3,
        h % 0.3,
        h > 0,
        ~(h > 0),
        h == h,
        +h,
    ),
    "real matrix on the left": lambda h: torch.ones(2, ROWS) @ h,
    "copy.copy": copy.copy,
    "copy.deepcopy": lambda h: copy.deepcopy([h, {"h": h}]),
    "nn.Parameter": parameter,
    "iteration and unpacking": iteration,
    "topk": lambda h: h.topk(2),
    "topk.values": lambda h: h.topk(2).values * 2,
    "max over a dim": lambda h: (h.max(dim=1).indices, *h.min(1)),
    "sort": lambda h: h.sort(descending=True)[1],
    "split, chunk, unbind": lambda h: [*h.split([2, 4], dim=1), *h.chunk(2, 1), *h.unbind(1)],
    "in place": in_place,
    "in place through a view": row_view,
    "out=": out_argument,
    "a real tensor changed in place": real_tensor_changed,
    "where": lambda h: (torch.where(h > 0, h, 0.0), h.where(h > 0, torch.tensor(1.0))),
    "cat and stack of lists": lambda h: (torch.cat([h, torch.ones(1, FEATURES)]), torch.stack([h[0], h[1]])),
    "nested list in meshgrid": lambda h: torch.meshgrid([h[0], h[1]], indexing="ij"),
    "indexing": lambda h: (
        h[..., None, 0],
        h[1:3, -1],
        h[[0, 2]],
        h[torch.tensor([1, 1])],
        h[None],
    ),
    "masked write": lambda h: h.masked_fill_(h > 0, 0),
    "mask as an index of a write": lambda h: operator.setitem(h, h > 0, 0.0) or h,
    "scatter": scatter,
    "gather": lambda h: h.gather(1, h.argsort(1)),
    ".T .mT .real .data": lambda h: (h.T, h.mT, h.real, h.data + 1),
    "detach and requires_grad": lambda h: (h.detach(), h.requires_grad, h.clone().requires_grad_().requires_grad),
    "dtype changes": lambda h: (h.double(), h.to(torch.float16), h.type(torch.float64), h.long(), h.to("cpu"), h.cpu()),
    "new tensors like it": lambda h: (
        torch.zeros_like(h),
        h.new_ones(2),
        torch.zeros(h.shape) + h,
        torch.ones(h.shape[0]),
    ),
    "numpy scalar": lambda h: (h * np.float32(2), np.float64(2) * h),
    "module": nn.LayerNorm(FEATURES),
    "multihead attention": lambda h: nn.MultiheadAttention(FEATURES, 2).eval()(h, h, h)[0].shape,
    "F.linear with it as weight": lambda h: F.linear(torch.ones(2, FEATURES), h),
    "functional_call on it": lambda h: torch.func.functional_call(nn.Tanh(), {}, (h,)),
    "functional_call with it": with_lazy_weight,
    "scaled dot product attention": lambda h: F.scaled_dot_product_attention(*[h[None, None]] * 3, is_causal=True),
    "cross entropy": lambda h: F.cross_entropy(h, torch.zeros(ROWS, dtype=torch.long)),
    "no_grad": under_no_grad,
    "autocast": under_autocast,
    "inference_mode": under_inference_mode,
    "random draws": drawing,
    "compiled helper": compiled_helper,
    "checkpoint": lambda h: checkpoint(helper, h, use_reentrant=False),
    "checkpoint, reentrant": lambda h: checkpoint(helper, h.clone().requires_grad_(), use_reentrant=True),
    "autograd.Function": lambda h: Straight.apply(h, 2.0),
    "autograd.Function with setup_context": TwoOutputs.apply,
    "functools.reduce": lambda h: functools.reduce(operator.add, [h, h, h]),
    "builtin sum": lambda h: sum(h),
    "pytree": lambda h: pytree.tree_map(lambda t: t * 2, {"a": [h], "b": Pair(h, h)}),
    "argument of a user's subclass": lambda h: h + torch.ones(FEATURES).as_subclass(Logged),
    "torch.as_tensor": torch.as_tensor,
    "custom operator": with_fake,
    "torch.cond": lambda h: torch.cond(h.sum() > 0, lambda t: t * 2, lambda t: t * 3, (h,)),
    "torch.ops": lambda h: torch.ops.aten.relu(h),
    "another thread": in_a_thread(lambda h: h * 2),
    "parameter of a module": as_weight,
    "forward hook of a module in the body": hooked,
    "svd": lambda h: torch.linalg.svdvals(h),
    "named attribute": lambda h: setattr(h, "tag", "resid") or (h.tag, h),
}

SYNCED: dict[str, Callable] = {
    "if": branch,
    "bool, int, float, complex, item": numbers,
    "math": lambda h: math.exp(h.mean()),
    "tolist": lambda h: h.tolist(),
    "json": lambda h: json.dumps(h[0].tolist()),
    "numpy": lambda h: h.numpy(),
    "np.asarray": np.asarray,
    "numpy on the left": numpy_on_the_left,
    "value as an index": lambda h: h[:, h[0].argmax()],
    "str": str,
    "print": lambda h: print(h) or str(h),
    "format": lambda h: f"{h[0, 0]:.2f} {h[0, 1]:>9.3f}",
    "index into a list": lambda h: list("abcdef")[h[0].argmax()],
    "range": lambda h: list(range(h[0].argmax())),
    "number in tensor": lambda h: (h[0, 0].item() in h, 5.0 in h),
    "tensor in list": lambda h: h[0, 0] in [1.0, 2.0],
    "sorted, max": sorted_by_python,
    "torch.tensor of a list": lambda h: torch.tensor([h[0, 0], h[1, 1]]),
    "h[mask]": lambda h: h[h > 0],
    "nonzero": lambda h: h.nonzero(),
    "where a number is meant": lambda h: (torch.full((2,), h[0, 0]), torch.arange(h[0].argmax() + 1)),
    "tensor_split by values": lambda h: h.tensor_split(torch.tensor([1, 2])),
    "custom operator without a fake": no_fake,
    "unique": lambda h: torch.unique((h * 3).long()),
    "torch.equal": lambda h: torch.equal(h, h + 0),
    "allclose": lambda h: torch.allclose(h, h + 1),
    "from_dlpack": lambda h: torch.from_dlpack(h),
    "np.from_dlpack": lambda h: np.from_dlpack(h),
    "torch.distributions": distribution,
    "data_ptr": lambda h: h.data_ptr() != 0,
    "repeat_interleave by a value": lambda h: torch.ones(FEATURES).repeat_interleave((h[0] > 0).long()),
    "zeros of a value": lambda h: torch.zeros(h[0].argmax() + 1),
}

REFUSED: dict[str, tuple[Callable, type, str]] = {
    "pickle": (pickle.dumps, NotRecordableError, "cannot be pickled"),
    "torch.save": (saved_to_file, NotRecordableError, "cannot be pickled"),
    "torch.func.grad": (lambda h: torch.func.grad(lambda t: (t**2).sum())(h), NotRecordableError, "tracer.apply"),
    "torch.vmap": (lambda h: torch.vmap(lambda t: t.sum())(h), NotRecordableError, "tracer.apply"),
    "scripted function": (scripted, NotRecordableError, "tracer.apply"),
    "closure of torch.func.grad": (
        lambda h: torch.func.grad(lambda t: (t * h).sum())(x()[:1, :1]),
        NotRecordableError,
        "inside a torch.func transform",
    ),
    "sync in another thread": (in_a_thread(lambda h: float(h[0, 0])), NotRecordableError, "another thread"),
    "data of a real tensor": (
        lambda h: setattr(torch.ones(1), "data", h),
        NotRecordableError,
        "`.data = ...`",
    ),
    "share_memory_": (lambda h: h.share_memory_(), NotRecordableError, "tracer.apply"),
    ".grad": (lambda h: h.grad, NotRecordableError, "has no gradient"),
    ".grad_fn": (lambda h: (h.detach().requires_grad_() * 2).grad_fn, NotRecordableError, "`.grad_fn`"),
    ".data = ": (lambda h: setattr(h, "data", h + 1), NotRecordableError, "`.data = ...`"),
    "apply_": (lambda h: h.apply_(abs), NotRecordableError, "tracer.apply"),
    "shape that does not fit": (lambda h: h @ torch.ones(4, 4), RuntimeError, "[5, 6] X [4, 4]"),
    "numpy array times it": (lambda h: np.ones(FEATURES) * h, TypeError, "unsupported operand"),
}


# -- the tests ------------------------------------------------------------------------------------------------------


def eager(fn: Callable) -> Any:
    """The row on the real tensor."""
    h = model()[0](x())
    torch.manual_seed(1)
    return fn(h)


def equal(got: Any, want: Any) -> None:
    leaves, spec = pytree.tree_flatten(got)
    wanted, want_spec = pytree.tree_flatten(want)
    assert spec == want_spec
    for a, b in zip(leaves, wanted, strict=True):
        if isinstance(b, torch.Tensor | np.ndarray):
            assert type(a) is (torch.Tensor if isinstance(b, Logged | nn.Parameter) else type(b))
            torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=0)
        else:
            assert a == b


@pytest.mark.parametrize("name", RECORDED)
def test_recorded(name):
    wrapped, fn = NNsight(model()), RECORDED[name]
    want = eager(fn)
    torch.manual_seed(1)
    with wrapped.trace(x()) as tracer:
        got = nnsight_fx.save([fn(wrapped[0].output)])
        assert not tracer.waves[0].started
    equal(got, [want])


@pytest.mark.parametrize("name", SYNCED)
def test_synced(name):
    wrapped, fn = NNsight(model()), SYNCED[name]
    want = eager(fn)
    with wrapped.trace(x()) as tracer:
        got = nnsight_fx.save([fn(wrapped[0].output)])
        assert tracer.waves[0].started
    equal(got, [want])


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    fn, error, text = REFUSED[name]
    wrapped = NNsight(model())
    with pytest.raises(error) as raised, wrapped.trace(x()):
        fn(wrapped[0].output)
    assert text in str(raised.value)
    if issubclass(error, nnsight_fx.NNsightFXError):
        assert f"{FILE}:" in str(raised.value)
    with wrapped.trace(x()):
        out = wrapped.output.save()
    equal(out, model()(x()))


# -- functions with a backward of their own ---------------------------------------------------------------------------


class Reversal(torch.autograd.Function):
    """Returns its argument as it is, as a view."""

    @staticmethod
    def forward(ctx, h):
        return h.view_as(h)

    @staticmethod
    def backward(ctx, grad):
        return -3 * grad


class Busy(torch.autograd.Function):
    """In-place operations, tuples, real tensors, random numbers and grad modes inside `forward`."""

    @staticmethod
    def forward(ctx, h, weight):
        with torch.enable_grad():
            scaled = h * (weight * 2)
        ones = torch.ones(FEATURES) + 1
        scaled.add_(ones)
        top, places = scaled.topk(2, dim=1)
        with torch.no_grad():
            noise = torch.randn(ROWS, 2) * 0
        ctx.save_for_backward(places)
        ctx.mark_non_differentiable(places)
        return top + noise + weight.sum() * scaled.T[0, 0] * 0, "label", places

    @staticmethod
    def backward(ctx, grad, *_):
        (places,) = ctx.saved_tensors
        return torch.zeros(ROWS, FEATURES).scatter(1, places, grad * 7), None


class Looks(torch.autograd.Function):
    """Its `forward` needs numbers."""

    @staticmethod
    def forward(ctx, h):
        return h * 2 if h.sum() > 0 else h

    @staticmethod
    def backward(ctx, grad):
        return grad


def without_grad(h):
    with torch.no_grad():
        return Straight.apply(h, 2.0) + h


DIFFERENTIABLE: dict[str, Callable] = {
    "old style": lambda h: Straight.apply(h, 2.0),
    "setup_context": lambda h: torch.stack(TwoOutputs.apply(h)),
    "view": Reversal.apply,
    "busy": lambda h: Busy.apply(h, torch.full((FEATURES,), 0.5))[0],
    "twice": lambda h: Straight.apply(Reversal.apply(h) * h, 1.5),
    "partly under no_grad": lambda h: h * without_grad(h),
    "checkpoint": lambda h: checkpoint(helper, h, use_reentrant=False),
    "checkpoint, reentrant": lambda h: checkpoint(helper, h, use_reentrant=True),
    "checkpoint of a function": lambda h: checkpoint(lambda t: Reversal.apply(t * t), h, use_reentrant=True),
    "nn.Parameter": lambda h: nn.Parameter(h.detach() * 0 + 1) * h,
    "detach": lambda h: h.detach() * h,
    "requires_grad_": lambda h: h.detach().requires_grad_() * h,
    "in place": lambda h: operator.setitem(g := h * 2, (slice(None), 0), h[:, 1]) or g,
    "autocast": under_autocast,
}


def gradients(out: torch.Tensor, module: nn.Module) -> list:
    module.zero_grad()
    out.backward(torch.linspace(1, 2, out.numel()).reshape(out.shape))
    return [p.grad for p in module[0].parameters()]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_gradient_is_eagers(name):
    module, fn = model().requires_grad_(), DIFFERENTIABLE[name]
    want = gradients(fn(module[0](x())), module)
    wrapped = NNsight(module)
    with wrapped.trace(x()) as tracer:
        out = fn(wrapped[0].output).save()
        assert not tracer.waves[0].started
    equal(gradients(out, module), want)


def test_a_forward_that_needs_numbers_is_refused():
    wrapped = NNsight(model().requires_grad_())
    with pytest.raises(NotRecordableError, match=r"`Looks.forward` needs the numbers.*tracer.apply\(Looks.apply"):
        with wrapped.trace(x()):
            Looks.apply(wrapped[0].output)


CALLS_ON_REAL_VALUES = {
    "checkpoint": lambda tracer, fn, h: checkpoint(fn, h, use_reentrant=True),
    "apply": lambda tracer, fn, h: tracer.apply(fn, h),
}


@pytest.mark.parametrize("name", CALLS_ON_REAL_VALUES)
def test_a_closure_over_a_recorded_value_is_refused_where_real_ones_are_used(name):
    wrapped = NNsight(model().requires_grad_())
    with pytest.raises(
        NotRecordableError, match=rf"{FILE}:\d+: `0.output`, made at {FILE}:\d+, .* Pass it as an argument"
    ):
        with wrapped.trace(x()) as tracer:
            h = wrapped[0].output
            CALLS_ON_REAL_VALUES[name](tracer, lambda t: t + h, h)
