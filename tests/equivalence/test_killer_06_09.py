"""Killer cases 6 to 9: modules that are not called, containers, arguments by keyword."""

import dataclasses

import pytest
import torch
import torch.nn as nn
from transformers.utils import ModelOutput

from nnsight_fx import MissedSiteError, save

from .harness import Case, check, each
from .models import Returns, State, as_dict, as_tuple
from .programs import after, before, keep, run

# -- 6: a module that is not called ------------------------------------------------------------------------------------


class Chooses(nn.Module):
    """`yes` or `no` runs, by an argument; `unused` never does."""

    def __init__(self):
        super().__init__()
        self.a, self.yes, self.no = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.unused, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x, flag=True):
        h = self.a(x)
        return self.head(self.yes(h) if flag else self.no(h))


def not_called(m, x, out):
    """The model has run, and what else was saved is there."""
    for path, flag in (("no", True), ("yes", False), ("unused", True)):
        with pytest.raises(MissedSiteError, match=rf"test_killer_06_09.py:\d+: `{path}.output`"):
            with m.trace(x, flag=flag) as tracer:
                m.a.output[:, 0] = 1
                h = m.a.output.save()
                y = save(tracer.result)
                m.get(f"{path}.output").save()
        out[path] = h, y


def not_called_by_hand(m, x, out):
    def change(h):
        h[:, 0] = 1

    for path, flag in (("no", True), ("yes", False), ("unused", True)):
        y = run(m, x, after(m.a, change), after(m.a, keep(out, "h")), flag=flag)
        out[path] = out.pop("h"), y


# -- 7: a tuple --------------------------------------------------------------------------------------------------------


def replace_an_element(m, x, out):
    with m.trace(x) as tracer:
        h, other, step = m.part.output
        m.part.output = (h * 2, other, step)
        out["y"] = save(tracer.result)


def replace_an_element_by_hand(m, x, out):
    out["y"] = run(m, x, after(m.part, lambda output: (output[0] * 2, *output[1:])))


def element_in_place(m, x, out):
    with m.trace(x) as tracer:
        m.part.output[0][:, 0] = 7
        out["y"] = save(tracer.result)


def element_in_place_by_hand(m, x, out):
    def change(output):
        output[0][:, 0] = 7

    out["y"] = run(m, x, after(m.part, change))


def number_in_a_tuple(m, x, out):
    """A leaf that is no tensor is read as the object it is, and can be another one."""
    for factor in (4, -1):
        with m.trace(x) as tracer:
            h, other, step = m.part.output
            out["step"] = step
            m.part.output = (h, other, step * factor)
            out[f"y{factor}"] = save(tracer.result)


def number_in_a_tuple_by_hand(m, x, out):
    for factor in (4, -1):

        def change(output, factor=factor):
            out["step"] = output[2]
            return (*output[:2], output[2] * factor)

        out[f"y{factor}"] = run(m, x, after(m.part, change))


def item_of_a_tuple(m, x, out):
    """Python's own error, at once and at the user's line; element 1 is the very tensor that the module returned."""
    with m.trace(x) as tracer:
        with pytest.raises(TypeError, match="does not support item assignment"):
            m.part.output[0] = m.part.output[0] * 2
        h, other, step = m.part.output
        m.part.output = (h * 2, other, step)
        same = m.part.output[1] is other
        out["part"], out["y"] = save(m.part.output), save(tracer.result)
    assert same


def item_of_a_tuple_by_hand(m, x, out):
    def change(output):
        out["part"] = (output[0] * 2, *output[1:])
        return out["part"]

    out["y"] = run(m, x, after(m.part, change))


# -- 8: dicts, dataclasses, ModelOutput --------------------------------------------------------------------------------


def dict_item(m, x, out):
    with m.trace(x) as tracer:
        m.part.output["h"] = m.part.output["h"] * 2
        m.part.output["step"] = 5
        out["part"], out["y"] = save(m.part.output), save(tracer.result)


