"""Lower what a `tracer.cond` decides."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from .calls import ModuleCall
from .effects import changes, effect
from .job import Job, select

CHEAP = {  # total, and less work than a branch; the rest of a block is worth one
    *("add", "sub", "mul", "neg", "abs", "clamp", "clone", "copy_", "where", "logical_and", "detach", "fill_", "zero_"),
    *("getitem", "setitem", "take_at", "put_at", "select", "narrow", "view", "reshape", "expand", "unsqueeze", "squeeze", "transpose", "permute"),
    *("flatten", "cat", "stack", "zeros_like", "ones_like", "full_like", "to", "float", "type_as", "contiguous", "masked_fill"),
    *("add_", "sub_", "mul_", "iadd", "isub", "imul", "ne", "eq", "lt", "le", "gt", "ge", "sum", "mean"),
}  # fmt: skip


VIEWS = {"select", "narrow", "view", torch.narrow, operator.getitem}


def conditional(gm: fx.GraphModule, job: Job) -> int:
    """Lower `select` to a predicated select, or, where a block does real work, to `torch.cond`.

    ```
    t = mul(h, 2.0)                       t = mul(h, 2.0)
    s = select(p, t, h)             ->    s = where(p, t, h)

    t = linear(h, w)                      c = cond(p, true_0, false_0, (h, w))
    s = select(p, t, h)             ->    s = getitem(c, 0)
    ```

    A branch takes what only its `select` uses, in-place operations on a copy among them. It keeps what a branch not taken
    must not do: the work, and in a backward the NaN of `0 * inf`.

    Does not fire when: nothing is conditional. A block stays a select where it is cheap, where something that it reads
    is changed in between, where it needs a number (torch.cond takes tensors), or where the body has a backward of its own.
    """
    chosen = [n for n in gm.graph.nodes if n.op == "call_function" and n.target is select]
    for i, node in enumerate(chosen):
        holds, new, old = node.args
        block = _block(node) if not job.differentiates else []
        with gm.graph.inserting_before(node):
            lowered = _branch(gm, node, block, i, job.raw_numbers) if _worth(block) else None
            if lowered is None:
                lowered = gm.graph.call_function(torch.where, (holds, new, old))
        node.replace_all_uses_with(lowered)
        job.emitted.discard(node)
        job.exports.update({value: lowered for value, n in job.exports.items() if n is node})
        if job.cut is not None:
            job.cut.leaves[:] = [lowered if leaf is node else leaf for leaf in job.cut.leaves]
        gm.graph.erase_node(node)
        if lowered.target is not torch.where:
            for spare in reversed(block):
                job.emitted.discard(spare)
                gm.graph.erase_node(spare)
    return len(chosen)


def _worth(block: list[fx.Node]) -> bool:
    names = [n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "") for n in block]
    return any(name not in CHEAP for name in names)


def _block(node: fx.Node) -> list[fx.Node]:
    """The nodes that nothing but `node` uses, in order, and that can be computed where it stands."""
    _, new, _ = node.args
    found: list[fx.Node] = []
    n, inside = node.prev, set()
    while n.op in ("call_function", "call_method", "get_attr"):
        if changes(n):
            if n.users or not _on_copy(n, new):
                break  # somebody else's memory: what was read before that stays before it
            found.append(n)
        elif effect(n) is not None and not isinstance(n.target, ModuleCall) and n.target not in BRANCHES:
            if not n.users:
                break  # a mode begins or ends
        elif n.users and inside.issuperset({*n.users} - {node} if n is new else n.users):
            found.append(n)
        inside.update(found[-1:])
        n = n.prev
    return found[::-1]


def _on_copy(node: fx.Node, copy: object) -> bool:
    """Does an in-place operation work on the copy that a condition had made for it?"""
    own = node.args[0] if node.args else None
    while isinstance(own, fx.Node) and own is not copy and own.target in VIEWS:
        own = own.args[0] if own.args else None
    return own is copy and isinstance(own, fx.Node) and own.target == "clone"


def _branch(gm: fx.GraphModule, node: fx.Node, block: list[fx.Node], i: int, plain: bool) -> fx.Node | None:
    holds, new, old = node.args
    assert isinstance(new, fx.Node) and isinstance(old, fx.Node)
    inside = set(block)
    if new not in inside:
        return None
    taken = list(dict.fromkeys([old, *(x for n in block for x in n.all_input_nodes if x not in inside)]))
    if not plain and any(map(_number, taken)):
        return None
    yes, no = fx.Graph(), fx.Graph()
    given = {x: yes.placeholder(x.name) for x in taken}
    other = {x: no.placeholder(x.name) for x in taken}
    for n in block:
        given[n] = yes.node_copy(n, given.__getitem__)
    yes.output((given[new],))
    no.output((no.call_method("clone", (other[old],)),))
    for name, graph in ((f"true_{i}", yes), (f"false_{i}", no)):
        gm.add_submodule(name, fx.GraphModule(gm, graph))
    branches = [gm.graph.get_attr(f"{side}_{i}") for side in ("true", "false")]
    call = gm.graph.call_function(branch if plain else torch.ops.higher_order.cond, (holds, *branches, tuple(taken)))
    return gm.graph.call_function(operator.getitem, (call, 0))


def branch(holds: torch.Tensor, yes: fx.GraphModule, no: fx.GraphModule, operands: tuple) -> tuple:
    """`torch.cond` in a graph that runs as it is."""
    return (yes if holds else no)(*operands)


BRANCHES = (branch, torch.ops.higher_order.cond)


def _number(node: fx.Node) -> bool:
    """Is a node's value none that torch.cond takes? Lifted numbers, shapes and what is computed from them."""
    return (
        node.target in ("item", "size")
        or node.op == "get_attr"
        or "example_value" in node.meta
        and not isinstance(node.meta["example_value"], torch.Tensor)
    )
