"""`explain()`: what ran how, as text and as data."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.nn as nn

from nnsight_fx import FallbackWarning, NNsight, OutsideTraceError, compat


class Broken(nn.Module):
    """A graph break in the middle, at a line of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        h = self.a(x)
        scale = h.sum().item()  # breaks here
        h = self.b(h) * (2 if scale > 0 else 3)
        return self.c(h)


BREAK = Broken.forward.__code__.co_firstlineno + 2


def wrap(raw=None, **options):
    torch.manual_seed(0)
    model = NNsight(raw or nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    if options:
        model.compile(**options)
    return model


def test_segments_breaks_passes_and_the_latest_trace():
    model = wrap(Broken(), backend="eager")
    with model.trace(torch.ones(2, 4)) as tracer:
        h = model.a.output
        if h.sum() > -1e9:  # a sync point
            model.b.output = model.b.output * 2
        out = model.c.output.save()
    facts = model.explain().to_dict()
    (capture,) = facts["captures"]
    assert facts["engine"] == "spliced, backend=eager" and capture["options"]["backend"] == "eager"
    first, *rest = capture["segments"]
    assert first["break"]["line"] == f"{__file__}:{BREAK}" and "item" in first["break"]["reason"]
    assert rest[-1]["break"] is None
    assert "a.output" in first["paths"] and first["sites"] == len(first["paths"])
    assert [p["pass"] for p in capture["passes"]][:2] == ["skip", "splice"]
    nodes = [p["nodes"] for p in capture["passes"]]
    assert [p["change"] for p in capture["passes"][1:]] == [b - a for a, b in zip(nodes, nodes[1:], strict=False)]
    trace = facts["trace"]
    assert trace["engine"] == "spliced" and trace["forwards"] == 1 and trace["segments"] >= 2
    (sync,) = trace["syncs"]
    assert re.fullmatch(r"test_explain\.py:\d+", sync)
    assert (trace["saved"], trace["bytes"], trace["graphs"]) == (1, out.nbytes, 1)
    text = str(model.explain())
    for part in (
        "graph break at",
        f"{__file__}:{BREAK}",
        "pass 2 splice",
        "passes with nothing to rewrite: 1 skip",
        "sync point: test_explain.py:",
        "saved: 1 tensors, 32 B",
    ):
        assert part in text
    assert "keeps the forward's activations alive for a backward" in text
    assert str(tracer.explain()) in text.replace("\n  ", "\n")


def test_hits_and_compiles_of_each_trace():
    model = wrap(backend="eager")
    found = []
    for _ in range(3):
        with torch.no_grad(), model.trace(torch.ones(2, 4)) as tracer:
            model[0].output.save()
        found.append(tracer.explain())
    assert [(n.compiles, n.hits, n.graphs) for n in found] == [(1, 0, 0), (0, 1, 0), (0, 1, 0)]
    assert model.explain().to_dict()["captures"][0]["hits"] == 2


def test_a_fallback_is_the_traces_own():
    model = wrap(backend="eager")
    x = torch.ones(2, 4)
    with model.trace(x) as falls:
        model[0].output.save()
        with falls.cond(True):
            falls.stop()
    with model.trace(x) as plain:
        model[0].output.save()
    assert plain.explain().fallbacks == [] and plain.explain().engine == "spliced"
    assert falls.explain().engine == "hooks" and "tracer.cond" in falls.explain().fallbacks[0]
    assert "fallback: hook engine: a `tracer.cond`" in str(model.explain())


def test_hooks():
    model = wrap()
    x = torch.ones(2, 4)
    with model.trace() as tracer:
        with tracer.invoke(x):
            late = model[2].output
        with tracer.invoke(x):
            model[0].output[:, :2] += late
            model[2].output.save()
    notes = tracer.explain()
    assert (notes.engine, notes.forwards, notes.saved) == ("hooks", 2, 1)
    assert "2 forwards" in str(notes) and str(model.explain()).startswith("Sequential: hooks")


def test_with_inputs_the_model_runs_first():
    model = wrap(Broken(), backend="eager")
    assert len(model.explain(torch.ones(2, 4)).to_dict()["captures"][0]["segments"]) == 2


def test_before_the_run_there_is_nothing():
    model = wrap()
    with model.trace(torch.ones(2, 4)) as tracer:
        with pytest.raises(OutsideTraceError, match=r"test_explain\.py:\d+: this trace has not run"):
            tracer.explain()
    assert model.explain().to_dict()["trace"]["forwards"] == 1
    with model.scan(torch.ones(2, 4)) as tracer:
        pass
    with pytest.raises(OutsideTraceError, match="has not run"):
        tracer.explain()


def test_the_recompile_limit_is_said_when_near(monkeypatch):
    class Sizes(nn.Module):
        def forward(self, x):
            return x * len(x)

    monkeypatch.setattr(compat.dynamo, "RECOMPILES", 9)
    model = wrap(Sizes(), backend="eager", dynamic=False)
    for rows in range(2, 6):
        with model.trace(torch.ones(rows, 4)):
            pass
    recompiles = model.explain().to_dict()["captures"][0]["recompiles"]
    assert recompiles == {"most": 4, "limit": 9} and "gives up" not in str(model.explain())
    for rows in range(6, 9):
        with model.trace(torch.ones(rows, 4)):
            pass
    assert "one entry was captured 7 times, and at 9 Dynamo gives up" in str(model.explain())


def test_seconds_by_shape_and_plan_and_passes_with_nothing_to_do():
    model = wrap(backend="eager")
    lines = []
    for rows in (2, 2, 3):
        with torch.no_grad(), model.trace(torch.ones(rows, 4)) as tracer:
            model[0].output.save()
        lines.append(str(tracer.line).rpartition("/")[2])
    facts = model.explain().to_dict()["captures"][0]
    assert [(s["shape"], s["plan"], s["captures"], s["compiles"]) for s in facts["spent"]] == [
        ("2 x 4", lines[0], 1, 1),
        ("any x 4", lines[2], 1, 1),
    ]
    assert facts["seconds"]["capture"] == pytest.approx(sum(s["capture_s"] for s in facts["spent"]), abs=0.01)
    text = str(model.explain())
    assert re.search(r"2 segments captured( in [\d.]+ s)?, 2 compiles( in [\d.]+ s)?, 1 cache hits", text)
    assert re.search(rf"for any x 4, at {lines[2]}: 1 capture in [\d.]+ s, 1 compile in [\d.]+ s", text)
    idle = [f"{n} {p['pass']}" for n, p in enumerate(facts["passes"], 1) if not p["rewrites"]]
    assert "0 rewrites" not in text and f"passes with nothing to rewrite: {', '.join(idle)}" in text and len(idle) > 3


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


def test_a_symbolic_capture_that_cannot_be_warns_once():
    model = wrap(Counts(), backend="eager", capture="symbolic")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            with model.trace(torch.ones(2, 4)) as tracer:
                model.linear.output.save()
    (warning,) = caught
    assert warning.category is FallbackWarning and warning.filename == __file__
    assert warning.lineno == int(str(tracer.line).rpartition(":")[2])
    assert "ran on hooks: it could not be traced symbolically, it sets `calls`" in str(warning.message)
    assert model.explain().to_dict()["trace"]["engine"] == "hooks"
    model.linear.weight.data.mul_(2)
    other = wrap(Counts(), backend="eager", capture="symbolic")  # another model says it, too
    with pytest.warns(FallbackWarning, match="nnsight_fx: the model is compiled"), other.trace(torch.ones(2, 4)):
        pass
