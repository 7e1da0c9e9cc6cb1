"""`model.sweep`: one body over a grid, as sessions of many traces."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import NotRecordableError
from ..tracing.lazy import LazyTensor, user_line
from .results import Results
from .store import Store, manifest

Cell = tuple[int, tuple]  # its index in the grid, and its values


def sweep(
    model: Any,
    fn: Callable[..., Any],
    inputs: Any,
    over: Mapping[str, Iterable],
    *,
    store: Any = None,
    chunk: int = 64,
    progress: bool = True,
    compile: Any = None,
    **options: Any,
) -> Results:
    """Run `fn` as the body of a trace for every cell of a grid.

    ```python
    def patch(tracer, layer, position):
        model.transformer.h[layer].output[:, position] = clean[layer][:, position]
        return logit_difference(model.lm_head.output[:, -1])

    found = model.sweep(patch, corrupted, over={"layer": range(12), "position": range(14)}, store="runs/ioi")
    found.array.sel(layer=3)                 # xarray, labelled
    found.heatmap("ioi.png", bar="recovered")
    ```

    Args:
        fn: `fn(tracer, *cell)`, with the cell's values in the order of `over`, or by name where its parameters have them.
            Returns a recorded value, or a dict of them: the results, which are saved for it. All cells give the same
            names and shapes.
        inputs: what `model.trace` takes, each time the same; a tuple is several arguments, a dict keywords of a plain module.
        over: the axes: names and their values. The grid is their product, the last axis the fastest.
        store: a folder for results as they come. A sweep that was killed goes on in it, and ends with the same result.
        chunk: cells in one session, and in one file of the store.
        progress: show a bar with cells a second and what is left.
        compile: as `model.trace` takes it. Other keywords go to `model.trace`, too.

    Gradients are off. Returns `Results`: on the CPU, first the axes' dimensions, then those of one result.

    Raises:
        StoreError: `store` holds another sweep, model, input or body.
        NotRecordableError: `fn` returns no recorded value.
        ValueError: an axis is empty, or cells differ in the shape of their results.
    """
    axes = {name: list(values) for name, values in over.items()}
    if not axes or not all(axes.values()):
        raise ValueError(f"{user_line()}: `over` needs at least one axis, and each a value; it has {{{_sizes(axes)}}}.")
    cells = list(enumerate(itertools.product(*axes.values())))
    call = _by_name(fn, tuple(axes))
    about = manifest(model, fn, inputs, axes)
    kept = Store(store, about) if store is not None else None
    found: dict[int, dict[str, torch.Tensor]] = {}
    for indices, results in kept.load() if kept else ():
        found.update({i: {name: rows[n] for name, rows in results.items()} for n, i in enumerate(indices)})
    todo = [cell for cell in cells if cell[0] not in found]
    with tqdm(
        total=len(cells), initial=len(cells) - len(todo), unit="cell", disable=not progress, smoothing=0.1
    ) as bar:
        for some in _chunks(todo, chunk):
            results = _run(model, call, inputs, axes, some, {"compile": compile, **options})
            if kept is not None:
                kept.put([i for i, _ in some], {name: torch.stack([r[name] for r in results]) for name in results[0]})
            found.update(zip((i for i, _ in some), results, strict=True))
            bar.update(len(some))
    shape = [len(values) for values in axes.values()]
    first = found[0]
    for i, values in cells:
        if {n: t.shape for n, t in found[i].items()} != {n: t.shape for n, t in first.items()}:
            raise ValueError(
                f"{user_line()}: cell {_named(axes, values)} has results {_shapes(found[i])}, the first cell {_shapes(first)}; one "
                "array holds what has one shape."
            )
    stacked = {name: torch.stack([found[i][name] for i, _ in cells]) for name in first}
    return Results(
        axes, {n: t.reshape(*shape, *t.shape[1:]) for n, t in stacked.items()}, kept.manifest if kept else about
    )


def _run(
    model: Any, call: Any, inputs: Any, axes: dict, cells: list[Cell], options: dict
) -> list[dict[str, torch.Tensor]]:
    """The results of some cells, in one session."""
    args, kwargs = _given(model, inputs)
    saved: list[dict[str, Any]] = []
    with torch.no_grad(), model.session():
        for _, values in cells:
            with _cell(axes, values), model.trace(*args, **kwargs, **options) as tracer:
                saved.append(_saved(call(tracer, values)))
    return [{name: value.detach().cpu() for name, value in each.items()} for each in saved]


@contextlib.contextmanager
def _cell(axes: dict, values: tuple) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"nnsight_fx: in the sweep's cell {_named(axes, values)}")
        raise


def _saved(result: Any) -> dict[str, Any]:
    """What a body returned, by name, saved."""
    named = dict(result) if isinstance(result, Mapping) else {"result": result}
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise NotRecordableError(
                f"{user_line()}: a sweep's body returns its result, a recorded value or a dict of them; `{name}` is a "
                f"{type(value).__name__}. End the body with `return model.lm_head.output[:, -1]`, say."
            )
        if isinstance(value, LazyTensor):
            value.save()
    return named


def _given(model: Any, inputs: Any) -> tuple[tuple, dict]:
    if isinstance(inputs, tuple):
        return inputs, {}
    if isinstance(inputs, dict) and not hasattr(model, "tokenizer"):
        return (), inputs
    return (inputs,), {}


def _by_name(fn: Callable, names: tuple[str, ...]) -> Callable[[Any, tuple], Any]:
    """`fn` with a cell's values in its own order, where its parameters are named as the axes are."""
    try:
        own = list(inspect.signature(fn).parameters)[1:]
    except (TypeError, ValueError):
        own = []
    if set(names) <= set(own):
        return lambda tracer, values: fn(tracer, **dict(zip(names, values, strict=True)))
    return lambda tracer, values: fn(tracer, *values)


def _chunks(cells: Sequence[Cell], size: int) -> Iterator[list[Cell]]:
    for start in range(0, len(cells), max(1, size)):
        yield list(cells[start : start + max(1, size)])


def _named(axes: dict, values: tuple) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in zip(axes, values, strict=True))


def _sizes(axes: dict[str, list]) -> str:
    return ", ".join(f"{name}: {len(values)} values" for name, values in axes.items())


def _shapes(results: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in results.items())
