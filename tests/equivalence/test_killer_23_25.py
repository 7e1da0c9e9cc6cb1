"""Killer cases 23 to 25: skips, values between invokes, modules called beside the model.

More of each: test_skips.py (23), tests/engine/test_waves.py (24), tests/tracing/test_small_verbs.py (25).
"""

import pytest
import torch
import torch.nn as nn

from nnsight_fx import LanguageModel, SkipError, save

from .harness import Case, check, each, ids
from .models import MLP, Returns, as_tuple, llama
from .programs import after, before, first, keep, run, skipped

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
    with pytest.raises(SkipError, match=r"`part` is skipped in 1 of 2 invokes .*test_killer_23_25.py:\d+"):
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
    module = llama().eval()
    module.config.use_cache = False
    return module


CASES = [
    Case(23, skip_and_write, skip_and_write_by_hand, lambda: Returns(as_tuple), fused=True),
    Case(23, skips_of_invokes, skips_of_invokes_by_hand, lambda: Returns(as_tuple)),
    Case(24, between_lengths, between_lengths_by_hand, lm, ids(), kind=LanguageModel, slow=("aot_eager",), rounds=True),
    Case(24, edit_and_invokes, edit_and_invokes_by_hand, MLP, fused=True),
    Case(25, calls_beside, calls_beside_by_hand, Adapted),
    Case(25, one_tensor_two_names, one_tensor_two_names_by_hand, MLP, fused=True),
]


@pytest.mark.parametrize(("case", "engine"), each(CASES))
def test_killer(case, engine):
    check(case, engine)
