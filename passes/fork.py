"""Rows that begin where they are first changed: until there they are the clean run's."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.fx as fx

from nnsight_fx.plan.verbs import Site

from .job import Job
from .outline import seams


def fork(gm: fx.GraphModule, job: Job | None = None, *, at: Collection[Site] = ()) -> int:
    """Let rows join the batch at the sites `at`; return how many of these there are.

    ```
    h = region_0(x, w0)                       h = region_0(x, w0)
    s = site(h, "l.0", "output", 0, True)     j = join(h, i, 0)          # %i : placeholder, which rows begin anew
    g = region_0(s, w1)                 ->    s = site(j, "l.0", "output", 0, True)
    return (g,)                               g = region_0(s, w1);  return (g,)
    ```

    `i` is a 1-d int64 tensor, an input for each site, in the graph's order and behind its own inputs: a copy of row `i[k]`,
    as it is there, becomes a row behind those that there are. Every value that is used behind the site and holds the rows
    (`meta["rows"]`, the dimension) is joined, and so is their number where the graph takes it as an input
    (`meta["rows"] == "count"`).

    Does not fire when: a site is not in the graph. A value that holds the rows in a part of a dimension (`meta["rows"] is
    None` and `meta["mixed"]`) must not be used behind a site: `ValueError`. What is the clean run's for good (`meta["clean"]`, pass `causal`) stays.
    """
    sources = [n for n in gm.graph.nodes if n.op == "placeholder"]
    joins = 0
    for where, group in [s for s in seams(gm) if s[0] in at]:
        nodes = list(gm.graph.nodes)
        at_site = nodes.index(group[0])
        ahead = set(nodes[at_site:])
        live = [n for n in nodes[:at_site] if not ahead.isdisjoint(n.users)]
        with gm.graph.inserting_after(sources[-1]):
            index = gm.graph.placeholder(f"joins_{joins}")
        sources.append(index)
        joins += 1
        with gm.graph.inserting_before(group[0]):
            for node in live:
                dim = node.meta.get("rows")
                if node.meta.get("clean"):
                    continue
                if node.meta.get("mixed"):
                    raise ValueError(
                        f"`{node.name}` holds the rows together with something else at `{'.'.join(map(str, where))}`"
                    )
                if dim is None:
                    continue
                target, rest = (more, ()) if dim == "count" else (join, (dim,))
                new = gm.graph.call_function(target, (node, index, *rest))
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new, delete_user_cb=ahead.__contains__)
    return joins


def join(x: torch.Tensor, rows: torch.Tensor, dim: int) -> torch.Tensor:
    """`x` with copies of some of its rows behind it."""
    return torch.cat([x, x.index_select(dim, rows)], dim) if rows.numel() else x


def more(count: int, rows: torch.Tensor) -> int:
    """How many rows there are when `rows` have joined."""
    return count + rows.numel()
