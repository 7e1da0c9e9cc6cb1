"""CUDA graphs: what Inductor records under `mode="reduce-overhead"` writes to the same memory each time it is replayed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator

import torch

from ...compat import inductor
from ...compat.tensors import memory, tree_leaves, tree_map_only

MODES = ("reduce-overhead", "max-autotune")


def recorded(backend: object, mode: str | None, options: dict) -> bool:
    """Does Inductor record CUDA graphs under these options?"""
    asked = options.get("triton.cudagraphs", mode in MODES)
    return backend == "inductor" and bool(asked)


def begin() -> None:
    """A new run: the values of the last one may be written over from here on."""
    if torch.cuda.is_available():
        torch.compiler.cudagraph_mark_step_begin()


def apart(values: dict, given: Iterable) -> dict:
    """The values in memory of their own, which no replay writes to.

    What shares memory goes on to share it; what lies in the memory of a `given` tensor (a parameter, an input) or on an autograd
    graph stays what it is, or becomes a copy on that graph.
    """
    own = {memory(x) for x in tree_leaves(list(given)) if isinstance(x, torch.Tensor) and x.layout is torch.strided}
    copies: dict[int, torch.UntypedStorage] = {}

    def copied(x: torch.Tensor) -> torch.Tensor:
        if x.layout is not torch.strided or memory(x) in own:
            return x
        if x.requires_grad:
            return x.clone() if x.grad_fn is not None else x
        if memory(x) not in copies:
            copies[memory(x)] = x.untyped_storage().clone()
        new = torch.empty(0, dtype=x.dtype, device=x.device)
        return new.set_(copies[memory(x)], x.storage_offset(), x.shape, x.stride())

    return {name: tree_map_only(torch.Tensor, copied, value) for name, value in values.items()}


class _Kept(logging.Handler):
    def __init__(self):
        super().__init__()
        self.reasons: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.reasons.append(record.getMessage())


@contextlib.contextmanager
def refusals(device: torch.device | None) -> Iterator[list[str]]:
    """Why Inductor records no CUDA graph of what is compiled in this block."""
    log = inductor.graphs_log()
    kept, level, skipped = _Kept(), log.level, inductor.skipped_graphs()
    log.addHandler(kept)
    log.setLevel(logging.WARNING)
    try:
        yield kept.reasons
    finally:
        log.removeHandler(kept)
        log.setLevel(level)
        more = inductor.skipped_graphs() - skipped
        if device is not None and device.type != "cuda":
            kept.reasons[:] = [f"the model is on the {device.type}"]
        elif more > len(kept.reasons):
            kept.reasons.append("Inductor told no reason (`TORCH_LOGS=cudagraphs`)")
