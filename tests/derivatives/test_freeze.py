"""`freeze=`: against the same models with `.detach()` written at these places by hand."""

import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nnsight_fx import NNsight
from tests.derivatives.families import FAMILIES, built, by_hand, looped, read, rows_of
from tests.derivatives.test_vjp import engines, wrap

PARTS = ("attention", "norms", "gates")
SINGLE = ("gemma2", "t5")  # which compute parts in single precision, whatever the model's is
GATED = ("llama", "gemma2", "mixtral", "qwen3_moe", "t5")


def still_attention(module, query, key, value, attention_mask, **kwargs):
    """transformers' attention by the fused kernel, with the pattern constant: written out."""
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scaling
    cap = kwargs.get("softcap")
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    if kwargs.get("position_bias") is not None:
        scores = scores + kwargs["position_bias"]
    if attention_mask is not None:
        scores = (
            scores.masked_fill(~attention_mask, -torch.inf)
            if attention_mask.dtype is torch.bool
            else scores + attention_mask
        )
    elif kwargs.get("is_causal", getattr(module, "is_causal", False)):
        n = scores.shape[-1]
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    pattern = scores.softmax(-1).detach()
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


def layer_norm(self, x):
    """The mean that is taken off is linear in `x`: it is no denominator."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt().detach() * self.weight + self.bias


def rms_norm(self, x):
    eps = getattr(self, "variance_epsilon", getattr(self, "eps", None))
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps).detach()
    if type(self).__name__.startswith("Gemma"):
        return (wide * (1 + self.weight.float())).type_as(x)
    return self.weight * wide.to(x.dtype)


def gated(self, x):
    act = self.act_fn if hasattr(self, "act_fn") else self.act
    gate, up, down = (
        getattr(self, a, None) or getattr(self, b)
        for a, b in (("gate_proj", "wi_0"), ("up_proj", "wi_1"), ("down_proj", "wo"))
    )
    return down(act(gate(x)).detach() * up(x))


def experts(self, hidden_states, top_k_index, top_k_weights):
    out = torch.zeros_like(hidden_states)
    for n in range(self.num_experts):
        rows, which = torch.where(top_k_index == n)
        gate, up = F.linear(hidden_states[rows], self.gate_up_proj[n]).chunk(2, dim=-1)
        each = F.linear(self.act_fn(gate).detach() * up, self.down_proj[n]) * top_k_weights[rows, which, None]
        out.index_add_(0, rows, each.to(out.dtype))
    return out


def by_hand_frozen(module, freeze):
    """Put `.detach()` into a model at the places."""
    for m in module.modules():
        name = type(m).__name__
        if "norms" in freeze and isinstance(m, nn.LayerNorm):
            m.forward = types.MethodType(layer_norm, m)
        elif "norms" in freeze and name.endswith(("RMSNorm", "T5LayerNorm")):
            m.forward = types.MethodType(rms_norm, m)
        elif "gates" in freeze and name.endswith(("LlamaMLP", "Gemma2MLP", "Qwen3MoeMLP", "T5DenseGatedActDense")):
            m.forward = types.MethodType(gated, m)
        elif "gates" in freeze and name.endswith("Experts"):
            m.forward = types.MethodType(experts, m)
    if "attention" in freeze:
        ALL_ATTENTION_FUNCTIONS["still"] = still_attention
        ALL_MASK_ATTENTION_FUNCTIONS["still"] = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        module.set_attn_implementation("still")
    return module


CASES = [(name, (part,)) for name in FAMILIES for part in PARTS if part != "gates" or name in GATED]
CASES += [("gpt2", ("attention", "norms")), ("llama", PARTS)]


ROWS = rows_of([(f"{name}-{'-'.join(freeze)}", name, freeze) for name, freeze in CASES])


@pytest.mark.parametrize(("name", "freeze", "engine"), ROWS)
def test_families(name, freeze, engine):
    target, sources = by_hand(name, by_hand_frozen(built(name), freeze))
    cotangents = torch.randn(3, *target.shape, dtype=torch.double)
    want = looped(target, sources, cotangents)
    plain = looped(*by_hand(name, built(name)), cotangents)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(want, plain, strict=True))
    model = wrap(built(name), engine)
    _, pull = model.vjp(lambda tracer: read(name, model), FAMILIES[name].inputs, freeze=set(freeze))
    exact = {"rtol": 1e-4, "atol": 1e-5} if name in SINGLE else {"rtol": 1e-9, "atol": 1e-9}
    for got, w in zip(pull(cotangents), want, strict=True):
        torch.testing.assert_close(got, w, **exact)


@engines
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_attention_written_out_and_as_one_kernel(kind, engine):
    target, sources = by_hand("gpt2", by_hand_frozen(built("gpt2"), ("attention",)))
    cotangents = torch.randn(2, *target.shape, dtype=torch.double)
    module = built("gpt2")
    module.set_attn_implementation(kind)
    model = wrap(module, engine)
    _, pull = model.vjp(lambda tracer: read("gpt2", model), FAMILIES["gpt2"].inputs, freeze="attention")
    for got, w in zip(pull(cotangents), looped(target, sources, cotangents), strict=True):
        torch.testing.assert_close(got, w, rtol=1e-9, atol=1e-9)


@engines
def test_with_norms_and_attention_frozen_a_model_without_mlps_is_linear(engine):
    """What makes direct attribution exact: gradient times value is the whole of the logit."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.q, self.k, self.v, self.o = nn.RMSNorm(8), *(nn.Linear(8, 8, bias=False) for _ in range(4))

        def forward(self, x):
            h = self.norm(x)
            return x + self.o(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h), is_causal=True))

    torch.manual_seed(0)
    module = nn.Sequential(Attention(), Attention(), nn.RMSNorm(8), nn.Linear(8, 5, bias=False)).double()
    model, x = wrap(module, engine), torch.randn(1, 4, 8, dtype=torch.double)
    body = lambda tracer: (model[3].output, model[0].input)  # noqa: E731
    exact = model.jacobian(body, x, freeze={"attention", "norms"})
    torch.testing.assert_close(torch.einsum("btvcld,cld->btv", exact, x), module(x).detach())
    bent = model.jacobian(body, x)
    assert not torch.allclose(torch.einsum("btvcld,cld->btv", bent, x), module(x))


