"""Random draws that nobody uses, for compilers that would leave them out, or make them in another order."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.fx as fx

from ...passes.effects import draws
from ...plan import tree


def drawn(value: object) -> torch.Tensor | None:
    """One tensor of what drew, apart from the autograd graph: a gradient of zero would reach what drew."""
    return next((x.detach() for x in tree.flatten(value)[0] if isinstance(x, torch.Tensor)), None)


def give_out(gm: fx.GraphModule) -> int:
    """Make what an unused draw gives a further output; return how many there are.

    ```
    a = rand_like(h)               a = rand_like(h)
    b = rand_like(h)         ->    b = rand_like(h)
    return (h + b,)                return (h + b, drawn(a))
    ```

    Inductor leaves out a dead `bernoulli`, as CPUs make dropout of, and lets other dead draws go behind later ones (torch 2.13).
    """
    output = gm.graph.output_node()
    used, ahead = {output}, [output]
    while ahead:
        new = [n for n in ahead.pop().all_input_nodes if n not in used]
        used.update(new)
        ahead += new
    dead = [n for n in gm.graph.nodes if n not in used and draws(n)]
    with gm.graph.inserting_before(output):
        further = [gm.graph.call_function(drawn, (n,)) for n in dead]
    if further:
        output.args = ((*output.args[0], *further),)  # type: ignore[misc]
        gm.recompile()
    return len(further)


def without(call: Callable, further: int) -> Callable:
    """A compiled graph without its last outputs."""
    if not further:
        return call

    def given(*args: object) -> tuple:
        return tuple(call(*args))[:-further]

    return given
