"""The derivative of a forward: a graph of its own, beside the forward that keeps what it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.fx as fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from nnsight_fx.compat.graphs import OpOverload, get_proxy_mode
from nnsight_fx.compat.tensors import version
from nnsight_fx.errors import NotConnectedError
from nnsight_fx.plan.keys import Value, leaves
from nnsight_fx.plan.plan import InterventionGraph
from nnsight_fx.plan.verbs import Read, place_of_site

from .differentiate import become, traced_by
from .effects import effect
from .frozen import PARTS, Frozen
from .job import Job, linear, source


def linearize(gm: fx.GraphModule, job: Job) -> int:
    """Split the forward from its derivative, which is a graph over what the forward keeps for it.

    ```
    h   = linear(x, w, b)                      h = addmm(b, x, t(w))
    s   = source(h)                            y = tanh(h)
    y   = tanh(h)                       ->     k = 1 - y * y
    d   = linear((y,), (h,), ())               return (y, k)
    return ()
                                               and, of a cotangent c:   return (c * k,)
    ```

    The graph is interpreted over the fakes of its inputs, of which none requires grad: autograd begins at the sources, and
    `torch.autograd.grad` is asked for their gradients. `make_fx` records both. What depends on a cotangent is the derivative, all
    else is the forward, so nothing is computed twice, and nothing below the lowest source. Frozen parts are cut off
    meanwhile (`frozen.py`). Attention is written out: its fused backwards have no batching rule.

    Comes last: inputs and outputs are final. Does not fire when: the plan keeps no derivative in this segment.
    """
    if not any(n.target is linear for n in gm.graph.nodes):
        return 0
    assert job.inputs is not None
    flow = ForwardFlow(gm, job)
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in job.inputs()]
    with sdpa_kernel([SDPBackend.MATH]):
        traced = traced_by(flow.values, plain)
    become(gm, traced)
    job.requires, job.accumulates, job.blocks = [False] * flow.own, [], []
    job.linear = _split(gm, flow)
    return 1


@dataclass
class Derivative:
    """The derivative of a compiled forward. `graph(*kept, *cotangents)` gives the sources' gradients."""

    graph: fx.GraphModule
    kept: list[
        tuple[str, int, bool]
    ]  # what it takes of the forward: ("input" or "output", which); is it the number in that tensor
    targets: int  # the first outputs behind the forward's own are the targets
    own: int  # how many outputs the forward has of its own
    built: dict = field(default_factory=dict)  # as it was compiled for numbers of cotangents


