"""Calls of one linear layer on a few rows each become one call on all of them."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
from torch.nn.functional import linear

from nnsight_fx.compat.fakes import detect_fake_mode, on_fakes
from nnsight_fx.compat.inductor import pure

from .calls import ModuleCall
from .effects import effect
from .job import Job

FEW = 64  # rows of a call up to which reading the weight is what it costs
MANY = 512  # rows of a joined call, whose results are all there at once


def batch_linears(gm: fx.GraphModule, job: Job) -> int:
    """Join calls that a body makes of one `nn.Linear` of the model; return how many calls were joined.

    ```
    a = module_lm_head({w}, (x,))                 h2 = block_1(h1)
    h2 = block_1(h1)                              y = norm(h2)
    y = norm(h2)                         ->       a, b = together({w}, x, y)
    b = module_lm_head({w}, (y,))                 return (h2, a, b)
    return (h2, a, b)
    ```

    A logit lens reads the unembedding once, not once a layer: on a few rows that is all it costs. The calls move behind
    what the last of them needs, and what uses them behind that; the blocks of the model are left without them. A sum may be
    rounded differently than in calls of their own, and a compiler may leave the results in one piece of memory.

    Does not fire when: a call has more than `FEW` rows, or a number of them that is not known; one needs what another made;
    something that lies between them is changed in place, or draws, or switches a mode; a result requires grad; there is a
    `backward`, a condition or a `cut`.
    """
    calls: dict[tuple, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if _of_linear(node):
            calls.setdefault(_which(node), []).append(node)
    alone = all(len(found) < 2 for found in calls.values())
    if alone or job.inputs is None or job.cut is not None or job.plan.backs or any(op.when for op in job.plan.ops):
        return 0
    rows = _rows(gm, job.inputs(), {n for found in calls.values() for n in found})
    return sum(_joined(gm, found, rows) for found in calls.values() if len(found) > 1)


def _of_linear(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, ModuleCall) or type(target.module) is not nn.Linear:
        return False
    _, args, kwargs = node.args
    return len(args) == 1 and isinstance(args[0], fx.Node) and not kwargs  # type: ignore[arg-type]


def _which(node: fx.Node) -> tuple:
    """Of which layer a node is a call: its path and its tensors."""
    given: Any = node.args[0]
    return node.target.__name__, tuple(given.items())  # type: ignore[union-attr]


class _Shapes(fx.Interpreter):
    """How many rows some nodes give, where that is a number."""

    def __init__(self, gm: fx.GraphModule, wanted: set[fx.Node]):
        super().__init__(gm)
        self.wanted, self.rows = wanted, {}

    def run_node(self, n: fx.Node) -> object:
        found = super().run_node(n)
        if n in self.wanted and all(isinstance(size, int) for size in found.shape) and not found.requires_grad:
            self.rows[n] = found.numel() // found.shape[-1]
        return found


def _rows(gm: fx.GraphModule, fakes: list, wanted: set[fx.Node]) -> dict[fx.Node, int]:
    mode = detect_fake_mode(fakes)
    if mode is None:
        return {}
    shapes = _Shapes(gm, wanted)
    with on_fakes(mode):
        shapes.run(*fakes)
    return shapes.rows


def _joined(gm: fx.GraphModule, calls: list[fx.Node], rows: dict[fx.Node, int]) -> int:
    """Walk the graph with calls held back, and what uses them, as long as nothing stands against it."""
    few = {n for n in calls if rows.get(n, FEW + 1) <= FEW}
    held: dict[fx.Node, None] = {}  # in order
    waiting: list[fx.Node] = []  # the calls among them
    count = 0

    def flush(before: fx.Node) -> None:
        nonlocal count
        if len(waiting) > 1:
            count += len(waiting)
            _join(gm, waiting, held, before)
        waiting.clear()
        held.clear()

    for node in list(gm.graph.nodes):
        uses = any(n in held for n in node.all_input_nodes)
        if node.op == "output" or (held and _acts(node)):
            flush(node)
        elif node in few and (uses or sum(rows[n] for n in waiting) + rows[node] > MANY):
            flush(node)
            uses = False
        if node in few:
            waiting.append(node)
        if node in few or uses:
            held[node] = None
    return count


def _acts(node: fx.Node) -> bool:
    """Does a node do more than compute? Modules that draw, or move their buffers, are not called in a graph."""
    known = node.target is torch._check or isinstance(node.target, ModuleCall)
    return not known and effect(node) is not None


def _join(gm: fx.GraphModule, calls: list[fx.Node], held: dict[fx.Node, None], before: fx.Node) -> None:
    given = calls[0].args[0]
    with gm.graph.inserting_before(before):
        joined = gm.graph.call_function(together, (given, tuple(n.args[1][0] for n in calls)))  # type: ignore[index]
        for i, call in enumerate(calls):
            call.target, call.args = operator.getitem, (joined, i)
    for node in held:
        before.prepend(node)


@pure
def together(given: dict[str, torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A linear layer of many inputs of shapes `(..., in)`: one tensor `(..., out)` for each."""
    flat = [x.reshape(-1, x.shape[-1]) for x in inputs]
    joined = linear(torch.cat(flat), given["weight"], given.get("bias"))
    parts = joined.split([x.shape[0] for x in flat])
    return tuple(part.reshape(*x.shape[:-1], -1).clone() for part, x in zip(parts, inputs, strict=True))