# -- kinds of each part ------------------------------------------------------------------------------------------------------


class Of(nn.Module):
    """`function` of two projections of the input, between two sites."""

    def __init__(self, function, width=6):
        super().__init__()
        self.entry, self.a, self.b = nn.Identity(), nn.Linear(width, width), nn.Linear(width, width)
        self.function = function

    def forward(self, x):
        x = self.entry(x) * 1
        return self.function(self.a(x), self.b(x), x)


def frozen_equals(function, by_hand, part, engine):
    torch.manual_seed(0)
    module, x = Of(function).double(), torch.randn(2, 6, dtype=torch.double)
    model = wrap(module, engine)
    got = model.jacobian(lambda tracer: (model.output, model.a.input), x, freeze={part})
    want = torch.func.jacrev(lambda x: by_hand(module.a(x), module.b(x), x))(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def new_gelu(x):
    return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * torch.pow(x, 3))))


def in_place(a, b, x):
    act = F.silu(a)
    act *= b
    return act


GATES = {
    "silu": (lambda a, b, x: F.silu(a) * b, lambda a, b, x: F.silu(a).detach() * b),
    "the other way round": (lambda a, b, x: b * torch.sigmoid(a), lambda a, b, x: b * torch.sigmoid(a).detach()),
    "written out": (lambda a, b, x: new_gelu(a) * b, lambda a, b, x: new_gelu(a).detach() * b),
    "swish": (
        lambda a, b, x: a * torch.sigmoid(1.7 * a) * b,
        lambda a, b, x: (a * torch.sigmoid(1.7 * a)).detach() * b,
    ),
    "gpt-oss": (
        lambda a, b, x: (b + 1) * (a * torch.sigmoid(a)),
        lambda a, b, x: (b + 1) * (a * torch.sigmoid(a)).detach(),
    ),
    "squared": (lambda a, b, x: F.relu(a).square() * b, lambda a, b, x: F.relu(a).square().detach() * b),
    "halves": (
        lambda a, b, x: F.silu((c := a.chunk(2, -1))[0]) * c[1],
        lambda a, b, x: F.silu((c := a.chunk(2, -1))[0]).detach() * c[1],
    ),
    "glu": (lambda a, b, x: F.glu(a), lambda a, b, x: a.chunk(2, -1)[0] * torch.sigmoid(a.chunk(2, -1)[1]).detach()),
    "in place": (in_place, lambda a, b, x: F.silu(a).detach() * b),
}
NORMS = {
    "root": (
        lambda a, b, x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt(),
        lambda a, b, x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt().detach(),
    ),
    "power": (
        lambda a, b, x: x * torch.pow(x.square().mean(-1, keepdim=True) + 1e-6, -0.5),
        lambda a, b, x: x * torch.pow(x.square().mean(-1, keepdim=True) + 1e-6, -0.5).detach(),
    ),
    "variance": (
        lambda a, b, x: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6),
        lambda a, b, x: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6).detach(),
    ),
    "deviation": (
        lambda a, b, x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6),
        lambda a, b, x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6).detach(),
    ),
    "length": (
        lambda a, b, x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6),
        lambda a, b, x: x / x.norm(dim=-1, keepdim=True).detach(),
    ),
    "normalize": (lambda a, b, x: F.normalize(x, dim=-1), lambda a, b, x: x / x.norm(dim=-1, keepdim=True).detach()),
}
PATTERNS = {
    "matmul": (lambda a, b, x: (a @ b.T).softmax(-1) @ x, lambda a, b, x: (a @ b.T).softmax(-1).detach() @ x),
    "einsum": (
        lambda a, b, x: torch.einsum("ij,jd->id", torch.softmax(a @ b.T, -1), x),
        lambda a, b, x: (a @ b.T).softmax(-1).detach() @ x,
    ),
    "cast and dropped": (
        lambda a, b, x: (
            F.dropout(F.softmax(a @ b.T, dim=-1, dtype=torch.float64).to(x.dtype), 0.5, False)[None] @ x[None]
        ),
        lambda a, b, x: ((a @ b.T).softmax(-1).detach() @ x)[None],
    ),
}
KINDS = [
    (part, kind, *pair)
    for part, kinds in (("gates", GATES), ("norms", NORMS), ("attention", PATTERNS))
    for kind, pair in kinds.items()
]


