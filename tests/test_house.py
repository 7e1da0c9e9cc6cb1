"""The house only gets tidier: no figure of `tests/plugins/house.py` grows, and no module imports its importer."""

from __future__ import annotations

import json

import house


def test_no_figure_grows() -> None:
    allowed = json.loads(house.ALLOWED.read_text())
    now = house.figures()
    assert now.keys() == allowed.keys()
    grown = {name: (count, allowed[name]) for name, count in now.items() if count > allowed[name]}
    assert not grown, f"more than `tests/house.json` allows (now, allowed): {grown}"


def test_cycles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"e"}}
    assert house.cycles(graph) == [["a", "b", "c"]]
