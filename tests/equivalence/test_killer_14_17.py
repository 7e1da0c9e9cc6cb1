"""Killer cases 14 to 17: Python that looks at values, recurrent modules, experts, batch statistics."""

import contextlib

import pytest
import torch
import torch.nn as nn

from nnsight_fx import MissedSiteError, UnsavedValueError, save

from .harness import Case, check, each
from .models import MLP, BatchNorm, MoE, Recurrent
from .programs import Enough, after, before, first, keep, run, skipped

# -- 14: an `if` in the body, a number, both nested --------------------------------------------------------------------


def ifs(m, x, out):
    """Both outcomes, one inside the other; what is saved on the way not taken is not there."""
    for scale in (1.0, -1.0):
        seen = []
        with m.trace(x) as tracer:
            h = m.blocks[0].output * scale
            unsaved = h + 1
            if h.flatten()[0] > 0:
                seen.append("positive")
                if m.blocks[1].output.mean().item() > 1e9:
                    out["never"] = m.blocks[1].output.save()
                m.blocks[1].output = m.blocks[1].output * 2
            else:
                seen.append("negative")
                out["kept"] = m.blocks[1].output.save()
            m.blocks[2].output[:, 0] = m.blocks[2].output.sum().item()
            out[f"y{scale}"] = save(tracer.result)
        out[f"seen{scale}"] = seen
        with pytest.raises(UnsavedValueError):
            unsaved.sum()


def ifs_by_hand(m, x, out):
    for scale in (1.0, -1.0):
        seen = []

        def look(h, scale=scale, seen=seen):
            seen.append("positive" if (h * scale).flatten()[0] > 0 else "negative")

        def change(h, seen=seen):
            if seen == ["positive"]:
                return h * 2
            out["kept"] = h

        def fill(h):
            h[:, 0] = h.sum().item()

        hooks = after(m.blocks[0], look), after(m.blocks[1], change), after(m.blocks[2], fill)
        out[f"y{scale}"] = run(m, x, *hooks)
        out[f"seen{scale}"] = seen


# -- 15: recurrent modules ---------------------------------------------------------------------------------------------


def zero_one_state(m, x, out):
    with m.trace(x) as tracer:
        o, (h, c) = m.lstm.output
        h[:] = 0
        out["o"], out["state"], out["y"] = o.save(), save([h, c]), save(tracer.result)


def zero_one_state_by_hand(m, x, out):
    def change(output):
        output[1][0][:] = 0
        out["o"], out["state"] = output[0], list(output[1])

    out["y"] = run(m, x, after(m.lstm, change))


def replace_nested(m, x, out):
    with m.trace(x) as tracer:
        o, (h, c) = m.lstm.output
        m.lstm.output = (o, (c, h * 2))
        out["whole"], out["y"] = save(m.lstm.output), save(tracer.result)


def replace_nested_by_hand(m, x, out):
    def change(output):
        o, (h, c) = output
        out["whole"] = (o, (c, h * 2))
        return out["whole"]

    out["y"] = run(m, x, after(m.lstm, change))


def skip_with_a_tuple(m, x, out):
    with m.trace(x) as tracer:
        h = m.lstm.input
        m.lstm.skip((h, (h[:, 0][None], h[:, 1][None] * 2)))
        out["state"] = m.lstm.output[1][0].save()
        out["y"] = save(tracer.result)


def skip_with_a_tuple_by_hand(m, x, out):
    values = []

    def prepare(h):
        values.append((h, (h[:, 0][None], h[:, 1][None] * 2)))

    def look(output):
        out["state"] = output[1][0]

    with skipped(m.lstm, values.pop):
        out["y"] = run(m, x, before(m.lstm, first(prepare)), after(m.lstm, look))


class Gated(nn.Module):
    """A GRU on a packed sequence."""

    def __init__(self):
        super().__init__()
        self.a, self.gru, self.head = nn.Linear(16, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(self.a(x), torch.tensor([7, 5, 2]), batch_first=True)
        out, h = self.gru(packed)
        return self.head(nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0]) + self.head(h[0])[:, None]


def packed(m, x, out):
    with m.trace(x) as tracer:
        m.a.output[:, 1] = 0
        _, h = m.gru.output
        h[:] *= 2
        out["h"], out["y"] = h.save(), save(tracer.result)


