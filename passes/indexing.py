"""Positions that change from run to run."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from nnsight_fx.capture.marker import marker_of, site
from nnsight_fx.compat.inductor import pure
from nnsight_fx.compat.tensors import memory

from .effects import changes, effect
from .job import Job, backward, gradient, set_gradient, settled, tap

VIEWS = {
    *("getitem", "select", "narrow", "view", "reshape", "transpose", "permute", "movedim", "unsqueeze", "squeeze", "expand"),
    *("detach", "flatten", "contiguous", "to", "float", "half", "bfloat16", "double", "split", "chunk", "unbind", "t"),
}  # fmt: skip
FRESH = {
    *("add", "sub", "mul", "truediv", "div", "neg", "matmul", "linear", "cat", "stack", "clone", "where", "zeros_like"),
    *("ones_like", "full_like", "take_at", "softmax", "relu", "gelu", "silu", "tanh", "exp", "mean", "sum", "norm"),
    *("log_softmax", "log", "sigmoid", "sqrt", "rsqrt", "square", "pow", "reciprocal", "logsumexp", "cumsum", "var", "std"),
    *("amax", "amin", "argmax", "argmin", "mm", "bmm", "addmm", "embedding", "layer_norm", "rms_norm"),
}  # fmt: skip

QUIET = {
    torch._check,
    tap,
    backward,
    gradient,
    set_gradient,
    settled,
}  # they change no value, which `effect` cannot tell


def index(gm: fx.GraphModule, job: Job, lifted: set[fx.Node]) -> None:
    """Lower `x[:, n]` and `x[:, n] = v` with a lifted `n`, which neither indexing nor Inductor takes as a number.

    ```
    r = getitem(x, (:, n))         ->   r = take_at(x, [1], [n])
    setitem(x, (:, n), v)          ->   put_at(x, [1], [n], (:,), v)
    r.add_(c)                      ->   r.add_(c);  put_at(x, [1], [n], (:,), r)
    ```

    A read is a copy, written back where it is changed itself; it stays a view (`select`) where what it is read from, or a view of
    it, is changed while it is in use.
    """
    users = dict.fromkeys(user for number in lifted for user in number.users)
    nodes = [n for n in users if n.op == "call_function" and n.target in (operator.getitem, operator.setitem)]
    calls = (n for n in gm.graph.nodes if n.op.startswith("call") and n.target not in QUIET)
    effects = [n for n in calls if effect(n) is not None] if nodes else []
    over = job.closed and (job.exit is None or len(job.exit.done) == len(job.plan.ops))
    kept = {*job.exports.values(), *(job.cut.leaves if job.cut is not None else ())}
    back = {n: _written_back(n, effects, kept, over) for n in nodes if n.target is operator.getitem}
    for node in nodes:
        _lower(gm, job, node, lifted, back.get(node))


def _lower(gm: fx.GraphModule, job: Job, node: fx.Node, lifted: set[fx.Node], back: list[fx.Node] | None) -> None:
    """One read or write; `back`: the changes of what is read, to be written back, if it may be a copy."""
    x: Any = node.args[0]
    key: Any = node.args[1]
    key = key if isinstance(key, tuple) else (key,)
    at = {i for i, entry in enumerate(key) if isinstance(entry, fx.Node) and entry in lifted}
    if not at:
        return  # a number is written, not a position
    ellipsis = next((i for i, entry in enumerate(key) if entry is Ellipsis), len(key))
    left = [(i, sum(e is not None for e in key[:i])) for i in range(ellipsis) if i in at]
    right = [(i, -sum(e is not None for e in key[i:])) for i in range(ellipsis, len(key)) if i in at]
    where = [dim for _, dim in (*left, *right)]
    numbers = [key[i].args[0] for i, _ in (*left, *right)]  # the 0-d tensors
    rest = tuple(entry for i, entry in enumerate(key) if i not in at)
    basic = all(entry is None or entry is Ellipsis or isinstance(entry, int | slice) for entry in rest)
    writes = node.target is operator.setitem
    back = back if basic else None
    with gm.graph.inserting_before(node):
        if writes and basic:
            x = gm.graph.call_function(put_at, (x, where, numbers, rest, node.args[2]))
        elif back is not None:
            made = gm.graph.call_function(take_at, (x, where, numbers))
        else:
            made = x
            for i, dim in [*reversed(left), *right]:  # the innermost first: no dim shifts another
                made = gm.graph.call_method("select", (made, dim, key[i]))
            if writes:
                x = gm.graph.call_function(operator.setitem, (made, rest or Ellipsis, node.args[2]))
        if not writes and not all(entry is Ellipsis or entry == slice(None) for entry in rest):
            made = gm.graph.call_function(operator.getitem, (made, rest))
    new = x if writes else made
    for change in back or ():
        with gm.graph.inserting_after(change):
            job.emitted.add(gm.graph.call_function(put_at, (x, where, numbers, rest, made)))
    node.replace_all_uses_with(new)
    job.exports.update({v: new for v, n in job.exports.items() if n is node})
    if job.cut is not None:
        job.cut.leaves[:] = [new if leaf is node else leaf for leaf in job.cut.leaves]
    gm.graph.erase_node(node)
    for i in at:
        _settle(gm, key[i])


def _written_back(read: fx.Node, effects: list[fx.Node], kept: set[object], over: bool) -> list[fx.Node] | None:
    """The operations that change what was read, and nothing else of the same memory; `None` where a copy would show.

    `effects` are the operations of the graph that do more than compute, in order; `kept` is what leaves the graph, and `over`
    tells that the plan does nothing behind it, which could change what was read from. What is given out with what it was read
    from shares its memory.
    """
    alone = not any(_may_share(other, read.args[0]) for other in kept if other is not read)
    alone = alone and not _given(read.args[0])
    views, same, ahead, used = {read}, {read}, [read], read
    while ahead:
        node = ahead.pop()
        if node in kept and not (over and alone):
            return None
        used = max(used, read.graph.output_node() if node in kept else node, *node.users)
        for user in node.users:
            if user not in views and (_changed(user) in views if changes(user) else _name(user) not in FRESH):
                views.add(user)
                ahead.append(user)
    found = []
    for node in effects:
        if node < read:
            continue
        if not changes(node):
            if any(a in views or _may_share(a, read.args[0]) for a in node.all_input_nodes):
                return None  # it may change what it is given
        elif _changed(node) in same:
            same.add(node)
            found.append(node)
        elif _changed(node) in views or (node < used and _may_share(_changed(node), read.args[0])):
            return None
    return found


def _given(x: object) -> bool:
    """Does a value lie in the memory of what the graph is given (the user's input)?"""
    root = _root(x)
    given = [n for n in root.graph.nodes if n.op == "placeholder"]
    return root in given or (_storage(root) is not None and _storage(root) in map(_storage, given))


def _changed(node: fx.Node) -> object:
    """What an operation in place changes."""
    return node.kwargs.get("out") or (node.args[0] if node.args else None)


def _may_share(a: object, b: object) -> bool:
    """May two values lie in the same memory?"""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return True
    if _apart(_rows(a), _rows(b)):
        return False
    a, b = _root(a), _root(b)
    stored = _storage(a), _storage(b)
    if None not in stored:
        return stored[0] == stored[1]
    return a is b or not all(_name(n) in FRESH for n in (a, b))


def _apart(a: tuple | None, b: tuple | None) -> bool:
    """Are they the rows of two invokes?"""
    return a is not None and b is not None and a[0] is b[0] and (a[2] <= b[1] or b[2] <= a[1])


def _rows(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """In which rows of what a view lies, where an invoke has taken it from these."""
    while isinstance(node, fx.Node) and node.args and (node.target is site or _name(node) in VIEWS or changes(node)):
        if node.target is torch.narrow and node.args[1] == 0 and all(isinstance(n, int) for n in node.args[2:]):
            x, _, start, size = node.args
            return x, start, start + size  # type: ignore[return-value, operator]
        node = _within(node)
    return None


def _root(node: fx.Node) -> fx.Node:
    while node.target is site or (_storage(node) is None and (_name(node) in VIEWS or changes(node))):
        inside = _within(node)
        if not isinstance(inside, fx.Node):
            break
        node = inside
    return node


def _within(node: fx.Node) -> object:
    """What a marker, a view or an operation in place is of."""
    if node.target is site:
        return marker_of(node).value
    return node.args[0] if node.args else None


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("example_value")
    return memory(value) if isinstance(value, torch.Tensor) else None


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _settle(gm: fx.GraphModule, number: fx.Node) -> None:
    """Read a number, and check it, where it is used first; forget it where nothing uses it but its check."""
    check = next((n for n in number.users if n.target is operator.ge), None)
    if check is None:
        return
    chain = [number, check, *check.users]
    first = min((n for n in number.users if n is not check), default=None)
    for node in chain if first is not None else reversed(chain):
        if first is None:
            gm.graph.erase_node(node)
        else:
            first.prepend(node)


@pure
def take_at(x: torch.Tensor, dims: list[int], numbers: list[torch.Tensor]) -> torch.Tensor:
    """A copy of `x` at these numbers of these dimensions, with tensors for indices."""
    front = x.movedim(dims, [*range(len(dims))])
    return front[tuple(n.reshape(1).to(x.device) for n in numbers)].squeeze(0)


@pure
def put_at(x: torch.Tensor, dims: list[int], numbers: list[torch.Tensor], rest: tuple, value: object) -> None:
    """`x[..., n, rest] = value`, likewise."""
    part = x.movedim(dims, [*range(len(dims))])[(*[slice(None)] * len(dims), *rest)]
    shape = part.shape[len(dims) :]
    new = torch.as_tensor(value).to(x.device, x.dtype)
    while new.dim() > len(shape) and new.shape[0] == 1:
        new = new[0]
    part.index_put_(
        tuple(n.reshape(1).to(x.device) for n in numbers), new.expand(shape).unsqueeze(0).clone()
    )  # it may be `x`'s own memory
