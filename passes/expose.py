"""Results become graph outputs."""

from __future__ import annotations

import torch.fx as fx

from .job import Job


def expose(gm: fx.GraphModule, job: Job) -> int:
    """Append the values that leave the segment to its outputs: the nodes themselves, no clone, no detach.

    ```
    return (out,)   ->   return (out, h)
    ```

    `job.own` is the number of the segment's own outputs, `job.gives` names the others.

    Does not fire when: nothing made here is saved or used later.
    """
    output = gm.graph.output_node()
    own = list(output.args[0])  # type: ignore[arg-type]
    job.own = len(own)
    job.gives = sorted(job.exports)
    output.args = (tuple(own + [job.exports[value] for value in job.gives]),)
    return len(job.gives)
