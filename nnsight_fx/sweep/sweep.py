"""`model.sweep`: one body over a grid, as sessions of many traces."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..engine.clock import listening
from ..engine.request import Compile
from ..envoys.envoy import host_of
from ..generation.loop import option
from ..lines import user_line
from ..report.runs import Report, as_one
from .choice import Choice, checked
from .executors import Executor, Serial, chosen
from .job import PROMPT, SweepJob, is_dataset, look
from .results import Results
from .steps import TOKENS, missing, texts
from .store import LONG, Store, manifest

if TYPE_CHECKING:
    from ..envoys.envoy import Envoy


CHUNK = 64


def sweep(
    model: Envoy,
    fn: Callable[..., object],
    inputs: Any,
    over: Mapping[str, Iterable],
    *,
    reduce: str | None = None,
    stop: bool = False,
    prepare: Callable[[list[int]], None] | None = None,
    store: object = None,
    chunk: int | None = None,
    seed: int | None = None,
    executor: str | Executor | None = None,
    engine: str = "auto",
    progress: bool = True,
    generate: Mapping[str, object] | None = None,
    compile: Compile = None,
    **options: object,
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
            A list is a dataset: each of its inputs is a value of the axis `prompt`, the first of the grid. `fn` gets its
            number if it has a parameter `prompt`. Inputs of one length share forwards; none is padded to another's.
        over: the axes: names and their values. The grid is their product, the last axis the fastest.
        reduce: "mean" averages over the prompts; `Results.errors` are then the standard errors.
        stop: end each forward behind the last site of its body, as `tracer.stop()` does in a trace.
        prepare: called with the numbers of a chunk's prompts before these run: for what bodies need of other runs.
        store: a folder for results as they come. A sweep that was killed goes on in it, and ends with the same result.
        chunk: cells in one session, and in one file of the store; 64.
        seed: what a cell draws at random is decided by this and the cell's number. By default torch's own seed.
        executor: "devices" runs chunks on all GPUs of the machine, "ray" on a Ray cluster or a local one;
            `nnsight_fx.sweep.executors` has the objects that these stand for.
        engine: for a model that is compiled (`model.compile()`, `compile=`). "auto" runs the first cells on hooks, and compiles
            where that is likely to take less time than it saves on the rest; "compiled" and "hooks" say so beforehand.
            `model.explain()` tells which it was, and why. Both give the same numbers, but for rounding.
        progress: show a bar with cells (of generations: tokens) a second and what is left, and what it waits for: capturing, compiling.
        generate: each cell is a generation with these options of `generate`, of which `max_new_tokens` is needed; see below.
        compile: as `model.trace` takes it. Other keywords go to `model.trace`, too.

    **Generations.** With `generate=` the body is that of `model.generate`: it may loop over the steps, and returns nothing, values,
    or lists of them with one for each step. Cells with prompts of one length run as rows of one loop, on hooks, each with its own body
    in step with the others; a row leaves at its end. What cannot be a row (beams, a body that looks at a value of the forward that it is
    in) is a generation of its own, and `model.explain()` says why. Results are `tokens` (int64, the new ones, -1 behind the end), `text`
    where there is a tokenizer, and what the body returned, lists as `(..., step, ...)` with NaN behind the end. Each row samples from
    a generator of its own, decided by `seed` and the cell: alone, in any batch and on resume it draws the same.

    ```python
    def steer(tracer, layer, strength):
        for step in tracer.iter[:]:
            model.model.layers[layer].output[:] += strength * vector

    found = model.sweep(steer, prompts, over={"layer": range(4, 20, 4), "strength": [0, 2, 4]}, generate=dict(max_new_tokens=32))
    found.text                     # array of strings, (prompt, layer, strength)
    found.to_dataframe()           # one row for each cell
    ```

    Gradients are off. Returns `Results`: on the CPU, first the axes' dimensions, then those of one result.

    Whatever ends a sweep, an interrupt of yours, too, has as `.results` what the finished cells gave.

    Raises:
        StoreError: `store` holds another sweep, model, input or body.
        NotRecordableError: `fn` returns no recorded value.
        ValueError: an axis is empty, or cells differ in the shape of their results.
        WorkerLostError: a worker of an executor dies again and again.
    """
    if not isinstance(over, Mapping):
        raise TypeError(f"{user_line()}: `over` maps the names of axes to their values, and got {over!r}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{user_line()}: `chunk` is how many cells run together, at least one; it is {chunk}.")
    many = is_dataset(model, inputs)
    axes = {name: list(values) for name, values in over.items()}
    if many and PROMPT in axes:
        raise ValueError(f"{user_line()}: `{PROMPT}` is the axis of the list of inputs; give yours another name.")
    axes = {PROMPT: list(range(len(inputs))), **axes} if many else axes
    if not axes or not all(axes.values()):
        raise ValueError(f"{user_line()}: `over` needs at least one axis, and each a value; it has {{{_sizes(axes)}}}.")
    if reduce not in (None, "mean") or (reduce and not many):
        raise ValueError(f'{user_line()}: `reduce="mean"` averages over a list of inputs; it is {reduce!r} here.')
    runner = chosen(executor)
    checked(engine)
    generate = _generation(model, generate, stop)
    model.dispatch()
    items = list(inputs) if many else [inputs]
    looked = [look(model, item) for item in items]
    options = {"compile": compile, **options}
    job = SweepJob(model, fn, items, axes, options, many, prepare, stop, generate=generate)
    job.shapes, job.texts = [shapes for _, shapes, _ in looked], [text for _, _, text in looked]
    kept = None
    if store is not None:
        further = {"stop": stop} if generate is None else {"stop": stop, "generate": generate}
        about = manifest(model, (fn, prepare), [digest for digest, _, _ in looked], axes, {**options, **further})
        begun = {"seed": torch.initial_seed() if seed is None else seed, "chunk": chunk or CHUNK}
        kept, job.stored = Store(store, about | begun), True
        seed, chunk = kept.adopt("seed", seed), kept.manifest["chunk"]
    job.seed = torch.initial_seed() if seed is None else seed
    with as_one(model, "sweep", user_line()) as report:
        here = type(runner) is Serial
        choice = Choice(job, engine, report, here, None if kept is None else kept.manifest.get("ran"))
        found: dict[int, dict[str, torch.Tensor]] = {}
        try:
            failed = _run(job, job.chunks(chunk or CHUNK), kept, choice if here else runner, progress, report, found)
            if failed:
                raise failed[0]
        except BaseException as error:  # the user's interrupt, too
            if found:
                error.results = _results(model, job, axes, items, kept, found)  # type: ignore[attr-defined]
                many_of = f"{len(found)} of the sweep's {len(job.cells)} cells"
                error.add_note(f"nnsight_fx: {many_of} have their results: they are in this error's `.results`.")
            raise
        choice.settle()
        about = f"{len(job.cells)} cells" + ("" if here else f", with the executor {type(runner).__name__}")
        report.notes = [about, *report.notes]
    results = _results(model, job, axes, items, kept, found)
    return results.mean(PROMPT) if reduce else results


