"""`model.vjp`, `model.jvp` and `model.jacobian`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from tqdm.auto import tqdm

from ..batching.memory import free, out_of_memory
from ..engine.linear import Tensors
from ..engine.request import Compile
from ..lines import user_line
from ..plan import tree
from .body import Kept, Side, kept

if TYPE_CHECKING:
    from ..envoys.envoy import Envoy

Structure: TypeAlias = Any  # tensors, as the body has put targets or sources together
MOST = 64  # cotangents at a time, where memory allows


def vjp(
    model: Envoy,
    fn: Callable[..., object],
    inputs: object,
    *,
    freeze: Collection[str] = (),
    chunk: int | None = None,
    progress: bool = True,
    compile: Compile = None,
    **options: object,
) -> tuple[Structure, Pullback]:
    """The targets of a body, and a function that takes cotangents back to its sources: many for one forward.

    ```python
    def body(tracer):
        sources = [layer.output for layer in model.transformer.h]
        return model.lm_head.output[:, -1], sources

    logits, pull = model.vjp(body, prompt, freeze={"attention", "norms"})
    grads = pull(torch.eye(50257)[answers].unsqueeze(1))     # (n, 1, 50257) -> for each layer (n, 1, length, width)
    ```

    Args:
        fn: `fn(tracer)` is the body of a trace, with what interventions it likes, and returns `(targets, sources)`: values of
            sites, in any structure. A target may be computed from sites, a source is a value with which the model goes on. Where
            one source lies behind another, each gets its whole derivative, as from `torch.autograd.grad`.
        inputs: what `model.trace` takes; a tuple is several arguments, a dict keywords of a plain module.
        freeze: parts that are constants in the derivative: "attention" (its patterns, which are softmaxes that multiply values), "norms"
            (what they divide by; the mean that a layer norm takes off is linear, and stays), "gates" (of a gated MLP the
            activated side). Anything that computes so is found, on hooks and in captured graphs alike (`nnsight_fx.passes.frozen`).
        chunk: cotangents that go back together. By default up to 64, fewer where memory is short; half as many when it runs out.
        progress: show a bar where there are several chunks.
        compile: as `model.trace` takes it. Other keywords go to `model.trace`, too.

    The forward runs once, up to the last target. What it kept lives as long as `pull`. No parameter gets a gradient, and nothing
    of the model changes. Captured, the derivative is one graph, compiled for each number of cotangents.

    Returns `(targets, pull)`, as `torch.func.vjp` does. The targets are detached.

    Raises:
        NotConnectedError: no target depends on a source; a source is changed in place behind its site; a frozen part is not there.
        NotRecordableError: a target or source is of integers, or no recorded value; the body looks at a value; the model draws
            random numbers (dropout in train mode).
        ValueError: an unknown name in `freeze`; `chunk` below one.
    """
    found = _kept(model, fn, inputs, freeze, chunk, compile, options)
    return found.targets.of(found.linear.values), Pullback(found, chunk, progress)


def jvp(
    model: Envoy,
    fn: Callable[..., object],
    inputs: object,
    tangents: object,
    *,
    freeze: Collection[str] = (),
    chunk: int | None = None,
    progress: bool = True,
    compile: Compile = None,
    **options: object,
) -> tuple[Structure, Structure]:
    """The targets of a body, and how they change as its sources do: tangents `(n, *source)` forward to `(n, *target)`.

    ```python
    logits, moved = model.jvp(body, prompt, directions)      # (n, batch, length, width) -> (n, batch, vocabulary)
    ```

    `tangents` have the structure of the sources, each with a dimension of its own in front. With several sources a row is one change
    of all of them; `None` for a source leaves it as it is. All else is as in `vjp`, of which this is the transpose: the derivative is
    the same graph, differentiated by its cotangents. To take many directions more than once, keep `pull` of `vjp`, and say `pull.push(tangents)`.

    Returns `(targets, changes)`, as `torch.func.jvp` does.

    Raises:
        ValueError: tangents of another structure or shape. What `vjp` raises.
    """
    found = _kept(model, fn, inputs, freeze, chunk, compile, options)
    return found.targets.of(found.linear.values), Pullback(found, chunk, progress).push(tangents)


def jacobian(
    model: Envoy,
    fn: Callable[..., object],
    inputs: object,
    *,
    freeze: Collection[str] = (),
    chunk: int | None = None,
    progress: bool = True,
    compile: Compile = None,
    **options: object,
) -> Structure:
    """The derivative of each target by each source: `(*target, *source)`, by one forward and a cotangent for each number of the targets.

    ```python
    def body(tracer):
        return model.transformer.h[11].output[0, -1], model.transformer.h[3].output

    model.jacobian(body, prompt)                             # (768, 1, length, 768)
    ```

    In the structure of the targets, and in each place of it in that of the sources, as from `torch.func.jacrev`. All else is as in `vjp`. It is
    all held at once: for targets of many numbers take rows of the identity to `pull` of `vjp`, and keep what you need of each.
    """
    found = _kept(model, fn, inputs, freeze, chunk, compile, options)
    values = found.linear.values
    sizes = [x.numel() for x in values]

    def rows(start: int, stop: int) -> Tensors:
        """Rows of the identity on all targets."""
        made, before = [], 0
        for x, size in zip(values, sizes, strict=True):
            row = x.new_zeros(stop - start, size)
            for n in range(max(start, before), min(stop, before + size)):
                row[n - start, n - before] = 1
            made.append(row.view(stop - start, *x.shape))
            before += size
        return made

    whole = _in_chunks(found, "pull", rows, sum(sizes), chunk, progress)
    parts = [x.split(sizes) for x in whole]  # source -> target
    blocks = [
        found.sources.of([part[t].reshape(*x.shape, *part[t].shape[1:]) for part in parts])
        for t, x in enumerate(values)
    ]
    return found.targets.of(blocks)


class Pullback:
    """What `model.vjp` returns beside the targets. It holds what the forward kept, and can be called any number of times."""

    def __init__(self, found: Kept, chunk: int | None, progress: bool):
        self.found, self.chunk, self.progress = found, chunk, progress

    def __call__(self, cotangents: object, *, chunk: int | None = None) -> Structure:
        """Cotangents `(n, *target)`, in the targets' structure, to gradients `(n, *source)`, in the sources'.

        With several targets a row is one cotangent of all of them; `None` for a target is zero.

        Raises:
            ValueError: another structure or shape.
        """
        return self.found.sources.of(self._many("pull", self.found.targets, cotangents, chunk))

    def push(self, tangents: object, *, chunk: int | None = None) -> Structure:
        """Tangents `(n, *source)`, in the sources' structure, to changes `(n, *target)`, in the targets'."""
        return self.found.targets.of(self._many("push", self.found.sources, tangents, chunk))

    def __repr__(self) -> str:
        shown = [", ".join(f"{n} {tuple(x[0])}" for n, x in zip(s.names, s.like, strict=True)) for s in self.found[1:]]
        return f"Pullback(from {shown[0]} to {shown[1]})"

    def _many(self, way: str, side: Side, given: object, chunk: int | None) -> Tensors:
        values = _matched(side, given, "cotangents" if way == "pull" else "tangents")
        n = len(values[0])
        return _in_chunks(self.found, way, lambda a, b: [x[a:b] for x in values], n, chunk or self.chunk, self.progress)


def _kept(
    model: Envoy,
    fn: Callable,
    inputs: object,
    freeze: Collection[str],
    chunk: int | None,
    compile: Compile,
    options: dict,
) -> Kept:
    if chunk is not None and chunk < 1:
        raise ValueError(f"{user_line()}: `chunk` is how many cotangents go together, at least one; it is {chunk}.")
    return kept(model, fn, inputs, freeze, {"compile": compile, **options})


def _matched(side: Side, given: object, what: str) -> Tensors:
    """What the user gave, leaf by leaf, each with the dimension of the rows in front."""
    whole = given if isinstance(given, torch.Tensor) else None
    leaves = [whole] if whole is not None else _leaves(side, given, what)
    if len(leaves) != len(side.names):
        raise ValueError(f"{user_line()}: {what} are for {', '.join(side.names)}, and there {_are(len(leaves))}.")
    rows = next((len(x) for x in leaves if isinstance(x, torch.Tensor) and x.dim()), None)
    made = []
    for name, (shape, dtype, device), x in zip(side.names, side.like, leaves, strict=True):
        if x is None and rows is not None:
            x = torch.zeros(rows, *shape, dtype=dtype, device=device)
        if not isinstance(x, torch.Tensor) or tuple(x.shape[1:]) != shape or len(x) != rows or not rows:
            got = f"of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else repr(x)
            hint = (
                " For a single one say `x.unsqueeze(0)`."
                if isinstance(x, torch.Tensor) and tuple(x.shape) == shape
                else ""
            )
            raise ValueError(
                f"{user_line()}: {what} for `{name}` are of shape (n, {', '.join(map(str, shape))}), n of them, the same n for all; given is {got}.{hint}"
            )
        made.append(x.detach().to(device, dtype))
    return made


def _leaves(side: Side, given: object, what: str) -> list:
    leaves, spec = tree.flatten(given)
    if spec != side.spec and not (isinstance(given, Sequence) and len(leaves) == len(side.names)):
        raise ValueError(
            f"{user_line()}: {what} have the structure that the body returned, of {len(side.names)}: {', '.join(side.names)}; given is {given!r:.80}."
        )
    return leaves


def _are(n: int) -> str:
    return f"are {n}" if n != 1 else "is one"


def _in_chunks(
    found: Kept, way: str, rows: Callable[[int, int], Tensors], n: int, chunk: int | None, progress: bool
) -> Tensors:
    """All rows through the derivative, as many at a time as fit."""
    size = min(n, chunk or _fits(found, n))
    run = found.linear.pull if way == "pull" else found.linear.push
    done: list[Tensors] = []
    at = 0
    with tqdm(total=n, unit="row", disable=not progress or size >= n) as bar:
        while at < n:
            left = -(-(n - at) // -(-(n - at) // size))  # pieces as equal as can be, the largest first
            try:
                done.append(run(rows(at, at + left)))
            except Exception as error:
                if not out_of_memory(error) or left == 1:
                    raise
                size = left // 2
                continue
            at += left
            bar.update(left)
    return done[0] if len(done) == 1 else [torch.cat(each) for each in zip(*done, strict=True)]


def _fits(found: Kept, n: int) -> int:
    """How many rows at once: a quarter of the free memory, if each takes its ends and a few values as large between them."""
    like = [*found.targets.like, *found.sources.like]
    largest = max(_bytes(x) for x in like)
    one = sum(map(_bytes, like)) + 8 * largest
    return max(1, min(n, MOST, free(like[0][2]) // 4 // max(1, one)))


def _bytes(like: tuple) -> int:
    shape, dtype, _ = like
    return torch.Size(shape).numel() * dtype.itemsize
