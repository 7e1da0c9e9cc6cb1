"""What leaves a trace: recorded values become the real tensors, in place, wherever they are held."""

from __future__ import annotations

from typing import Any, TypeVar

from ..errors import OutsideTraceError
from . import tree
from .lazy import LazyObject, LazyTensor, user_line
from .tape import Tape

T = TypeVar("T")

_open: list[Tape] = []  # the tapes of open traces, innermost last


def opened(tape: Tape) -> None:
    _open.append(tape)


def closed(tape: Tape) -> None:
    if tape in _open:
        _open.remove(tape)


def save(value: T) -> T:
    """Keep a value, or everything a container holds when the trace ends.

    ```python
    with model.trace(prompt):
        kept = nnsight_fx.save([])
        for layer in model.transformer.h:
            kept.append(layer.output)
    ```

    Returns `value` itself. After the trace every recorded value in it is a plain `torch.Tensor`, in lists, tuples, dicts,
    dataclasses and their nestings.

    Raises:
        OutsideTraceError: no trace is open.
    """
    if not _open:
        raise OutsideTraceError(
            f"{user_line()}: `save` was called where no trace is open. Call it inside `with model.trace(...)`."
        )
    tape = _open[-1]
    if isinstance(value, LazyTensor):
        value.save()
    else:
        tape.containers.append(value)
    return value


def lazies(value: Any) -> list:
    """The recorded values in a container, nested ones too."""
    found, seen = [], set()

    def walk(v: Any) -> None:
        if id(v) in seen:
            return
        seen.add(id(v))
        if type(v) in (LazyTensor, LazyObject):
            found.append(v)
            return
        parts = tree.children(v)
        children = (
            parts[2]
            if parts is not None
            else list(v.values())
            if isinstance(v, dict)
            else list(v)
            if isinstance(v, set | frozenset)
            else ()
        )
        for child in children:
            walk(child)

    walk(value)
    return found


def collect(tape: Tape) -> None:
    """Save what the saved containers hold now."""
    for container in tape.containers:
        for lazy in lazies(container):
            if isinstance(lazy, LazyTensor):
                lazy.save()
            else:
                tape.keep_object(lazy)


def put_objects(value: Any) -> None:
    """Put the real objects where a saved container holds what stood for them."""
    parts = tree.children(value)
    if parts is None:
        return
    kind, keys, children = parts
    for key, child in zip(keys or range(len(children)), children, strict=True):
        if type(child) is LazyObject and "_real" in child.__dict__:
            if kind == "dataclass":
                object.__setattr__(value, str(key), child._look())
            elif kind in ("dict", "list"):
                value[key] = child._look()
        else:
            put_objects(child)
