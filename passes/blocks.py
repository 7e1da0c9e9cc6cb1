"""Where a model's equal blocks begin."""

from __future__ import annotations

import re

import torch.fx as fx

from nnsight_fx.capture.marker import marker_of, site

from .job import Job

LEAST = 4  # blocks in a row
HEAVY = {  # operations that no compiler fuses with what is in front of them
    *("linear", "addmm", "mm", "bmm", "baddbmm", "matmul", "einsum", "scaled_dot_product_attention", "lstm", "gru"),
    *("conv1d", "conv2d", "conv3d", "embedding"),
}
BLOCK = re.compile(r"(?:(.*)\.)?\d+")


def blocks(gm: fx.GraphModule, job: Job) -> int:
    """Note in `job.blocks` the nodes with which the blocks of the model's longest list begin, and what comes behind it.

    ```
    s0 = site(h0, "l.0", "input", 0, True)        s0 = site(h0, "l.0", "input", 0, True)
    h1 = linear(norm(s0), w0)                     h1 = linear(norm(s0), w0)          # begins a block
    s1 = site(h1, "l.1", "input", 0, True)   ->   s1 = site(h1, "l.1", "input", 0, True)
    h2 = linear(norm(s1), w1)                     h2 = linear(norm(s1), w1)          # begins a block
    ...                                           ...
    ```

    A block begins with the first matrix product (or convolution, attention) behind its marker, so that cutting there keeps the
    element-wise operations, and those that a plan put at the marker, with what they fuse with.

    Does not fire when: no list of modules in a row has `LEAST` markers in the graph.
    """
    found: dict[str, dict[str, fx.Node]] = {}
    ends: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target is not site:
            continue
        path, kind = marker_of(node).name
        parts = BLOCK.fullmatch(path)
        if parts is None:
            continue
        name = parts[1] or ""
        if kind == "input":
            found.setdefault(name, {}).setdefault(path, node)
        elif kind == "output":
            ends[name] = node
    long = [name for name, starts in found.items() if len(starts) >= LEAST]
    if not long:
        return 0
    outermost = min(long, key=lambda name: (name.count("."), -len(found[name])))
    marks = [*found[outermost].values(), *([ends[outermost]] if outermost in ends else [])]
    limits = set(marks)
    for mark in marks:
        begin = _begin(mark, limits)
        if begin is not None:
            job.blocks.append(begin)
    return len(job.blocks)


def _begin(mark: fx.Node, limits: set[fx.Node]) -> fx.Node | None:
    """The first heavy operation behind a marker, in front of the next; or the first of any kind."""
    first, node = None, mark.next
    while node.op != "output" and node not in limits:
        if node.op in ("call_function", "call_method") and node.target is not site:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            if name in HEAVY:
                return node
            first = first or node
        node = node.next
    return first
