"""A plan as text: each operation a line of Python-like code, with the user's line behind it.

```
v0 = model.transformer.h[7].output                # steer.py:12
v1 = torch.Tensor.add(v0[0], constant_0)          # steer.py:12
```
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch

from ..lines import Line
from . import tree
from .keys import NOTHING, Container, Items, Keep, Key, Named, NumberSlot, Plain, SizeExpr, Span, TensorSlot, Value
from .operators import name_of_operator
from .plan import InterventionGraph, Op
from .verbs import (
    Apply,
    AtSite,
    Barrier,
    Call,
    CallModule,
    Grad,
    Linearize,
    Reach,
    Read,
    ReadObject,
    RunBackward,
    Save,
    SetGrad,
    Skip,
    StopRun,
    Sync,
    Visit,
    Write,
)

_OPERATORS = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "matmul": "@", "pow": "**", "floordiv": "//", "mod": "%",
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "and": "&", "or": "|", "xor": "^",
}  # fmt: skip


def module_name(path: str) -> str:
    """`transformer.h.7` as `model.transformer.h[7]`."""
    parts = ["model"]
    for part in path.split(".") if path else ():
        parts.append(f"[{part}]" if part.isdigit() else f".{part}")
    return "".join(parts)


def site_name(site: tuple[str, str, int]) -> str:
    path, kind, _ = site
    return "tracer.result" if kind == "result" else f"{module_name(path)}.{kind}"


def leaf_paths(spec: tree.Spec) -> list[str]:
    """How Python reaches each leaf of a tree: `[0]`, `["h"]`, `.logits`."""
    if spec is None:
        return [""]
    kind, _, keys, children = spec
    steps = [f".{k}" if kind == "dataclass" else f"[{k!r}]" for k in (keys or range(len(children)))]
    return [step + rest for step, child in zip(steps, children, strict=True) for rest in leaf_paths(child)]


class Printer:
    """The lines of one plan."""

    def __init__(self, plan: InterventionGraph, names: dict[int, str] | None = None):
        self.plan, self.names = plan, names or {}

    def value(self, n: int, leaf: int) -> str:
        paths = leaf_paths(self.plan.specs[n])
        return f"v{n}" + (paths[leaf] if 0 <= leaf < len(paths) else "")

    def constant(self, slot: int) -> str:
        return self.names.get(slot, f"constant_{slot}")

    def show(self, key: Key) -> str:
        """An argument."""
        if isinstance(key, Value):
            return self.value(key.op, key.leaf)
        if isinstance(key, TensorSlot | NumberSlot):
            return self.constant(key.slot)
        if isinstance(key, Plain):
            return "..." if key.value is Ellipsis else repr(key.value)
        if isinstance(key, Items):
            items = ", ".join(map(self.show, key.items))
            return f"[{items}]" if key.cls is list else f"({items}{',' if len(key.items) == 1 else ''})"
        if isinstance(key, Named):
            return "{" + ", ".join(f"{k!r}: {self.show(v)}" for k, v in zip(key.names, key.items, strict=True)) + "}"
        if isinstance(key, Span):
            return f"slice({', '.join(map(self.show, key))})"
        if isinstance(key, Container):
            return f"{key.cls.__name__}({', '.join(map(self.show, key.items))})"
        return str(key.expr if isinstance(key, SizeExpr) else key)

    def index(self, key: Key) -> str:
        """What stands between brackets."""
        if isinstance(key, Items) and key.cls is tuple and key.items:
            return ", ".join(map(self.index, key.items))
        if isinstance(key, Span):
            start, stop, step = ("" if k == NOTHING else self.show(k) for k in key)
            return f"{start}:{stop}" + (f":{step}" if step else "")
        return self.show(key)

    def written(self, op: Op, whole: tree.Spec) -> str:
        """The tree that a write or a skip gives to its site."""
        leaves = iter(op.tree)

        def build(spec: tree.Spec) -> str:
            if spec is None:
                key = next(leaves)
                return "..." if isinstance(key, Plain) and key.cls is Keep else self.show(key)
            kind, cls, keys, children = spec
            parts = [build(child) for child in children]
            if kind == "list":
                return f"[{', '.join(parts)}]"
            if kind == "tuple":
                return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
            named = list(zip(keys, parts, strict=True)) if keys else []
            if cls is dict:
                return "{" + ", ".join(f"{k!r}: {p}" for k, p in named) + "}"
            return f"{cls.__name__}({', '.join(f'{k}={p}' for k, p in named) if keys else ', '.join(parts)})"

        return build(whole)

    def expression(self, n: int, op: Op) -> tuple[str, bool]:
        """The code of an operation, and whether it makes a value."""
        first = self.show(op.first) if op.args.items else ""
        match op.verb:
            case Read(site) | ReadObject(site):
                return site_name(site), True
            case Reach(site):
                return f"reaches({site_name(site)})", True
            case Write(site, spec):
                return f"{site_name(site)} = {self.written(op, spec)}", False
            case Skip((path, _, _), spec):
                return f"{module_name(path)}.skip({self.written(op, spec)})", False
            case Save():
                return f"{first}.save()", False
            case Sync():
                return f"look_at({first})", False
            case StopRun() | Barrier() as verb:
                return f"tracer.{verb.name}()", False
            case Grad():
                return f"{first}.grad", True
            case SetGrad():
                of, new = op.args.items
                asked = self.plan.ops[of.op] if isinstance(of, Value) else None
                owner = asked.first if asked is not None and isinstance(asked.verb, Grad) else of
                return f"{self.show(owner)}.grad = {self.show(new)}", False
            case RunBackward(returns):
                rest = self._arguments(op, 1)
                return (f"torch.autograd.grad({first}, {rest})" if returns else f"{first}.backward({rest})"), False
            case Linearize(freeze):
                frozen = f", freeze={set(freeze)!r}" if freeze else ""
                return f"linearize({self._arguments(op)}{frozen})", False
            case CallModule(path):
                return f"{module_name(path)}({self._arguments(op)})", True
            case Apply():
                return f"tracer.apply({function_name(op)}, {self._arguments(op)})", True
            case _:
                return self._call(op)

    def _arguments(self, op: Op, skip: int = 0) -> str:
        named = zip(op.kwargs.names, op.kwargs.items, strict=True)
        return ", ".join([*map(self.show, op.args.items[skip:]), *(f"{k}={self.show(v)}" for k, v in named)])

    def _call(self, op: Op) -> tuple[str, bool]:
        name, args = function_name(op), op.args.items
        if not name.startswith("torch.Tensor."):
            return f"{name}({self._arguments(op)})", True
        first, method = self.show(args[0]), name.removeprefix("torch.Tensor.")
        if method.endswith(".__get__"):
            return f"{first}.{method.removesuffix('.__get__')}", True
        if method == "__getitem__":
            return f"{first}[{self.index(args[1])}]", True
        if method == "__setitem__":
            return f"{first}[{self.index(args[1])}] = {self.show(args[2])}", False
        bare = method.strip("_")
        if method.startswith("__") and len(args) == 2 and not op.kwargs.names:
            second = self.show(args[1])
            if bare in _OPERATORS:
                return f"{first} {_OPERATORS[bare]} {second}", True
            if bare[:1] == "r" and bare[1:] in _OPERATORS:
                return f"{second} {_OPERATORS[bare[1:]]} {first}", True
            if bare[:1] == "i" and bare[1:] in _OPERATORS:
                return f"{first} {_OPERATORS[bare[1:]]}= {second}", False
        return f"{first}.{method}({self._arguments(op, 1)})", True

    def line(self, n: int) -> str:
        """One operation, without its comment."""
        op = self.plan.ops[n]
        text, makes = self.expression(n, op)
        when = f"if {' and '.join(map(self.show, op.when))}: " if op.when else ""
        return f"{when}v{n} = {text}" if makes else when + text


def function_name(op: Op) -> str:
    """The qualified name of the function that an operation calls."""
    if not isinstance(op.verb, Call | Apply):
        return op.verb.name
    found = op.verb.fn.obj
    name = getattr(found, "__qualname__", None) or type(found).__name__
    return name_of_operator(found) or f"{getattr(found, '__module__', '') or 'builtins'}.{name}"


def code(plan: InterventionGraph, lines: Sequence[Line], constants: Sequence[Any], names: dict[int, str]) -> str:
    """The whole plan."""
    printer = Printer(plan, names)
    rows: list[tuple[str, str]] = [
        (f"{printer.constant(slot)} = {describe(value)}", "lifted") for slot, value in enumerate(constants)
    ]
    invoke = -1
    for n, op in enumerate(plan.ops):
        if len(plan.groups.rows) > 1 and op.invoke != invoke:
            invoke = op.invoke
            rows.append((f"# invoke {invoke}", ""))
        notes = [short(lines[n])] if n < len(lines) else []
        if isinstance(op.verb, AtSite | Visit) and op.verb.site[2]:
            notes.append(f"call {op.verb.site[2]}")
        if op.ambient is not None:
            notes.append("grad" if op.ambient.grad else "no grad")
        rows.append((printer.line(n), ", ".join(notes)))
    width = min(max((len(text) for text, note in rows if note), default=0), 72)
    return "\n".join(f"{text:<{width}}  # {note}" if note else text for text, note in rows)


@functools.lru_cache(1024)
def short(line: Line) -> str:
    return f"{os.path.basename(line.filename)}:{line.lineno}"


def describe(constant: object) -> str:
    """A lifted value in a few words."""
    if isinstance(constant, torch.Tensor):
        return f"Tensor{list(constant.shape)}, {str(constant.dtype).removeprefix('torch.')}"
    return repr(constant)