def packed_by_hand(m, x, out):
    def fill(h):
        h[:, 1] = 0

    def change(output):
        output[1].mul_(2)
        out["h"] = output[1]

    out["y"] = run(m, x, after(m.a, fill), after(m.gru, change))


# -- 16: a mixture of experts ------------------------------------------------------------------------------------------


def route_elsewhere(m, x, out):
    """Other experts run, with other numbers of rows; one that gets none is not called."""
    for bias in ((9.0, 9.0, 0.0, 0.0), (0.0, 0.0, 9.0, 0.0)):
        with m.trace(x) as tracer:
            m.router.output += torch.tensor(bias)
            out[f"router {bias}"], out[f"y{bias}"] = m.router.output.save(), save(tracer.result)


def route_elsewhere_by_hand(m, x, out):
    for bias in ((9.0, 9.0, 0.0, 0.0), (0.0, 0.0, 9.0, 0.0)):

        def change(h, bias=bias):
            h += torch.tensor(bias)
            out[f"router {bias}"] = h

        out[f"y{bias}"] = run(m, x, after(m.router, change))


def steer_an_expert(m, x, out):
    with m.trace(x) as tracer:
        m.router.output[:, 2] = 9
        out["rows"] = m.experts[2].input.save()
        m.experts[2].output = m.experts[2].output * 3
        out["y"] = save(tracer.result)


def steer_an_expert_by_hand(m, x, out):
    def choose(h):
        h[:, 2] = 9

    expert = m.experts[2]
    hooks = before(expert, first(keep(out, "rows"))), after(expert, lambda h: h * 3)
    out["y"] = run(m, x, after(m.router, choose), *hooks)


def expert_without_tokens(m, x, out):
    """An expert that gets no token is not called, and is an error only for those who read it."""
    with pytest.raises(MissedSiteError, match=r"`experts.0.output` \(call 0\) was read"):
        with m.trace(x) as tracer:
            m.router.output[:, 0] = -99
            router = m.router.output.save()
            y = save(tracer.result)
            m.experts[0].output.save()
    out["router"], out["y"] = router, y


def expert_without_tokens_by_hand(m, x, out):
    def change(h):
        h[:, 0] = -99
        out["router"] = h

    out["y"] = run(m, x, after(m.router, change))


# -- 17: batch statistics ----------------------------------------------------------------------------------------------


def skip_the_statistics(m, x, out):
    with m.trace(x) as tracer:
        m.bn.skip(m.bn.input * 2)
        out["y"] = save(tracer.result)


def skip_the_statistics_by_hand(m, x, out):
    out["y"] = m.head(m.b((m.a(x) * 2).relu()))


def statistics(m, x, out):
    """Once for each forward, as in eager; not for a scan, a capture, or a forward that ends before."""
    with m.scan(x):
        m.bn.output
    with m.trace(x) as tracer:
        m.bn.output[:, 0] = 1
        out["y"] = save(tracer.result)
    with m.trace(x) as tracer:
        out["a"] = m.a.output.save()
        tracer.stop()


def statistics_by_hand(m, x, out):
    def change(h):
        h[:, 0] = 1

    def leave(h):
        out["a"] = h
        raise Enough

    out["y"] = run(m, x, after(m.bn, change))
    with contextlib.suppress(Enough):
        run(m, x, after(m.a, leave))


def trained():
    return BatchNorm().train()


UNCERTAIN = "no scan could tell"

CASES = [
    Case(14, ifs, ifs_by_hand, MLP),
    Case(15, zero_one_state, zero_one_state_by_hand, Recurrent, breaks=True, fused=True),
    Case(15, replace_nested, replace_nested_by_hand, Recurrent, breaks=True),
    Case(15, skip_with_a_tuple, skip_with_a_tuple_by_hand, Recurrent, breaks=True),
    Case(15, packed, packed_by_hand, Gated, falls_back=UNCERTAIN),
    Case(16, route_elsewhere, route_elsewhere_by_hand, MoE, breaks=True),
    Case(16, steer_an_expert, steer_an_expert_by_hand, MoE, falls_back=UNCERTAIN),
    Case(16, expert_without_tokens, expert_without_tokens_by_hand, MoE, falls_back=UNCERTAIN),
    Case(17, skip_the_statistics, skip_the_statistics_by_hand, trained, fused=True),
    Case(17, statistics, statistics_by_hand, trained, fused=True),
]


@pytest.mark.parametrize(("case", "engine"), each(CASES))
def test_killer(case, engine):
    check(case, engine)
