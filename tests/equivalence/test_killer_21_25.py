"""Killer cases 21 to 25: generation, stops, skips, values between invokes, modules called beside the model.

More of each: tests/generation (21), test_skips.py (22, 23), tests/engine/test_waves.py (24), tests/tracing/test_small_verbs.py (25).
"""

import contextlib

import pytest
import torch
import torch.nn as nn
import transformers as hf

from nnsight_fx import LanguageModel, SkipError, UnsavedValueError, save

from .harness import Case, check, each, ids
from .models import MLP, SMALL, Returns, as_tuple
from .programs import Enough, after, before, first, keep, run, skipped

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


# -- 23: skips ---------------------------------------------------------------------------------------------------------


def skip_and_write(m, x, out):
    """A tuple made of the module's own input, whose output is read and written afterwards."""
    with m.trace(x) as tracer:
        h = m.part.input
        m.part.skip((h * 0.5, h + 1, 3))
        out["before"] = m.part.output[0].clone().save()
        m.part.output[0][:, 0] = 9
        m.part.output = (m.part.output[0], m.part.output[1] * 2, 3)
        out["part"], out["y"] = save(m.part.output), save(tracer.result)


def skip_and_write_by_hand(m, x, out):
    inputs = []

    def look(args, kwargs):
        inputs.append(kwargs["x"])

    def change(output):
        out["before"] = output[0].clone()
        output[0][:, 0] = 9
        out["part"] = (output[0], output[1] * 2, 3)
        return out["part"]

    with skipped(m.part, lambda: (inputs[0] * 0.5, inputs[0] + 1, 3)):
        out["y"] = run(m, x, before(m.part, look), after(m.part, change))


def skips_of_invokes(m, x, out):
    """Each with a value of its own; in some of them it is an error that names the line."""
    with m.trace() as tracer:
        for scale in (2.0, -1.0):
            with tracer.invoke(x * scale):
                h = m.part.input
                m.part.skip((h * scale, h - scale, 3))
                out[f"y{scale}"] = m.output.save()
    with pytest.raises(SkipError, match=r"`part` is skipped in 1 of 2 invokes .*test_killer_21_25.py:\d+"):
        with m.trace() as tracer:
            with tracer.invoke(x):
                m.part.skip((m.part.input, m.part.input, 3))
            with tracer.invoke(x):
                m.part.output


def skips_of_invokes_by_hand(m, x, out):
    n, scales, inputs = len(x), (2.0, -1.0), []

    def look(args, kwargs):
        inputs.append(kwargs["x"])

    def value():
        parts = [(h * scale, h - scale) for h, scale in zip(inputs[0].split(n), scales, strict=True)]
        return *(torch.cat(column) for column in zip(*parts, strict=True)), 3

    with skipped(m.part, value):
        y = run(m, torch.cat([x * 2.0, x * -1.0]), before(m.part, look))
    out |= {f"y{scale}": part for scale, part in zip(scales, y.split(n), strict=True)}


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


# -- 24: values between invokes ----------------------------------------------------------------------------------------


def between_lengths(m, x, out):
    """The last position of a short prompt into that of a long one; each has the values that it has alone."""
    short, long = x[:1, :3].tolist(), x[1:].tolist()
    with m.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(short):
            h = m.model.layers[1].output[:, -1]
            barrier()
            out["short"] = m.lm_head.output[:, -1].save()
        with tracer.invoke(long):
            barrier()
            m.model.layers[1].output[:, -1] = h
            out["long"] = m.lm_head.output[:, -1].save()
        with tracer.invoke():
            out["both"] = m.lm_head.output[:, -1].save()


def between_lengths_by_hand(m, x, out):
    """Two runs of their own, of one prompt each: to rounding, since their batches differ."""
    seen = {}
    short = run(m, x[:1, :3], after(m.model.layers[1], keep(seen, "h"))).logits[:, -1]

    def change(h):
        h[:, -1] = seen["h"][:, -1]

    long = run(m, x[1:], after(m.model.layers[1], change)).logits[:, -1]
    out.update(short=short, long=long, both=torch.cat([short, long]))


