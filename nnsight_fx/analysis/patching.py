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

import inspect
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..envoys.envoy import host_of
from ..lines import user_line
from ..report.runs import one_run
from ..sweep.job import given, is_dataset
from ..sweep.results import Results
from ..sweep.sweep import sweep
from ..tracing.saving import save
from .parts import Parts
from .places import HEADED, PartPlace, PartValues

if TYPE_CHECKING:
    from ..model.model import NNsight
    from ..tracing.contexts import Tracer


Metric = Callable[..., torch.Tensor]


@one_run
def activations(
    model: NNsight, inputs: object, part: str = "residual", parts: Parts | None = None
) -> list[torch.Tensor]:
    """A part of every layer on a prompt: tensors (batch, length, width)."""
    found = PartValues(PartPlace(model, part, parts), [inputs])
    found.prepare([0])
    return found.held[0]


@one_run
def patch(
    model: NNsight,
    clean: object,
    corrupted: object,
    metric: Metric,
    *,
    part: str = "residual",
    over: Sequence[str] | None = None,
    layers: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
    parts: Parts | None = None,
    **options: object,
) -> Results:
    """Run `corrupted` with one place of it as it is in `clean`, for every place.

    Args:
        clean, corrupted: prompts (or tensors of several rows) of the same number of tokens; or two lists of prompts, pair by
            pair: the axis `prompt` comes first, and `reduce="mean"` averages over it.
        metric: of the logits (batch, length, vocabulary); what it returns is the result of a cell. With a parameter `prompt`
            it gets the number of the pair, too.
        part: "residual" (a layer's output), "residual_pre" (its input), "attention" and "mlp" (their outputs), "z" (what
            a head gives to the output projection), "q", "k", "v".
        over: the axes, of "layer", "position", "head"; layer and position, for "z", "q", "k", "v" layer and head. What
            is not an axis is patched whole.
        layers, positions: which; all by default. Negative positions count from the end.
        options: `store=`, `chunk=`, `progress=` and others of `model.sweep`.
    """
    _checked(model, patch, options)
    site = PartPlace(model, part, parts)
    source, items = PartValues(site, _several(model, clean)), _several(model, corrupted)
    _paired(site, source.items, items, "patch")
    other = lambda h, *at: source(*at)  # noqa: E731
    found = _write(site, corrupted, metric, over, layers, positions, other, source.prepare, options)
    return _beside(found, site, metric, {"clean": source.items, "corrupted": items}, options)


@one_run
def ablate(
    model: NNsight,
    inputs: object,
    metric: Metric,
    *,
    by: str = "zero",
    reference: object = None,
    part: str = "z",
    over: Sequence[str] | None = None,
    layers: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
    parts: Parts | None = None,
    **options: object,
) -> Results:
    """Run `inputs` without one place of it, for every place: set to zero, to its mean, or to another prompt's value.

    `by` is "zero", "mean" (over all prompts, rows and positions of `reference`, else of `inputs`) or "resample" (the value in
    `reference`, a prompt of the same length; of lists, the prompt of the same number). The rest is as in `patch`.
    """
    _checked(model, ablate, options)
    if by not in ("zero", "mean", "resample"):
        raise ValueError(f"{user_line()}: `by` is zero, mean or resample; not `{by}`.")
    if by == "resample" and reference is None:
        raise ValueError(f"{user_line()}: resample ablation takes its values from another prompt: give `reference=`.")
    site = PartPlace(model, part, parts)
    items = _several(model, inputs)
    source = PartValues(site, items if reference is None else _several(model, reference))
    prepare: Any = None
    if by == "mean":
        means = source.means()
        other = lambda h, layer, prompt: means[layer].expand(h.shape)  # noqa: E731
    elif by == "zero":
        other = lambda h, layer, prompt: torch.zeros_like(h)  # noqa: E731
    else:
        _paired(site, source.items, items, 'ablate(by="resample")')
        other, prepare = lambda h, *at: source(*at), source.prepare
    found = _write(site, inputs, metric, over, layers, positions, other, prepare, options)
    return _beside(found, site, metric, {"intact": items}, options)


