"""Keywords that nobody takes: a model whose `forward` swallows `**kwargs` would drop a misspelt one in silence."""

from __future__ import annotations

import difflib
import inspect
import typing
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch.nn as nn

from ..errors import nearest
from ..lines import user_line
from ..scan.scan import callee

# What transformers takes out of `**kwargs` by decorators, whatever a signature says.
SWALLOWED = frozenset(
    {"cache_position", "labels", "logits_to_keep", "output_attentions", "output_hidden_states", "past_key_values"}
    | {"return_dict", "use_cache", "cache"}
)
_known: weakref.WeakKeyDictionary[nn.Module, dict[str | None, Taken | None]] = weakref.WeakKeyDictionary()


def check(module: nn.Module, fn: str | None, kwargs: Iterable[str], verb: str, *own: Callable) -> None:
    """Raise a `TypeError` (of `generate` a `ValueError`) at the user's line for a keyword that neither `verb` nor the traced function takes.

    A model of transformers hands its `**kwargs` on: there every name counts that the `forward` of a module inside takes, or
    that an annotation of `**kwargs` has. Any other function may do with `**kwargs` what it likes: there only what is nearly
    a keyword of the verb is an error.
    """
    names = [*kwargs]
    if not names:
        return
    taken = known(module, fn)
    if taken is None:
        return
    wrong = [name for name in names if name not in taken.names]
    if not wrong:
        return
    signatures = [inspect.signature(function).parameters.values() for function in own]
    ours = [p.name for parameters in signatures for p in parameters if p.kind == p.KEYWORD_ONLY]
    if taken.open:
        wrong = [name for name in wrong if _close(name, [*ours, *(taken.names if taken.near else ())])]
    if not wrong:
        return
    if taken.near:
        raise ValueError(  # which transformers raises
            f"{user_line()}: `{wrong[0]}=` is no keyword of `{verb}`; {nearest(wrong[0], [*ours, *sorted(taken.names, key=len)])}"
        )
    where = f"`{fn}`" if fn else "forward"
    hint = nearest(wrong[0], [*ours, *sorted(taken.names, key=len)])
    close = _close(wrong[0], [*ours, *taken.names, *_of_generate(module)])
    if close and close not in ours and close not in taken.names:
        hint = f"`{close}` is `generate`'s: `with model.generate(..., {close}=...)`"
    raise TypeError(
        f"{user_line()}: `{wrong[0]}=` is no keyword of `{verb}` and none of the model's {where}; {hint.removesuffix('?')}"
        f"{'?' if hint.endswith('?') else '.'} A keyword that only a module inside knows goes among the inputs: "
        f'`{{"input_ids": ids, "{wrong[0]}": ...}}`.'
    )


def _close(name: str, known: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), None)


def _of_generate(module: nn.Module) -> set[str]:
    """What transformers' `generate` takes beside its own parameters: the fields of its configuration."""
    config = getattr(module, "generation_config", None)
    return set() if config is None else {name for name in vars(type(config)()) if name[0] != "_"}


def shows(function: Callable) -> Callable[[Callable], Callable]:
    """A method that hands its keywords to `function`: `help()` shows those, and what is said of them there."""

    def shown(method: Callable) -> Callable:
        model, *rest = inspect.signature(function).parameters.values()
        method.__doc__ = function.__doc__
        method.__signature__ = inspect.Signature([model.replace(name="self"), *rest])  # type: ignore[attr-defined]
        return method

    return shown


class Taken(NamedTuple):
    """The keywords that a function takes; is it open: may others be meant for it, too, and is what is nearly one of them wrong."""

    names: frozenset[str]
    open: bool
    near: bool = False


def known(module: nn.Module, fn: str | None = None) -> Taken | None:
    """The keywords that a traced function takes; `None` where that cannot be told."""
    held = _known.setdefault(module, {})
    if fn not in held:
        held[fn] = _taken(module, fn)
    return held[fn]


def _taken(module: nn.Module, fn: str | None) -> Taken | None:
    called = callee(module, fn)
    parameters = _parameters(called.forward if isinstance(called, nn.Module) else called)
    if parameters is None:
        return None
    rest = [p for p in parameters if p.kind == p.VAR_KEYWORD]
    names = {p.name for p in parameters if p not in rest}
    if not rest:
        return Taken(frozenset(names), False)
    if fn == "generate" and type(module).__module__.startswith(
        "transformers."
    ):  # which has a check of its own behind this
        forward = _taken(module, None)
        return Taken(frozenset(names | _of_generate(module) | (forward.names if forward else set())), True, True)
    of_transformers = type(called).__module__.startswith("transformers.") and isinstance(called, nn.Module)
    if not of_transformers:
        return Taken(frozenset(names), True)
    for forward in {type(m).forward: m.forward for m in called.modules()}.values():
        for parameter in _parameters(forward) or ():
            names |= _annotated(parameter.annotation) if parameter.kind == parameter.VAR_KEYWORD else {parameter.name}
    names |= SWALLOWED
    return Taken(frozenset(names | {f"{part}_{name}" for part in ("encoder", "decoder") for name in names}), False)


def _parameters(function: Callable) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # TorchScript, C
        return None


def _annotated(annotation: object) -> set[str]:
    """The names of `**kwargs: Unpack[SomeTypedDict]`."""
    of = typing.get_args(annotation)
    return set(getattr(of[0], "__annotations__", ())) if of else set()
