"""What a node does beside computing its value: the question that every pass which removes nodes asks first."""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any

import torch
import torch.fx as fx

from nnsight_fx.capture.marker import anchor, site, supply
from nnsight_fx.compat.graphs import OpOverload
from nnsight_fx.plan.names import RANDOM, RANDOM_IN_PLACE

TORCH = {  # where functions live that only compute; `None`: builtins of torch without a module
    *(
        None,
        "nnsight_fx.passes.demand",
        "nnsight_fx.passes.indexing",
        "nnsight_fx.passes.read_positions",
        "torch",
        "torch.functional",
        "torch.nn.functional",
        "torch.special",
        "math",
    ),
    *("torch._C._nn", "torch._C._linalg", "torch._C._fft", "torch._C._special"),
}
BUILTINS = {getattr, abs, min, max, sum, pow, round, len, int, float, bool}
IN_PLACE = {
    "setitem",
    "delitem",
    "copy_",
    "put_at",
    *(f"i{op}" for op in ("add", "sub", "mul", "truediv", "floordiv", "mod")),
}
IN_PLACE |= {f"i{op}" for op in ("pow", "and", "or", "xor", "lshift", "rshift", "matmul", "concat")}
DRAWS = RANDOM | RANDOM_IN_PLACE | {"alpha_dropout", "feature_alpha_dropout", "rrelu", "gumbel_softmax", "fractional"}
DRAWS |= {"dropout1d", "dropout2d", "dropout3d", "native_dropout", "lstm", "gru", "rnn_tanh", "rnn_relu"}


def effect(node: fx.Node) -> str | None:
    """What `node` does beside computing its value, in words; `None` when that is nothing.

    Errs to one side: a function that is not known to be pure counts as one that is not.
    """
    if node.op in ("placeholder", "get_attr") or node.target in (anchor, site, supply):
        return None
    if isinstance(node.target, OpOverload):
        return _of_schema(node.target)
    if node.op not in ("call_function", "call_method"):
        return "calls a module"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return _changes(node, name) or _draws(node, name) or _unknown(node, name)


def changes(node: fx.Node) -> bool:
    """Does `node` change a tensor that exists already?"""
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and _changes(node, name) is not None


def draws(node: fx.Node) -> bool:
    """Does `node` draw random numbers, or may it, as far as its function tells? What switches a mode does not."""
    if isinstance(node.target, OpOverload):
        return torch.Tag.nondeterministic_seeded in node.target.tags
    if node.op not in ("call_function", "call_method") or node.target in (anchor, site, supply):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return _draws(node, name) is not None or (not name.startswith(("_", "set_")) and _unknown(node, name) is not None)


def _of_schema(op: OpOverload) -> str | None:
    if op._schema.is_mutable or "batch_norm" in op._schema.name:  # whose schemas do not admit to the statistics
        return "changes a tensor in place"
    return "draws random numbers" if torch.Tag.nondeterministic_seeded in op.tags else None


def _changes(node: fx.Node, name: str) -> str | None:
    trailing = name.endswith("_") and not name.endswith("__") and getattr(operator, name, None) is not node.target
    if trailing or name.strip("_") in IN_PLACE or node.kwargs.get("out") is not None or _given(node, "inplace"):
        return "changes a tensor in place"
    if "batch_norm" in name or "instance_norm" in name:
        flag = "use_input_stats" if "instance" in name else "training"
        known = _signature(node) is not None
        if not known or (_given(node, flag) and _given(node, "running_mean") is not None):
            return "changes running statistics"
    if "embedding" in name and _given(node, "max_norm") is not None:
        return "renormalises its weight"
    return None


def _draws(node: fx.Node, name: str) -> str | None:
    p = _given(node, "dropout_p")
    if name == "scaled_dot_product_attention" and len(node.args) > 4:
        p = node.args[4]
    if p not in (None, 0):
        return "draws random numbers"
    if name in DRAWS or name.startswith(("rand", "fractional")):
        quiet = _signature(node) is not None and ("dropout" in name or name == "rrelu")
        if not (quiet and (_given(node, "training") is False or _given(node, "p") == 0)):
            return "draws random numbers"
    return None


def _unknown(node: fx.Node, name: str) -> str | None:
    if name.startswith(("_", "set_")) or not name:  # modes are switched by functions with such names
        return f"calls `{name or node.target}`"
    if node.op == "call_method" or node.target in BUILTINS or getattr(operator, name, None) is node.target:
        return None
    module = getattr(node.target, "__module__", None)
    return None if module in TORCH else f"calls `{module}.{name}`"


def _signature(node: fx.Node) -> inspect.BoundArguments | None:
    ours = getattr(node.target, "__module__", None) in TORCH
    known = (_remembered if ours else _signature_of)(node.target)
    if known is None:
        return None
    try:
        bound = known.bind(*node.args, **node.kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    return bound


def _signature_of(target: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):
        return None


_remembered = functools.cache(_signature_of)  # of torch's functions: a user's, and what it holds, is not kept alive


def _given(node: fx.Node, name: str) -> object:
    """An argument of a call, by name; `None` where it has none or its signature is unknown."""
    bound = _signature(node)
    return node.kwargs.get(name) if bound is None else bound.arguments.get(name)