def dict_item_by_hand(m, x, out):
    def change(output):
        output["h"], output["step"] = output["h"] * 2, 5
        out["part"] = output

    out["y"] = run(m, x, after(m.part, change))


def dataclass_field(m, x, out):
    with m.trace(x) as tracer:
        m.part.output.h = m.part.output.h * 2
        m.part.output.step = 5
        m.part.output.skip[:, 0] = 1
        out["part"], out["y"] = save(m.part.output), save(tracer.result)


def dataclass_field_by_hand(m, x, out):
    def change(output):
        output.h, output.step = output.h * 2, 5
        output.skip[:, 0] = 1
        out["part"] = output

    out["y"] = run(m, x, after(m.part, change))


@dataclasses.dataclass
class Answers(ModelOutput):
    logits: torch.Tensor = None
    hidden: torch.Tensor = None


class GivesOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        h = self.a(x)
        return Answers(logits=self.head(h), hidden=h)


def field_of_the_result(m, x, out):
    with m.trace(x) as tracer:
        m.output.logits = m.output.logits * 2
        m.output["hidden"][:, 0] = 0
        out["y"] = save(tracer.result)
    assert type(out["y"]).__name__ == "Answers"


def field_of_the_result_by_hand(m, x, out):
    def change(result):
        result.logits = result.logits * 2
        result["hidden"][:, 0] = 0

    out["y"] = run(m, x, after(m, change))


# -- 9: arguments by keyword -------------------------------------------------------------------------------------------


def inputs_by_keyword(m, x, out):
    with m.trace(x) as tracer:
        out["into"] = m.part.input.save()
        m.part.input = m.part.input + 1
        args, kwargs = m.part.inputs
        out["args"], out["names"], out["scale"] = len(args), list(kwargs), kwargs["scale"]
        out["y"] = save(tracer.result)


def inputs_by_keyword_by_hand(m, x, out):
    def change(args, kwargs):
        out.update(into=kwargs["x"], args=len(args), names=list(kwargs), scale=kwargs["scale"])
        return args, {**kwargs, "x": kwargs["x"] + 1}

    out["y"] = run(m, x, before(m.part, change))


def scale_by_keyword(m, x, out):
    for scale in (5.0, 3.0, 2.0):
        with m.trace(x) as tracer:
            args, kwargs = m.part.inputs
            m.part.inputs = (args, {**kwargs, "scale": scale})
            out[f"y{scale}"] = save(tracer.result)


def scale_by_keyword_by_hand(m, x, out):
    for scale in (5.0, 3.0, 2.0):
        change = before(m.part, lambda args, kwargs, scale=scale: (args, {**kwargs, "scale": scale}))
        out[f"y{scale}"] = run(m, x, change)


CASES = [
    Case(6, not_called, not_called_by_hand, Chooses, falls_back="no scan could tell"),
    Case(7, replace_an_element, replace_an_element_by_hand, lambda: Returns(as_tuple), fused=True),
    Case(7, element_in_place, element_in_place_by_hand, lambda: Returns(as_tuple)),
    Case(7, number_in_a_tuple, number_in_a_tuple_by_hand, lambda: Returns(as_tuple)),
    Case(7, item_of_a_tuple, item_of_a_tuple_by_hand, lambda: Returns(as_tuple)),
    Case(8, dict_item, dict_item_by_hand, lambda: Returns(as_dict)),
    Case(8, dataclass_field, dataclass_field_by_hand, lambda: Returns(State), fused=True),
    Case(8, field_of_the_result, field_of_the_result_by_hand, GivesOutput),
    Case(9, inputs_by_keyword, inputs_by_keyword_by_hand, lambda: Returns(as_dict)),
    Case(9, scale_by_keyword, scale_by_keyword_by_hand, lambda: Returns(as_tuple), fused=True),
]


@pytest.mark.parametrize(("case", "engine"), each(CASES))
def test_killer(case, engine):
    check(case, engine)