def edit_and_invokes(m, x, out):
    """At one site: the edit first, then the invokes in their order, then the whole batch."""
    with m.edit() as edited:
        edited.blocks[0].output = edited.blocks[0].output * 2
    with edited.trace() as tracer:
        with tracer.invoke(x):
            out["first"] = edited.blocks[0].output.clone().save()
            edited.blocks[0].output += 1
        with tracer.invoke():
            out["whole"] = edited.blocks[0].output.clone().save()
            edited.blocks[0].output[:] *= 3
        with tracer.invoke(-x):
            edited.blocks[0].output[:, 0] = 0
            out["y"] = edited.output.save()


def edit_and_invokes_by_hand(m, x, out):
    n = len(x)

    def change(h):
        h = h * 2
        out["first"] = h[:n].clone()
        h[:n] += 1
        out["whole"] = h.clone()
        h *= 3
        h[n:, 0] = 0
        return h

    out["y"] = run(m, torch.cat([x, -x]), after(m.blocks[0], change))[n:]


# -- 25: calls beside the model's, two names of one tensor, the user's own input ----------------------------------------


class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x):
        return self.inner(x).tanh()


class Adapted(MLP):
    """An MLP with a module that its own forward never calls."""

    def __init__(self):
        super().__init__()
        self.ad = Adapter()


def calls_beside(m, x, out):
    with m.trace(x) as tracer:
        h = m.blocks[0].output
        out["lens"] = m.head(m.norm(h)).save()
        m.blocks[1].output = m.ad(m.blocks[1].output, hook=True)
        out["inner"] = m.ad.inner.output.save()
        out["head"], out["y"] = m.head.output.save(), save(tracer.result)  # the model's own call


def calls_beside_by_hand(m, x, out):
    def look(h):
        out["lens"] = m.head.forward(m.norm.forward(h))

    hooks = after(m.blocks[0], look), after(m.blocks[1], lambda h: m.ad(h)), after(m.ad.inner, keep(out, "inner"))
    out["y"] = run(m, x, *hooks, after(m.head, keep(out, "head")))


def one_tensor_two_names(m, x, out):
    """Two writes and a read at one site; what is saved twice is one storage; the user's input is changed in place."""
    with m.trace(x) as tracer:
        m.input[:, 0] = 3
        m.blocks[0].output = m.blocks[0].output + 1
        m.blocks[0].output = m.blocks[0].output * 2
        one, two = m.blocks[0].output.save(), m.blocks[1].input.save()
        out["y"] = save(tracer.result)
    out["h"], out["is one"] = one, one.data_ptr() == two.data_ptr()
    assert bool((x[:, 0] == 3).all())


def one_tensor_two_names_by_hand(m, x, out):
    x[:, 0] = 3
    out["y"] = run(m, x, after(m.blocks[0], lambda h: (h + 1) * 2), before(m.blocks[1], first(keep(out, "h"))))
    out["is one"] = True


def lm():
    module = llama()
    module.config.use_cache = False
    return module


AOT, SPLICED = ("aot_eager",), ("eager", "aot_eager")  # generations take seconds to capture: `make test-slow`

CASES = [
    Case(21, one_step, one_step_by_hand, llama, ids(), kind=LanguageModel, slow=AOT),
    Case(21, into_the_cache, into_the_cache_by_hand, llama, ids(), kind=LanguageModel, slow=AOT),
    Case(21, ends_early, ends_early_by_hand, llama, ids(1), kind=LanguageModel, slow=SPLICED),
    Case(21, sampled, sampled_by_hand, llama, ids(), kind=LanguageModel, slow=SPLICED, draws=True),
    Case(22, stop_inside, stop_inside_by_hand, MLP),
    Case(22, stop_in_one_of_two, stop_in_one_of_two_by_hand, MLP),
    Case(23, skip_and_write, skip_and_write_by_hand, lambda: Returns(as_tuple), fused=True),
    Case(23, skips_of_invokes, skips_of_invokes_by_hand, lambda: Returns(as_tuple)),
    Case(23, skip_at_one_step, skip_at_one_step_by_hand, llama, ids(), kind=LanguageModel, slow=SPLICED),
    Case(24, between_lengths, between_lengths_by_hand, lm, ids(), kind=LanguageModel, slow=AOT, rounds=True),
    Case(24, edit_and_invokes, edit_and_invokes_by_hand, MLP, fused=True),
    Case(25, calls_beside, calls_beside_by_hand, Adapted),
    Case(25, one_tensor_two_names, one_tensor_two_names_by_hand, MLP, fused=True),
]


@pytest.mark.parametrize(("case", "engine"), each(CASES))
def test_killer(case, engine):
    check(case, engine)