@one_run
def steering(
    model: NNsight,
    inputs: object,
    metric: Metric,
    vector: torch.Tensor,
    scales: Iterable[float],
    *,
    layers: Iterable[int] | None = None,
    positions: int | slice | None = None,
    parts: Parts | None = None,
    **options: object,
) -> Results:
    """Add `scale * vector` to the residual stream behind a layer, for every layer and scale. `vector` is (width,)."""
    _checked(model, steering, options)
    site = PartPlace(model, "residual", parts)
    where = slice(None) if positions is None else positions

    measure = _measure(model, site, metric)

    def body(tracer: Tracer, layer: int, scale: float, prompt: int = 0) -> torch.Tensor:
        h = site.value(layer)
        h[:, where] = h[:, where] + tracer.constant(float(scale)).to(vector.dtype) * vector
        return measure(prompt)

    chosen = list(range(site.layers) if layers is None else layers)
    found = model.sweep(body, inputs, {"layer": chosen, "scale": list(scales)}, **options)
    return _beside(found, site, metric, {"unsteered": _several(model, inputs)}, options)


@one_run
def attribution(
    model: NNsight,
    clean: object,
    corrupted: object,
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
    site = PartPlace(model, part, parts)
    _paired(site, [clean], [corrupted], "attribution")
    there, here = activations(model, clean, part, parts), activations(model, corrupted, part, parts)
    _same_shape(there, here)
    ends = [activations(model, x, "residual_pre", parts)[0] for x in (corrupted, clean)]
    total = [torch.zeros_like(h) for h in here]
    start = PartPlace(model, "residual_pre", parts)
    for step in range(steps):
        with model.trace(corrupted):
            entry = start.value(0)
            if step:
                entry[:] = torch.lerp(ends[0], ends[1], step / steps)
            entry.requires_grad_()
            values = [site.value(layer) for layer in range(site.layers)]
            result = metric(model.get(site.table.unembed).output).sum()
            grads = [save(g) for g in torch.autograd.grad(result, values)]
        total = [t + g / steps for t, g in zip(total, grads, strict=True)]
    scores = torch.stack([(a - b) * g for a, b, g in zip(there, here, total, strict=True)]).sum(
        1
    )  # layer, length, width
    scores = scores[..., site.columns(scores.shape[-1], None)]
    scores = scores.unflatten(-1, (site.heads, -1)).sum((1, -1)) if part in HEADED else scores.sum(-1)
    axes = {"layer": range(site.layers), site.axes[1]: range(scores.shape[1])}
    return Results(axes, {"result": scores.cpu()}, {"program": f"attribution of {part}"})


@one_run
def logit_lens(model: NNsight, inputs: object, *, position: int | None = -1, parts: Parts | None = None) -> Results:
    """The logits that the embeddings and each layer's output would give through the final norm and the unembedding.

    Results (nostalgebraist 2020, "interpreting GPT: the logit lens"): an axis `layer`, of "embedding" and the layers' numbers,
    then (batch, vocabulary) at one position, (batch, length, vocabulary) for `position=None`.
    """
    site = PartPlace(model, "residual", parts)
    norm, unembed = model.get(site.table.norm), model.get(site.table.unembed)
    with torch.no_grad(), model.trace(inputs):
        found = []
        for h in (
            PartPlace(model, "residual_pre", parts).value(0),
            *(site.value(layer) for layer in range(site.layers)),
        ):
            h = h if position is None else h[:, position]
            found.append(save(unembed(norm(h))))
    layers = ["embedding", *range(site.layers)]
    return Results(
        {"layer": layers}, {"result": torch.stack([f.detach().cpu() for f in found])}, {"program": "logit lens"}
    )


def _checked(model: NNsight, verb: Callable, options: dict[str, object]) -> None:
    """A misspelt keyword is told by the verb that it was written to."""
    own = {"compile", "fn", "pad_to"} | inspect.signature(sweep).parameters.keys()
    model.dispatch()
    host_of(model).check_keywords(options.get("fn"), options.keys() - own, verb.__name__, verb, sweep)


def _write(
    site: PartPlace,
    inputs: object,
    metric: Metric,
    over: Sequence[str] | None,
    layers: Iterable[int] | None,
    positions: Iterable[int] | None,
    source: Callable[[torch.Tensor, int, int], torch.Tensor],
    prepare: Callable[[list[int]], None] | None,
    options: dict,
) -> Results:
    """The sweep that writes one place of a part."""
    model, chosen = site.model, tuple(over or site.axes)
    known = ("layer", "position", "head")
    if "layer" not in chosen or not set(chosen) <= set(known) or ("head" in chosen and site.part not in HEADED):
        raise ValueError(
            f"{user_line()}: `over` is `layer`, with `position` or (for {', '.join(HEADED)}) `head`; not {chosen}."
        )
    if "position" in chosen and positions is None:
        positions = range(_length(site, _several(model, inputs)))
    every = {
        "layer": list(range(site.layers) if layers is None else layers),
        "position": list(positions or ()),
        "head": list(range(site.heads)),
    }
    measure = _measure(model, site, metric)

    def body(tracer: object, prompt: int = 0, **cell: int) -> torch.Tensor:
        here = site.value(cell["layer"])
        there = source(here, cell["layer"], prompt)
        index = site.index(here.shape[-1], cell.get("position"), cell.get("head"))
        here[index] = there[index]
        return measure(prompt)

    return model.sweep(body, inputs, {name: every[name] for name in chosen}, prepare=prepare, **options)


def _beside(found: Results, site: PartPlace, metric: Metric, runs: dict[str, list], options: dict) -> Results:
    """Add what the metric is with nothing patched, of each prompt and run, and the tokens at the positions."""
    model, measure = site.model, _measure(site.model, site, metric)
    plain = {k: v for k, v in options.items() if k not in inspect.signature(sweep).parameters}
    for name, items in runs.items():
        numbers = []
        with torch.no_grad(), model.session():
            for n, item in enumerate(items):
                args, kwargs = given(model, item)
                with model.trace(*args, compile=False, **kwargs, **plain):
                    numbers.append(save(measure(n)))
        numbers = [number.detach().cpu() for number in numbers]
        found.baselines[name] = torch.stack(numbers) if is_dataset(model, items) and len(items) > 1 else numbers[0]
    if "position" in found.over and max(map(len, runs.values())) == 1:
        texts = site.tokens(item for (item,) in runs.values())
        if texts is not None:
            found.labels["position"] = [texts[position] for position in found.over["position"]]
    return found


def _measure(model: NNsight, site: PartPlace, metric: Metric) -> Callable[[int], torch.Tensor]:
    """The metric of the logits; it gets the prompt's number where it has a parameter `prompt`."""
    takes = "prompt" in inspect.signature(metric).parameters

    def measured(prompt: int) -> torch.Tensor:
        logits = model.get(site.table.unembed).output
        found = metric(logits, prompt=prompt) if takes else metric(logits)
        return found.squeeze() if isinstance(found, torch.Tensor) and found.shape == (1,) else found

    return measured


def _several(model: NNsight, inputs: Any) -> list:
    return list(inputs) if is_dataset(model, inputs) else [inputs]


def _paired(site: PartPlace, ours: list, theirs: list, verb: str) -> None:
    """Raise a `ValueError`, before anything runs, where prompts are no pairs of the same length."""
    if len(ours) != len(theirs):
        raise ValueError(
            f"{user_line()}: {len(ours)} prompts to take values from, and {len(theirs)} to run; give pairs."
        )
    for n, pair in enumerate(zip(ours, theirs, strict=True)):
        a, b = map(site.length, pair)
        if a != b:
            which = f"pair {n} of prompts differs" if len(ours) > 1 else "the prompts differ"
            shown = " and ".join(map(_shown, pair))
            raise ValueError(
                f"{user_line()}: {which} in length, {a} tokens and {b}: {shown}. `{verb}` goes position by position: give "
                "prompts of the same number of tokens."
            )


def _shown(prompt: object) -> str:
    """A prompt in a few words: the text, or the first ids."""
    if isinstance(prompt, str):
        return reprlib.repr(prompt)
    ids = prompt.get("input_ids") if isinstance(prompt, Mapping) else prompt
    flat = torch.as_tensor(ids).flatten().tolist()
    return f"ids {', '.join(map(str, flat[:6]))}{', ...' if len(flat) > 6 else ''}"


def _length(site: PartPlace, items: list) -> int:
    lengths = [site.length(item) for item in items]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{user_line()}: the prompts have {min(lengths)} to {max(lengths)} tokens, so that a position is another place in each. Give "
            '`positions=`, negative ones from the end, or `over=("layer",)`.'
        )
    return lengths[0]


def _same_shape(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    if a[0].shape != b[0].shape:
        raise ValueError(
            f"{user_line()}: the prompts differ in shape: {tuple(a[0].shape[:2])} and {tuple(b[0].shape[:2])} (batch, tokens). "
            "`attribution` goes row by row and position by position."
        )