def _results(
    model: Envoy, job: SweepJob, axes: dict[str, list], items: list, kept: Store | None, found: dict[int, dict]
) -> Results:
    """What the cells gave, as arrays of the grid's shape. Where a cell has nothing stands NaN, or -1."""
    nothing = {name: missing(value) for name, value in next(iter(found.values())).items()}
    every = [found.get(i, nothing) for i in range(len(job.cells))]
    stacked = {name: torch.stack([each[name] for each in every]) for name in nothing}
    shape = [len(values) for values in axes.values()]
    values = {name: rows.reshape(*shape, *rows.shape[1:]) for name, rows in stacked.items()}
    prompts = [textwrap.shorten(item, LONG, placeholder="...") for item in items if isinstance(item, str)]
    labels = {PROMPT: prompts} if job.many and len(prompts) == len(items) else {}
    results = Results(axes, values, kept.manifest if kept else {}, labels=labels)
    if job.generate is not None:
        results.steps = job.by_step | {TOKENS}
        tokenizer = getattr(model, "tokenizer", None)
        results.text = None if tokenizer is None else texts(tokenizer, values[TOKENS])
    return results


def _generation(model: Envoy, given: Mapping[str, object] | None, stop: bool) -> dict | None:
    """`generate=` of a sweep, with its `max_new_tokens`."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise TypeError(f"{user_line()}: `generate` is a dict of the options of `generate`; it is {given!r}.")
    if stop:
        raise ValueError(
            f"{user_line()}: `stop=True` ends a forward behind the last site of its body, and a generation needs it whole."
        )
    host = host_of(model)
    host.check_keywords("generate", given, "generate", sweep)
    most = option(host.module, dict(given), "max_new_tokens")
    if not isinstance(most, int) or most < 1:
        what = "is missing" if most is None else f"is {most!r}"
        raise ValueError(
            f"{user_line()}: a sweep of generations needs a `max_new_tokens` of at least 1, which is its last axis; it {what}."
        )
    return {**given, "max_new_tokens": most}


def _run(
    job: SweepJob,
    chunks: list[list[int]],
    kept: Store | None,
    runner: Executor | Choice,
    progress: bool,
    report: Report,
    found: dict[int, dict[str, torch.Tensor]],
) -> list[Exception]:
    """Put the results of all cells into `found`, by number; the errors of those that failed while others did not."""
    failed: list[Exception] = []
    plans: dict[int, str] = {}
    for cells, results, digests in kept.load() if kept else ():
        found.update({i: {name: rows[n] for name, rows in results.items()} for n, i in enumerate(cells)})
        plans.update(zip(cells, digests, strict=True))
    todo = [cells for cells in chunks if not found.keys() >= set(cells)]
    total, each = len(job.cells), job.steps or 1
    runs = iter(())
    if todo:
        runs = runner.run(todo) if isinstance(runner, Choice) else runner.run(job, todo)
    with (
        tqdm(
            total=total * each,
            initial=len(found) * each,
            unit="tok" if job.steps else "cell",
            disable=not progress,
            smoothing=0.1,
        ) as bar,
        contextlib.ExitStack() as ending,
        listening(bar.set_postfix_str),
    ):
        ending.callback(getattr(runs, "close", lambda: None))  # workers end now, whatever is wrong with what they gave
        for cells, done in runs:
            report.take(done.report)
            failed += done.failed
            for cell, results in zip(cells, done.results, strict=True):
                if results is None:
                    continue
                if found:
                    _check(job, cell, results, next(iter(found.values())), next(iter(found)))
                found[cell] = results
            if kept is not None and not done.failed:
                if isinstance(runner, Choice) and runner.ran is not None and "ran" not in kept.manifest:
                    kept.folder.write(ran=runner.ran)
                rows = {name: torch.stack([found[cell][name] for cell in cells]) for name in found[cells[0]]}
                kept.put(cells, rows, done.plans)
                plans.update(zip(cells, done.plans, strict=True))
            bar.update(len(cells) * each)
    if kept is not None and not failed:
        kept.finish([plans[cell] for cell in range(total)])
    return failed


def _check(job: SweepJob, cell: int, results: dict, first: dict, of: int) -> None:
    if {n: t.shape for n, t in results.items()} != {n: t.shape for n, t in first.items()}:
        raise ValueError(
            f"{user_line()}: cell {job.named(cell)} has results {_shapes(results)}, cell {job.named(of)} {_shapes(first)}; one "
            "array holds what has one shape."
        )


def _sizes(axes: dict[str, list]) -> str:
    return ", ".join(f"{name}: {len(values)} values" for name, values in axes.items())


def _shapes(results: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in results.items())
