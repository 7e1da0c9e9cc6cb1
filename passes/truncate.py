"""Remove what comes after the site at which the plan stops the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx as fx

from .effects import effect
from .job import Job


@dataclass(frozen=True)
class Tail:
    """What lies behind a stop."""

    nodes: tuple[fx.Node, ...]


def truncate(gm: fx.GraphModule, job: Job) -> int:
    """Drop everything behind the stop, where that has no side effects.

    ```
    h   = linear(x, w, b)                    h = linear(x, w, b)
    s   = site(h, "l", "output", 0, True)    s = site(h, "l", "output", 0, True)
    add = s.add(c)                     ->    add = s.add(c)
    out = relu(s)                            return ()
    return (out,)
    ```

    for `v = model.l.output + c; tracer.stop()`. What the plan made at the stop stays, and `expose` gives it out; the
    segment's own outputs go, since the run ends with it and nobody takes them.

    Does not fire when: the plan does not stop in this segment; a node behind the stop changes a tensor in place or draws
    random numbers, or is not known to do neither (it may be the end of a mode that began before); the capture half was
    taken, or may not be left out (`job.removes`).
    """
    tail = match(gm, job) if job.removes else None
    if tail is None:
        return 0
    gm.graph.output_node().args = ((),)
    for node in reversed(tail.nodes):
        gm.graph.erase_node(node)
    job.removed.add(None)
    return len(tail.nodes) + 1


def match(gm: fx.GraphModule, job: Job) -> Tail | None:
    """The tail behind `job.stop`, if it only computes."""
    if job.stop is None or job.cut is not None:
        return None
    nodes: list[fx.Node] = []
    node = job.stop.next
    while node.op != "output":
        if node not in job.emitted:
            nodes.append(node)
        node = node.next
    return Tail(tuple(nodes)) if all(effect(n) is None for n in nodes) else None
