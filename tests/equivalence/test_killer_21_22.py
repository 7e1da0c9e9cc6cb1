"""Killer cases 21 and 22: generation, and stops in the middle of a layer; and of case 23 the skip at one step.

More of each: tests/generation (21), test_skips.py (22).
"""

import contextlib

import pytest
import torch
import transformers as hf

from nnsight_fx import LanguageModel, UnsavedValueError, save

from .harness import Case, check, each, ids
from .models import MLP, SMALL
from .programs import Enough, after, before, first, keep, run

# -- 21: generation with a key-value cache -----------------------------------------------------------------------------

STEPS = 4


def llama():
    config = hf.LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2)
    return hf.LlamaForCausalLM(config).eval()


def options(**more):
    return {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}


def by_transformers(m, x, *handles, **more):
    try:
        return m.generate(x, attention_mask=torch.ones_like(x), **options(**more))
    finally:
        for handle in handles:
            handle.remove()


def vector():
    return torch.linspace(-4, 4, 32)


def one_step(m, x, out):
    """Only step 2 is steered; each step is read: the prompt's length first, then one token."""
    with m.generate(x, **options()) as tracer:
        out["hidden"] = save([])
        for step in tracer.iter[:]:
            if step == 2:
                m.model.layers[1].output += vector()
            out["hidden"].append(m.model.layers[2].output)
        out["tokens"] = tracer.result.save()


def one_step_by_hand(m, x, out):
    out["hidden"] = []

    def steer(h):
        h += vector()

    hooks = [after(m.model.layers[1], steer, call=2)]
    hooks.append(m.model.layers[2].register_forward_hook(lambda _m, _args, h: out["hidden"].append(h)))
    out["tokens"] = by_transformers(m, x, *hooks)


def into_the_cache(m, x, out):
    """A write while the prompt is read changes the keys and values that later steps look back at."""
    with m.generate(x, **options()) as tracer:
        m.model.layers[0].output[:, 1] = vector()
        out["prompt"] = m.lm_head.output.save()
        for _ in tracer.iter[3]:
            out["last"] = m.lm_head.output.save()
        out["tokens"] = tracer.result.save()


def into_the_cache_by_hand(m, x, out):
    def change(h):
        h[:, 1] = vector()

    hooks = [after(m.model.layers[0], change), after(m.lm_head, keep(out, "prompt"))]
    out["tokens"] = by_transformers(m, x, *hooks, after(m.lm_head, keep(out, "last"), call=3))


def ends_early(m, x, out):
    """The end token comes at step 1: the loop ends with the generation, and the code behind it runs."""
    eos = m._module.generate(x, **options())
    with m.generate(x, **options(eos_token_id=int(eos[0, x.shape[1] + 1]))) as tracer:
        out["steps"] = save([])
        for step in tracer.iter[:]:
            m.lm_head.output
            out["steps"].append(step)
        out["tokens"] = tracer.result.save()


def ends_early_by_hand(m, x, out):
    eos = m.generate(x, **options())
    out["tokens"] = by_transformers(m, x, eos_token_id=int(eos[0, x.shape[1] + 1]))
    out["steps"] = list(range(out["tokens"].shape[1] - x.shape[1]))


def sampled(m, x, out):
    with m.generate(x, **options(do_sample=True, top_k=20)) as tracer:
        for _ in tracer.iter[1:3]:
            m.model.layers[1].output += vector()
        out["tokens"] = tracer.result.save()


def sampled_by_hand(m, x, out):
    def steer(h):
        h += vector()

    hooks = [after(m.model.layers[1], steer, call=step) for step in (1, 2)]
    out["tokens"] = by_transformers(m, x, *hooks, do_sample=True, top_k=20)


# -- 22: a stop in the middle of a layer -------------------------------------------------------------------------------


@contextlib.contextmanager
def spied(m, out):
    """Which modules are called."""
    out["called"] = []
    module = getattr(m, "_module", m)
    handles = [
        part.register_forward_pre_hook(lambda _m, _args, name=name: out["called"].append(name))
        for name, part in module.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stop_inside(m, x, out):
    with spied(m, out), m.trace(x) as tracer:
        m.blocks[1].act.input *= 2
        out["into act"] = m.blocks[1].act.input.save()
        tracer.stop()
    with m.trace(x) as tracer:  # usable afterwards
        out["y"] = save(tracer.result)


def stop_inside_by_hand(m, x, out):
    def change(h):
        out["into act"] = h.mul_(2)
        raise Enough

    hook = before(m.blocks[1].act, first(change))  # first: a spy behind it is not reached
    with spied(m, out), contextlib.suppress(Enough):
        run(m, x, hook)
    out["y"] = m(x)


def stop_in_one_of_two(m, x, out):
    """The forward ends for both; what the other saved until there is delivered."""
    with m.trace() as tracer:
        with tracer.invoke(x):
            out["first"] = m.blocks[1].output.save()
            tracer.stop()
        with tracer.invoke(x + 1):
            m.blocks[0].output[:, 0] = 1
            out["second"] = m.blocks[1].output.save()
            lost = m.blocks[2].output.save()
    with pytest.raises(UnsavedValueError):
        lost.sum()


def stop_in_one_of_two_by_hand(m, x, out):
    n = len(x)

    def change(h):
        h[n:, 0] = 1

    run(m, torch.cat([x, x + 1]), after(m.blocks[0], change), after(m.blocks[1], keep(out, "both")))
    out["first"], out["second"] = out.pop("both").split(n)


# -- 23: a skip at one step ---------------------------------------------------------------------------------------------


def skip_at_one_step(m, x, out):
    with m.generate(x, **options()) as tracer:
        for _ in tracer.iter[1]:
            m.model.layers[1].mlp.skip(m.model.layers[1].mlp.input * 2)
        out["tokens"] = tracer.result.save()


def skip_at_one_step_by_hand(m, x, out):
    mlp, calls = m.model.layers[1].mlp, []
    forward = mlp.forward

    def instead(h):
        calls.append(1)
        return h * 2 if len(calls) == 2 else forward(h)

    mlp.forward = instead
    out["tokens"] = by_transformers(m, x)
    del mlp.forward


AOT, SPLICED = ("aot_eager",), ("eager", "aot_eager")  # generations take seconds to capture: `make test-slow`

CASES = [
    Case(21, one_step, one_step_by_hand, llama, ids(), kind=LanguageModel, slow=AOT),
    Case(21, into_the_cache, into_the_cache_by_hand, llama, ids(), kind=LanguageModel, slow=AOT),
    Case(21, ends_early, ends_early_by_hand, llama, ids(1), kind=LanguageModel, slow=SPLICED),
    Case(21, sampled, sampled_by_hand, llama, ids(), kind=LanguageModel, slow=SPLICED, draws=True),
    Case(22, stop_inside, stop_inside_by_hand, MLP),
    Case(22, stop_in_one_of_two, stop_in_one_of_two_by_hand, MLP),
    Case(23, skip_at_one_step, skip_at_one_step_by_hand, llama, ids(), kind=LanguageModel, slow=SPLICED),
]


@pytest.mark.parametrize(("case", "engine"), each(CASES))
def test_killer(case, engine):
    check(case, engine)
