"""torch's own attention and encoder layers: no weights, the fast paths, nested tensors, one tensor as query, key and value."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

import nnsight_fx
from nnsight_fx import NotRecordableError, UnsavedValueError

from ..equivalence.harness import ENGINES, same, wrap

PADDING = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)


class Attends(nn.Module):
    """Attention alone."""

    def __init__(self, weights: bool = False):
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(8, 2, batch_first=True), weights

    def forward(self, x):
        out, weights = self.attention(x, x, x, need_weights=self.weights)
        return out if weights is None else out + weights.sum()


class Maybe(nn.Module):
    """Gives a tensor or nothing, which the values decide."""

    def forward(self, x):
        return (x * 2, x + 1 if float(x.sum()) < -1e6 else None)


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.maybe = Maybe()

    def forward(self, x):
        return self.maybe(x)[0]


def encoder(**options) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, **options)


def built(make, engine: str, grad: bool = False):
    torch.manual_seed(0)
    return wrap(make().eval().requires_grad_(grad), engine)


def inputs(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))


def by_hook(module: nn.Module, path: str, *args, **kwargs):
    seen = []
    handle = module.get_submodule(path).register_forward_hook(lambda m, a, out: seen.append(out))
    out = module(*args, **kwargs)
    handle.remove()
    return seen[0], out


# -- `(model, x) -> values`, with what plain hooks give -----------------------------------------------------------------


def whole(model, x):
    with model.trace(x):
        kept = nnsight_fx.save(model.layers[0].self_attn.output)
        out = model.output.save()
    return kept, out


def first(model, x):
    with model.trace(x):
        h = model.layers[0].self_attn.output[0].save()
        weights = model.layers[0].self_attn.output[1]
        out = model.output.save()
    return (h, weights), out


def layer(model, x):
    with model.trace(x):
        h = model.layers[0].output.save()
        out = model.output.save()
    return h, out


def norm(model, x):
    with model.trace(x):
        h = model.layers[1].norm1.output.save()
        out = model.output.save()
    return h, out


READS = {whole: "layers.0.self_attn", first: "layers.0.self_attn", layer: "layers.0", norm: "layers.1.norm1"}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("program", READS, ids=lambda p: p.__name__)
def test_reads_in_an_encoder(program, grad, engine):
    model = built(encoder, engine, grad)
    for seed in range(2):
        with torch.set_grad_enabled(grad):
            want = by_hook(model._module, READS[program], inputs(seed))
            got = program(model, inputs(seed))
        same(got, want, engine == "hooks", program.__name__)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_run_has_the_bits_of_the_model_alone(engine):
    model = built(encoder, "hooks")
    with torch.no_grad(), model.trace(inputs(), compile=False if engine == "hooks" else {"backend": engine}):
        out = model.output.save()
    with torch.no_grad():
        plain = model._module if engine == "hooks" else torch.compile(model._module, backend=engine)
        same(out, plain(inputs()), engine == "hooks")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("which", ["query", "key", "value", "key and value", "all", "each"])
def test_one_tensor_is_written_in_parts(which, weights, engine):
    """Query, key and value are one tensor, and the model's Python looks whether they are."""
    model = built(lambda: Attends(weights), engine)
    attention = model._module.attention
    for seed in range(2):
        x = inputs(seed)
        with torch.no_grad(), model.trace(x):
            (q, k, v), options = model.attention.inputs
            new = {
                "query": (q + 1, k, v),
                "key": (q, k + 1, v),
                "value": (q, k, v + 1),
                "key and value": (q, k + 1, v + 1),
            }
            shared = q * 2
            new |= {"all": (shared, shared, shared), "each": (q + 1, k * 2, v - 1)}
            model.attention.inputs = (new[which], options)
            out = model.output.save()
        by = {"query": (x + 1, x, x), "key": (x, x + 1, x), "value": (x, x, x + 1), "key and value": (x, x + 1, x + 1)}
        by |= {"all": (x * 2,) * 3, "each": (x + 1, x * 2, x - 1)}
        with torch.no_grad():
            want, scores = attention(*by[which], need_weights=weights)
        torch.testing.assert_close(out, want + scores.sum() if weights else want)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_query_alone_as_the_first_input(engine):
    model, x = built(Attends, engine), inputs()
    with torch.no_grad(), model.trace(x):
        model.attention.input = model.attention.input * 3
        out = model.output.save()
    with torch.no_grad():
        torch.testing.assert_close(out, model._module.attention(x * 3, x, x, need_weights=False)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_padding_is_taken_out(engine):
    model, x = built(encoder, engine), inputs()
    with torch.no_grad():
        want = model._module(x, src_key_padding_mask=PADDING)
        with model.trace(x, src_key_padding_mask=PADDING):
            out = model.output.save()
        torch.testing.assert_close(out[~PADDING[:, : out.shape[1]]], want[~PADDING[:, : want.shape[1]]])
        for body in (
            lambda: model.layers[0].output.save(),
            lambda: model.layers[1].output.sum().item(),
            lambda: setattr(model.layers[0], "output", model.layers[0].output * 0),
        ):
            with pytest.raises(
                NotRecordableError, match=r"layers\.\d\.output` holds a nested tensor.*use_nested_tensor"
            ):
                with model.trace(x, src_key_padding_mask=PADDING):
                    body()


@pytest.mark.parametrize("engine", ENGINES)
def test_padding_that_stays(engine):
    model, x = built(lambda: encoder(enable_nested_tensor=False), engine), inputs()
    with torch.no_grad():
        with model.trace(x, src_key_padding_mask=PADDING):
            h = model.layers[0].output.save()
            out = model.output.save()
        want = by_hook(model._module, "layers.0", x, src_key_padding_mask=PADDING)
    same((h, out), want, False)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_where_the_scan_saw_a_tensor(engine):
    model = built(Holds, engine)
    with model.trace(inputs()):
        kept = nnsight_fx.save([model.maybe.output[1], model.maybe.output[0]])
    same(kept, [None, inputs() * 2], True)
    with model.trace(inputs()):
        found = nnsight_fx.save({"all": model.maybe.output})
        alone = model.maybe.output[1]
        alone = alone.save() if alone is not None else alone
    same(found["all"][0], inputs() * 2, True)
    if alone is not None:
        with pytest.raises(UnsavedValueError, match="no tensor in this run: the model gave None"):
            alone + 1
