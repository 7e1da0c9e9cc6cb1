"""`NNsight`: a wrapped model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from .capture import _torch
from .capture.markers import Markers
from .engine.run import Run, live
from .engine.sites import Scanner
from .engine.switch import State
from .engine.wave import Wave
from .envoy import Envoy
from .tracing import tree
from .tracing.contexts import Tracer


@dataclass(frozen=True)
class Batch:
    """One prepared input: what the model is called with, and its rows on dimension 0."""

    args: tuple
    kwargs: dict
    rows: int


class NNsight(Envoy):
    """Wrap any `nn.Module`.

    ```python
    model = NNsight(module)
    with model.trace(x):
        model.layer[2].output[:] = 0
        out = model.output.save()
    ```
    """

    def __init__(self, module: nn.Module, *, rename: dict[str, str | list[str]] | None = None):
        self._envoys: dict[int, Envoy] = {}
        self._rename = rename or {}
        super().__init__(module, "", self, self._names_of(""))
        self.tracer: Tracer | None = None
        self._compiled: Any = None
        self._module_changed()

    def _module_changed(self) -> None:
        """The module tree is new: everything learnt of the old one is forgotten."""
        self._markers = Markers(self._module)
        self._scanner = Scanner(self._module)
        self._envoys = {id(self._module): self}
        if self._compiled is not None:
            self._compiled.reset()

    def _envoy_of(self, module: nn.Module) -> Envoy:
        if id(module) not in self._envoys:
            if module not in self._markers.paths:
                self._module_changed()
            path = self._markers.paths[module]
            self._envoys[id(module)] = Envoy(module, path, self, self._names_of(path))
        return self._envoys[id(module)]

    def _names_of(self, path: str) -> dict[str, str]:
        """Aliases of the children of `path`."""
        found = {}
        for old, new in self._rename.items():
            where, _, name = old.rpartition(".")
            if "." not in old.lstrip(".") or where.lstrip(".") == path:
                for alias in [new] if isinstance(new, str) else new:
                    found[alias] = name or old.lstrip(".")
        return found

    # -- traces --------------------------------------------------------------------------------------------------

    def trace(
        self,
        *args: Any,
        compile: bool | dict | None = None,
        fn: str | None = None,
        pad_to: int | None = None,
        trace: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Run the model on an input with the interventions of a `with` block.

        `compile=False` runs on hooks, `True` or a dict of `compile` options on captured graphs; by default as
        `model.compile()` was called. `fn` names another method to trace, `pad_to` fixes the padded length of prompts.
        `trace=False` just runs the model and returns its output. Every other keyword is the model's.
        """
        if not trace:
            batch = self._collate([self._prepare(args, kwargs)], pad_to=pad_to)
            return (self._module if fn is None else getattr(self._module, fn))(*batch.args, **batch.kwargs)
        return Tracer(self, args, kwargs, compile=compile, fn=fn, pad_to=pad_to)

    def _has_input(self, kwargs: dict) -> bool:
        """Do keywords alone make an input of this model?"""
        return bool(kwargs)

    def _prepare(self, args: tuple, kwargs: dict) -> Batch:
        """One invoke's input, on the model's device."""
        device = self.device
        moved = tree.tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) and device is not None else x, (args, kwargs))
        tensors = [x for x in tree.flatten(moved)[0] if isinstance(x, torch.Tensor) and x.dim() > 0]
        return Batch(*moved, rows=tensors[0].shape[0] if tensors else 1)

    def _collate(self, batches: list[Batch], pad_to: int | None = None) -> Batch:
        """Several inputs as one: tensors are concatenated on dimension 0."""
        if len(batches) == 1:
            return batches[0]
        flat = [tree.flatten((b.args, b.kwargs)) for b in batches]
        if any(spec != flat[0][1] for _, spec in flat):
            raise ValueError("the invokes of one batch must be called with the same arguments; their structures differ")
        joined = [self._join(i, list(column)) for i, column in enumerate(zip(*(leaves for leaves, _ in flat), strict=True))]
        args, kwargs = tree.unflatten(joined, flat[0][1])
        return Batch(args, kwargs, sum(b.rows for b in batches))

    @staticmethod
    def _join(index: int, column: list) -> Any:
        first = column[0]
        if isinstance(first, torch.Tensor) and first.dim() > 0:
            if any(x.shape[1:] != first.shape[1:] for x in column):
                shapes = ", ".join(str(tuple(x.shape)) for x in column)
                raise ValueError(f"argument {index} of the invokes cannot be batched: shapes {shapes} differ behind dimension 0")
            return torch.cat(column)
        if any(x is not first and x != first for x in column):
            raise ValueError(f"argument {index} of the invokes cannot be batched: {column} are not equal")
        return first

    def _unknown_dims(self, batch: Batch) -> tuple:
        """For each leaf of an input, the dims that hold the rows and the (padded) length, or `None`."""
        return tuple(
            (0 if isinstance(x, torch.Tensor) and x.dim() > 0 and x.shape[0] == batch.rows else None, None)
            for x in tree.flatten((batch.args, batch.kwargs))[0]
        )

    def _length(self, batch: Batch) -> int | None:
        """The padded length of a batch, for models that have one."""
        return None

    # -- what a trace asks of its model --------------------------------------------------------------------------

    def _state(self) -> State:
        return State()

    def _suspend(self) -> Callable[[], None]:
        """While a body runs, functions that the user compiled run as written; the return undoes it."""
        old = _torch.stance()
        _torch.set_stance(_torch.eager_stance())
        return lambda: _torch.set_stance(old)

    def _wave(self, tracer: Tracer, first: Batch, alone: bool) -> Wave:
        return Wave(self, tracer, first, alone)

    def _run(self, wave: Wave, plan: Any) -> Run:
        fn = wave.tracer.fn
        batch = wave.batch

        def call() -> Any:
            return (self._module if fn is None else getattr(self._module, fn))(*batch.args, **batch.kwargs)

        modules = self._module.get_submodule
        return Run(plan, wave.tape.constants, wave.tape.lines, self._markers, call, modules, wave.symbols)
