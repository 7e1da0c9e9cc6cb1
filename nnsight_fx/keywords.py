"""Keywords that nobody takes: a model whose `forward` swallows `**kwargs` would drop a misspelt one in silence."""

from __future__ import annotations

import inspect
import typing
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch.nn as nn

from .capture.scan import callee
from .errors import nearest
from .tracing.lazy import user_line

# What transformers takes out of `**kwargs` by decorators, whatever a signature says.
SWALLOWED = frozenset(
    {"cache_position", "labels", "logits_to_keep", "output_attentions", "output_hidden_states", "past_key_values"}
    | {"return_dict", "use_cache", "cache"}
)
_known: weakref.WeakKeyDictionary[nn.Module, dict[str | None, frozenset[str] | None]] = weakref.WeakKeyDictionary()


def check(module: nn.Module, fn: str | None, kwargs: Iterable[str], verb: str, own: Callable | None = None) -> None:
    """Raise a `TypeError` at the user's line for a keyword that neither `verb` nor the traced function takes.

    A function that takes `**kwargs` hands them on: then every name counts that the `forward` of a module inside takes, or
    that the annotation of its `**kwargs` has.
    """
    names = [*kwargs]
    if not names:
        return
    taken = known(module, fn)
    wrong = next((name for name in names if taken is not None and name not in taken), None)
    if wrong is None or taken is None:
        return
    ours = (
        [] if own is None else [p.name for p in inspect.signature(own).parameters.values() if p.kind == p.KEYWORD_ONLY]
    )
    where = f"`{fn}`" if fn else "forward"
    hint = nearest(wrong, [*ours, *sorted(taken)])
    if hasattr(getattr(module, "generation_config", None), wrong):
        hint = f"it is `generate`'s: `with model.generate(..., {wrong}=...)`"
    raise TypeError(
        f"{user_line()}: `{wrong}=` is no keyword of `{verb}` and none of the model's {where}; {hint.removesuffix('?')}"
        f"{'?' if hint.endswith('?') else '.'} A keyword that only a module inside knows goes among the inputs: "
        f'`{{"input_ids": ids, "{wrong}": ...}}`.'
    )


def verb(function: Callable) -> Callable[[Callable], Callable]:
    """A method that hands its keywords to `function`: `help()` shows those, and what is said of them there."""

    def shown(method: Callable) -> Callable:
        model, *rest = inspect.signature(function).parameters.values()
        method.__doc__ = function.__doc__
        method.__signature__ = inspect.Signature([model.replace(name="self"), *rest])  # type: ignore[attr-defined]
        return method

    return shown


def known(module: nn.Module, fn: str | None = None) -> frozenset[str] | None:
    """The keywords that a traced function takes; `None` where that cannot be told."""
    held = _known.setdefault(module, {})
    if fn not in held:
        held[fn] = _names(module, fn)
    return held[fn]


def _names(module: nn.Module, fn: str | None) -> frozenset[str] | None:
    called = callee(module, fn)
    parameters = _parameters(called.forward if isinstance(called, nn.Module) else called)
    if parameters is None:
        return None
    if not any(p.kind == p.VAR_KEYWORD for p in parameters):
        return frozenset(p.name for p in parameters)
    if not isinstance(called, nn.Module):
        return None  # transformers' `generate` has a check of its own
    found = set(SWALLOWED)
    for forward in {type(m).forward: m.forward for m in called.modules()}.values():
        inside = _parameters(forward)
        if inside is None:
            return None
        found |= {p.name for p in inside}
        for parameter in inside:
            if parameter.kind == parameter.VAR_KEYWORD:
                found |= _annotated(parameter.annotation)
    return frozenset(found)


def _parameters(function: Any) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # TorchScript, C
        return None


def _annotated(annotation: Any) -> set[str]:
    """The names of `**kwargs: Unpack[SomeTypedDict]`."""
    of = typing.get_args(annotation)
    return set(getattr(of[0], "__annotations__", ())) if of else set()