class ForwardFlow(fx.Interpreter):
    """The graph as a function of its inputs, with the gradients of the sources."""

    def __init__(self, gm: fx.GraphModule, job: Job):
        super().__init__(gm, garbage_collect_values=False)
        self.job, self.own = job, 0
        self.begun: Begun = {}
        self.cotangents: list[fx.Node] = []

    def values(self, *given: object) -> list:
        mode = get_proxy_mode()
        assert mode is not None and self.job.plan.linear is not None
        op = self.job.plan.ops[self.job.plan.linear]
        self.recorded, self.frozen = mode.tracer.graph, Frozen(op.verb.freeze)  # type: ignore[attr-defined]
        found: list = []
        inputs, self.env = iter(given), {}
        outputs: list = []
        with self.frozen if self.frozen.names else torch.enable_grad():
            for node in self.module.graph.nodes:  # type: ignore[union-attr]
                if node.op == "placeholder":
                    self.env[node] = next(inputs)
                elif node.op == "output":
                    outputs = [self.env[n] if isinstance(n, fx.Node) else n for n in node.args[0]]
                elif node.target is source:
                    x, *value = node.args
                    self.env[node] = begin(self.begun, Value(*value), self.env[x])  # type: ignore[arg-type]
                elif node.target is linear:
                    self.env[node] = None
                    targets, sources, _ = self.map_nodes_to_values(node.args, node)
                    found = self._gradients(list(targets), list(sources))
                else:
                    self.env[node] = self.run_node(node)
        self.own = len(outputs)
        return [*outputs, *found]

    def _gradients(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> list:
        plan, lines = self.job.plan, self.job.lines
        check(plan, lines, targets, sources, self.frozen, self.begun)
        cotangents = []
        for target in targets:
            cotangents.append(torch.empty_like(target, requires_grad=False))
            self.cotangents.append(next(iter(reversed(self.recorded.nodes))))
        live = [n for n, x in enumerate(targets) if x.requires_grad]
        found = torch.autograd.grad(
            [targets[n] for n in live], sources, [cotangents[n] for n in live], allow_unused=True
        )
        return [*targets, *found]


def _split(gm: fx.GraphModule, flow: ForwardFlow) -> Derivative:
    """Take out of a graph what depends on the cotangents."""
    graph, output = gm.graph, gm.graph.output_node()
    outputs: list = list(output.args[0])  # type: ignore[arg-type]
    cotangents = flow.cotangents
    targets = len(cotangents)
    own, gradients = outputs[: flow.own + targets], outputs[flow.own + targets :]
    depend: dict[fx.Node, None] = dict.fromkeys(cotangents)
    for node in graph.nodes:
        if node is not output and any(n in depend for n in node.all_input_nodes):
            depend[node] = None
    inputs = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    made, kept, twins = fx.Graph(), [], dict[fx.Node, fx.Node]()

    def taken(node: fx.Node) -> fx.Node:
        """A node of the forward, as the derivative has it."""
        if node not in twins:
            if node.op == "get_attr" or (_looks_at_one(node) and not depend.keys() & set(node.all_input_nodes)):
                twins[node] = made.node_copy(node, taken)  # a view of what is kept takes no memory, and no output
            else:
                with made.inserting_before(first):
                    twins[node] = made.placeholder(f"kept_{len(kept)}")
                number = node.target is torch.ops.aten._local_scalar_dense.default  # no compiler gives it as an output
                held = node.all_input_nodes[0] if number else node
                if held not in inputs and held not in own:
                    own.append(held)
                kept.append(("input", inputs[held], number) if held in inputs else ("output", own.index(held), number))
        return twins[node]

    first = None
    for n, node in enumerate(cotangents):
        twins[node] = made.placeholder(f"cotangent_{n}")
        first = first or twins[node]
    for node in depend:
        if node not in twins:
            twins[node] = made.node_copy(node, taken)
    made.output(tuple(taken(g) for g in gradients))
    output.args = (tuple(own),)
    for node in reversed(depend):
        graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and effect(node) is None:
            graph.erase_node(node)
    derivative = fx.GraphModule(gm, made)
    return Derivative(derivative, kept, targets, flow.own)


def _looks_at_one(node: fx.Node) -> bool:
    """Does a node look at one tensor in another way, with nothing else that the forward computes?"""
    if not isinstance(node.target, OpOverload) or len(node.all_input_nodes) != 1:
        return False
    aliases = [a.alias_info for a in node.target._schema.arguments if a.alias_info is not None]
    return len(aliases) == 1 and not aliases[0].is_write and len(node.target._schema.returns) == 1


# -- shared with the hook engine ------------------------------------------------------------------------------------------


Begun = dict[
    Value, tuple[torch.Tensor, int]
]  # the sources that there are, and how often each had been changed in place


def begin(begun: Begun, value: Value, x: torch.Tensor) -> torch.Tensor:
    """Autograd follows a source from here on."""
    begun[value] = (x if x.requires_grad else x.requires_grad_(), version(x))
    return x


def check(
    plan: InterventionGraph,
    lines: Sequence,
    targets: list[torch.Tensor],
    sources: list[torch.Tensor],
    frozen: Frozen | None,
    begun: Begun,
) -> None:
    """Raise where a derivative is not what was asked for: a `NotConnectedError` at the user's line."""
    n = plan.linear
    assert n is not None
    line = lines[n]
    missing = frozen.missing() if frozen is not None else None
    if missing is not None:
        raise NotConnectedError(
            f'{line}: `freeze={{"{missing}"}}`, and there is nothing of that kind in the forward up to the targets. Looked for: {PARTS[missing]}.'
        )
    named = [leaves(keys) for keys in plan.ops[n].args.items]
    for value, (x, then) in begun.items():
        if version(x) != then:
            raise NotConnectedError(changed(line, f"the source {_told(plan, lines, value)}"))
    reached = _reached(targets)
    for key, x in zip(named[1], sources, strict=True):
        if not reached(x):
            told = ", ".join(_told(plan, lines, key) for key in named[0])
            raise NotConnectedError(
                f"{line}: {'none of the targets' if len(targets) > 1 else 'the target'} {told} {'depends' if len(targets) > 1 else 'does not depend'} on the source {_told(plan, lines, key)}: it "
                "comes later in the model, its way there is frozen, or it is a copy or a part that the body made (`h[:, -1]`) while the "
                "model goes on with the whole. Give the value of a site as it is, and take the part of its gradient."
            )


def changed(line: object, what: str) -> str:
    """The text about a source that is no value any more."""
    return (
        f"{line}: {what} is changed in place behind its site, so there is no derivative by the value that it had. Give a site that "
        "lies behind the change, or the model's next value."
    )


def _told(plan: InterventionGraph, lines: Sequence, key: object) -> str:
    verb = plan.ops[key.op].verb if isinstance(key, Value) else None
    if isinstance(verb, Read):
        return f"`{place_of_site(verb.site)}`" + (f"[{key.leaf}]" if key.leaf > 0 else "")  # type: ignore[union-attr]
    return f"that {lines[key.op]} computes" if isinstance(key, Value) else "value"


def _reached(targets: list[torch.Tensor]) -> Callable[[torch.Tensor], bool]:
    """Does autograd's graph lead from some targets to a value?"""
    seen: set[tuple[object, int]] = set()
    leaf: set[int] = {id(x) for x in targets}
    left = [(x.grad_fn, x.output_nr) for x in targets if x.grad_fn is not None]
    visited = set()
    while left:
        function, number = left.pop()
        seen.add((function, number))
        if function in visited:
            continue
        visited.add(function)
        variable = getattr(function, "variable", None)
        if isinstance(variable, torch.Tensor):
            leaf.add(id(variable))
        left += [(f, i) for f, i in function.next_functions if f is not None]
    return lambda x: id(x) in leaf or (x.grad_fn, x.output_nr) in seen
