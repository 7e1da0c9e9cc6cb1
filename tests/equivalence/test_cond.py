"""`tracer.cond`: both outcomes of one program, on every engine, against forwards written by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import transformers

import nnsight_fx
from nnsight_fx import (
    InvokeError,
    LanguageModel,
    NNsight,
    NotRecordableError,
    OutOfOrderError,
    UnsavedValueError,
    assert_max_compiles,
    assert_no_fallback,
)

ENGINES = ["hooks", "eager", "aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])]
pytestmark = pytest.mark.parametrize("engine", ENGINES)


def wrap(engine, raw=None):
    torch.manual_seed(0)
    raw = raw or nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    model = NNsight(raw)
    if engine != "hooks":
        model.compile(backend=engine, fullgraph=True)
    return model, raw


def same(engine, found, wanted):
    exact = {"rtol": 0, "atol": 0} if engine in ("hooks", "eager") else {}
    torch.testing.assert_close(found, wanted, **exact)


def undefined(*values):
    for value in values:
        with pytest.raises(UnsavedValueError, match=r"test_cond\.py:\d+: .* in a `tracer.cond` that did not hold"):
            _ = value + 1


def test_one_program_has_both_outcomes(engine):
    """In-place changes, writes, saves, modules called on values, values used behind the block; one compile for all."""
    model, raw = wrap(engine)
    for turn, sign in enumerate((1.0, -1.0, 2.0)):
        x = torch.randn(3, 4)
        compiles = 1 if turn == 0 and engine != "hooks" else 0
        with assert_no_fallback(), assert_max_compiles(compiles), model.trace(x) as tracer:
            h = model[0].output
            with tracer.cond(h.sum() * 0 + sign > 0):
                model[0].output[:, 1] = 5.0
                model[2].output = model[2].output * 2
                inside = model[2].output.save()
                made = (h + 1).save()
            with tracer.cond(h.sum() * 0 + sign < 0):
                model[3].output = model[3](model[2].output) / 0.5
            out = tracer.result.save()
            used = (made * 2).save()
        h = raw[0](x)
        if sign > 0:
            h = h.clone()
            h[:, 1] = 5.0
        second = raw[2](raw[1](h))
        if sign > 0:
            second = second * 2
            same(engine, (inside, made, used), (second, h + 1, (h + 1) * 2))
        else:
            undefined(inside, made, used)
        same(engine, out, raw[3](second) / (0.5 if sign < 0 else 1))


def test_nested(engine):
    model, raw = wrap(engine)
    for outer, inner in ((1, 1), (1, 0), (0, 1), (0, 0)):
        x = torch.randn(3, 4)
        a, b = torch.tensor(outer), torch.tensor(bool(inner))
        with assert_no_fallback(), model.trace(x) as tracer:
            with tracer.cond(a):
                with tracer.cond(b):
                    model[2].output.mul_(3)
                    found = (model[2].output.norm() / 0.1).save()
                model[3].output = -model[3].output
            out = tracer.result.save()
        h = raw[2](raw[1](raw[0](x)))
        h = h * 3 if outer and inner else h
        same(engine, out, raw[3](h) * (-1 if outer else 1))
        if outer and inner:
            same(engine, found, h.norm() / 0.1)
        else:
            undefined(found)
    if engine != "hooks":
        assert model.explain().to_dict()["captures"][0]["compiles"] == 1


def test_a_branch_not_taken_gives_no_nan(engine):
    """A select computes both sides, and 0 * inf is NaN in a backward; work like that is a branch."""
    model, raw = wrap(engine)
    for holds in (True, False):
        x = torch.randn(3, 4, requires_grad=True)
        with model.trace(x) as tracer:
            h = model[0].output
            with tracer.cond(holds):
                model[2].output = model[2](torch.softmax(h, -1)) / (h.sum() * float(holds))
            out = tracer.result.save()
        h = raw[0](x)
        wanted = raw[3](raw[2](torch.softmax(h, -1)) / h.sum() if holds else raw[2](raw[1](h)))
        same(engine, out, wanted)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(wanted.sum(), x))


def test_skip_and_stop(engine):
    model, raw = wrap(engine)
    for holds in (True, False):
        x = torch.randn(3, 4)
        with model.trace(x) as tracer:
            with tracer.cond(model[0].output.sum() * 0 + float(holds)):
                model[1].skip(model[0].output)
            second = model[2].output.save()
            with tracer.cond(holds):
                tracer.stop()
            third = model[3].output.save()
        h = raw[2](raw[0](x) if holds else raw[1](raw[0](x)))
        same(engine, second, h)
        if not holds:
            same(engine, third, raw[3](h))
        else:
            with pytest.raises(UnsavedValueError):
                _ = third + 1
    if engine != "hooks":
        assert "tracer.cond" in str(model.explain())  # the fallback has its name


def test_a_draw_happens_only_where_it_is_taken(engine):
    model, raw = wrap(engine)
    for holds in (1.0, 0.0):
        x = torch.randn(3, 4)
        torch.manual_seed(1)
        with model.trace(x) as tracer:
            with tracer.cond(model[0].output.sum() * 0 + holds):
                model[2].output = model[2].output + torch.randn(3, 4)
            out = tracer.result.save()
        drawn = torch.get_rng_state()
        torch.manual_seed(1)
        h = raw[2](raw[1](raw[0](x)))
        same(engine, out, raw[3](h + torch.randn(3, 4) if holds else h))
        assert torch.equal(drawn, torch.get_rng_state())


def test_a_sync_point_in_a_block_leaves_it_where_it_does_not_hold(engine):
    model, raw = wrap(engine)
    for holds in (1.0, 0.0):
        x, seen = torch.randn(3, 4), []
        with model.trace(x) as tracer:
            with tracer.cond(model[0].output.sum() * 0 + holds):
                with tracer.cond(True):
                    seen.append(model[2].output.norm().item())
                seen.append("outer")
                model[2].output = model[2].output / seen[0]
            out = tracer.result.save()
        h = raw[2](raw[1](raw[0](x)))
        assert len(seen) == 2 * holds
        same(engine, out, raw[3](h / h.norm().item() if holds else h))


def test_looking_at_what_was_not_made(engine):
    model, _ = wrap(engine)
    with pytest.raises(UnsavedValueError, match="has no value: it was made in a `tracer.cond` that did not hold"):
        with model.trace(torch.randn(3, 4)) as tracer:
            with tracer.cond(model[0].output.sum() * 0):
                made = model[1].output + 1
            print(made)


def test_each_invoke_decides_for_its_rows(engine):
    model, raw = wrap(engine)
    x, y = torch.randn(2, 4), torch.randn(3, 4)
    for first in (1.0, 0.0):
        with assert_no_fallback(), model.trace() as tracer:
            with tracer.invoke(x):
                with tracer.cond(model[2].output.sum() * 0 + first):
                    doubled = model[2].output * 2
                plain = model[3].output.save()
            with tracer.invoke(y):
                with tracer.cond(model[0].output.sum() * 0 + (1 - first)):
                    model[2].output = model[2].output * 0
                model[3].output[:2] += doubled[:, :2]
                out = model[3].output.save()
        h = raw[2](raw[1](raw[0](y)))
        wanted = raw[3](h if first else h * 0).clone()
        if first:
            wanted[:2] += (raw[2](raw[1](raw[0](x))) * 2)[:, :2]
        torch.testing.assert_close((plain, out), (raw(x), wanted))


def test_a_tensor_of_the_user_changes_only_where_it_holds(engine):
    model, raw = wrap(engine, nn.Sequential(nn.Linear(4, 4)).requires_grad_(False))
    total = torch.zeros(4)
    for holds in (1.0, 0.0, 1.0):
        x, before = torch.randn(3, 4), total.clone()
        with model.trace(x) as tracer, tracer.cond(model[0].output.sum() * 0 + holds):
            total.add_(model[0].output.sum(0))
        torch.testing.assert_close(total, before + holds * raw[0](x).sum(0))


def test_in_a_generation_and_a_session(engine):
    raw = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2, n_embd=32, n_head=4, vocab_size=99, n_positions=64, eos_token_id=None, bos_token_id=1
        )
    ).eval()
    model = LanguageModel(raw)
    if engine != "hooks":
        model.compile(backend=engine)
    ids = torch.tensor([[1, 2, 3, 4]])
    with model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) as tracer:
        logits = nnsight_fx.save([])
        for step in tracer.iter[:]:
            with tracer.cond(model.transformer.h[0].output.sum() * 0 + (step == 2)):
                model.transformer.h[1].output[:] = 0
            logits.append(model.lm_head.output[:, -1])
    zero = raw.lm_head(raw.transformer.ln_f(torch.zeros(1, 32)))
    assert [torch.allclose(found, zero, atol=1e-5) for found in logits] == [False, False, True, False]
    with model.session():
        for holds in (True, False):
            with model.trace(ids) as tracer, tracer.cond(holds):
                made = model.transformer.h[1].output + 1
            if holds:
                assert made.sum().item() == made.sum().item()
            else:
                with pytest.raises(UnsavedValueError):
                    made.sum().item()


def test_what_a_block_cannot_hold(engine):
    model, _ = wrap(engine)
    x = torch.randn(3, 4)
    with pytest.raises(
        RuntimeError, match=r"the condition has shape \(3, 4\): Boolean value of Tensor with more than one"
    ):
        with model.trace(x) as tracer, tracer.cond(model[0].output > 0):
            pass
    with pytest.raises(
        NotRecordableError, match=r"test_cond\.py:\d+: `0\.output` is written in a `tracer.cond` with another shape"
    ):
        with model.trace(x) as tracer, tracer.cond(True):
            model[0].output = model[0].output[:2]
    with pytest.raises(NotRecordableError, match="a backward depends on a `tracer.cond`"):
        with model.trace(x) as tracer, tracer.cond(True):
            model[3].output.sum().backward()
    with pytest.raises(OutOfOrderError, match="depends on `0.output`|depends on `3.output`"):
        with model.trace(x) as tracer, tracer.cond(model[3].output.sum() > 0):
            model[0].output = model[0].output * 2
    with pytest.raises(InvokeError, match="`cond`"), model.edit() as edited:
        edited._root.tracer.cond(True)
    with model.trace(x) as tracer:  # nothing is left behind
        out = tracer.result.save()
    assert out.shape == (3, 2) and model.tracer is None


def test_across_two_forwards(engine):
    """What one invoke computes late in a block, another uses early: or does not, where the block did not hold."""
    model, raw = wrap(engine)
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    for holds in (1.0, 0.0):
        with model.trace() as tracer:
            with tracer.invoke(x):
                with tracer.cond(model[3].output.sum() * 0 + holds):
                    late = model[3].output * 2
            with tracer.invoke(y):
                model[0].output[:, :2] += late
                model[0].output[:, 2:] += 1
                out = model[3].output.save()
        h = raw[0](y).clone()
        h[:, 2:] += 1
        if holds:
            h[:, :2] += raw(x) * 2
        torch.testing.assert_close(out, raw[3](raw[2](raw[1](h))))
