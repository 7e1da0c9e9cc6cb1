"""Remove the modules that the plan skips."""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx as fx

from nnsight_fx.capture.marker import marker_of, pass_through, site, supply
from nnsight_fx.plan.verbs import Site

from .effects import effect
from .job import Job


@dataclass(frozen=True)
class SkippedCall:
    """One call of a module: what lies between its input and its output markers."""

    call: Site
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def skip(gm: fx.GraphModule, job: Job) -> int:
    """Drop what a skipped module computes, where that has no side effects.

    ```
    i = site(x, "m", "input", 0, True)         i = site(x, "m", "input", 0, True)
    h = linear(i, w, b)                  ->    v = supply("m", "skip", 0, 0)
    o = site(h, "m", "output", 0, True)        o = site(v, "m", "output", 0, True)
    ```

    for `model.m.skip(value)`. Comes before `splice`, which puts the skip value where the `supply` is, as it does in a
    graph that was captured for a plan that skips.

    Does not fire when: a node of the region changes a tensor in place or draws random numbers, or is not known to do
    neither; something behind the module uses a value from inside it; it calls itself; the segment does not hold
    all of it; the capture half was taken (`job.half`), or may not be left out (`job.removes`).
    """
    if not job.removes or not job.plan.skips:
        return 0
    counts = dict(job.entry.counts)
    gone: set[fx.Node] = set()
    rewrites = 0
    for node in list(gm.graph.nodes):
        if node in gone or node.target is not site or not (marker := marker_of(node)).last:
            continue
        path, kind = marker.name
        call = counts.get((path, kind), 0)
        counts[(path, kind)] = call + 1
        if kind != "input" or call not in job.plan.skips.get(path, ()) or (path, "skip", call) in job.half:
            continue
        region = match(node, (path, "output", call))
        if region is not None and counts.get((path, "output"), 0) == call:
            _remove(gm, region)
            gone.update(region.nodes)
            job.removed.add(region.call)
            rewrites += 1
    return rewrites


def match(entry: fx.Node, call: Site) -> SkippedCall | None:
    """The region behind a module's last input marker, if nothing but its output leaves it."""
    path = call[0]
    nodes: list[fx.Node] = []
    outputs: list[fx.Node] = []
    node = entry.next
    while not (outputs and marker_of(outputs[-1]).last):
        name = marker_of(node).name if node.target is site else None
        if node.op == "output" or name == (path, "input"):
            return None
        (outputs if name == (path, "output") else nodes).append(node)
        node = node.next
    inside = {*nodes, *outputs}
    if any(effect(n) is not None or not inside.issuperset(n.users) for n in nodes):
        return None
    return SkippedCall(call, tuple(nodes), tuple(outputs))


def _remove(gm: fx.GraphModule, region: SkippedCall) -> None:
    path, _, call = region.call
    for node in region.outputs:
        with gm.graph.inserting_before(node):
            value = gm.graph.call_function(supply, (path, "skip", call, marker_of(node).leaf))
        pass_through(node, value)
    for node in reversed(region.nodes):
        gm.graph.erase_node(node)
