"""Killer cases 18 to 20: values that are no tensors, code that no graph holds, dtypes."""

import pytest
import torch
import torch.nn as nn

from nnsight_fx import save

from .harness import Case, check, data, each
from .programs import after, before, first, keep, run

# -- 18: what modules give and take that is no tensor ------------------------------------------------------------------


class Nothing(nn.Module):
    def forward(self, log):
        log.append("seen")


class Count(nn.Module):
    def forward(self, x):
        return x.shape[-1]


class Word(nn.Module):
    def forward(self, x):
        return "plus" if x.dim() == 3 else "minus"


class Grow(nn.Module):
    def forward(self, x, so_far):
        return [*so_far, x]


class Odd(nn.Module):
    """Takes a dict, and its children give `None`, an int, a string, and lists that grow."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.nothing, self.count = nn.Linear(16, 16), nn.Linear(16, 16), Nothing(), Count()
        self.word, self.grow = Word(), nn.ModuleList([Grow(), Grow()])

    def forward(self, batch):
        log, h = [], self.a(batch["x"]) * batch["scale"]
        self.nothing(log)
        found = self.grow[1](self.b(h), self.grow[0](h, []))
        total = sum(found) / self.count(h)
        return total if self.word(h) == "plus" else -total


def odd_inputs(seed):
    return {"x": data(3, 7, 16)(seed), "scale": 2.0}


def read_no_tensors(m, x, out):
    with m.trace(x) as tracer:
        out["nothing"], out["count"], out["word"] = m.nothing.output, m.count.output, m.word.output
        out["keys"], out["x"] = list(m.input), m.input["x"].save()
        out["grown"], out["y"] = save(m.grow[1].output), save(tracer.result)


def read_no_tensors_by_hand(m, x, out):
    hooks = [after(module, keep(out, name)) for name, module in (("nothing", m.nothing), ("count", m.count))]
    hooks += [after(m.word, keep(out, "word")), after(m.grow[1], keep(out, "grown"))]
    out["keys"], out["x"] = list(x), x["x"]
    out["y"] = run(m, x, *hooks)


def write_no_tensors(m, x, out):
    """A number, a string, a list of other lengths: what the model's Python does with them follows."""
    for count, word in ((4, "plus"), (8, "minus"), (16, "plus")):
        with m.trace(x) as tracer:
            m.grow[0].output = [*m.grow[0].output, m.a.output * 3]
            m.count.output, m.word.output = count, word
            out[f"y{count}"] = save(tracer.result)


def write_no_tensors_by_hand(m, x, out):
    for count, word in ((4, "plus"), (8, "minus"), (16, "plus")):
        kept = {}
        hooks = [after(m.count, lambda _, count=count: count), after(m.word, lambda _, word=word: word)]
        hooks += [after(m.a, keep(kept, "a")), after(m.grow[0], lambda h, kept=kept: [*h, kept["a"] * 3])]
        out[f"y{count}"] = run(m, x, *hooks)


def write_an_item_of_the_input(m, x, out):
    with m.trace(x) as tracer:
        m.input["x"] = m.input["x"] + 1
        m.input["scale"] = 0.5
        out["y"] = save(tracer.result)


def write_an_item_of_the_input_by_hand(m, x, out):
    x["x"], x["scale"] = x["x"] + 1, 0.5
    out["y"] = m(x)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.b(self.a(x))


def a_tuple_for_a_tensor(m, x, out):
    """The caller cannot use it: its own exception, and the write's line with it."""
    with pytest.raises(TypeError, match=r"(?s)linear.*test_killer_18_20.py:\d+"):
        with m.trace(x):
            m.a.output = (m.a.output, 1)
    with m.trace(x) as tracer:
        out["y"] = save(tracer.result)


def a_tuple_for_a_tensor_by_hand(m, x, out):
    with pytest.raises(TypeError, match="linear"):
        run(m, x, after(m.a, lambda h: (h, 1)))
    out["y"] = m(x)


# -- 19: code that no graph holds, with modules inside and behind ------------------------------------------------------


@torch.compiler.disable
def opaque(h):
    """What no graph holds: numbers, lists, text."""
    print(end="")
    return torch.tensor(max(h.flatten().tolist()))


