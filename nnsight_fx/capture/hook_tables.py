"""The tables of hooks that torch keeps on a module: ours go into them, and come out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.nn as nn

from ..compat.frames import compiled_from
from ..compat.modules import comes_and_goes

TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
KEY = -1  # the key of our hooks in every table, which torch counts from 0: Dynamo guards on it, so it never changes


def put(module: nn.Module, before: Callable, after: Callable) -> None:
    """Hook one module: inputs before every other hook; outputs after the user's, before transformers' own collectors."""
    if module._forward_pre_hooks or module._forward_hooks:
        _insert(module._forward_pre_hooks, before, lambda hook: True)
        _insert(module._forward_hooks, after, comes_and_goes)
    else:
        module._forward_pre_hooks[KEY] = before
        module._forward_hooks[KEY] = after
    module._forward_pre_hooks_with_kwargs[KEY] = True
    module._forward_hooks_with_kwargs[KEY] = True


def take(module: nn.Module) -> None:
    """Take the hooks off again."""
    module._forward_pre_hooks.pop(KEY, None)
    module._forward_hooks.pop(KEY, None)
    module._forward_pre_hooks_with_kwargs.pop(KEY, None)
    module._forward_hooks_with_kwargs.pop(KEY, None)


def _insert(table: dict, hook: Callable, comes_after: Callable[[object], bool]) -> None:
    """Insert `hook` in front of those that come after it. By taking them out and in again: Dynamo guards on the order of
    insertion, which `move_to_end` leaves as it is."""
    later = [(key, other) for key, other in table.items() if comes_after(other)] if table else []
    for key, _ in later:
        del table[key]
    table[KEY] = hook
    table.update(later)


def uncompiled(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Callable | None]]:
    """`(module, attribute, what the user compiled)` for each module that he did: compiled code passes no markers."""
    found: list[tuple[nn.Module, str, Callable | None]] = []
    for m in modules:
        if m.__dict__.get("_compiled_call_impl") is not None:  # `module.compile()`
            found.append((m, "_compiled_call_impl", None))
        if "forward" in m.__dict__:  # `torch.compile(module)`, `module.forward = torch.compile(module.forward)`
            own = compiled_from(m.__dict__["forward"])
            if own is not None:
                found.append((m, "forward", own))
    return found


def override(module: nn.Module, function: Callable | None, name: str = "forward") -> Callable[[], None]:
    """Replace an instance's `forward`, or another method; the undo puts back exactly what was there."""
    had = name in module.__dict__
    old = module.__dict__.get(name)
    module.__dict__[name] = function

    def restore() -> None:
        if had:
            module.__dict__[name] = old
        else:
            module.__dict__.pop(name, None)

    return restore
