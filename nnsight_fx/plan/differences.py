"""Why two plans are not one: their structural key, and the first things that differ."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from .keys import Container, Identity, Items, Key, Named, NumberSlot, Plain, Span, TensorSlot, Value
from .operators import name_of_operator
from .plan import InterventionGraph, Op

FACTS = ("shape", "stride", "dtype", "device", "requires_grad", "is_leaf", "type")
FIELDS = {
    "ambient": "the grad or autocast mode",
    "effect": "its effect",
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
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = [getattr(value, f.name) for f in dataclasses.fields(value)]
        return type(value).__name__ + stable(tuple(held))
    if isinstance(value, tuple) and type(value) is not tuple:
        return type(value).__name__ + stable(tuple(value))
    if isinstance(value, tuple):
        return "(" + ",".join(stable(v) for v in value) + ")"
    if isinstance(value, frozenset | set):
        return "{" + ",".join(sorted(stable(v) for v in value)) + "}"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


def key(plan: InterventionGraph) -> str:
    """A hash of the structure; the same in every process unless an operation calls a function of the user's own."""
    text = "\n".join([*(stable(op) for op in plan.ops), stable(plan.groups), plan.recapture])
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
    heads = [[(op.verb.name, op.invoke, stable(op.verb.subject)) for op in plan.ops] for plan in (a, b)]
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
    yield from _items("argument", a.args.items, b.args.items, shift)
    if a.kwargs.names == b.kwargs.names:
        for name, x, y in zip(a.kwargs.names, a.kwargs.items, b.kwargs.items, strict=True):
            yield from _keys(f"keyword {name}", x, y, shift)
    else:
        yield f"keywords {list(a.kwargs.names)} and {list(b.kwargs.names)}"
    if a.verb != b.verb and a.effect == b.effect:
        yield f"the structure or rows of its site differs: {a.verb} and {b.verb}"
    for field, text in FIELDS.items():
        if getattr(a, field) != getattr(b, field):
            yield f"{text} differs: {getattr(a, field)} and {getattr(b, field)}"


def _items(where: str, a: tuple[Key, ...], b: tuple[Key, ...], shift: int) -> Iterator[str]:
    if len(a) != len(b):
        yield f"{where}s are {len(a)} here and {len(b)} there"
        return
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        yield from _keys(f"{where} {i}", x, y, shift)


def _keys(where: str, a: Key, b: Key, shift: int) -> Iterator[str]:
    """The differences of two keys; values that are merely numbered otherwise, because operations came in between, are equal."""
    if isinstance(a, Value) and isinstance(b, Value):
        if (a.op - b.op, a.leaf) != (shift, b.leaf):
            yield f"{where} is another value (v{a.op} and v{b.op})"
    elif a == b:
        return
    elif isinstance(a, TensorSlot) and isinstance(b, TensorSlot):
        for name, x, y in zip(FACTS, a.facts, b.facts, strict=True):
            if x != y:
                yield f"the tensor in {where} has {name} {x} here and {y} there"
    elif isinstance(a, NumberSlot) and isinstance(b, NumberSlot):
        if a.kind != b.kind:
            yield f"{where} is a lifted {a.kind} here and a lifted {b.kind} there"
    elif isinstance(a, Plain) and isinstance(b, Plain):
        yield (
            f"{where} is {a.value!r} here and {b.value!r} there, which is structure (only positions and numbers in arithmetic "
            "are lifted)"
        )
    elif isinstance(a, Span) and isinstance(b, Span):
        for x, y in zip(a, b, strict=True):
            yield from _keys(where, x, y, shift)
    elif isinstance(a, Items | Named | Container) and isinstance(b, Items | Named | Container) and _alike(a, b):
        for x, y in zip(a.items, b.items, strict=True):
            yield from _keys(where, x, y, shift)
    else:
        yield f"{where} has another form ({stable(a)} and {stable(b)})"


def _alike(a: Items | Named | Container, b: Items | Named | Container) -> bool:
    """Are they containers of the same structure?"""
    return type(a) is type(b) and a[:-1] == b[:-1] and len(a.items) == len(b.items)
