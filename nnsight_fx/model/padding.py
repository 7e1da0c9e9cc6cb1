"""On which side a language model takes padding.

Prompts of several lengths share a forward only if padding changes no prompt's numbers. Which side does that is decided by the
innermost language model, not by a wrapper around it (PEFT's, `torch.compile`'s, a module of the user's).
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import NamedTuple

import torch.nn as nn

from ..compat.transformers import is_transformers

# Model types in which a pad token changes its neighbours: a state that no mask resets, a mixing that no mask stops.
RECURRENT = frozenset({"rwkv", "recurrent_gemma", "xlstm"})
MIXING = frozenset({"convbert", "fnet", "funnel", "mobilebert", "nystromformer", "reformer", "squeezebert", "yoso"})
COUNTS = "create_position_ids_from_input_ids"  # RoBERTa and its kin count positions from the pad tokens themselves
ABSOLUTE = re.compile(r"(^|[._])(pos|position|positions|wpe|positional)([._]|$)")


class Padding(NamedTuple):
    """What a model can take."""

    left: str = ""  # why not on the left; empty where it can
    right: str = ""
    positions: bool = False  # on the left: must `position_ids` say where each prompt begins
    reads_last: bool = False  # is it a causal model, of which people read the last column


def padding_of(module: nn.Module) -> Padding:
    """On which side a model takes padding."""
    inner, reached = innermost(module)
    kind, name = getattr(getattr(inner, "config", None), "model_type", ""), type(inner).__name__
    causal = hasattr(inner, "generate") and not getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
    if kind in MIXING:
        why = f"`{name}` mixes neighbouring tokens where no mask stops it"
        return Padding(why, why)
    if kind in RECURRENT:
        return Padding(f"`{name}` carries a state from token to token that no mask resets", reads_last=True)
    if getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False):
        return Padding("the adapter puts tokens of its own in front of the prompt", reads_last=causal)
    if any(hasattr(m, COUNTS) or hasattr(sys.modules.get(type(m).__module__), COUNTS) for m in inner.modules()):
        return Padding(reads_last=causal)
    if "position_ids" not in _parameters(inner):
        counts = f"`{name}` counts positions from the first column, and takes no `position_ids`"
        return Padding(counts if _absolute(inner) else "", reads_last=causal)
    if reached or not _absolute(inner, rotary=True):
        return Padding(positions=reached, reads_last=causal)
    return Padding(f"`{type(module).__name__}` does not hand `position_ids` on to `{name}`", reads_last=causal)


def innermost(module: nn.Module) -> tuple[nn.Module, bool]:
    """The language model inside wrappers, and whether keywords that the wrappers do not name reach it."""
    reached = True
    while not is_transformers(module) and "position_ids" not in _parameters(module):
        inner = next((m for m in module.modules() if m is not module and "input_ids" in _parameters(m)), None)
        if inner is None:
            break
        reached = reached and any(p.kind is p.VAR_KEYWORD for p in _parameters(module).values())
        module = inner
    return module, reached


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # a forward of C's, or none
        return {}


def _absolute(module: nn.Module, rotary: bool = False) -> bool:
    """Has a model a table of positions? With `rotary`, is it anything but a rotary one?"""
    names = [*(n for n, _ in module.named_modules()), *(n for n, _ in module.named_parameters()), *(n for n, _ in module.named_buffers())]  # fmt: skip
    if rotary and any("rotary" in n for n in names):
        return False
    return rotary or any(
        ABSOLUTE.search(n) and not re.search("rotary|relative", n) for n in (n.rpartition(".")[2] for n in names)
    )
