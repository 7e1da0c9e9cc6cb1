"""What leaves a trace: recorded values become the real tensors, in place, wherever they are held."""

from __future__ import annotations

import threading
from typing import Any, TypeVar

from ..errors import OutsideTraceError
from ..lines import user_line
from ..plan import tree
from .functions import inside
from .lazy import LazyTensor, key_of, tape_of
from .objects import LazyObject, lazies, real_of
from .tape import Tape

T = TypeVar("T")


class _Open(threading.local):
    """What this thread has open, innermost last: sessions, and the tapes of traces."""

    def __init__(self):
        self.stack: list = []


_open = _Open()


class Early:
    """A trace that has no input yet: what is saved in it belongs to its first forward."""

    def __init__(self) -> None:
        self.containers: list[object] = []


def opened(scope: object) -> None:
    """A tape or a session, which has `containers`, too."""
    _open.stack.append(scope)


def closed(scope: object) -> None:
    if scope in _open.stack:
        _open.stack.remove(scope)


def scopes() -> list:
    """What is open, as a list of its own."""
    return list(_open.stack)


def exchange(stack: list) -> list:
    """Another line of work goes on, which has `stack` open; returns what was."""
    old, _open.stack = _open.stack, stack
    return old


def session() -> Any:
    """The innermost open session, or `None`."""
    for scope in reversed(_open.stack):
        if not isinstance(scope, Tape | Early):
            return scope
    return None


def catch_up() -> None:
    """A model begins to run in the middle of a trace: what this thread's sessions have put off runs before it."""
    for scope in list(_open.stack):
        if not isinstance(scope, Tape | Early):
            scope.catch_up()


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
    if isinstance(value, LazyTensor):
        value.save()
        return value
    if not _open.stack:
        raise OutsideTraceError(
            f"{user_line()}: `save` was called where no trace is open. Call it inside `with model.trace(...)`."
        )
    _open.stack[-1].containers.append(value)
    return value


def collect(tape: Tape, held: bool = True) -> None:
    """The body is done: save what the saved containers hold now, in a session all that anybody still holds (`held`)."""
    for container in tape.containers:
        for lazy in lazies(container):
            if isinstance(lazy, LazyTensor):
                lazy.save()
            else:
                tape_of(lazy).objects.keep(lazy)
    if held and session() is not None:
        tape.forget_reads()
        for lazy in list(tape.values.values()):
            if id(lazy) not in tape.saved and not inside(key_of(lazy)):
                tape.keep(lazy)
        for stand_in in tape.objects.held:
            tape.objects.keep(stand_in, asked=False)


def put_objects(container: object) -> None:
    """Put the real objects where a saved container holds what stood for them."""
    seen, left = set(), [container]
    while left:
        value = left.pop()
        parts = tree.children(value) if id(value) not in seen else None
        seen.add(id(value))
        if parts is None:
            continue
        kind, keys, children = parts
        for key, child in zip(keys or range(len(children)), children, strict=True):
            real = _real(child)
            if real is child:
                left.append(child)
            elif kind in tree.MUTABLE:
                tree.put(value, kind, key, real)


def _real(child: object) -> object:
    """The real object that something stands for, if it is known: a value that no scan could tell may be none of a tensor's."""
    if type(child) is LazyTensor:
        return child.__dict__.get("_real_object", child)
    return real_of(child) if isinstance(child, LazyObject) and "_real" in child.__dict__ else child
