"""Graphs by hand and plans from a few recorded lines: what a pass is tried on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnsight_fx import NNsight
from nnsight_fx.capture.marker import site
from nnsight_fx.engine.captured.capture import Capture
from nnsight_fx.passes.demand import take
from nnsight_fx.passes.job import Job, Progress, TakesConstant
from nnsight_fx.plan.plan import InterventionGraph

Body = Callable[[Any, Any, list], None]  # model, tracer, and the list for what it saves


class Net(nn.Module):
    """`out = c(relu(b(a(x))))`: the model whose graph the hand-built ones imitate."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.c(torch.relu(self.b(self.a(x))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def graph(function: Callable, *inputs: torch.Tensor) -> fx.GraphModule:
    """The graph of a function that calls `site`; with inputs, fakes stand on its nodes as capture leaves them."""
    gm = fx.GraphModule({}, fx.Tracer(autowrap_functions=(site, take)).trace(function))
    if inputs:
        mode = FakeTensorMode()
        Noting(gm).run(*(mode.from_tensor(x) for x in inputs))
    return gm


class Noting(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        n.meta["example_value"] = value = super().run_node(n)
        return value


def net_graph(*inputs: torch.Tensor) -> fx.GraphModule:
    """`Net` with its markers, as a function of its input and its parameters."""

    def forward(x, wa, ba, wb, bb, wc, bc):
        h = site(x, "a", "input", 0, True)
        h = site(nn.functional.linear(h, wa, ba), "a", "output", 0, True)
        h = site(h, "b", "input", 0, True)
        h = site(nn.functional.linear(h, wb, bb), "b", "output", 0, True)
        h = site(torch.relu(h), "c", "input", 0, True)
        return (site(nn.functional.linear(h, wc, bc), "c", "output", 0, True),)

    return graph(forward, *inputs)


@dataclass
class Recorded:
    """A plan, what it takes, and the values it saves."""

    plan: InterventionGraph
    constants: list
    saved: list[tuple[int, int]] = field(default_factory=list)


def record(body: Body, *inputs: torch.Tensor, module: nn.Module | None = None) -> Recorded:
    """The plan of a body; several inputs are several invokes. Nothing runs."""
    model, saved, keys = NNsight(module or net()), [], []
    with model.scan(*inputs if len(inputs) == 1 else ()) as tracer:
        try:
            if len(inputs) == 1:
                body(model, tracer, saved)
            for i, x in enumerate(inputs if len(inputs) > 1 else ()):
                with tracer.invoke(x):
                    body(model, i, saved)
        finally:
            keys = [lazy._key for lazy in saved]
    wave = tracer.waves[-1]
    return Recorded(wave.tape.plan(wave.groups()), wave.tape.constants, keys)


def job_of(recorded: Recorded, **options: Any) -> Job:
    """The job of a segment with which the model begins."""
    return Job(recorded.plan, Progress([0] * len(recorded.plan.workers), set(), {}, set()), **options)


def call(
    gm: fx.GraphModule, job: Job, recorded: Recorded, *inputs: Any, known: dict | None = None
) -> tuple[tuple, dict]:
    """Run a finished graph: its own outputs, and the values that it gives by number."""
    extras = []
    for taken in job.takes:
        value = recorded.constants[taken.slot] if isinstance(taken, TakesConstant) else (known or {})[taken]
        extras.append(value if isinstance(value, torch.Tensor) or job.raw_numbers else torch.tensor(value))
    gm.graph.lint()
    gm.recompile()
    outputs = gm(*inputs, *extras)
    return outputs[: job.own], dict(zip(job.gives, outputs[job.own :], strict=True))


def eager(body: Body, *inputs: torch.Tensor, module: nn.Module | None = None, **compile: Any) -> list[torch.Tensor]:
    """What the body saves, on the hook engine, or on captured graphs with `compile` options."""
    model, saved = NNsight(module or net()), []
    with model.trace(*inputs if len(inputs) == 1 else (), compile=compile or False) as tracer:
        if len(inputs) == 1:
            body(model, tracer, saved)
        for i, x in enumerate(inputs if len(inputs) > 1 else ()):
            with tracer.invoke(x):
                body(model, i, saved)
    return saved


def targets(gm: fx.GraphModule) -> list:
    """What the graph calls, in order."""
    return [n.target for n in gm.graph.nodes if n.op not in ("placeholder", "output")]


def outputs(gm: fx.GraphModule) -> Any:
    """What the graph returns."""
    return gm.graph.output_node().args[0]


def capture(model: NNsight) -> Capture:
    """What is captured of a model that was compiled."""
    assert model._host.compiled is not None
    return model._host.compiled
