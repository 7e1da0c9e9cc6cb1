"""Plans as Graphviz drawings: one table of styles, a node an operation, an edge a value.

torch.fx's own drawer draws an `fx.Graph` through pydot; a plan is none (its operations wait for sites and belong to
invokes), so its DOT text is written here, and only rendering needs something installed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from typing import Any

from . import verbs
from .printing import Printer, describe, leaf_paths, module_name, short

Style = dict[str, str]

_BOX: Style = {"shape": "box", "style": "rounded,filled"}
STYLES: dict[str, Style] = {
    verbs.Read.name: _BOX | {"fillcolor": "#d5e8f7"},
    verbs.Write.name: _BOX | {"fillcolor": "#f9d9c3", "penwidth": "2"},
    verbs.Skip.name: _BOX | {"fillcolor": "#e5e5e5", "style": "rounded,filled,dashed"},
    verbs.StopRun.name: {"shape": "octagon", "style": "filled", "fillcolor": "#f4b6b6"},
    verbs.Save.name: {"shape": "cylinder", "style": "filled", "fillcolor": "#d8efd3"},
    verbs.Call.name: {"shape": "box", "style": "filled", "fillcolor": "#ffffff"},
    verbs.CallModule.name: {"shape": "component", "style": "filled", "fillcolor": "#efe3f7"},
    verbs.Apply.name: {"shape": "box", "style": "filled,dotted", "fillcolor": "#fff3c4"},
    verbs.Sync.name: {"shape": "diamond", "style": "filled", "fillcolor": "#fff3c4"},
    verbs.Barrier.name: {"shape": "box", "style": "filled", "fillcolor": "#bbbbbb", "height": "0.1"},
    verbs.ReadObject.name: _BOX | {"fillcolor": "#d5e8f7", "style": "rounded,filled,dotted"},
    verbs.Reach.name: _BOX | {"fillcolor": "#e3f1f9", "style": "rounded,filled,dotted"},
    verbs.Observe.name: _BOX | {"fillcolor": "#d5e8f7", "style": "rounded,filled,dashed"},
    verbs.Visit.name: {"shape": "component", "style": "filled,dashed", "fillcolor": "#efe3f7"},
    verbs.Grad.name: _BOX | {"fillcolor": "#f7d5ea"},
    verbs.SetGrad.name: _BOX | {"fillcolor": "#f7d5ea", "penwidth": "2"},
    verbs.RunBackward.name: {"shape": "invhouse", "style": "filled", "fillcolor": "#f7d5ea"},
    verbs.Linearize.name: {"shape": "invhouse", "style": "filled,dashed", "fillcolor": "#f7d5ea"},
    "cond": {"shape": "diamond", "style": "filled", "fillcolor": "#ffffff"},
    "constant": {"shape": "note", "style": "filled", "fillcolor": "#fbf7e6"},
}
SUFFIXES = ("svg", "png", "pdf")


def style(kind: str) -> Style:
    """How an operation of this kind is drawn; add an entry to `STYLES` to draw a new one."""
    return STYLES.get(kind, STYLES[verbs.Call.name])


def to_dot(graph: Any) -> str:
    """A `tracing.graph.Graph` in DOT: invokes as clusters, lifted values as notes, gradients and writes by dashed edges."""
    plan, printer = graph.plan, Printer(graph.plan, graph.names)
    rows = ["digraph plan {", '  rankdir="TB"; node [fontname="Helvetica", fontsize="10"]; edge [fontsize="9"];']
    for slot in sorted({slot for op in graph for slot in op.constants}):
        value = graph.constants[slot] if slot < len(graph.constants) else ""
        rows.append(_node(f"c{slot}", f"{printer.constant(slot)}\n{describe(value)}", style("constant")))
    several = len(plan.groups.rows) > 1
    for invoke in sorted({op.invoke for op in graph}):
        nodes = [_node(f"v{op.index}", _label(op), style(op.kind)) for op in graph if op.invoke == invoke]
        if several:
            nodes = [f"  subgraph cluster_{invoke} {{ label={_quoted(f'invoke {invoke}')};", *nodes, "  }"]
        rows += nodes
    for op, raw in zip(graph, plan.ops, strict=True):
        rows += [f"  c{slot} -> v{op.index};" for slot in op.constants]
        for n, leaf in sorted(raw.needs):
            paths = leaf_paths(plan.specs[n])
            label = paths[leaf] if 0 <= leaf < len(paths) else ""
            look = {"label": label} if label else {}
            if op.kind in (verbs.Grad.name, verbs.RunBackward.name, verbs.SetGrad.name):
                look["style"] = "dashed"
            rows.append(f"  v{n} -> v{op.index}{_attributes(look)};")
    return "\n".join([*rows, "}", ""])


def _label(op: Any) -> str:
    if op.site is not None:
        path, kind, call = op.site
        what = f"{op.kind} {module_name(path) if kind != 'result' else 'tracer'}.{kind}" + (
            f" (call {call})" if call else ""
        )
    else:
        what = (
            op.name.removeprefix("torch.")
            if op.kind in (verbs.Call.name, verbs.Apply.name)
            else op.code.partition(" = ")[2]
        )
        what = what if op.kind in (verbs.Call.name, verbs.Apply.name, verbs.CallModule.name) else op.kind
    return what + (f"\n{short(op.line)}" if op.line else "")


def _node(name: str, label: str, look: Style) -> str:
    return f"  {name}{_attributes({'label': label} | look)};"


def _attributes(look: dict[str, str]) -> str:
    return f" [{', '.join(f'{k}={_quoted(v)}' for k, v in look.items())}]" if look else ""


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def missing() -> str | None:
    """What rendering lacks."""
    if importlib.util.find_spec("graphviz") is None:
        return 'the package `graphviz` (`pip install "nnsight-fx[viz]"`)'
    return None if shutil.which("dot") else "the program `dot` (https://graphviz.org/download)"


def draw(graph: object, path: str | os.PathLike) -> str:
    """`Graph.draw`."""
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1].removeprefix(".").lower()
    if suffix not in (*SUFFIXES, "dot"):
        raise ValueError(f"`{path}`: a drawing is an .svg, .png, .pdf or .dot file")
    lacks = missing() if suffix != "dot" else None
    if lacks is not None:
        path += ".dot"
        warnings.warn(f"nothing renders drawings here: {lacks} is missing. Wrote DOT text to `{path}`.", stacklevel=3)
    data = to_dot(graph).encode() if suffix == "dot" or lacks is not None else _render(to_dot(graph), suffix)
    with open(path, "wb") as file:
        file.write(data)
    return path


def svg(graph: object) -> str | None:
    """The drawing for a notebook, where it can be rendered."""
    return _render(to_dot(graph), "svg").decode() if missing() is None else None


def _render(dot: str, suffix: str) -> bytes:
    import graphviz

    return graphviz.Source(dot).pipe(format=suffix)
