"""Thin helpers that users of other libraries know: baukit's `TraceDict`, nnterp's `steer`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..envoys.envoy import Envoy, host_of, path_of
from ..model.model import NNsight
from ..plan import tree
from ..tracing.saving import save

if TYPE_CHECKING:
    from ..tracing.contexts import Tracer


@dataclass
class Retained:
    """What `TraceDict` keeps of a layer."""

    input: Any = None
    output: Any = None


class TraceDict(dict[str, Retained]):
    """Keep, and edit, what several layers get and return while the model is called in a block.

    ```python
    with TraceDict(model, ["transformer.h.3", "transformer.h.7"], edit_output=lambda h, layer: h * 0.5) as seen:
        logits = model(input_ids).logits
    seen["transformer.h.3"].output  # a plain tensor
    ```

    Args:
        model: a wrapped model; calls of it in the block are traces, on the engine that it is compiled for.
        layers: paths below the model (`"transformer.h.3"`).
        retain_output, retain_input: what to keep: the value, after the edit; the input is the first one where it is
            alone, else all positional ones.
        clone, detach: keep a copy; keep it off the autograd graph.
        retain_grad: the kept output requires grad and has `.grad` after a backward; on the hook engine.
        edit_output: `edit_output(output)` or `edit_output(output, layer)` gives the layer's new output. It is recorded,
            like the body of a trace.
        stop: end the forward behind the last of the layers; the call then returns `None`.

    A second call in the block replaces what the first has kept.

    Source: baukit's `nethook.TraceDict`.
    """

    def __init__(
        self,
        model: NNsight,
        layers: Iterable[str],
        retain_output: bool = True,
        retain_input: bool = False,
        clone: bool = False,
        detach: bool = False,
        retain_grad: bool = False,
        edit_output: Callable | None = None,
        stop: bool = False,
    ):
        super().__init__()
        self.model, self.layers = model, {name: model.get(name) for name in layers}
        self.retain_output, self.retain_input, self.stop = retain_output, retain_input, stop
        self.clone, self.detach, self.retain_grad = clone, detach, retain_grad
        self.edit = edit_output
        self.named = edit_output is not None and len(inspect.signature(edit_output).parameters) > 1

    def __enter__(self) -> TraceDict:
        host = host_of(self.model)
        self.outer, host.caller = host.caller, self._call
        return self

    def __exit__(self, *_: object) -> None:
        host_of(self.model).caller = self.outer

    def _call(self, *args: object, **kwargs: Any) -> Any:
        result = None
        if self.retain_grad:
            kwargs["compile"] = False  # a compiled graph has no gradient of its intermediate values
        with self.model.trace(*args, **kwargs) as tracer:
            for name in sorted(self.layers, key=lambda n: _place(tracer, self.layers[n])):
                self[name] = save(Retained())
                self._watch(name, self.layers[name], self[name])
            if self.stop:
                tracer.stop()
            result = save(tracer.result)
        for x in tree.flatten([kept.output for kept in self.values()])[0] if self.retain_grad else ():
            if isinstance(x, torch.Tensor):
                x.retain_grad()
        return result

    def _watch(self, name: str, layer: Envoy, kept: Retained) -> None:
        if self.retain_input:
            args, _ = layer.inputs
            kept.input = self._copy(args[0] if len(args) == 1 else args, grad=False)
        if self.edit is not None:
            layer.output = self.edit(layer.output, name) if self.named else self.edit(layer.output)
        if self.retain_output:
            kept.output = self._copy(layer.output, self.retain_grad)
            if self.retain_grad:  # a copy goes on, so that the model can change it in place
                layer.output = tree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, kept.output)

    def _copy(self, value: object, grad: bool) -> Any:
        def copied(x: object) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if grad:
                x = x if x.requires_grad else x.requires_grad_()
            elif self.detach:
                x = x.detach()
            return x.clone() if self.clone else x

        return tree.tree_map(copied, value)


def _place(tracer: Tracer, layer: Envoy) -> int:
    """Where in the model's order a layer returns; unknown ones last."""
    return getattr(tracer.tape.meta((path_of(layer), "output", 0)), "order", 2**31)


def steer(
    layers: Envoy | Iterable[Envoy],
    vector: torch.Tensor,
    factor: float = 1.0,
    positions: int | slice | list[int] | torch.Tensor | None = None,
) -> None:
    """Add `factor * vector` to what layers return, at some token positions or at all.

    ```python
    with model.trace(prompt):
        steer(model.transformer.h[4:8], vector, factor=2.0, positions=-1)
    ```

    Args:
        layers: an envoy or several, in the model's order. Of a tuple, the first element is steered.
        vector: (features,), or what broadcasts to (rows, positions, features).
        positions: along dimension 1 of (rows, tokens, features).

    Source: nnterp's `StandardizedTransformer.steer`.
    """
    for layer in [layers] if isinstance(layers, Envoy) else layers:
        out = layer.output
        h = out[0] if isinstance(out, tuple) else out
        if positions is None:
            h = h + factor * vector
        else:
            h = h.clone()
            h[:, positions] += factor * vector
        layer.output = (h, *out[1:]) if isinstance(out, tuple) else h
