"""The private exceptions that say what only a run can find out: who raises and who catches each.

`python tests/plugins/control_flow.py --write` makes docs/control_flow.md of the code; `tests/test_house.py` compares.
"""

from __future__ import annotations

import ast
import collections
import sys

import house

PAGE = house.ROOT / "docs" / "control_flow.md"
HEAD = """# Exceptions that steer a run

Made from the code by `python tests/plugins/control_flow.py --write`. How a request runs is decided before it runs
(`engine/choose.py`). What only the run can find out is told by one of these. None of them reaches the user, who gets the
errors of `nnsight_fx/errors.py`.

| exception | means | raised in | caught in |
| --- | --- | --- | --- |
"""


def page() -> str:
    """The page as the code has it."""
    trees = {name: ast.parse(path.read_text()) for name, path in house.sources().items()}
    bases, docs, homes = {}, {}, {}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not name.endswith(".errors"):
                bases[node.name] = {ast.unparse(b).rpartition(".")[2] for b in node.bases}
                docs[node.name] = (ast.get_docstring(node) or "").partition("\n")[0]
                homes[node.name] = name
    found, grown = {"Exception", "BaseException"}, True
    while grown:
        new = {n for n, b in bases.items() if b & found} - found
        grown, found = bool(new), found | new
    found -= {"Exception", "BaseException"}
    raised, caught = collections.defaultdict(set), collections.defaultdict(set)
    for name, tree in trees.items():
        where = name.removeprefix("nnsight_fx.").replace(".", "/")
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and node.exc is not None:
                named = {n.id if isinstance(n, ast.Name) else n.attr for n in _names(node.exc)}
                for each in named & found:
                    raised[each].add(where)
            elif isinstance(node, ast.ExceptHandler) and node.type is not None:
                named = {n.id if isinstance(n, ast.Name) else n.attr for n in _names(node.type)}
                for each in named & found:
                    caught[each].add(where)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "contextlib.suppress"):
                named = {n.id if isinstance(n, ast.Name) else n.attr for a in node.args for n in _names(a)}
                for each in named & found:
                    caught[each].add(where)
    rows = [
        f"| `{n}` | {docs[n]} | {_listed(raised[n])} | {_listed(caught[n])} |"
        for n in sorted(found, key=lambda n: (homes[n], n))
        if raised[n] or caught[n]
    ]
    return HEAD + "\n".join(rows) + "\n"


def _names(node: ast.AST) -> list:
    return [n for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)]


def _listed(names: set[str]) -> str:
    return ", ".join(f"`{n}`" for n in sorted(names)) or "-"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page())
    else:
        print(page())
