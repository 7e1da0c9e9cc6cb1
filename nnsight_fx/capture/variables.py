"""A module's call while Dynamo traces, done on Dynamo's own variables instead of by instructions that it reads one by one."""

from __future__ import annotations

from .. import compat
from ..compat.repeats import Translator, Variable
from . import markers, marking, repeats
from .hook_tables import TABLES
from .marker import anchor, site
from .marking import PLAIN


def between(tx: object, path: object, counted: object, module: object, /, *args: object, **kwargs: object) -> object:
    """`markers.between`."""
    return among(tx, path, counted, compat.variables.tuple_of([]), module, *args, **kwargs)


def block(
    tx: Translator, path: object, counted: Variable, module: Variable, /, *args: Variable, **kwargs: Variable
) -> object:
    """`markers.block`: what another block's trace says of this one, where it does."""
    module, look = compat.variables.looked_at(module), compat.variables.looked_at
    called, named = [look(x) for x in args], {name: look(x) for name, x in kwargs.items()}

    def trace() -> object:
        return between(tx, path, counted, module, *called, **named)

    return trace() if counted.as_python_constant() else repeats.repeated(tx, module, (called, named), trace)


def among(
    tx: Translator,
    path: Variable,
    counted: Variable,
    collectors: Variable,
    module: Variable,
    /,
    *args: object,
    **kwargs: object,
) -> object:
    """`markers.among`; what is rare is left to its text, which Dynamo then reads."""
    hooks = compat.variables.items(collectors)
    if sum(compat.variables.length(tx, module, table) for table in TABLES) != 2 + len(hooks):
        return compat.variables.inlined(tx, markers.among, path, counted, collectors, module, *args, **kwargs)
    name, count = path.as_python_constant(), counted.as_python_constant()
    given = _marked(tx, [*args, *kwargs.values()], name, "input", count)
    called, named = given[: len(args)], dict(zip(kwargs, given[len(args) :], strict=True))
    out = compat.variables.attribute(tx, module, "forward").call_function(tx, called, named)
    (out,) = _marked(tx, [out], name, "output", count)
    for collect in hooks:
        changed = collect.call_function(tx, [module, compat.variables.tuple_of(called), out], {})
        out = out if compat.variables.is_plain(changed, ()) else changed
    return out


def _marked(tx: object, values: list, path: str, kind: str, counted: bool) -> list:
    """`mark`, of what is in a container."""
    first = compat.variables.looked_at(values[0]) if values else None
    if kind == "output" and compat.variables.is_tensor(first):  # the value itself
        return [compat.variables.node(tx, site, first, path, kind, 0, True)]
    count = _count(values) if counted else 0
    if count is None:
        return compat.variables.items(
            compat.variables.inlined(tx, marking.mark, compat.variables.tuple_of(values), path, kind, True)
        )
    fresh, _, left = _walk(tx, values, path, kind, 0, count)
    if left == count:
        compat.variables.node(tx, site, compat.variables.node(tx, anchor), path, kind, 0, 1)
    return fresh


def _count(values: list) -> int | None:
    """How many tensors there are, where they are in tuples."""
    found = 0
    for value in map(compat.variables.looked_at, values):
        items = compat.variables.items(value)
        if items is None and not compat.variables.is_tensor(value) and not compat.variables.is_plain(value, PLAIN):
            return None
        inside = 1 if compat.variables.is_tensor(value) else 0 if items is None else _count(items)
        if inside is None:
            return None
        found += inside
    return found


def _walk(tx: object, values: list, path: str, kind: str, leaf: int, left: int) -> tuple[list, int, int]:
    """`marking.mark_inside`, which sees to what is no tensor, plain value or tuple of these."""
    fresh = []
    for value in values:
        value = compat.variables.looked_at(value)
        if compat.variables.is_tensor(value):
            value, leaf, left = compat.variables.node(tx, site, value, path, kind, leaf, left), leaf + 1, left - 1
        elif (items := compat.variables.items(value)) is not None:
            inside, leaf, now = _walk(tx, items, path, kind, leaf, left)
            value, left = (value if now == left else compat.variables.tuple_of(inside)), now
        elif compat.variables.is_plain(value, PLAIN):
            leaf += 1
        else:
            made = compat.variables.inlined(
                tx, marking.mark_inside, compat.variables.tuple_of([value]), path, kind, leaf, left
            )
            one, *counts = compat.variables.items(made)
            (value,) = compat.variables.items(one)
            leaf, left = (n.as_python_constant() for n in counts)
        fresh.append(value)
    return fresh, leaf, left
