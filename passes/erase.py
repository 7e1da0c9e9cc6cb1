"""Remove the markers: what nobody touched costs nothing."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from nnsight_fx.capture.marker import anchor, marker_of, site

from .job import Job

PURE = {operator.getitem, torch.narrow}


def erase(gm: fx.GraphModule, job: Job | None = None) -> int:
    """Replace every marker by its input and drop what the plan left without a user.

    ```
    s   = site(h, "l", "output", 0, True)    ->    out = relu(h)
    out = relu(s)
    ```

    Does not fire when: there is no marker. Only getters and views are dropped as dead: `fx` cannot tell an in-place or
    random operation from a pure one, so its own dead code elimination would drop side effects.
    """
    erased = 0
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target is site:
            marked = marker_of(node).value
            node.replace_all_uses_with(marked)
            gm.graph.erase_node(node)
            if marked.target is anchor:
                gm.graph.erase_node(marked)
            erased += 1
    emitted = job.emitted if job is not None else set()
    for node in reversed(list(gm.graph.nodes)):
        if node in emitted and node.op == "call_function" and node.target in PURE and not node.users:
            gm.graph.erase_node(node)
            erased += 1
    return erased
