"""The figures by which the house is judged (issue "One house"): `python tests/plugins/house.py` prints them.

`tests/house.json` holds the most that is allowed of each. It only shrinks: `--write` takes today's figures where they are lower.
"""

from __future__ import annotations

import ast
import collections
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nnsight_fx"
ALLOWED = ROOT / "tests" / "house.json"
LINES = 500
# From the ground up: a room imports itself and what stands before it, nothing else. `nnsight_fx/__init__.py` and
# `patching.py` are doors to the rooms; the other files beside the rooms are the ground.
ROOMS = [
    "ground",
    "compat",
    "viz",
    "interventions",
    "plan",
    "capture",
    "tracing",
    "scan",
    "envoys",
    "passes",
    "engine",
    "report",
    "batching",
    "generation",
    "harvest",
    "sweep",
    "derivatives",
    "stored",
    "model",
    "analysis",
    "cli",
    "doors",
]
DOORS = ("nnsight_fx", "nnsight_fx.patching")


def room(module: str) -> str:
    """The room that a module stands in."""
    if module in DOORS:
        return "doors"
    name = module.split(".")[1]
    return name if name in ROOMS else "ground"


def sources() -> dict[str, Path]:
    """Each module of the package with its file; `passes` is a link to a folder beside it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py", recurse_symlinks=True) if sys.version_info >= (3, 13) else _walk(PACKAGE)):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _walk(folder: Path) -> list[Path]:
    return [f for p in folder.iterdir() for f in (_walk(p) if p.is_dir() else [p] if p.suffix == ".py" else [])]


class Module:
    """What one file imports, defines and uses."""

    def __init__(self, name: str, path: Path, names: set[str]):
        self.name, self.path, self.names = name, path, names
        self.text = path.read_text()
        self.tree = ast.parse(self.text)
        self.own = {n.name for n in ast.walk(self.tree) if isinstance(n, ast.ClassDef | ast.FunctionDef)}
        self.own |= {n.attr for n in ast.walk(self.tree) if isinstance(n, ast.Attribute) and _is_self(n)}
        self.own |= {n.id for n in ast.walk(self.tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}

    def imports(self) -> set[str]:
        """The modules of the package that are imported when this one is: not in functions, not for types alone."""
        found, left = set(), list(self.tree.body)
        while left:
            node = left.pop()
            if isinstance(node, ast.ImportFrom):
                found |= self._targets(node)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
                left += node.body + node.orelse
            elif isinstance(node, ast.Try | ast.With | ast.ClassDef):
                left += node.body
        return found - {self.name}

    def upward(self) -> list[str]:
        """The imports, of functions and for types too, that leave this module's room for one above it."""
        mine, nodes = ROOMS.index(room(self.name)), [n for n in ast.walk(self.tree) if isinstance(n, ast.ImportFrom)]
        targets = sorted({t for n in nodes for t in self._targets(n)})
        return [f"{self.name} imports {t}" for t in targets if ROOMS.index(room(t)) > mine]

    def _targets(self, node: ast.ImportFrom) -> set[str]:
        base = self.name.split(".")
        if node.level:
            package = base if self.path.name == "__init__.py" else base[:-1]
            source = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
        else:
            source = node.module or ""
        inside = {f"{source}.{alias.name}" for alias in node.names} & self.names
        return inside or ({source} & self.names)

    def private_uses(self) -> int:
        """Uses of names with an underscore that another file of ours has."""
        count = 0
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("nnsight_fx")):
                count += sum(alias.name.startswith("_") and not alias.name.startswith("__") for alias in node.names)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                count += not _is_self(node) and node.attr not in self.own and node.attr in OURS - DOCUMENTED
        return count

    def private_torch(self) -> int:
        """Names of torch with an underscore, but for operators and the documented `torch._check`; in `compat/` they are at home."""
        if self.name.startswith("nnsight_fx.compat"):
            return 0
        found = [n.module or "" for n in ast.walk(self.tree) if isinstance(n, ast.ImportFrom) and not n.level]
        found += [a.name for n in ast.walk(self.tree) if isinstance(n, ast.Import) for a in n.names]
        found += [ast.unparse(n) for n in ast.walk(self.tree) if isinstance(n, ast.Attribute)]
        named = {n for n in found if n.startswith("torch.") and not n.startswith(("torch.ops.", "torch._check"))}
        return sum(any(map(_private, name.split("."))) for name in named)


def _private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def _is_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


# Documented names that begin with an underscore: nnsight's, torch's, and of named tuples.
DOCUMENTED = {"_module", "_parameters", "_buffers", "_modules", "_check", "_replace", "_fields", "_asdict"}
OURS: set[str] = set()  # every name with an underscore that is defined somewhere in the package


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(v: str) -> None:
        index[v] = low[v] = len(index)
        stack.append(v)
        for w in sorted(graph.get(v, ())):
            if w not in index:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in stack:
                low[v] = min(low[v], index[w])
        if low[v] == index[v]:
            at = stack.index(v)
            group = sorted(stack[at:])
            del stack[at:]
            if len(group) > 1:
                found.append(group)

    for v in sorted(graph):
        if v not in index:
            visit(v)
    return found


def figures() -> dict[str, int]:
    """What is counted today."""
    files = sources()
    modules = [Module(name, path, set(files)) for name, path in files.items()]
    OURS.update(name for m in modules for name in m.own if _private(name))
    classes = collections.Counter(n.name for m in modules for n in ast.walk(m.tree) if isinstance(n, ast.ClassDef))
    longest = [n.end_lineno - n.lineno for m in modules for n in ast.walk(m.tree) if isinstance(n, ast.ClassDef)]
    return {
        "imports of a room above": sum(len(m.upward()) for m in modules),
        "modules in import cycles": sum(map(len, cycles({m.name: m.imports() for m in modules}))),
        f"files over {LINES} lines": sum(m.text.count("\n") > LINES for m in modules),
        "classes over 300 lines": sum(n > 300 for n in longest),
        "classes that share a name": sum(n > 1 for n in classes.values()),
        "uses of another file's private names": sum(m.private_uses() for m in modules),
        "Any": sum(isinstance(n, ast.Name) and n.id == "Any" for m in modules for n in ast.walk(m.tree)),
        "private torch names outside compat": sum(m.private_torch() for m in modules),
    }


if __name__ == "__main__":
    now = figures()
    allowed = json.loads(ALLOWED.read_text()) if ALLOWED.exists() else {}
    for name, count in now.items():
        print(f"{count:6} {name} (allowed {allowed.get(name, count)})")
    if "--write" in sys.argv:
        ALLOWED.write_text(json.dumps({n: min(c, allowed.get(n, c)) for n, c in now.items()}, indent=1) + "\n")
