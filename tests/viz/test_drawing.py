"""Drawings: every kind of operation in its own style, values by edges; DOT text where nothing renders."""

import re
import sys
import types

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight
from nnsight_fx.plan import drawing
from nnsight_fx.plan import plan as dialect

KINDS = [v for k, v in vars(dialect).items() if k.isupper() and isinstance(v, str)]


@pytest.fixture
def graph():
    model = NNsight(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    with model.trace(torch.ones(2, 4), compile=False) as tracer:
        model[2].input = model[0].output + torch.ones(4)
        model[2].output.topk(2).values.save()
    return tracer.graph


def nodes(dot):
    return dict(re.findall(r"^  (\w+) \[label=\"(.*?)\", shape", dot, re.M))


def test_every_kind_has_its_own_style():
    looks = [tuple(sorted(drawing.style(kind).items())) for kind in [*KINDS, "constant", "cond"]]
    assert len(set(looks)) == len(looks) and set(KINDS) <= set(drawing.STYLES)


def test_nodes_edges_and_constants(graph):
    dot = graph.to_dot()
    found = nodes(dot)
    assert found["c0"] == "constant_0\\nTensor[4], float32"
    assert found["v0"].startswith("read model[0].output\\ntest_drawing.py:")
    assert [op.kind for op in graph] == ["read", "call", "write", "read", "call", "save"]
    edges = re.findall(r"^  (\w+) -> (\w+)(?: \[label=\"(.*?)\"\])?;", dot, re.M)
    assert sorted(edges) == [
        ("c0", "v1", ""),
        ("v0", "v1", ""),
        ("v1", "v2", ""),
        ("v3", "v4", ""),
        ("v4", "v5", "[0]"),
    ]


def test_without_graphviz_it_writes_dot_and_says_so(graph, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing.shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="is missing. Wrote DOT text to"):
        path = graph.draw(tmp_path / "p.svg")
    assert path == str(tmp_path / "p.svg.dot") and (tmp_path / "p.svg.dot").read_text() == graph.to_dot()
    assert "image/svg+xml" not in graph._repr_mimebundle_() and "read" in graph.to_dot()
    assert graph.draw(tmp_path / "p.dot") == str(tmp_path / "p.dot")
    with pytest.raises(ValueError, match=r"is an \.svg, \.png, \.pdf or \.dot file"):
        graph.draw(tmp_path / "p.jpeg")


def test_with_graphviz_it_renders(graph, tmp_path, monkeypatch):
    asked = []

    class Source:
        def __init__(self, source):
            self.source = source

        def pipe(self, format):
            asked.append((self.source, format))
            return b"<svg/>"

    fake = types.SimpleNamespace(Source=Source)
    monkeypatch.setitem(sys.modules, "graphviz", fake)
    monkeypatch.setattr(drawing, "missing", lambda: None)
    assert graph.draw(tmp_path / "p.svg") == str(tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_bytes() == b"<svg/>" and asked == [(graph.to_dot(), "svg")]
    assert graph._repr_mimebundle_()["image/svg+xml"] == "<svg/>"


@pytest.mark.skipif(drawing.missing() is not None, reason="Graphviz is not installed")
def test_dot_itself_takes_it(graph, tmp_path):
    graph.draw(tmp_path / "p.svg")
    assert "<svg" in (tmp_path / "p.svg").read_text()
