"""Why two plans are not one: their structural key, and the first things that differ."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from .encode import Identity
from .operators import name_of_operator
from .plan import InterventionGraph, Op

FACTS = ("shape", "stride", "dtype", "device", "requires_grad", "is_leaf", "type")
FIELDS = {
    "ambient": "the grad or autocast mode",
    "effect": "its effect",
    "extra": "the structure or rows of its site",
    "when": "its conditions",
}


class Difference(NamedTuple):
    """One place where two plans differ in structure."""

    here: int | None  # the operation in the first plan; `None` where only the second has one
    there: int | None
    reason: str

    def __str__(self) -> str:
        return self.reason


def stable(value: object) -> Any:
    """A part of an operation as text that is the same in every process, wherever the part itself is."""
    if isinstance(value, Identity):
        name = name_of_operator(value.obj)
        return name or f"{getattr(value.obj, '__qualname__', type(value.obj).__qualname__)}@{id(value.obj)}"
    if isinstance(value, tuple):
        return "(" + ",".join(stable(v) for v in value) + ")"
    if isinstance(value, frozenset | set):
        return "{" + ",".join(sorted(stable(v) for v in value)) + "}"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


def key(plan: InterventionGraph) -> str:
    """A hash of the structure; the same in every process unless an operation calls a function of the user's own."""
    text = "\n".join([*(stable(tuple(op)) for op in plan.ops), stable(tuple(plan.groups)), plan.recapture])
    return hashlib.sha256(text.encode()).hexdigest()


def diff(a: InterventionGraph, b: InterventionGraph, say: Any, say_other: Any) -> list[Difference]:
    """What makes the structures differ; `say(n)` and `say_other(n)` give an operation as text."""
    if a is b:
        return []
    found: list[Difference] = []
    if a.groups != b.groups:
        found.append(Difference(None, None, f"the rows of the invokes differ: {a.groups.rows} and {b.groups.rows}"))
    if a.recapture != b.recapture:
        found.append(
            Difference(
                None, None, f"what the capture must do differs: {a.recapture!r} and {b.recapture!r} ('' is nothing)"
            )
        )
    heads = [[(op.kind, op.invoke, stable(op.target)) for op in plan.ops] for plan in (a, b)]
    for tag, i, j, k, m in difflib.SequenceMatcher(None, heads[0], heads[1], autojunk=False).get_opcodes():
        if tag == "equal":
            for n, o in zip(range(i, j), range(k, m), strict=True):
                parts = "; ".join(_parts(a.ops[n], b.ops[o], n - o))
                if parts:
                    found.append(Difference(n, o, f"{say(n)}: {parts}"))
            continue
        found += [Difference(n, None, f"only here: {say(n)}") for n in range(i, j)]
        found += [Difference(None, o, f"only there: {say_other(o)}") for o in range(k, m)]
    return found


def _parts(a: Op, b: Op, shift: int) -> Iterator[str]:
    for name, here, there in (("argument", a.args[2], b.args[2]), ("keyword", a.kwargs[2:], b.kwargs[2:])):
        yield from _keys(name, here, there, shift)
    if a.kwargs[1] != b.kwargs[1]:
        yield f"keywords {list(a.kwargs[1])} and {list(b.kwargs[1])}"
    for field, text in FIELDS.items():
        if getattr(a, field) != getattr(b, field):
            yield f"{text} differs: {getattr(a, field)} and {getattr(b, field)}"


def _keys(where: str, a: object, b: object, shift: int) -> Iterator[str]:
    """The differences of two keys; values that are merely numbered otherwise, because operations came in between, are equal."""
    if a == b or not (isinstance(a, tuple) and isinstance(b, tuple)):
        if a != b:
            yield f"{where} is {a!r} here and {b!r} there"
        return
    tags = (a[0] if a else None, b[0] if b else None)
    if tags == ("v", "v"):
        if (a[1] - b[1], a[2]) != (shift, b[2]):
            yield f"{where} is another value (v{a[1]} and v{b[1]})"
    elif tags == ("c", "c"):
        for name, x, y in zip(FACTS, a[2], b[2], strict=True):
            if x != y:
                yield f"the tensor in {where} has {name} {x} here and {y} there"
    elif tags == ("n", "n"):
        if a[2] != b[2]:
            yield f"{where} is a lifted {a[2]} here and a lifted {b[2]} there"
    elif tags == ("l", "l"):
        x, y = (float.fromhex(k[2]) if k[1] is float else k[2] for k in (a, b))
        yield f"{where} is {x!r} here and {y!r} there, which is structure (only positions and floats in arithmetic are lifted)"
    elif len(a) != len(b) or (tags[0] != tags[1] and str in (type(tags[0]), type(tags[1]))):
        yield f"{where} has another form ({stable(a)} and {stable(b)})"
    else:
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            nested = isinstance(x, tuple) and x and isinstance(x[0], str)
            yield from _keys(f"{where} {i}" if nested and where in ("argument", "keyword") else where, x, y, shift)
