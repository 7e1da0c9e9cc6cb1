"""A module's call while Dynamo traces, done on Dynamo's own variables instead of by instructions that it reads one by one."""

from __future__ import annotations

from typing import Any

from . import _torch, markers
from .markers import PLAIN, TABLES, anchor, site


def between(tx: Any, path: Any, counted: Any, module: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`markers.between`."""
    return among(tx, path, counted, _torch.tuple_of([]), module, *args, **kwargs)


def among(tx: Any, path: Any, counted: Any, collectors: Any, module: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`markers.among`; what is rare is left to its text, which Dynamo then reads."""
    hooks = _torch.items(collectors)
    if sum(_torch.length(tx, module, table) for table in TABLES) != 2 + len(hooks):
        return _torch.inlined(tx, markers.among, path, counted, collectors, module, *args, **kwargs)
    name, count = path.as_python_constant(), counted.as_python_constant()
    given = _marked(tx, [*args, *kwargs.values()], name, "input", count)
    called, named = given[: len(args)], dict(zip(kwargs, given[len(args) :], strict=True))
    out = _torch.attribute(tx, module, "forward").call_function(tx, called, named)
    (out,) = _marked(tx, [out], name, "output", count)
    for collect in hooks:
        changed = collect.call_function(tx, [module, _torch.tuple_of(called), out], {})
        out = out if _torch.is_plain(changed, ()) else changed
    return out


def _marked(tx: Any, values: list, path: str, kind: str, counted: bool) -> list:
    """`mark`, of what is in a container."""
    count = _count(values) if counted else 0
    if count is None:
        return _torch.items(_torch.inlined(tx, markers.mark, _torch.tuple_of(values), path, kind, True))
    fresh, _, left = _walk(tx, values, path, kind, 0, count)
    if left == count:
        _torch.node(tx, site, _torch.node(tx, anchor), path, kind, 0, 1)
    return fresh


def _count(values: list) -> int | None:
    """How many tensors there are, where they are in tuples."""
    found = 0
    for value in map(_torch.looked_at, values):
        items = _torch.items(value)
        if items is None and not _torch.is_tensor(value) and not _torch.is_plain(value, PLAIN):
            return None
        inside = 1 if _torch.is_tensor(value) else 0 if items is None else _count(items)
        if inside is None:
            return None
        found += inside
    return found


def _walk(tx: Any, values: list, path: str, kind: str, leaf: int, left: int) -> tuple[list, int, int]:
    """`markers._mark`, which sees to what is no tensor, plain value or tuple of these."""
    fresh = []
    for value in values:
        value = _torch.looked_at(value)
        if _torch.is_tensor(value):
            value, leaf, left = _torch.node(tx, site, value, path, kind, leaf, left), leaf + 1, left - 1
        elif (items := _torch.items(value)) is not None:
            inside, leaf, now = _walk(tx, items, path, kind, leaf, left)
            value, left = (value if now == left else _torch.tuple_of(inside)), now
        elif _torch.is_plain(value, PLAIN):
            leaf += 1
        else:
            made = _torch.inlined(tx, markers._mark, _torch.tuple_of([value]), path, kind, leaf, left)
            one, *counts = _torch.items(made)
            (value,) = _torch.items(one)
            leaf, left = (n.as_python_constant() for n in counts)
        fresh.append(value)
    return fresh, leaf, left
