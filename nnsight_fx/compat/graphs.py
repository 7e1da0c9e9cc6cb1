"""What Dynamo leaves beside a graph that it captured: the context of its compilation, side effects, breaks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._guards
from torch._subclasses.fake_tensor import (
    FakeTensorMode,
)


def as_dynamos(gm: torch.fx.GraphModule) -> None:
    """Say of a rewritten graph what Dynamo says of its own: which inputs (parameters) stay where they are, as CUDA graphs ask.

    Without it they would copy every parameter into memory of theirs, at each replay.
    """
    from torch._dynamo.source import LocalSource

    gm.meta.setdefault("dynamo_compile_id", None)
    gm._param_name_to_source = {}  # type: ignore[assignment]
    for node in gm.graph.find_nodes(op="placeholder"):
        node._dynamo_source = LocalSource(node.name)


def tracing_context() -> Any:
    return torch._guards.TracingContext.try_get()


def new_context(mode: FakeTensorMode) -> tuple[Any, Any]:
    """A context of compilation as Dynamo would have made it, and the block in which it holds."""
    context = torch._guards.TracingContext(mode)
    return context, torch._guards.tracing(context)


@contextlib.contextmanager
def tracing(context: Any) -> Iterator[None]:
    """Compile under a captured graph's context. Integers may be read from tensors there: that is how positions are lifted."""
    env = context.fake_mode.shape_env
    old: Any = env.settings if env is not None else None
    if env is not None:
        env.settings = dataclasses.replace(old, allow_scalar_outputs=True)
    try:
        with torch._guards.tracing(context):
            yield
    finally:
        if env is not None:
            env.settings = old


def replays_nothing(restored: Callable[[Any], bool]) -> bool:
    """In a backend's callback: does nothing that existed before the frame change when the graph has run, tensors aside?

    `restored` tells objects that Dynamo writes to and that are then as they were. When this cannot tell, it says no.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output = InstructionTranslator.current_tx().output
        effects = output.side_effects
        changed: list[Any] = [
            v
            for v in effects.id_to_variable.values()
            if effects.is_modified(v)
            and type(v.mutation_type).__name__ in ("AttributeMutationExisting", "ValueMutationExisting")
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
        return False


def _as_before(effects: Any, variable: Any) -> bool:
    """Are all attributes that Dynamo is to store on an object the constants that it holds already?"""
    stores = effects.store_attr_mutations.get(variable)
    name = (
        "is_base_vt_modified" if hasattr(type(variable), "is_base_vt_modified") else "is_underlying_vt_modified"
    )  # 2.11
    if not stores or getattr(variable, name)(effects):
        return False
    held = vars(variable.value)
    return all(
        new.is_python_constant() and name in held and held[name] is new.as_python_constant()
        for name, new in stores.items()
    )


def break_of(gm: torch.fx.GraphModule) -> tuple[str, str] | None:
    """In a backend's callback: why Dynamo ended this graph where it did, and at which line; `None` at a frame's end."""
    ended = getattr(gm, "compile_subgraph_reason", None)
    if ended is None or not ended.graph_break:
        return None
    line = ended.user_stack[-1] if ended.user_stack else None
    reason = " ".join(str(ended.reason).strip().split("\n")[0].split())
    return reason, f"{line.filename}:{line.lineno}" if line is not None else "an unknown line"
