"""Give each invoke its rows of a batched run."""

from __future__ import annotations

import torch
import torch.fx as fx

from .job import Job, put_rows, rows


def narrow(gm: fx.GraphModule, job: Job) -> int:
    """Lower `rows` and `put_rows`.

    ```
    r = rows(h, 2, 1, 3, True)            ->  r = narrow(h, 0, 2, 1)
    w = put_rows(h, v, 0, 2, 3, True)     ->  t = narrow(h, 0, 2, 1);  w = cat([v, t])
    ```

    Does not fire when: the leaf does not hold the batch in its rows. The scan decides that by the batch *symbol*; only
    where it could not (`batched` is `None`) does an equal size count. Such a leaf goes to every invoke whole.
    """
    rewrites = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in (rows, put_rows):
            continue
        x, rest = node.args[0], node.args[1:]
        new = None
        if node.target is put_rows:
            new, rest = rest[0], rest[1:]
        start, size, total, batched = rest
        with gm.graph.inserting_before(node):
            if batched is None and not _holds(x, total):
                result = x if new is None else new
            elif new is None:
                result = gm.graph.call_function(torch.narrow, (x, 0, start, size))
            else:
                parts = [gm.graph.call_function(torch.narrow, (x, 0, 0, start))] if start else []
                parts.append(new)
                if start + size < total:
                    parts.append(gm.graph.call_function(torch.narrow, (x, 0, start + size, total - start - size)))
                result = gm.graph.call_function(torch.cat, (parts,))
        node.replace_all_uses_with(result)
        _rename(job, node, result)
        gm.graph.erase_node(node)
        rewrites += 1
    return rewrites


def _holds(x: fx.Node, total: int) -> bool:
    while "example_value" not in x.meta and x.args and isinstance(x.args[0], fx.Node):
        x = x.args[0]
    value = x.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.dim() > 0 and bool(value.shape[0] == total)


def _rename(job: Job, old: fx.Node, new: fx.Node) -> None:
    """Values that were `old` are `new`."""
    job.emitted.discard(old)
    job.exports.update({value: new for value, node in job.exports.items() if node is old})
    if job.cut is not None:
        job.cut.leaves[:] = [new if leaf is old else leaf for leaf in job.cut.leaves]
