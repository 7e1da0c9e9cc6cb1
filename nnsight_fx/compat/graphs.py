"""What Dynamo leaves beside a graph that it captured: the context of its compilation, side effects, breaks."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from .fakes import FakeTensorMode, detect_fake_mode, placeholder_fakes
from .probe import Name, needed

if TYPE_CHECKING:
    from torch._dynamo.side_effects import SideEffects
    from torch._dynamo.variables.base import VariableTracker


OpOverload = type(torch.ops.aten.add.Tensor)  # an operation of aten's, as it stands in a graph
make_fx = needed("torch.fx.experimental.proxy_tensor.make_fx")
get_proxy_mode = needed("torch.fx.experimental.proxy_tensor.get_proxy_mode")
_DECOMPOSITIONS = Name(
    "torch._decomp.get_decompositions", "a backward that torch cannot differentiate once more is not transposed"
)
_CONTEXT = Name("torch._guards.TracingContext", "variants are compiled without Dynamo's context")
_TRACING = Name("torch._guards.tracing", "variants are compiled without Dynamo's context")
_SETTINGS = Name(
    "torch.fx.experimental.symbolic_shapes.ShapeEnv.settings",
    "an integer that is read from a tensor is looked at when it runs",
)
_REASON = Name("torch.fx.GraphModule.compile_subgraph_reason", "why a graph ends where it does is not told")
_TRANSLATOR = Name(
    "torch._dynamo.symbolic_convert.InstructionTranslator", "the whole model runs also where nobody reads its result"
)
_EFFECTS = Name(
    "torch._dynamo.output_graph.OutputGraph.side_effects", "the whole model runs also where nobody reads its result"
)
_CHECKPOINT = Name(
    "torch.ops.higher_order.tag_activation_checkpoint", "no intervention reaches into a checkpointed block"
)
_LAZY = Name(
    "torch.fx._lazy_graph_module._LazyGraphModule",
    "a graph's Python text is written also where nothing runs or reads it",
)
_LOCAL = Name("torch._dynamo.source.LocalSource", "CUDA graphs copy each parameter at each replay")


def copied(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A graph to be rewritten, with what is known of each node. Its Python text is written when it first runs."""
    made = (_LAZY() or torch.fx.GraphModule)(gm, copy.deepcopy(gm.graph))
    for old, new in zip(gm.graph.nodes, made.graph.nodes, strict=True):
        new.meta = dict(old.meta)
    return made


def as_dynamos(gm: torch.fx.GraphModule) -> None:
    """Say of a rewritten graph what Dynamo says of its own: which inputs (parameters) stay where they are, as CUDA graphs ask.

    Without it they would copy every parameter into memory of theirs, at each replay.
    """
    source = _LOCAL()
    if source is None:
        return
    gm.meta.setdefault("dynamo_compile_id", None)
    gm._param_name_to_source = {}  # type: ignore[assignment]
    for node in gm.graph.find_nodes(op="placeholder"):
        node._dynamo_source = source(node.name)


def written_out(graph: torch.fx.Graph) -> dict:
    """Of the fused backwards in a graph, which autograd cannot go through: what they are made of."""
    backwards = {n.target for n in graph.nodes if isinstance(n.target, OpOverload) and "backward" in n.target.__name__}
    found = _DECOMPOSITIONS()
    return {} if found is None else found(list(backwards))


class Context:
    """What we ask of a context of compilation, where torch has none."""

    def __init__(self, fake_mode: object):
        self.fake_mode = fake_mode


def tracing_context(gm: torch.fx.GraphModule) -> object:
    """In a backend's callback: the context of compilation."""
    found = _CONTEXT()
    if found is not None and _TRACING() is not None:
        return found.try_get()
    return Context(detect_fake_mode(placeholder_fakes(gm)) or FakeTensorMode())


def new_context(mode: object) -> tuple:
    """A context of compilation as Dynamo would have made it, and the block in which it holds."""
    context = (_CONTEXT() if _TRACING() is not None else None) or Context
    return (made := context(mode)), _within(made)


def _within(context: object) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if isinstance(context, Context) else _TRACING()(context)


@contextlib.contextmanager
def tracing(context: Any) -> Iterator[None]:
    """Compile under a captured graph's context. Integers may be read from tensors there: that is how positions are lifted."""
    env: Any = context.fake_mode.shape_env
    old: Any = None if env is None else _SETTINGS.of(env)
    if env is not None and old is not None:
        env.settings = dataclasses.replace(old, allow_scalar_outputs=True)
    try:
        with _within(context):
            yield
    finally:
        if env is not None and old is not None:
            env.settings = old


def replays_nothing(restored: Callable[[object], bool]) -> bool:
    """In a backend's callback: does nothing that existed before the frame change when the graph has run, tensors aside?

    `restored` tells objects that Dynamo writes to and that are then as they were. When this cannot tell, it says no.
    """
    if _TRANSLATOR() is None:
        return False
    try:
        output = _TRANSLATOR().current_tx().output
        effects = _EFFECTS.of(output)
        changed: list = [
            v
            for v in effects.id_to_variable.values()
            if effects.is_modified(v) and not type(v.mutation_type).__name__.endswith("New")
        ]
        others = (
            effects.tensor_hooks,
            effects.save_for_backward,
            effects.ca_final_callbacks_var,
            output.random_calls,
            output.backward_state,
        )
        return not any(others) and all(_as_before(effects, v) and restored(v.value) for v in changed)
    except Exception:  # another torch: Dynamo's tables look different there
        _EFFECTS.fails()
        return False


def _as_before(effects: SideEffects, variable: Any) -> bool:
    """Are all attributes that Dynamo is to store on an object the constants that it holds already?"""
    stores = effects.store_attr_mutations.get(variable)
    if not stores or _contents_changed(effects, variable):
        return False
    held = vars(variable.value)
    return all(
        new.is_python_constant() and name in held and held[name] is new.as_python_constant()
        for name, new in stores.items()
    )


def _contents_changed(effects: SideEffects, variable: VariableTracker) -> bool:
    """Does what an object holds as a container change?"""
    for name in ("is_base_vt_modified", "is_underlying_vt_modified"):  # up to torch 2.14; 2.11
        if hasattr(variable, name):
            return getattr(variable, name)(effects)
    return bool(getattr(variable.mutation_type, "is_modified", False))


def checkpointed(node: torch.fx.Node) -> bool:
    """Does a node of a captured graph call a block by `torch.utils.checkpoint`?"""
    return node.op == "call_function" and node.target is _CHECKPOINT()


def break_of(gm: torch.fx.GraphModule) -> tuple[str, str] | None:
    """In a backend's callback: why Dynamo ended this graph where it did, and at which line; `None` at a frame's end."""
    ended = _REASON.of(gm)
    if ended is None or not ended.graph_break:
        return None
    line = ended.user_stack[-1] if ended.user_stack else None
    reason = " ".join(str(ended.reason).strip().split("\n")[0].split())
    return reason, f"{line.filename}:{line.lineno}" if line is not None else "an unknown line"
