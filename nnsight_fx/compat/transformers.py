"""What transformers does on its own: hooks that it puts on lazily in the middle of a forward, and the names of caches."""

from __future__ import annotations

import sys
from typing import Any

import torch.nn as nn

from .modules import comes_and_goes

_INSTALLED = "_output_capturing_hooks_installed"
COLLECTING = (
    "transformers_dot_utils_dot_output_capturing"  # in Dynamo's names: what only the hooks that collect outputs read
)


def settle(module: nn.Module) -> None:
    """Install transformers' output-collecting hooks before a capture: it would install them at the first call that asks for
    them, and Dynamo cannot trace the locks that it takes.

    Not on a model with a part that has them: installing goes through all parts, and does not look whether they do.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:  # an older transformers installs nothing lazily
        return
    for each in module.modules():
        parts = (m for m in each.modules() if m is not each)
        if isinstance(each, PreTrainedModel) and not any(vars(m).get(_INSTALLED) for m in parts):
            maybe_install_capturing_hooks(each)


def collects(module: nn.Module) -> bool:
    """Has a forward of this module asked for such hooks?"""
    return any(vars(m).get(_INSTALLED) for m in module.modules())


CACHE = ("cache", "past_key_values")  # what a forward calls its cache, from transformers 5.24 on and before


def cache_among(kwargs: dict) -> Any:
    """The cache among a forward's arguments, under either name."""
    return next((kwargs[name] for name in CACHE if kwargs.get(name) is not None), None)


def is_transformers(module: nn.Module) -> bool:
    """Is it one of transformers' models? Importing their class would load Dynamo."""
    loaded = sys.modules.get("transformers.modeling_utils")
    return loaded is not None and isinstance(module, loaded.PreTrainedModel)


def restored(thing: object) -> bool:
    """Is it the variable by which a forward tells its output-collecting hooks what to collect? It is reset at the end."""
    return type(thing).__name__ == "CompileableContextVar" and type(thing).__module__.startswith("transformers.")


def collects_states(hook: object) -> bool:
    """Does a hook of transformers collect hidden states? It counts its calls, even those at which it collects none."""
    return "hidden_states" in [cell.cell_contents for cell in getattr(hook, "__closure__", None) or ()]


def without_library_hooks(module: nn.Module) -> tuple:
    """How `pickle` writes a module: without the hooks that transformers collects outputs with, which it puts on again."""
    reduced = module.__reduce_ex__(2)
    state = reduced[2]
    if isinstance(state, dict) and "_forward_hooks" in state:
        hooks = state["_forward_hooks"]
        kept = {k: h for k, h in hooks.items() if not comes_and_goes(h)}
        state = {**state, "_forward_hooks": type(hooks)(kept)}
        state.pop(_INSTALLED, None)
    return *reduced[:2], state, *reduced[3:]
