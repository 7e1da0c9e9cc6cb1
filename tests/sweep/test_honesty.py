"""Forked sessions on little memory, with an error among them, and with gradients in between: the loop's numbers."""

import pytest
import torch

from nnsight_fx import FallbackWarning, NNsight
from nnsight_fx.batching import forked

from .programs import MLP, X, mixed, mlp, patching, same
from .test_strategies import wrap


def groups(session):
    return session.explain().to_dict()["groups"]


def limited(rows, tried):
    """A compiler whose regions have memory for so many rows."""

    def compiler(gm, inputs):
        def region(*args):
            most = max(x.shape[0] for x in args if isinstance(x, torch.Tensor) and x.dim() == 3)
            tried.append(most)
            if most > rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return gm(*args)

        return region

    return compiler


@pytest.mark.parametrize("program", [patching, mixed])
def test_out_of_memory_halves_a_forked_batch(program):
    """Base rows are two at least, so five rows hold three traces that leave them."""
    module, tried = mlp(), []
    want = program(NNsight(module))
    model = NNsight(module)
    model.compile(backend=limited(5, tried))
    with model.session() as session:
        got = program(model)
    for a, b in zip(got, want, strict=True):
        same(a, b)
    if program is patching:
        assert max(tried) > 5
        (group,) = [g for g in groups(session) if g["strategy"] == "forked"]
        assert group["forwards"] > 1 and any("halved" in note for note in group["notes"])


def test_one_trace_that_does_not_fit_is_an_error_with_its_line():
    model, outs = NNsight(mlp()), []
    model.compile(backend=limited(0, []))
    with pytest.raises(torch.OutOfMemoryError) as caught, model.session():
        for i in range(4):
            with model.trace(X[0]):
                model.blocks[0].output[:, i] = 0
                outs.append(model.head.output.save())
    assert any("in the trace at" in note and __file__.rpartition("/")[2] in note for note in caught.value.__notes__)


def test_a_compiler_that_fails_costs_speed_only():
    """As in a trace: the regions run as `aot_eager` makes them, and nothing is compiled anew one by one."""

    def fails(gm, inputs):
        raise NotImplementedError("no such kernel")

    module = mlp()
    want = patching(NNsight(module))
    model = NNsight(module)
    model.compile(backend=fails)
    with pytest.warns(FallbackWarning, match="`fails` could not compile a segment") as told, model.session() as session:
        got = patching(model)
    for a, b in zip(got, want, strict=True):
        same(a, b)
    assert len(told) == 1  # for all regions
    (group,) = [g for g in groups(session) if g["strategy"] == "forked"]
    assert any("which runs with `aot_eager`: NotImplementedError: no such kernel" in note for note in group["notes"])


@pytest.mark.parametrize(("room", "least", "most"), [(1.0, 9, 9), (80_000.0, 2, 8), (1e12, 1, 1)])
def test_chunks_fit_the_memory_that_is_free(monkeypatch, room, least, most):
    module = mlp()
    want = patching(NNsight(module))
    monkeypatch.setattr(forked, "free", lambda device: room)
    model = wrap("eager", module)
    with model.session() as session:
        got = patching(model)
    for a, b in zip(got, want, strict=True):
        same(a, b)
    (group,) = [g for g in groups(session) if g["strategy"] == "forked"]
    assert least <= group["forwards"] <= most, group


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_an_error_names_its_trace_and_the_others_are_delivered(engine):
    """An index that only the values show to be wrong, in the third of four traces."""
    model, outs, bad = wrap(engine, mlp()), [], torch.tensor([99])
    with pytest.raises((IndexError, RuntimeError)) as caught, model.session():
        for i in range(4):
            with model.trace(X[0]):
                model.blocks[i % 3].output[:, i] = 0
                outs.append(model.head.output.save())
                if i == 2:
                    model.blocks[2].output.index_select(1, bad).save()
    assert any("in the trace at" in note for note in caught.value.__notes__)
    assert all(type(x) is torch.Tensor for x in outs[:2])
    for i, out in enumerate(outs[:2]):
        same(out, by_hook(model._module, i % 3, i))


def by_hook(module, layer, position):
    def zero(m, args, out):
        out = out.clone()
        out[:, position] = 0
        return out

    with module.blocks[layer].register_forward_hook(zero), torch.no_grad():
        return module(X[0])


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_attribution_is_one_backward_among_forked_traces(engine):
    """Reads of the clean run, one backward through the corrupted one, and the patches that it approximates."""
    torch.manual_seed(1)
    module = MLP().eval()
    model = wrap(engine, module)
    scores, patched = [], []
    with model.session() as session:
        with torch.no_grad(), model.trace(X[0]):
            clean = [block.output.save() for block in model.blocks]
        with model.trace(X[1]):
            here = [block.output for block in model.blocks]
            metric = model.head.output[:, -1, 0].sum()
            with metric.backward():
                grads = [h.grad for h in reversed(here)]
                scores = [((c - h) * g).sum(-1).save() for c, h, g in zip(clean, here, reversed(grads), strict=True)]
        for layer in range(3):
            for position in range(3):
                with torch.no_grad(), model.trace(X[1]):
                    model.blocks[layer].output[:, position] = clean[layer][:, position]
                    patched.append(model.head.output[:, -1, 0].save())
    kept = []
    hooks = [b.register_forward_hook(lambda m, a, out: kept.append(out) or out.retain_grad()) for b in module.blocks]
    module(X[1])[:, -1, 0].sum().backward()
    for hook in hooks:
        hook.remove()
    for score, value, cached in zip(scores, kept, clean, strict=True):
        same(score, ((cached - value) * value.grad).sum(-1))
    told = {g["strategy"]: g for g in groups(session)}
    assert "it runs a backward" in told["at once"]["why"]
    assert told["batched" if engine == "hooks" else "forked"]["traces"] == 9
