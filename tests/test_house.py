"""The house only gets tidier: no figure of `tests/plugins/house.py` grows, and no module imports its importer."""

from __future__ import annotations

import ast
import json

import control_flow
import house


def test_no_figure_grows() -> None:
    allowed = json.loads(house.ALLOWED.read_text())
    now = house.figures()
    assert now.keys() == allowed.keys()
    grown = {name: (count, allowed[name]) for name, count in now.items() if count > allowed[name]}
    assert not grown, f"more than `tests/house.json` allows (now, allowed): {grown}"


def test_rooms_import_downward_only() -> None:
    files = house.sources()
    modules = [house.Module(name, path, set(files)) for name, path in files.items()]
    upward = [line for m in modules for line in m.upward()]
    assert not upward, "a room imports one above it (the order is `ROOMS` in tests/plugins/house.py):\n" + "\n".join(
        upward
    )


def test_each_room_says_what_it_is_for() -> None:
    folders = [p for p in house.PACKAGE.iterdir() if (p / "__init__.py").exists()]
    assert {p.name for p in folders} == set(house.ROOMS) - {"ground", "doors"}
    silent = [p.name for p in folders if not ast.get_docstring(ast.parse((p / "__init__.py").read_text()))]
    assert not silent, f"rooms without a docstring in `__init__.py`: {silent}"


def test_an_upward_import_is_found(tmp_path) -> None:
    file = tmp_path / "tree.py"
    file.write_text("def f():\n    from ..engine import run\n")
    found = house.Module("nnsight_fx.plan.tree", file, {"nnsight_fx.engine.run", "nnsight_fx.engine"})
    assert found.upward() == ["nnsight_fx.plan.tree imports nnsight_fx.engine.run"]


def test_the_page_of_exceptions_is_made_from_the_code() -> None:
    assert control_flow.PAGE.read_text() == control_flow.page(), "python tests/plugins/control_flow.py --write"


def test_cycles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"e"}}
    assert house.cycles(graph) == [["a", "b", "c"]]
