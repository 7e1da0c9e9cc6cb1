"""A module's call while Dynamo traces, done on Dynamo's own variables instead of by instructions that it reads one by one."""

from __future__ import annotations

from typing import Any

from . import _torch, markers
from .markers import PLAIN, TABLES, anchor, site


def between(tx: Any, path: Any, module: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`markers.between`."""
    return among(tx, path, _torch.tuple_of([]), module, *args, **kwargs)


def among(tx: Any, path: Any, collectors: Any, module: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`markers.among`; what is rare is left to its text, which Dynamo then reads."""
    hooks = _torch.items(collectors)
    if sum(_torch.length(tx, module, table) for table in TABLES) != 2 + len(hooks):
        return _torch.inlined(tx, markers.among, path, collectors, module, *args, **kwargs)
    name = path.as_python_constant()
    given = _marked(tx, [*args, *kwargs.values()], name, "input")
    called, named = given[: len(args)], dict(zip(kwargs, given[len(args) :], strict=True))
    out = _torch.attribute(tx, module, "forward").call_function(tx, called, named)
    (out,) = _marked(tx, [out], name, "output")
    for collect in hooks:
        changed = collect.call_function(tx, [module, _torch.tuple_of(called), out], {})
        out = out if _torch.is_plain(changed, ()) else changed
    return out


def _marked(tx: Any, values: list, path: str, kind: str) -> list:
    """`mark`, of what is in a container."""
    fresh, _, left = _walk(tx, values, path, kind, 0, 0)
    if left == 0:
        _torch.node(tx, site, _torch.node(tx, anchor), path, kind, 0, 1)
    return fresh


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
