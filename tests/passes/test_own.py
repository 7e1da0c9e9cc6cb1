"""`model.compile(passes=(..., mine), disable={...})`: passes of the user's own over each captured graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn as nn

from nnsight_fx import NNsight, assert_no_fallback, passes

BACKENDS = ["eager", "aot_eager"]
X = torch.randn(2, 3, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.tanh(self.a(x))) * 2 * 3


def wrapped(**options: Any) -> Any:
    torch.manual_seed(0)
    model: Any = NNsight(nn.Sequential(*[Block() for _ in range(3)]))
    if options:
        model.compile(**options)
    return model


def fold(gm: fx.GraphModule, job: Any) -> int:
    """Two multiplications by numbers, one behind the other, are one."""
    folded = 0
    for node in gm.graph.find_nodes(op="call_function", target=operator.mul):
        inner = node.args[0]
        if getattr(inner, "target", None) is operator.mul and len(inner.users) == 1:
            x, first = inner.args
            if isinstance(first, int | float) and isinstance(node.args[1], int | float):
                node.args = (x, first * node.args[1])
                gm.graph.erase_node(inner)
                folded += 1
    return folded


def steer(m: Any) -> Any:
    with torch.no_grad(), m.trace(X):
        kept = m[0].output.save()
        m[1].output[:, -1] += 1
        out = m.output.save()
    return kept, out


def skipped(m: Any) -> Any:
    with torch.no_grad(), m.trace(X):
        m[1].skip(m[1].input * 2)
        out = m.output.save()
    return (out,)


def stopped(m: Any) -> Any:
    with torch.no_grad(), m.trace(X) as tracer:
        kept = m[1].a.output.save()
        tracer.stop()
    return (kept,)


def looked(m: Any) -> Any:
    with torch.no_grad(), m.trace(X):
        if m[0].output.sum() > -1e9:
            m[1].output[:] = 0
        out = m.output.save()
    return (out,)


def backward(m: Any) -> Any:
    with m.trace(X):
        grad = m[1].output.grad.save()
        m.output.sum().backward()
    return (grad,)


PROGRAMS = [steer, skipped, stopped, looked, backward]


def same(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "given", [(..., fold), (*passes.PIPELINE[:3], fold, *passes.PIPELINE[3:])], ids=["behind", "among"]
)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_a_pass_of_ones_own_runs_and_is_counted(program: Callable, given: tuple, backend: str) -> None:
    model = wrapped(backend=backend, passes=given)
    with assert_no_fallback():
        got = program(model)
    same(got, program(wrapped()))
    facts = model.explain().to_dict()["captures"][0]
    counts = {step["pass"]: step["rewrites"] for step in facts["passes"]}
    assert "fold" in counts and "fold" in facts["options"]["passes"]
    if program is steer:
        assert counts["fold"] == 3 and "fold: 3 rewrites" in str(model.explain())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(passes.OPTIONAL))
def test_what_can_be_left_out_changes_no_value(name: str, backend: str) -> None:
    model, plain = wrapped(backend=backend, disable={name}), wrapped()
    for program in PROGRAMS:
        same(program(model), program(plain))
    reported = {step["pass"] for step in model.explain().to_dict()["captures"][0]["passes"]}
    assert name not in reported


def test_a_sweep_runs_its_cells_one_by_one() -> None:
    def cell(m: Any, layer: int) -> Any:
        model[layer].output[:] = 0
        return model.output

    model = wrapped(backend="eager", passes=(..., fold))
    with torch.no_grad():
        found = model.sweep(cell, X, over={"layer": [0, 1]}, progress=False)
        model._host.compiled = None
        want = model.sweep(cell, X, over={"layer": [0, 1]}, progress=False)
    torch.testing.assert_close(found.array.values, want.array.values)
    with torch.no_grad(), model.session() as session:
        for layer in range(2):
            with model.trace(X, compile={"backend": "eager", "passes": (..., fold)}):
                model[layer].output[:] = 0
                model.output.save()
    assert "passes of yours are for the graph of one trace" in str(session.explain())


def test_a_pass_that_fails_is_named() -> None:
    def breaks(gm: fx.GraphModule, job: Any) -> int:
        raise RuntimeError("not today")

    def dangles(gm: fx.GraphModule, job: Any) -> int:
        next(n for n in gm.graph.nodes if n.op == "call_function").args = (fx.Graph().placeholder("elsewhere"),)
        return 1

    for step, message in ((breaks, "not today"), (dangles, "elsewhere")):
        with pytest.raises(Exception, match=message) as failed:
            steer(wrapped(backend="eager", passes=(..., step)))
        assert any(f"in the pass `{step.__name__}`" in note for note in failed.value.__notes__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disable": {"splice"}}, "test_own.py:.* `splice` cannot be left out: without it a plan would not run"),
        ({"disable": {"prun"}}, "`prun` cannot be left out: did you mean `prune`"),
        ({"passes": (fold,)}, "test_own.py:.* passes without .*`splice`.* cannot run a plan: `...` stands for"),
        ({"passes": (fold, ...)}, "the pass `fold` stands in front of `splice`"),
        ({"passes": (..., "fold")}, "a pass is a function `.gm, job. -> int`, not 'fold'"),
    ],
)
def test_bad_ones_are_told_at_once(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped(backend="eager", **options)
