"""Where nnsight 0.8.1 and ours part: one text, what each does with it. docs/nnsight.md gives the reasons, row by row."""

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import nnsight_fx
import same_models
from nnsight_fx import NNsight
from nnsight_peer import PeerError, run_peer
from test_same_text import HELPER, MODELS

pytestmark = pytest.mark.peer
GUIDE = (Path(__file__).parents[2] / "docs" / "nnsight.md").read_text()

# name: the text; the class of the exception that each raises, or None. The name stands in docs/nnsight.md.
DIFFERENCES: dict[str, tuple[str, str | None, str | None]] = {
    "an earlier site read after a later one": (
        """
        with model.trace(x):
            out["late"] = model.blocks[2].output.save()
            out["early"] = model.blocks[0].output.save()
        """,
        "OutOfOrderError",
        None,
    ),
    "an unsaved value after the trace": (
        """
        with model.trace(x):
            h = model.blocks[0].output
        out["h"] = h * 2
        """,
        "NameError",
        "UnsavedValueError",
    ),
    "a list with `.save()`": (
        """
        with model.trace(x):
            found = [].save()
            found.append(model.blocks[0].output)
        out["h"] = found[0]
        """,
        None,
        "AttributeError",
    ),
    "a value that Python changed in the body": (
        """
        n = 0
        with model.trace(x):
            n = n + 1
            out["h"] = model.blocks[0].output.save()
        out["n"] = torch.tensor(n)
        """,
        None,
        None,
    ),
    "code behind a loop that has no end": (
        """
        with model.trace(x) as tracer:
            for step in tracer.iter[:]:
                out[f"h{step}"] = model.blocks[0].output.save()
            out["y"] = model.output.save()
        """,
        None,
        None,
    ),
    "a name of a later invoke's site in an earlier one": (
        """
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.blocks[2].output[:] = h
                out["first"] = model.output.save()
            with tracer.invoke(-x):
                h = model.blocks[0].output
        """,
        "NameError",
        "NameError",
    ),
    "`tracer.next()`": (
        """
        with model.trace(x) as tracer:
            tracer.next()
            out["h"] = model.twice.output.save()
        """,
        "AttributeError",
        None,
    ),
    "a body that begins with `try`": (
        """
        with model.trace(x):
            try:
                out["h"] = model.blocks[0].output.save()
            finally:
                pass
        """,
        "ValueError",
        None,
    ),
    "a value that needs a later one of an earlier invoke": (
        """
        with model.trace() as tracer:
            with tracer.invoke(x):
                late = model.blocks[2].output
            with tracer.invoke(-x):
                model.blocks[0].output = late * 1
                out["y"] = model.output.save()
        """,
        "NameError",
        None,
    ),
}


def outcome(run) -> tuple[str | None, dict]:
    try:
        return None, run()
    except PeerError as error:
        return error.types[0], {}
    except Exception as error:
        return type(error).__name__, {}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_each_does_what_the_guide_says(name):
    text, theirs, ours = DIFFERENCES[name]
    text = "with torch.no_grad():\n" + textwrap.indent(textwrap.dedent(text), "    ")
    cls = "Twice" if "twice" in text else "Net"
    net, x = getattr(same_models, cls)(), torch.randn(2, 4, 8)
    program = f"{MODELS}\nnet = {cls}()\nnet.load_state_dict(state)\n{HELPER}\nmodel = NNsight(net)\n{text}"

    def here() -> dict[str, Any]:
        scope: dict[str, Any] = {"torch": torch, "model": NNsight(net), "x": x, "out": {}, "nnsight_fx": nnsight_fx}
        exec(text, scope)
        return scope["out"]

    found = outcome(lambda: run_peer(program, state=net.state_dict(), x=x)), outcome(here)
    assert (found[0][0], found[1][0]) == (theirs, ours)
    if theirs is None and ours is None:
        same = found[0][1].keys() == found[1][1].keys() and all(
            torch.equal(found[0][1][key], found[1][1][key]) for key in found[1][1]
        )
        assert not same, "this is no difference any more"
    assert f"| {name} |" in GUIDE
