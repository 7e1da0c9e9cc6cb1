"""What changes from run to run becomes a graph input, so that it never recompiles."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from nnsight_fx.plan.keys import Value

from .indexing import index
from .job import Job, TakesConstant, TakesParameter, constant, fetch, parameter

TAKES = {constant: TakesConstant, fetch: Value, parameter: TakesParameter}


def lift_constants(gm: fx.GraphModule, job: Job) -> int:
    """Turn `constant`, `fetch` and `parameter` nodes into placeholders behind the segment's own.

    ```
    c = constant(0, "tensor")        ->  %c : placeholder
    i = constant(1, "int")           ->  %i : placeholder (0-d int64);  n = i.item();  check(n >= 0)
    f = constant(2, "float")         ->  %f : placeholder (0-d float64, beside 0-d values their dtype)
    v = fetch(3, 0)                  ->  %v : placeholder
    ```

    Constants in one memory, of which one is changed in place, are views of one placeholder (`job.aliases`): a compiler takes
    its inputs for apart.

    Numbers are 0-d tensors on the CPU: an integer read from one is unbacked, so neither its value nor 0 or 1 are
    special; as a position it stays a tensor (`indexing`). `job.takes` lists what to give, in order.

    Does not fire when: the segment needs nothing from outside. With `job.raw_numbers` numbers stay Python numbers.
    """
    made, lifted, shared = 0, set(), {}
    sources = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in (constant, fetch, parameter)]
    last = next((n for n in reversed(gm.graph.nodes) if n.op == "placeholder"), None)
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node in sources:
        lies_in, view = job.aliases.get(node.args, (None, None))  # type: ignore[call-overload]
        if isinstance(lies_in, int) or lies_in in shared:
            _share(gm, job, node, inputs[lies_in] if isinstance(lies_in, int) else shared[lies_in], view)
            made += 1
            continue
        where = (
            gm.graph.inserting_after(last)
            if last is not None
            else gm.graph.inserting_before(next(iter(gm.graph.nodes)))
        )
        with where:
            last = value = gm.graph.placeholder(f"{node.target.__name__}_{made}")
        value.target = value.name  # another name would be an assignment in the generated code, over a placeholder's own
        kind = node.args[1] if node.target is constant else "tensor"
        if kind == "int" and not job.raw_numbers:
            with gm.graph.inserting_before(node):
                value = gm.graph.call_method("item", (value,))
                check = gm.graph.call_function(operator.ge, (value, 0))
                gm.graph.call_function(torch._check, (check,))
            lifted.add(value)
        job.takes.append(lies_in or TAKES[node.target](*node.args))
        made += 1
        if lies_in is not None:  # the memory that several constants lie in
            shared[lies_in] = value
        _share(gm, job, node, value, view)
    index(gm, job, lifted)
    return made


def _share(gm: fx.GraphModule, job: Job, node: fx.Node, value: fx.Node, view: tuple | None) -> None:
    """Take a value from an input, where it lies in that one's memory as a view of it: a write to one is seen in the other."""
    if view is not None:
        *strided, dtype = view
        with gm.graph.inserting_before(node):
            value = value if dtype is None else gm.graph.call_method("view", (value, dtype))
            value = gm.graph.call_function(torch.as_strided, (value, *strided))
    node.replace_all_uses_with(value)
    job.exports.update({v: value for v, n in job.exports.items() if n is node})
    if job.cut is not None:
        job.cut.leaves[:] = [value if leaf is node else leaf for leaf in job.cut.leaves]
    gm.graph.erase_node(node)
