"""Attention weights that a fused kernel keeps to itself: what is said of the `None` in their place."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import WeightsNotComputedError
from ..lines import user_line
from ..plan import tree

if TYPE_CHECKING:
    from .envoy import Envoy


FLAG = 'attn_implementation="eager"'
SWITCH = 'model.set_attn_implementation("eager")'


def explained(envoy: Envoy, value: object) -> object:
    """An attention module's output (attention, weights), whose weights say why they are `None` when they are asked for."""
    if type(value) is not tuple or len(value) < 2 or value[1] is not None:
        return value
    kernel = _kernel(envoy._module, envoy.root._module)
    if kernel is None:
        return value
    made = tree.Explained(value)
    made.why = {1: lambda: WeightsNotComputedError(f"{user_line()}: {_text(envoy, kernel)}")}
    envoy.root.tracer.withheld = lambda: _text(envoy, kernel)
    return made


def warn_of_none(module: object, kwargs: object) -> None:
    """Say at the user's line that `output_attentions=True` gets nothing from a kernel that has no weights."""
    kernel = _implementation(module, module)
    if kernel is not None and isinstance(kwargs, Mapping) and kwargs.get("output_attentions"):
        warnings.warn_explicit(
            f'nnsight_fx: {user_line()}: `output_attentions=True` gives nothing: attn_implementation="{kernel}" computes attention in '
            f"one kernel, which gives no attention weights. Load the model with `{FLAG}`, or switch this one (`{SWITCH}`).",
            UserWarning,
            *user_line(),
        )


def hint(root: Envoy, name: str) -> str:
    """What is added where an operation of written-out attention is asked for, and a kernel does it."""
    kernel = _implementation(root._module, root._module)
    if kernel is None or not any(part in name for part in ("softmax", "matmul", "dropout")):
        return ""
    return f' Under attn_implementation="{kernel}" attention is one kernel: load the model with `{FLAG}` to see its operations.'


def _text(envoy: Envoy, kernel: str) -> str:
    path = envoy.path.removeprefix("model.")
    inside = _interface(envoy)
    text = (
        f'`{path}.output[1]` is None: attn_implementation="{kernel}" computes attention in one kernel, which gives no attention weights. '
        f"Load the model with `{FLAG}` (`LanguageModel(..., {FLAG})`), or switch this one (`{SWITCH}`): then `.output[1]` has them"
    )
    if inside is None:
        return text + "."
    return (
        f"{text}, and `{path}.source.{inside}.source.nn_functional_softmax_0.output` can be changed before they are used. Here, "
        f"`{path}.source.{inside}.inputs` has the query, the key and the value. To go on without the weights, write `None` or `*output[1:]`."
    )


def _interface(envoy: Envoy) -> str | None:
    """The operation in which transformers calls the implementation."""
    try:
        names = envoy.source.names
    except Exception:  # no text, no name: the message does without
        return None
    return next((name for name in names if name.startswith("attention_interface")), None)


def _kernel(module: object, root: object) -> str | None:
    """The kernel that computes a module's attention; `None` if it is no attention, or writes the weights out."""
    name = type(module).__name__.lower()
    return _implementation(module, root) if "attention" in name or "attn" in name else None


def _implementation(module: object, root: object) -> str | None:
    config = getattr(module, "config", None) or getattr(root, "config", None)
    found = getattr(config, "_attn_implementation", None)
    return found if isinstance(found, str) and found != "eager" else None
