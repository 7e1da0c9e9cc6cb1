"""A result that is read at some positions is computed at those."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.fx as fx

from nnsight_fx.compat.fakes import FakeTensor, on_fakes
from nnsight_fx.compat.inductor import pure
from nnsight_fx.compat.symbols import free_symbols

from .demand import pull, taken
from .effects import effect
from .indexing import take_at
from .job import Job

FEW = 8  # positions, up to which it pays to gather them


@pure
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
    sources: dict[fx.Node, list[PositionRead]] = {}
    for node in gm.graph.nodes:
        if (found := _read(node)) is not None:
            sources.setdefault(found.x, []).append(found)
    sources = {x: reads for x, reads in sources.items() if _all(x, reads) and _fits(x, max(r.node for r in reads), job)}
    if not sources:
        return 0
    _note(gm, job)
    pulled = 0
    for x, reads in sources.items():
        numbers = list(dict.fromkeys(r.number for r in reads))
        if taken(x) is None or len(numbers) > FEW:
            continue
        with gm.graph.inserting_before(x.next):
            chosen = gm.graph.call_function(at, (x, *numbers))
            chosen.meta = dict(x.meta)
        for read in reads:
            _replace(gm, job, read, chosen, numbers.index(read.number))
        pulled += pull(
            gm, [chosen], lambda source, node: _fits(source, node, job), lambda old, new: _begins(job, old, new)
        )
    return pulled


class PositionRead(NamedTuple):
    """A read at lifted numbers, one of which is a position."""

    node: fx.Node  # the `take_at`
    x: fx.Node  # of what
    rows: fx.Node | None  # of which rows, where an invoke reads
    place: int  # where, in its dimensions, dimension 1 is

    @property
    def number(self) -> fx.Node:
        return self.node.args[2][self.place]  # type: ignore[index, return-value]


def _read(node: fx.Node) -> PositionRead | None:
    if node.op != "call_function" or node.target is not take_at:
        return None
    x, dims, numbers = node.args
    rows = x if x.target is torch.narrow and x.args[1] == 0 else None  # type: ignore[union-attr]
    x = x if rows is None else rows.args[0]
    value = x.meta.get("example_value")  # type: ignore[union-attr]
    size = value.dim() if isinstance(value, torch.Tensor) else 0
    places = [i for i, d in enumerate(dims) if d == 1 or (size and d == 1 - size)]  # type: ignore[arg-type]
    plain = all(isinstance(n, fx.Node) and n.op == "placeholder" for n in numbers)  # type: ignore[union-attr]
    if len(places) != 1 or not plain or not (size or min(dims) >= 0):  # type: ignore[type-var]
        return None
    return PositionRead(node, x, rows, places[0])  # type: ignore[arg-type]


def _all(x: fx.Node, reads: list[PositionRead]) -> bool:
    """Is it read at positions, and not used otherwise?"""
    whole = {r.rows for r in reads if r.rows is not None}
    nodes = {r.node for r in reads}
    return set(x.users) == whole | {r.node for r in reads if r.rows is None} and all(
        set(w.users) <= nodes for w in whole
    )


def _replace(gm: fx.GraphModule, job: Job, read: PositionRead, chosen: fx.Node, number: int) -> None:
    """Read from the chosen positions what was read from all."""
    _, dims, numbers = read.node.args
    size = chosen.meta["example_value"].dim()
    with gm.graph.inserting_before(read.node):
        new = chosen if read.rows is None else gm.graph.call_function(torch.narrow, (chosen, *read.rows.args[1:]))
        new = gm.graph.call_method("select", (new, 1, number))
        rest = [i for i in range(len(dims)) if i != read.place]  # type: ignore[arg-type]
        if rest:
            left = [d - (d > 1) for d in (dims[i] % size for i in rest)]  # type: ignore[index, operator]
            new = gm.graph.call_function(take_at, (new, left, [numbers[i] for i in rest]))  # type: ignore[index]
        elif len(chosen.args) > 2 or read.rows is not None:
            new = gm.graph.call_method("clone", (new,))  # of its own, as it was
    read.node.replace_all_uses_with(new)
    job.exports.update({v: new for v, n in job.exports.items() if n is read.node})
    gm.graph.erase_node(read.node)
    if read.rows is not None and not read.rows.users:
        gm.graph.erase_node(read.rows)


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
                known: object = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])  # type: ignore[arg-type]
                node.meta["example_value"] = _one(gm, node, *known)


def _one(gm: fx.GraphModule, node: fx.Node, args: tuple, kwargs: dict) -> object:
    return getattr(fx.Interpreter(gm), node.op)(node.target, args, kwargs)