class Numpy(nn.Module):
    """A trip through numpy in front of a child, and an opaque function behind it."""

    def __init__(self):
        super().__init__()
        self.inner, self.after = nn.Sequential(nn.Linear(16, 16), nn.Tanh()), nn.Linear(16, 16)

    def forward(self, x):
        h = torch.from_numpy(x.detach().numpy() * 2)
        h = self.inner(h)
        return self.after(h * opaque(h))


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.part, self.b = nn.Linear(16, 16), Numpy(), nn.Linear(16, 16)

    def forward(self, x):
        return self.b(self.part(self.a(x)))


def inside_of_it(m, x, out):
    with m.trace(x) as tracer:
        m.part.inner[0].output[:, 0] = 1
        m.part.inner.output = m.part.inner.output * 2
        out["into"], out["y"] = m.part.after.input.save(), save(tracer.result)


def inside_of_it_by_hand(m, x, out):
    def fill(h):
        h[:, 0] = 1

    hooks = after(m.part.inner[0], fill), after(m.part.inner, lambda h: h * 2)
    out["y"] = run(m, x, *hooks, before(m.part.after, first(keep(out, "into"))))


def in_front_of_it(m, x, out):
    """What comes before is captured as ever."""
    with m.trace(x):
        m.a.output = m.a.output + 1
        out["into"] = m.part.input.save()


def in_front_of_it_by_hand(m, x, out):
    run(m, x, after(m.a, lambda h: h + 1), before(m.part, first(keep(out, "into"))))


# -- 20: dtypes --------------------------------------------------------------------------------------------------------


class Half(nn.Module):
    """bfloat16, with an integer leaf beside."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.pair = nn.Linear(16, 16), nn.Linear(16, 16), Paired()
        self.to(torch.bfloat16)

    def forward(self, x):
        h, index = self.pair(self.a(x.bfloat16()))
        return self.b(h) + index


class Paired(nn.Module):
    def forward(self, h):
        return h, h.argmax(-1, keepdim=True)


def float_into_half(m, x, out):
    """In place it takes the model's dtype; as a new value it promotes, and the next layer refuses it as eager does."""
    vector = torch.linspace(-1, 1, 16)
    with m.trace(x) as tracer:
        m.a.output += vector
        m.pair.output[0][:, 0] = vector
        out["pair"], out["y"] = save(m.pair.output), save(tracer.result)
    with pytest.raises(RuntimeError, match=r"dtype.*|same dtype"):
        with m.trace(x):
            m.pair.output = (m.pair.output[0] + vector, m.pair.output[1])


def float_into_half_by_hand(m, x, out):
    vector = torch.linspace(-1, 1, 16)

    def steer(h):
        h += vector

    def change(output):
        output[0][:, 0] = vector
        out["pair"] = output

    out["y"] = run(m, x, after(m.a, steer), after(m.pair, change))
    with pytest.raises(RuntimeError, match=r"dtype.*|same dtype"):
        run(m, x, after(m.pair, lambda output: (output[0] + vector, output[1])))


def under_autocast(m, x, out):
    """The model computes in bfloat16, and so does what the body computes by operations that autocast knows."""
    vector = torch.linspace(-1, 1, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), m.trace(x) as tracer:
        h = m.a.output
        m.a.output = h + vector @ torch.eye(16)
        out["a"], out["into"], out["y"] = h.save(), m.b.input.save(), save(tracer.result)


def under_autocast_by_hand(m, x, out):
    vector = torch.linspace(-1, 1, 16)

    def change(h):
        out["a"], out["into"] = h, h + vector @ torch.eye(16)
        return out["into"]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out["y"] = run(m, x, after(m.a, change))


CASES = [
    Case(18, read_no_tensors, read_no_tensors_by_hand, Odd, odd_inputs),
    Case(18, write_no_tensors, write_no_tensors_by_hand, Odd, odd_inputs),
    Case(18, write_an_item_of_the_input, write_an_item_of_the_input_by_hand, Odd, odd_inputs),
    Case(18, a_tuple_for_a_tensor, a_tuple_for_a_tensor_by_hand, Chain, breaks=True),
    Case(19, inside_of_it, inside_of_it_by_hand, Holds, falls_back="no scan could tell"),
    Case(19, in_front_of_it, in_front_of_it_by_hand, Holds, breaks=True),
    Case(20, float_into_half, float_into_half_by_hand, Half),
    Case(20, under_autocast, under_autocast_by_hand, Chain),
]


@pytest.mark.parametrize(("case", "engine"), each(CASES))
def test_killer(case, engine):
    check(case, engine)
