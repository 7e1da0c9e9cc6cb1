"""The guards of Dynamo's captures: those on our own hook tables are dropped."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

TABLE = re.compile(r"\.(_forward_(pre_)?hooks|_compiled_call_impl)")  # where ours are


def needs_hooks(function: Callable) -> bool:
    """Does the code of any capture of a function get at what a hook holds, as it does for lists that one appends to?"""
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(function.__code__)
    used = [name for entry in entries for name in (*entry.code.co_names, *entry.code.co_consts)]
    return any(isinstance(name, str) and TABLE.search(f".{name}") for name in used)


def guards(function: Callable) -> list[str]:
    """What Dynamo checks before it uses each capture of a function, as text."""
    found = torch._dynamo.eval_frame._debug_get_cache_entry_list(function.__code__)
    return [str(entry.guard_manager).strip() for entry in found]


def root(function: Callable) -> tuple[str, ...]:
    """How the names begin of what an entry function closes over: what it holds is always the same."""
    return function.__code__.co_freevars


def forget_tables(start: tuple[str, ...]) -> None:
    """In a backend's callback for what has that `root`: drop the guards that the filter of `dynamo_compile` drops, where the user has no hooks. Dynamo builds
    all guards before it asks a filter, and then builds again what is left."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    found: Any = getattr(InstructionTranslator.current_tx().output.guards, "inner", None)
    start = tuple(f"L['{name}']" for name in start)
    for guard in list(found or ()):
        name = guard.name if isinstance(guard.name, str) else guard.name()
        told = guard.create_fn_name() == "CONSTANT_MATCH" or ".calls" in name
        if TABLE.search(name) and (name.startswith(start) or not told):
            found.discard(guard)


def of_library(hook: Any) -> bool:
    return (getattr(hook, "__module__", "") or "").startswith(("nnsight_fx.", "transformers.", "accelerate."))
