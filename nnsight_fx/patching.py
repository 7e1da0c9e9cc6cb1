"""Ready-made sweeps: activation patching by layer, position and head; attribution patching; logit lens; ablations.

```python
from nnsight_fx import patching

def logit_difference(logits):                                    # (batch, length, vocabulary)
    return logits[:, -1, io] - logits[:, -1, subject]

found = patching.patch(model, clean, corrupted, logit_difference)             # residual stream, layer x position
heads = patching.patch(model, clean, corrupted, logit_difference, part="z")   # layer x head
quick = patching.attribution(model, clean, corrupted, logit_difference)       # one forward and one backward
found.heatmap("residual.png", bar="logit difference")
```

Activation patching: Vig et al. 2020, arXiv:2004.12265; Meng et al. 2022, arXiv:2202.05262. Attribution patching: Nanda 2023
(neelnanda.io/attribution-patching); Syed et al. 2023, arXiv:2310.10348. Logit lens: nostalgebraist 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .parts import Column, Parts, first, heads_of, parts_of
from .sweep.results import Results
from .sweep.sweep import sweep
from .tracing.lazy import user_line
from .tracing.saving import save

HEADED = ("z", "q", "k", "v")
PARTS = ("residual", "residual_pre", "attention", "mlp", *HEADED)
Metric = Callable[[torch.Tensor], torch.Tensor]


class Site:
    """One part of every layer: its value, and the index of a position and a head in it."""

    def __init__(self, model: Any, part: str, given: Parts | None):
        if part not in PARTS:
            raise ValueError(f"{user_line()}: `part` is one of {', '.join(PARTS)}; not `{part}`.")
        self.model, self.part, self.table = model, part, parts_of(model, given)
        named = None if part.startswith("residual") else getattr(self.table, part)
        if named is None and not part.startswith("residual"):
            raise ValueError(
                f"{user_line()}: this family has no module for `{part}`; there is {', '.join(self._known())}."
            )
        self.column = named if isinstance(named, Column) else None
        self.path = named.path if isinstance(named, Column) else named
        self.layers = len(model._module.get_submodule(self.table.layers))
        self.heads = heads_of(model, part) if part in HEADED else 1

    def _known(self) -> list[str]:
        return [p for p in PARTS if p.startswith("residual") or getattr(self.table, p) is not None]

    def value(self, layer: int) -> torch.Tensor:
        """In a trace: (batch, length, width)."""
        block = self.model.get(f"{self.table.layers}.{layer}")
        if self.part == "residual":
            return first(block.nns_output)
        if self.part == "residual_pre":
            return block.nns_input
        envoy = block.get(self.path)
        return envoy.nns_input if self.part == "z" else first(envoy.nns_output)

    def columns(self, width: int, head: int | None) -> slice:
        """Where a head lies in the width."""
        start, size = 0, width
        if self.column is not None:
            size = width // self.column.of
            start = self.column.index * size
        if head is None:
            return slice(start, start + size)
        return slice(start + head * (size // self.heads), start + (head + 1) * (size // self.heads))

    def index(self, width: int, position: int | None, head: int | None) -> tuple:
        whole = self.column is None and head is None
        return (
            slice(None),
            slice(None) if position is None else position,
            slice(None) if whole else self.columns(width, head),
        )

    @property
    def axes(self) -> tuple[str, ...]:
        return ("layer", "head") if self.part in HEADED else ("layer", "position")


def activations(model: Any, inputs: Any, part: str = "residual", parts: Parts | None = None) -> list[torch.Tensor]:
    """A part of every layer on a prompt: tensors (batch, length, width)."""
    site = Site(model, part, parts)
    with torch.no_grad(), model.trace(inputs):
        found = [save(site.value(layer).clone()) for layer in range(site.layers)]
    return found


def patch(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    part: str = "residual",
    over: Sequence[str] | None = None,
    layers: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
    parts: Parts | None = None,
    **options: Any,
) -> Results:
    """Run `corrupted` with one place of it as it is in `clean`, for every place.

    Args:
        clean, corrupted: prompts (or batches of them) of the same number of tokens.
        metric: of the logits (batch, length, vocabulary); what it returns is the result of a cell.
        part: "residual" (a layer's output), "residual_pre" (its input), "attention" and "mlp" (their outputs), "z" (what
            a head gives to the output projection), "q", "k", "v".
        over: the axes, of "layer", "position", "head"; layer and position, for "z", "q", "k", "v" layer and head. What
            is not an axis is patched whole.
        layers, positions: which; all by default.
        options: `store=`, `chunk=`, `progress=` and others of `model.sweep`.
    """
    source = activations(model, clean, part, parts)
    return _write(
        model,
        corrupted,
        metric,
        part,
        over,
        layers,
        positions,
        parts,
        lambda here, layer: source[layer],
        source,
        options,
    )


def ablate(
    model: Any,
    inputs: Any,
    metric: Metric,
    *,
    by: str = "zero",
    reference: Any = None,
    part: str = "z",
    over: Sequence[str] | None = None,
    layers: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
    parts: Parts | None = None,
    **options: Any,
) -> Results:
    """Run `inputs` without one place of it, for every place: set to zero, to its mean, or to another prompt's value.

    `by` is "zero", "mean" (over the batch and length of `reference`, else of `inputs`) or "resample" (the value in
    `reference`, a prompt of the same length). The rest is as in `patch`.
    """
    if by not in ("zero", "mean", "resample"):
        raise ValueError(f"{user_line()}: `by` is zero, mean or resample; not `{by}`.")
    if by == "resample" and reference is None:
        raise ValueError(f"{user_line()}: resample ablation takes its values from another prompt: give `reference=`.")
    own = activations(model, inputs, part, parts)
    other = own if reference is None else activations(model, reference, part, parts)
    if by == "mean":
        other = [value.mean((0, 1), keepdim=True).expand_as(like) for value, like in zip(other, own, strict=True)]
    elif by == "zero":
        other = [torch.zeros_like(value) for value in own]
    return _write(
        model, inputs, metric, part, over, layers, positions, parts, lambda here, layer: other[layer], own, options
    )


def steering(
    model: Any,
    inputs: Any,
    metric: Metric,
    vector: torch.Tensor,
    scales: Iterable[float],
    *,
    layers: Iterable[int] | None = None,
    positions: int | slice | None = None,
    parts: Parts | None = None,
    **options: Any,
) -> Results:
    """Add `scale * vector` to the residual stream behind a layer, for every layer and scale. `vector` is (width,)."""
    site = Site(model, "residual", parts)
    where = slice(None) if positions is None else positions

    def body(tracer: Any, layer: int, scale: float) -> torch.Tensor:
        h = site.value(layer)
        h[:, where] = h[:, where] + tracer.constant(float(scale)).to(vector.dtype) * vector
        return metric(model.get(site.table.unembed).nns_output)

    chosen = list(range(site.layers) if layers is None else layers)
    return sweep(model, body, inputs, {"layer": chosen, "scale": list(scales)}, **options)


def attribution(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    part: str = "residual",
    parts: Parts | None = None,
    steps: int = 1,
) -> Results:
    """What `patch` would change, to first order: (clean - corrupted) times the metric's gradient, for every place at once.

    One forward and one backward on `corrupted` (`steps=1`); with more, the gradients are averaged on the straight way from
    corrupted to clean activations of the first layer's input (integrated gradients, Sundararajan et al. 2017,
    arXiv:1703.01365). Results: layer x position, for "z", "q", "k", "v" layer x head, summed over the batch. Parameters
    get no gradients.
    """
    site = Site(model, part, parts)
    there, here = activations(model, clean, part, parts), activations(model, corrupted, part, parts)
    _same_length(there, here)
    ends = [activations(model, x, "residual_pre", parts)[0] for x in (corrupted, clean)]
    total = [torch.zeros_like(h) for h in here]
    start = Site(model, "residual_pre", parts)
    for step in range(steps):
        with model.trace(corrupted):
            entry = start.value(0)
            if step:
                entry[:] = torch.lerp(ends[0], ends[1], step / steps)
            entry.requires_grad_()
            values = [site.value(layer) for layer in range(site.layers)]
            result = metric(model.get(site.table.unembed).nns_output).sum()
            grads = [save(g) for g in torch.autograd.grad(result, values)]
        total = [t + g / steps for t, g in zip(total, grads, strict=True)]
    scores = torch.stack([(a - b) * g for a, b, g in zip(there, here, total, strict=True)]).sum(
        1
    )  # layer, length, width
    scores = scores[..., site.columns(scores.shape[-1], None)]
    scores = scores.unflatten(-1, (site.heads, -1)).sum((1, -1)) if part in HEADED else scores.sum(-1)
    axes = {"layer": range(site.layers), site.axes[1]: range(scores.shape[1])}
    return Results(axes, {"result": scores.cpu()}, {"program": f"attribution of {part}"})


def logit_lens(model: Any, inputs: Any, *, position: int | None = -1, parts: Parts | None = None) -> torch.Tensor:
    """The logits that each layer's output would give through the final norm and the unembedding.

    Returns (layer, batch, vocabulary) at one position, (layer, batch, length, vocabulary) for `position=None`.
    """
    site = Site(model, "residual", parts)
    norm, unembed = model.get(site.table.norm), model.get(site.table.unembed)
    with torch.no_grad(), model.trace(inputs):
        found = []
        for layer in range(site.layers):
            h = site.value(layer)
            h = h if position is None else h[:, position]
            found.append(save(unembed(norm(h))))
    return torch.stack([f.detach() for f in found])


def _write(
    model: Any,
    inputs: Any,
    metric: Metric,
    part: str,
    over: Sequence[str] | None,
    layers: Iterable[int] | None,
    positions: Iterable[int] | None,
    parts: Parts | None,
    source: Callable[[torch.Tensor, int], torch.Tensor],
    like: list[torch.Tensor],
    options: dict[str, Any],
) -> Results:
    """The sweep that writes one place of a part."""
    site = Site(model, part, parts)
    length = like[0].shape[1]
    every = {
        "layer": list(range(site.layers) if layers is None else layers),
        "position": list(range(length) if positions is None else positions),
        "head": list(range(site.heads)),
    }
    chosen = tuple(over or site.axes)
    if "layer" not in chosen or not set(chosen) <= set(every) or ("head" in chosen and part not in HEADED):
        raise ValueError(
            f"{user_line()}: `over` is `layer`, with `position` or (for {', '.join(HEADED)}) `head`; not {chosen}."
        )

    def body(tracer: Any, **cell: int) -> torch.Tensor:
        here = site.value(cell["layer"])
        if here.shape[1] != length:
            raise ValueError(
                f"{user_line()}: the prompts differ in length: {length} tokens and {here.shape[1]}. Patching `{part}` goes position by position."
            )
        index = site.index(here.shape[-1], cell.get("position"), cell.get("head"))
        here[index] = source(here, cell["layer"])[index]
        return metric(model.get(site.table.unembed).nns_output)

    def named(tracer: Any, *values: int) -> torch.Tensor:
        return body(tracer, **dict(zip(chosen, values, strict=True)))

    return sweep(model, named, inputs, {name: every[name] for name in chosen}, **options)


def _same_length(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    if a[0].shape != b[0].shape:
        raise ValueError(
            f"{user_line()}: the prompts differ in shape: {tuple(a[0].shape[:2])} and {tuple(b[0].shape[:2])} (batch, tokens). Patching "
            "goes position by position."
        )
