"""Killer cases 1 to 5: aliases, views, modules that run twice or have two paths."""

import warnings

import pytest
import torch.nn as nn

from nnsight_fx import save

from .harness import Case, check, each
from .models import Alias, InPlace, Shared, Views
from .programs import after, before, first, keep, run

# -- 1: a module that returns its argument -----------------------------------------------------------------------------


def alias_in_place(m, x, out):
    with m.trace(x) as tracer:
        out["a"] = m.a.output.save()
        m.same.output[:, 1:] = 0
        out["y"] = save(tracer.result)


def alias_in_place_by_hand(m, x, out):
    def change(h):
        h[:, 1:] = 0

    out["y"] = run(m, x, after(m.a, keep(out, "a")), after(m.same, change))


def alias_replaced(m, x, out):
    with m.trace(x) as tracer:
        out["a"] = m.a.output.save()
        m.same.output = m.same.output * 0
        out["y"] = save(tracer.result)


def alias_replaced_by_hand(m, x, out):
    out["y"] = run(m, x, after(m.a, keep(out, "a")), after(m.same, lambda h: h * 0))


# -- 2: an activation in place -----------------------------------------------------------------------------------------


def activation_in_place(m, x, out):
    """A saved tensor is the real one: it shows what the model does to it later. A copy does not."""
    with m.trace(x) as tracer:
        out["a"], out["copy"] = m.a.output.save(), m.a.output.clone().save()
        out["act"], out["y"] = m.act.output.save(), save(tracer.result)
    out["negative"] = [bool((out[k] < 0).any()) for k in ("a", "copy", "act")]


def activation_in_place_by_hand(m, x, out):
    def look(h):
        out.update(a=h, copy=h.clone())

    out["y"] = run(m, x, after(m.a, look), after(m.act, keep(out, "act")))
    out["negative"] = [False, True, False]


# -- 3: a view ---------------------------------------------------------------------------------------------------------


def view_in_place(m, x, out):
    with m.trace(x) as tracer:
        out["whole"] = m.a.output.save()
        m.view.output[:, 0] = 5
        out["y"] = save(tracer.result)


def view_in_place_by_hand(m, x, out):
    def change(h):
        h[:, 0] = 5

    out["y"] = run(m, x, after(m.a, keep(out, "whole")), after(m.view, change))


def view_replaced(m, x, out):
    with m.trace(x) as tracer:
        out["whole"] = m.a.output.save()
        m.view.output = m.view.output * 0
        out["y"] = save(tracer.result)


def view_replaced_by_hand(m, x, out):
    out["y"] = run(m, x, after(m.a, keep(out, "whole")), after(m.view, lambda h: h * 0))


def view_in_place_under_grad(m, x, out):
    """Both halves come from one `chunk`: torch refuses to change one of them in place."""
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="multiple views"):
        # a compiler meets torch's refusal first, says so, and the graph runs as it is
        warnings.filterwarnings("ignore", "nnsight_fx: .* could not compile a segment")
        with m.trace(x):
            m.view.output[:, 0] = 5
    with m.trace(x) as tracer:
        m.view.output = m.view.output * 0
        y = save(tracer.result)
    out["y"] = y.detach()


def view_in_place_under_grad_by_hand(m, x, out):
    def change(h):
        h[:, 0] = 5

    with pytest.raises(RuntimeError, match="multiple views"):
        run(m, x, after(m.view, change))
    out["y"] = run(m, x, after(m.view, lambda h: h * 0)).detach()


# -- 4: a module that runs twice ---------------------------------------------------------------------------------------


def first_call(m, x, out):
    with m.trace(x) as tracer:
        m.a.output = m.a.output * 3
        out["into b"], out["y"] = m.b.input.save(), save(tracer.result)


def first_call_by_hand(m, x, out):
    out["y"] = run(m, x, after(m.a, lambda h: h * 3), before(m.b, first(keep(out, "into b"))))


def second_call(m, x, out):
    with m.trace(x) as tracer:
        for _ in tracer.iter[1]:
            out["into a"] = m.a.input.save()
            m.a.output[:, 0] = 2
        out["y"] = save(tracer.result)


def second_call_by_hand(m, x, out):
    def change(h):
        h[:, 0] = 2

    out["y"] = run(m, x, before(m.a, first(keep(out, "into a")), call=1), after(m.a, change, call=1))


def both_calls_cached(m, x, out):
    with m.trace(x) as tracer:
        cache = tracer.cache([m.a, m.b], include_inputs=True)
        for _ in tracer.iter[:]:
            m.a.output += 1
    out["calls"] = [len(cache.a), len(cache.b)]
    out["a"], out["into a"] = list(cache.a.output), [visit.input for visit in (cache.a[0], cache.a[1])]


def both_calls_cached_by_hand(m, x, out):
    out.update({"calls": [2, 1], "a": [], "into a": []})

    def change(_module, args, output):
        out["into a"].append(args[0])
        output += 1
        out["a"].append(output)

    run(m, x, m.a.register_forward_hook(change))


# -- 5: one module at two paths, one weight in two modules -------------------------------------------------------------


class Tied(nn.Module):
    """`m` is `l`, and `head` has its weight."""

    def __init__(self):
        super().__init__()
        self.l, self.head = nn.Linear(16, 16), nn.Linear(16, 16)
        self.m, self.head.weight = self.l, self.l.weight

    def forward(self, x):
        return self.head(self.m(self.l(x).tanh()))


def two_paths(m, x, out):
    with m.trace(x) as tracer:
        m.m.output = m.m.output * 2  # call 0, whatever its name
        for _ in tracer.iter[1]:
            out["second"] = m.l.output.save()
        out["y"] = save(tracer.result)
    out["second"], y = out["second"].detach(), out.pop("y")
    (y.square().sum()).backward()
    out["y"] = y.detach()
    assert m.m is m.l and m.l.path == "model.l"


def two_paths_by_hand(m, x, out):
    y = run(m, x, after(m.l, lambda h: h * 2), after(m.l, keep(out, "second"), call=1))
    y.square().sum().backward()
    out["second"], out["y"] = out["second"].detach(), y.detach()


CASES = [
    Case(1, alias_in_place, alias_in_place_by_hand, Alias, fused=True),
    Case(1, alias_replaced, alias_replaced_by_hand, Alias),
    Case(2, activation_in_place, activation_in_place_by_hand, InPlace, fused=True),
    Case(3, view_in_place, view_in_place_by_hand, Views, fused=True),
    Case(3, view_replaced, view_replaced_by_hand, Views),
    Case(3, view_in_place_under_grad, view_in_place_under_grad_by_hand, Views, trains=True, refused=True),
    Case(4, first_call, first_call_by_hand, Shared),
    Case(4, second_call, second_call_by_hand, Shared),
    Case(4, both_calls_cached, both_calls_cached_by_hand, Shared),
    Case(5, two_paths, two_paths_by_hand, Tied, trains=True, fused=True),
]


@pytest.mark.parametrize(("case", "engine"), each(CASES))
def test_killer(case, engine):
    check(case, engine)
