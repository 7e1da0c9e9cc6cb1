"""What nobody reads is not computed."""

from __future__ import annotations

import torch.fx as fx

from .effects import effect
from .job import Job


def prune(gm: fx.GraphModule, job: Job) -> int:
    """Drop the segment's own outputs where nobody takes them, and what was computed for them alone; return how many nodes went.

    ```
    h   = linear(x, w, b)                    h = linear(x, w, b)
    out = linear(relu(h), u)           ->    return (h,)
    return (out, h)
    ```

    for `v = model.l.output.save()`: the model's result is nobody's. A trace that saves what is in the middle of a language model does
    without its unembedding. What changes a tensor in place, draws random numbers, or is not known to do neither stays, with
    all that it needs.

    Does not fire when: the result is read, or may be (`job.unread`); the segment is cut.
    """
    if not job.unread or job.cut is not None:
        return 0
    output = gm.graph.output_node()
    own, kept = output.args[0][: job.own], output.args[0][job.own :]  # type: ignore[index]
    output.args = (tuple(kept),)
    job.own = 0
    gone = len(own)
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and effect(node) is None:
            gm.graph.erase_node(node)
            gone += 1
    return gone