@pytest.mark.parametrize("engine", ["hooks", "eager"])
@pytest.mark.parametrize(("part", "kind", "function", "by_hand"), KINDS, ids=[f"{p}-{k}" for p, k, *_ in KINDS])
def test_kinds(part, kind, function, by_hand, engine):
    frozen_equals(function, by_hand, part, engine)


LOOK_ALIKES = {
    "gates": lambda a, b, x: F.silu(a) * b[:, :1] + a * b + F.silu(a) * F.silu(b) + F.silu(a) * a,
    "norms": lambda a, b, x: x - x.mean(-1, keepdim=True) + x / x.sum(-1, keepdim=True),
    "attention": lambda a, b, x: a.softmax(-1) * b + torch.log_softmax(b, -1),
}


@pytest.mark.parametrize("engine", ["hooks", "eager"])
@pytest.mark.parametrize("part", PARTS)
def test_what_only_looks_alike_is_told_as_missing(part, engine):
    torch.manual_seed(0)
    model = wrap(Of(LOOK_ALIKES[part]).double(), engine)
    with pytest.raises(Exception, match="there is nothing of that kind"):
        model.vjp(lambda tracer: (model.output, model.a.input), torch.randn(2, 6, dtype=torch.double), freeze={part})


def test_half_precision_is_computed_in_single():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8)).to(torch.bfloat16)
    model, x = NNsight(module), torch.randn(2, 8, dtype=torch.bfloat16)
    values, _ = model.vjp(lambda tracer: (model[2].output, model[0].output), x, freeze={"norms"})
    torch.testing.assert_close(values, module(x).detach(), rtol=0.01, atol=0.01)
