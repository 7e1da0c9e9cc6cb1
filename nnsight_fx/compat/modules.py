"""Hooks: those on all modules, and whose a hook is."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.modules.module as globally

from .probe import Name

_WAYS = {
    "forward_hooks": globally.register_module_forward_hook,
    "forward_pre_hooks": globally.register_module_forward_pre_hook,
    "backward_hooks": globally.register_module_full_backward_hook,
    "backward_pre_hooks": globally.register_module_full_backward_pre_hook,
}


def _table(name: str, register: Callable) -> dict:
    """Where torch keeps them."""
    found = Name(
        f"torch.nn.modules.module._global_{name}", "the table is found by registering a hook and removing it"
    )()
    if found is None:
        handle = register(lambda *_: None)
        found = handle.hooks_dict_ref()
        handle.remove()
    return found


GLOBAL = [_table(*way) for way in _WAYS.items()]  # what torch calls on every module of the process


def hooked_everywhere() -> bool:
    """Has anybody put a hook on all modules?"""
    return any(GLOBAL)


_LIBRARIES = ("nnsight_fx", "transformers", "accelerate")


def library_of(hook: object) -> str | None:
    """The library whose own hook it is; `None` where the user put it there."""
    name = (getattr(hook, "__module__", "") or "").partition(".")[0]
    return name if name in _LIBRARIES else None


def comes_and_goes(hook: object) -> bool:
    """Is it a hook that comes and goes without the user: one by which transformers collects outputs, or ours?

    accelerate's only one (context parallel) is not. It stays, and changes what attention is called with.
    """
    return library_of(hook) in ("transformers", "nnsight_fx")
