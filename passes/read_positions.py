"""A result that is read at some positions is computed at those."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import free_symbols

from nnsight_fx.capture._torch import FakeTensor, on_fakes

from .demand import pull, taken
from .effects import effect
from .indexing import take_at
from .job import Job

FEW = 8  # positions, up to which it pays to gather them


def at(x: torch.Tensor, *numbers: torch.Tensor) -> torch.Tensor:
    """A copy of `x` at these numbers of dimension 1: `(rows, tokens, ...)` -> `(rows, len(numbers), ...)`."""
    return x[:, torch.stack([n.reshape(()) for n in numbers]).to(x.device)]


def read_positions(gm: fx.GraphModule, job: Job) -> int:
    """Pull positions that a plan reads back through what works on every position alone; return through how many operations.

    ```
    l = linear(n, u)                            t = at(n, p)
    y = take_at(l, [1], [p])             ->     l = linear(t, u)
    return (y,)                                 y = select(l, 1, 0)
                                                return (y,)
    ```

    for `model.lm_head.output[:, -1].save()`: the unembedding of one position, not of all. A matrix product of other rows may be
    rounded differently. What is read is a copy, as `take_at` gives one.

    Does not fire when: the value is used otherwise, too (the model's result, or one that is saved); it is made in front of the last
    block, whose copies would no longer be equal; something in between changes a tensor in place, or draws; the operation mixes
    positions, or is not known not to (see `demand`).
    """
    if job.cut is not None or job.inputs is None:
        return 0
    reads: dict[fx.Node, dict[fx.Node, int]] = {}
    for node in gm.graph.nodes:
        place = _place(node)
        if place is not None:
            reads.setdefault(node.args[0], {})[node] = place  # type: ignore[arg-type]
    reads = {x: found for x, found in reads.items() if set(found) == set(x.users) and _fits(x, max(found), job)}
    if not reads:
        return 0
    _note(gm, job)
    pulled = 0
    for x, found in reads.items():
        numbers = list(dict.fromkeys(n.args[2][i] for n, i in found.items()))  # type: ignore[index]
        if taken(x) is None or len(numbers) > FEW:
            continue
        with gm.graph.inserting_before(x.next):
            chosen = gm.graph.call_function(at, (x, *numbers))
            chosen.meta = dict(x.meta)
            for node, i in found.items():
                _read(gm, job, node, i, chosen, numbers.index(node.args[2][i]))  # type: ignore[index]
        pulled += pull(
            gm, [chosen], lambda source, node: _fits(source, node, job), lambda old, new: _begins(job, old, new)
        )
    return pulled


def _place(node: fx.Node) -> int | None:
    """Where, in the dimensions of a read at lifted numbers, dimension 1 is."""
    if node.op != "call_function" or node.target is not take_at:
        return None
    x, dims, numbers = node.args
    value = x.meta.get("example_value")  # type: ignore[union-attr]
    size = value.dim() if isinstance(value, torch.Tensor) else 0
    places = [i for i, d in enumerate(dims) if d == 1 or (size and d == 1 - size)]  # type: ignore[arg-type]
    plain = all(isinstance(n, fx.Node) and n.op == "placeholder" for n in numbers)  # type: ignore[union-attr]
    return places[0] if len(places) == 1 and plain and (size or min(dims) >= 0) else None  # type: ignore[type-var]


def _read(gm: fx.GraphModule, job: Job, node: fx.Node, place: int, chosen: fx.Node, number: int) -> None:
    """Read from the chosen positions what was read from all."""
    _, dims, numbers = node.args
    size = chosen.meta["example_value"].dim()
    with gm.graph.inserting_before(node):
        new = gm.graph.call_method("select", (chosen, 1, number))
        rest = [i for i in range(len(dims)) if i != place]  # type: ignore[arg-type]
        if rest:
            left = [d - (d > 1) for d in (dims[i] % size for i in rest)]  # type: ignore[index, operator]
            new = gm.graph.call_function(take_at, (new, left, [numbers[i] for i in rest]))  # type: ignore[index]
        elif len(chosen.args) > 2:
            new = gm.graph.call_method("clone", (new,))  # of its own, as it was
    node.replace_all_uses_with(new)
    job.exports.update({v: new for v, n in job.exports.items() if n is node})
    gm.graph.erase_node(node)


def _fits(source: fx.Node, node: fx.Node, job: Job) -> bool:
    """Is `source` behind the model's blocks, and does nothing happen between it and what is read of it?"""
    if job.blocks and source < job.blocks[-1]:
        return False
    between = source.next
    while between is not node:
        if effect(between) is not None:
            return False
        between = between.next
    return True


def _begins(job: Job, old: fx.Node, new: fx.Node) -> None:
    """What was put in front of the first operation of a block belongs to it."""
    job.blocks = [new if n is old else n for n in job.blocks]


def _note(gm: fx.GraphModule, job: Job) -> None:
    """Note what a plan's own operations look like, as capture does of the model's: on the fakes that it noted."""
    assert job.inputs is not None
    noted = (n.meta.get("example_value") for n in gm.graph.nodes)
    mode = next((x.fake_mode for x in noted if isinstance(x, FakeTensor)), None)
    if mode is None:
        return
    with on_fakes(mode):
        for node, fake in zip(gm.graph.find_nodes(op="placeholder"), job.inputs(), strict=True):
            if "example_value" not in node.meta and isinstance(fake, torch.Tensor) and not free_symbols(fake):
                kind = {"dtype": fake.dtype, "device": fake.device}
                node.meta["example_value"] = torch.empty_strided(fake.shape, fake.stride(), **kind)
        for node in gm.graph.nodes:
            ready = all("example_value" in n.meta for n in node.all_input_nodes)
            if node in job.emitted and "example_value" not in node.meta and ready and effect(node) is None:
                known: Any = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])  # type: ignore[arg-type]
                node.meta["example_value"] = _one(gm, node, *known)


def _one(gm: fx.GraphModule, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    return getattr(fx.Interpreter(gm), node.op)(node.target, args, kwargs)
