"""`tracer.graph`: printed as code, compared by structure, with the reasons why two differ."""

import re

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight, OutsideTraceError


def model():
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).requires_grad_(False))


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def recorded(body, x=X, wrapped=None):
    wrapped = wrapped or model()
    with wrapped.trace(x, compile=False) as tracer:
        body(wrapped, tracer)
    return tracer.graph


def steered(m, tracer, scale=2.0, at=-1, dim=-1):
    h = m[0].output
    h[at] = h[at] * scale
    m[2].input = h.mT.mT
    m[2].output.sum(dim).save()


def test_it_prints_as_code_with_the_users_lines():
    lines = [re.split(r"\s+# ", line) for line in str(recorded(steered)).splitlines()]
    assert [code for code, _ in lines] == [
        "constant_0 = -1",
        "constant_1 = 2.0",
        "constant_2 = -1",
        "v0 = model[0].output",
        "v1 = v0[constant_0]",
        "v2 = v1.mul(constant_1)",
        "v0[constant_2] = v2",
        "v4 = v0.mT",
        "v5 = v4.mT",
        "model[2].input = ((v5,), {})",
        "v7 = model[2].output",
        "v8 = v7.sum(-1)",
        "v8.save()",
    ]
    notes = [note for _, note in lines]
    first = steered.__code__.co_firstlineno
    assert notes[:3] == ["lifted"] * 3
    assert notes[3:] == [f"test_graph.py:{first + n}" for n in (1, 2, 2, 2, 3, 3, 3, 4, 4, 4)]


def test_plan_and_graph_are_one_and_grow_with_the_body():
    m = model()
    with m.trace(X, compile=False) as tracer:
        assert len(tracer.graph) == 0
        m[0].output.save()
        assert len(tracer.graph) == 2 and tracer.plan == tracer.graph
    assert [op.kind for op in tracer.plan] == ["read", "save"]
    with m.trace() as empty:
        with pytest.raises(OutsideTraceError, match="nothing is recorded yet"):
            empty.graph  # noqa: B018
        with empty.invoke(X):
            pass


def test_operations_are_data():
    graph = recorded(steered)
    read, call, *_, save = graph
    assert (read.kind, read.site, read.inputs, read.invoke) == ("read", ("0", "output", 0), (), 0)
    assert read.line.filename == __file__
    assert (call.kind, call.name, call.inputs, call.constants) == ("call", "torch.Tensor.__getitem__", (0,), (0,))
    assert save.kind == "save" and save.inputs == (graph[-2].index,)
    assert [op.site[0] for op in graph if op.kind == "write"] == ["2"]


def test_equality_is_of_structure():
    one = recorded(steered)
    other = recorded(lambda m, t: steered(m, t, scale=7.5, at=1))
    assert one == other and hash(one) == hash(other) and one.key == other.key and one.diff(other) == []
    assert one != recorded(lambda m, t: steered(m, t, dim=0))
    assert recorded(lambda m, t: m[0].output.mT.save()).plan is recorded(lambda m, t: m[0].output.mT.save()).plan


@pytest.mark.parametrize(
    "body, other, reason",
    [
        (
            lambda m, t: m[0].output.sum(0).save(),
            lambda m, t: m[0].output.sum(1).save(),
            "`v1 = v0.sum(0)` (test_graph.py:{line}): argument 1 is 0 here and 1 there, which is structure",
        ),
        (
            lambda m, t: m[0].output.add(torch.ones(4)).save(),
            lambda m, t: m[0].output.add(torch.ones(1)).save(),
            "the tensor in argument 1 has shape (4,) here and (1,) there",
        ),
        (
            lambda m, t: (m[0].output.relu(), m[2].output.save()),
            lambda m, t: m[2].output.save(),
            "only here: `v0 = model[0].output`",
        ),
        (
            lambda m, t: m[2].output.save(),
            lambda m, t: m[1].output.save(),
            "only there: `v0 = model[1].output`",
        ),
    ],
    ids=["dim", "shape", "removed", "added"],
)
def test_why_two_differ(body, other, reason):
    wrapped = model()
    reasons = [str(d) for d in recorded(body, wrapped=wrapped).diff(recorded(other, wrapped=wrapped))]
    start = reason.format(line=body.__code__.co_firstlineno)
    assert any(start in r for r in reasons), reasons


def test_an_inserted_operation_is_the_only_difference():
    a = recorded(lambda m, t: (m[0].output.add(1.0), m[2].output.mul(2.0).sum(0).save()))
    b = recorded(lambda m, t: m[2].output.mul(2.0).sum(0).save())
    assert [d.here for d in a.diff(b)] == [0, 1] and [d.there for d in b.diff(a)] == [0, 1]
