"""Generations in a session: values of their steps flow to later traces, and theirs to later generations."""

from __future__ import annotations

import pytest
import torch

from nnsight_fx import UnsavedValueError, assert_no_fallback

from .test_generate import (
    ENGINES,
    MODELS,
    STEPS,
    VECTOR,
    Hooks,
    blocks,
    ids,
    options,
    plain,
    shared,
    wrap,
)

pytestmark = pytest.mark.xdist_group("generation")  # one worker: one capture of a model
CACHES = pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])


def same(got, want, engine, more):
    """Captured with a static cache, Llama's attention takes the mask that eager leaves out: equal but for rounding."""
    exact = engine == "hooks" or (engine == "eager" and not more)
    torch.testing.assert_close(got, want, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)


@CACHES
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_flows_into_a_trace_and_into_another_generation(engine, family, more):
    module = shared(family)
    with Hooks(module) as hooks:
        hidden = hooks.keep(blocks(module)[0])
        plain(module, ids(), **more)

    def third(m, args, out):
        return hidden[2] if reference.step == 3 else None

    def prompts(m, args, out):
        return hidden[0] + 1

    with Hooks(module) as reference:
        reference.handles.append(blocks(module)[0].register_forward_hook(third))
        patched = plain(module, ids(seed=1), **more)
    handle = blocks(module)[0].register_forward_hook(prompts)
    logits = module(ids(seed=1)).logits
    handle.remove()

    model = wrap(module, engine)
    with assert_no_fallback(), model.session():
        with model.generate(ids(), **options(**more)) as tracer:
            steps = [blocks(model)[0].output for _ in tracer.iter[:]]
        with model.trace(ids(seed=1)):
            blocks(model)[0].output = steps[0] + 1
            got = model.lm_head.output.save()
        with model.generate(ids(seed=1), **options(**more)) as tracer:
            for _ in tracer.iter[3]:
                blocks(model)[0].output = steps[2]
            tokens = tracer.result.save()
        fourth = steps[3] * 2
    same(got, logits, engine, {})
    assert torch.equal(tokens, patched) and not torch.equal(patched, plain(module, ids(seed=1), **more))
    same(fourth, hidden[3] * 2, engine, more)
    with pytest.raises(UnsavedValueError, match="test_generation_in_sessions"):
        steps[1] + 1


@CACHES
@pytest.mark.parametrize("engine", ENGINES)
def test_a_trace_flows_into_a_generation_and_what_it_returns_into_the_next(engine, more):
    module = shared("llama")
    vector = (module.model.layers[0](module.model.embed_tokens(ids(seed=2)), **rope(module, 7)) * 2).mean((0, 1))

    def hook(m, args, out):
        return out + vector

    handle = module.model.layers[1].register_forward_hook(hook)
    first = plain(module, ids(), **more)
    handle.remove()
    want = plain(module, first, **more)
    model = wrap(module, engine)
    with assert_no_fallback(), model.session():
        with model.trace(ids(seed=2)):
            mean = (model.model.layers[0].output * 2).mean((0, 1))
        with model.generate(ids(), **options(**more)) as tracer:
            for _ in tracer.iter[:]:
                model.model.layers[1].output += mean
            result = tracer.result
        assert torch.equal(result.cpu(), first)  # between traces it is the tensor that it is
        with model.generate(result, **options(**more)) as tracer:
            got = tracer.result.save()
    assert torch.equal(got, want) and not torch.equal(first, plain(module, ids(), **more))


def rope(module, length):
    positions = torch.arange(length)[None]
    return {"position_embeddings": module.model.rotary_emb(torch.zeros(1), positions)}


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_an_edited_model_generates_in_a_session(engine):
    module = shared("gpt2")
    with Hooks(module).steer(module.transformer.h[0], set(range(STEPS))) as hooks:
        logits = hooks.keep(module.lm_head)
        want = plain(module, ids())
    model = wrap(module, engine)
    with model.edit() as edited:
        edited.transformer.h[0].output = edited.transformer.h[0].output + VECTOR
    with assert_no_fallback(), model.session():
        with edited.generate(ids(), **options()) as tracer:
            kept = [edited.lm_head.output for _ in tracer.iter[:]]
            tokens = tracer.result.save()
        with model.trace(ids()):
            used = (kept[2][:, -1] - model.lm_head.output[:, -1]).save()
    assert torch.equal(tokens, want)
    assert torch.equal(used, logits[2][:, -1] - module(ids()).logits[:, -1])


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_leaving_a_session_from_a_generation(engine):
    module = shared("gpt2")
    with Hooks(module) as hooks:
        logits = hooks.keep(module.lm_head)
        plain(module, ids())
    model, ran = wrap(module, engine), []
    with model.session() as session:
        with model.generate(ids(), **options()) as tracer:
            for step in tracer.iter[:]:
                last = model.lm_head.output.save()
                if step == 2:
                    session.stop()
        ran.append("never")
    assert torch.equal(last, logits[2]) and not ran
    assert "_compiled_call_impl" not in vars(module)
    with pytest.raises(KeyError) as caught, model.session():
        with model.generate(ids(), **options()) as tracer:
            for _ in tracer.iter[1]:
                raise KeyError("mine")
    assert caught.value.args == ("mine",) and model.tracer is None
    assert "_compiled_call_impl" not in vars(module) and torch.is_grad_enabled()
