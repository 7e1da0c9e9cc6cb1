"""`python tests/passes/page.py` writes docs/passes.md: the passes as their docstrings tell, what each is worth, and how to bring one's own."""

from __future__ import annotations

import inspect
import json
import textwrap
from pathlib import Path

from nnsight_fx import passes
from nnsight_fx.passes.causal import causal
from nnsight_fx.passes.demand import demand

FIGURES = Path(__file__).with_name("measured.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "passes.md"
FORKED = (demand, causal)  # of the graphs of sessions and sweeps, in front of the others

OWN = """
import operator

import torch
import torch.nn as nn

from nnsight_fx import NNsight


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * 2 * 3


def fold(gm, job):
    \"\"\"`x * 2 * 3` -> `x * 6`; return how many multiplications went.\"\"\"
    folded = 0
    for node in gm.graph.find_nodes(op="call_function", target=operator.mul):
        inner = node.args[0]
        if getattr(inner, "target", None) is operator.mul and len(inner.users) == 1:
            node.args = (inner.args[0], inner.args[1] * node.args[1])
            gm.graph.erase_node(inner)
            folded += 1
    return folded


model = NNsight(nn.Sequential(*[Scaled() for _ in range(3)]))
model.compile(backend="aot_eager", passes=(..., fold))
with torch.no_grad(), model.trace(torch.randn(2, 4)):
    model[1].output[:, 0] = 0
    out = model.output.save()
print(model.explain())  # ... pass 15 fold: 3 rewrites ...
"""

TEXT = """# Passes

<!-- written by `python tests/passes/page.py`; not by hand -->

What was captured of a model is a `torch.fx` graph with a marker at each site. A trace's plan is put into a copy of it by these
passes, in this order, and the compiler gets what comes of that. Each is a function `(gm, job) -> int` in a file of its own under
`passes/`; `nnsight_fx.passes.PIPELINE` is the tuple of them. `model.explain()` counts what each rewrote.

| pass | what it does | it does nothing when | can be left out |
| --- | --- | --- | --- |
{table}

## What each is worth

Measured by `python tests/passes/measured.py` on a small model: counts, no times, so that they are the same everywhere. A GPT-2 with 6 blocks
of width 32 and 8 tokens, or 6 blocks of two linear layers. Of a pass that every plan needs: what it does to the graph.

| pass | program | without it | with it |
| --- | --- | --: | --: |
{effects}

`model.compile(disable={{"prune"}})` leaves passes out; values stay the same (`tests/passes/test_own.py`). The last two work on the
graphs of sessions and sweeps. `batch_linears` and `read_positions` are for compilers: the backends `eager` and `aot_eager`, which keep the
model's bits, go without them.

## A pass of your own

`...` stands for the passes above. Yours run behind `splice`, over every graph of a trace that is captured from then on; sessions and sweeps
run one trace a forward. What a pass raises comes out with its name. It must keep the graph's inputs and outputs.

```python{own}```
"""


def effect(name: str, cell: dict) -> str:
    without, now = (f"{cell[k]:,}" if isinstance(cell[k], int) else cell[k] for k in ("without", "with"))
    unit = f" {cell['counts']}" if cell["counts"] else ""
    return f"| `{name}` | {cell['program']} | {without}{unit if cell['without'] else ''} | {now}{unit} |"


def row(step: passes.Pass) -> str:
    head, _, rest = (inspect.getdoc(step) or "").partition("\n")
    never = " ".join(rest.partition("Does not fire when:")[2].partition("\n\n")[0].split()).replace("|", "\\|")
    name = step.__name__  # type: ignore[attr-defined]
    return f"| `{name}` | {head} | {never} | {'yes' if name in passes.OPTIONAL else 'no'} |"


def page() -> str:
    table = "\n".join(map(row, (*passes.PIPELINE, *FORKED)))
    effects = "\n".join(effect(name, cell) for name, cell in json.loads(FIGURES.read_text()).items())
    return TEXT.format(table=table, effects=effects, own=textwrap.dedent(OWN))


if __name__ == "__main__":
    PAGE.write_text(page())
