"""A result that reads one position of each row is computed at that position only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from .job import Job

POINTWISE = {
    *("add", "sub", "mul", "truediv", "div", "true_divide", "neg", "pow", "rsqrt", "sqrt", "exp", "log", "tanh", "abs"),
    *("sigmoid", "relu", "gelu", "silu", "softplus", "square", "reciprocal", "to", "float", "type", "type_as", "clamp"),
    *("contiguous", "clone", "detach", "minimum", "maximum", "erf", "sin", "cos"),
}


def take(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`x[i, positions[i]]` for each row `i`, kept as a dimension of size 1: `(rows, tokens, ...)` -> `(rows, 1, ...)`."""
    index = positions.view(-1, 1, *[1] * (x.dim() - 2)).expand(-1, 1, *x.shape[2:])
    return x.gather(1, index)


def demand(gm: fx.GraphModule, job: Job | None = None) -> int:
    """Pull each `take` back through what works on every position alone; return through how many operations.

    ```
    n = layer_norm(h, (576,), w, b)       t = take(h, q)
    l = linear(n, u)                ->    n = layer_norm(t, (576,), w, b)
    t = take(l, q)                        l = linear(n, u)
    ```

    The last norm and the unembedding then cost one position of a row, not all. Shapes are those that capture noted
    (`meta["example_value"]`); positions are dimension 1.

    Does not fire when: the whole value is used, too; the operation mixes positions (attention, a softmax or a norm over
    them), is not in the table, or something that it takes differs from position to position without holding them in
    dimension 1.
    """
    return pull(gm, [n for n in gm.graph.nodes if n.target is take])


def pull(
    gm: fx.GraphModule,
    work: list[fx.Node],
    fits: Callable[[fx.Node, fx.Node], bool] = lambda source, node: True,
    moved: Callable[[fx.Node, fx.Node], None] = lambda source, node: None,
) -> int:
    """Pull choices of positions (`take`, and what else is called with a tensor and with where) back as far as they go.

    `fits(source, choice)` is asked before an operation is done at the chosen positions only; `moved(source, choice)` is told
    what has been put in front of it.
    """
    pulled = 0
    while work:
        node = work.pop()
        if node.graph is None or not node.users:
            continue
        source: Any = node.args[0]
        same = all(u.target is node.target and u.args[1:] == node.args[1:] for u in source.users)
        needs = taken(source) if same and fits(source, node) else None
        if needs is None:
            continue
        with gm.graph.inserting_before(source):
            chosen = {x: _choice(gm, node, x) for x in needs}
        moved(source, next(iter(chosen.values())))
        for old, new in chosen.items():
            source.replace_input_with(old, new)
        source.meta = _chosen(source, node)
        for user in list(source.users):
            user.replace_all_uses_with(source)
            gm.graph.erase_node(user)
            if user in work:
                work.remove(user)
        work += chosen.values()
        pulled += 1
    return pulled


def _choice(gm: fx.GraphModule, like: fx.Node, x: fx.Node) -> fx.Node:
    node = gm.graph.call_function(like.target, (x, *like.args[1:]))  # type: ignore[arg-type]
    node.meta = _chosen(x, like)
    return node


def _chosen(node: fx.Node, choice: fx.Node) -> dict:
    """What is known of a value, of the chosen positions of it."""
    value, many = node.meta["example_value"], len(choice.args) - 1
    share = {k: many * node.meta[k] / value.shape[1] for k in ("flops", "bytes") if k in node.meta}
    mode = getattr(value, "fake_mode", None)
    if mode is None:
        return {**node.meta, **share, "example_value": value[:, :many]}
    with mode:
        return {**node.meta, **share, "example_value": value[:, :many]}


def taken(node: fx.Node) -> list[fx.Node] | None:
    """The arguments of which an operation needs the same position only; `None` where it needs more."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    shape = _shape(node)
    if node.op not in ("call_function", "call_method") or shape is None or len(shape) < 2 or not node.args:
        return None
    first: Any = node.args[0]
    if name in POINTWISE and node.kwargs.get("out") is None:
        return _aligned(node, shape)
    if _shape(first) is None or len(_shape(first) or ()) != len(shape) or (_shape(first) or ())[1] != shape[1]:
        return None
    if name == "linear":
        return [first] if len(shape) > 2 else None
    if name in ("layer_norm", "rms_norm"):
        over = node.args[1] if len(node.args) > 1 else node.kwargs["normalized_shape"]
        return [first] if len(shape) - len(over) >= 2 else None  # type: ignore[arg-type]
    if name in ("mean", "sum", "var", "softmax", "log_softmax", "amax", "norm"):
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dims = dims if isinstance(dims, list | tuple) else [dims]
        fine = all(isinstance(d, int) and d % len(shape) > 1 for d in dims)
        return [first] if fine else None
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        whole = all(i == slice(None) or i == slice(0, None) or i == slice(0, None, None) for i in index)
        return [first] if whole and _shape(first) == shape else None
    return None


def _aligned(node: fx.Node, shape: tuple) -> list[fx.Node] | None:
    """The tensors of a pointwise operation that hold the positions."""
    found = []
    for x in node.all_input_nodes:
        size = _shape(x)
        if size is None:
            return None
        place = len(size) - (len(shape) - 1)  # where dimension 1 of the result is in it
        if place < 0 or size[place] == 1:
            continue
        if place != 1 or size[1] != shape[1]:
            return None
        found.append(x)
    return found or None


def _shape(node: object) -> tuple | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
