"""The guards of Dynamo's captures: those on our own hook tables are dropped."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .probe import Name

TABLE = re.compile(r"\.(_forward_(pre_)?hooks|_compiled_call_impl)")  # where ours are


_ENTRIES = Name(
    "torch._dynamo.eval_frame._debug_get_cache_entry_list", "captures are not counted, and every run puts its hooks on"
)
_TRANSLATOR = Name("torch._dynamo.symbolic_convert.InstructionTranslator", "guards on our own hooks stay")
_GUARDS = Name("torch._guards.GuardsSet.inner", "guards on our own hooks are dropped after Dynamo has built them")


def captures(function: Callable) -> list:
    """Dynamo's captures of a function, or none where it does not tell."""
    listed = _ENTRIES()
    return [] if listed is None else listed(function.__code__)


def needs_hooks(function: Callable) -> bool:
    """Does the code of any capture of a function get at what a hook holds, as it does for lists that one appends to?"""
    if _ENTRIES() is None:
        return True
    entries = captures(function)
    used = [name for entry in entries for name in (*entry.code.co_names, *entry.code.co_consts)]
    return any(isinstance(name, str) and TABLE.search(f".{name}") for name in used)


def guards(function: Callable) -> list[str]:
    """What Dynamo checks before it uses each capture of a function, as text."""
    return [str(entry.guard_manager).strip() for entry in captures(function)]


def root(function: Callable) -> tuple[str, ...]:
    """How the names begin of what an entry function closes over: what it holds is always the same."""
    return function.__code__.co_freevars


def forget_tables(start: tuple[str, ...]) -> None:
    """Called from the backend's callback. Removes the guards on our own hook tables before Dynamo builds them; they never change.

    They are those that the filter of `dynamo_compile` drops. Dynamo asks a filter only when it has built all guards, and then
    builds again what is left. For functions with that `root`, on models without hooks of the user's.
    """
    if _TRANSLATOR() is None:
        return
    try:
        found: Any = _GUARDS.of(_TRANSLATOR().current_tx().output.guards, ())
        start = tuple(f"L['{name}']" for name in start)
        for guard in list(found):
            name = guard.name if isinstance(guard.name, str) else guard.name()
            told = guard.create_fn_name() == "CONSTANT_MATCH" or ".calls" in name
            if TABLE.search(name) and (name.startswith(start) or not told):
                found.discard(guard)
    except (AttributeError, TypeError):  # another torch: guards look different there
        _GUARDS.fails()
