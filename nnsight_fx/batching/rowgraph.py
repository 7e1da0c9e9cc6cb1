"""The captured graph of a forward over any number of rows, and what is known of each of its values."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch.utils.flop_counter import FlopCounterMode

from .. import compat
from ..capture.marker import active, marker_of, site
from ..capture.segment import Segment
from ..compat.transformers import settle
from ..engine import clock
from ..engine.captured.capture import Capture
from ..engine.captured.entries import ENTRIES, entry_point
from ..passes.cost import Cost
from ..plan import tree
from .rows import Mixed, Rows

PRIMES = (53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113)
SMALLER = (47, 43, 41, 37, 31, 29, 23, 19, 17, 13, 11, 7, 5)  # where there may not be so many tokens

_known: weakref.WeakKeyDictionary[Segment, fx.GraphModule | str] = weakref.WeakKeyDictionary()


class Captured(Exception):
    """What Dynamo would call instead of the model: a graph and its inputs. Never reaches the user."""

    def __init__(self, segment: Segment, args: tuple):
        self.segment, self.args = segment, args


def captured(
    host: Any, capture: Capture, fn: str | None, batch: Any, line: object, vary: bool = False
) -> tuple[Segment, list]:
    """The graph of the model over the rows of `batch`, two at least, and its inputs, for traces at `line`. Nothing runs.

    Dynamo guards it: the next batch of the kind gets the same graph. With `vary` it holds for any number of tokens, too,
    from two on, where the model's Python does not look at that number. `Mixed` where the model is not one graph for any
    number of rows.
    """
    if capture.options.capture == "symbolic":
        raise Mixed("a symbolic capture is for one number of rows")
    key = (fn, vary, host.markers.own())
    if key not in capture.rowwise:
        if host.scanner.collects():
            settle(host.module)
        key = (fn, vary, host.markers.own())
        while len(capture.rowwise) >= ENTRIES:
            del capture.rowwise[next(iter(capture.rowwise))]
        capture.rowwise[key], _ = compat.dynamo.dynamo_compile(entry_point(host.module, fn), _backend, False, True)
    for x in tree.flatten((batch.args, batch.kwargs))[0]:
        if isinstance(x, torch.Tensor):
            compat.dynamo.any_size(x, 0)
    if vary:
        batch.let_lengths_vary()
    markers, begun = host.markers, time.perf_counter()
    outer, active.run = getattr(active, "run", None), None
    told, inside = clock.doing("capturing the model"), compat.dynamo.capturing(len(markers.paths))
    try:
        with told, markers.installed(list(markers.paths), {}), inside:
            capture.rowwise[key](batch.args, batch.kwargs)
    except Captured as found:
        if found.segment not in capture.row_graphs:  # else Dynamo knew it
            shape = _shape(found.segment)
            capture.row_graphs[found.segment] = shape
            capture.captures += 1
            capture.took(clock.CAPTURE, time.perf_counter() - begun, shape, line)
        return found.segment, list(found.args)
    except Exception as error:
        why = str(error).strip().partition("\n")[0]
        raise Mixed(f"the model is not one graph for any number of rows: {type(error).__name__}: {why}") from error
    finally:
        active.run = outer
    raise Mixed("Dynamo ran the model as it is")


def _backend(gm: fx.GraphModule, inputs: list) -> Callable:
    segment = Segment.captured(gm)

    @compat.frames.undisturbed
    def found(*args: object) -> Any:
        raise Captured(segment, args)

    return found


def annotated(segment: Segment, args: list) -> fx.GraphModule:
    """The graph with what is known of each value for one row: `rows`, `mixed`, `bytes`, `flops`. It is not to be changed.

    `Mixed` where rows are not apart in it.
    """
    if segment not in _known:
        try:
            _known[segment] = _annotated(segment, args)
        except Mixed as why:
            _known[segment] = str(why).partition("\n")[0]  # fx tells of its node below
        except Exception as error:
            why = str(error).partition("\n")[0]
            _known[segment] = f"the graph cannot be followed: {type(error).__name__}: {why}"
    found = _known[segment]
    if isinstance(found, str):
        raise Mixed(found)
    return found


def lengths(segment: Segment) -> set:
    """The symbols that stand for the number of tokens in a graph: sizes of its inputs behind dimension 0."""
    shapes = [fake.shape[1:] for fake in segment.fakes if isinstance(fake, torch.Tensor)]
    return {s for shape in shapes for n in shape for s in compat.symbols.symbols_of(n)}


def _fixed(segment: Segment) -> set[int]:
    """The sizes of its inputs that are no symbols."""
    found = (compat.symbols.size_at(n, {}) for x in segment.fakes if isinstance(x, torch.Tensor) for n in x.shape)
    return {n for n in found if n is not None}


def _shape(segment: Segment) -> str:
    """Of what inputs a graph is: `any x 14`; `any x any`."""
    numbers = (x for x in segment.fakes if isinstance(x, torch.Tensor))
    sizes = ([str(compat.symbols.size_at(n, {}) or "any") for n in x.shape] for x in numbers)
    found = dict.fromkeys(" x ".join(each) for each in sizes if each[:1] == ["any"])
    return ", ".join(found) or "no tensor"


def _annotated(segment: Segment, args: list) -> fx.GraphModule:
    """What is known of each value is found by a run on fakes, with some number of rows. Where the length is a symbol it is
    two numbers in turn, and what is found must be the same."""
    if not segment.pure:
        raise Mixed("the model's Python changes an object that existed before")
    gm = segment.copy()
    many = lengths(segment)
    numbers = _numbers(segment, many)
    runs = [_noted(gm, segment, args, each, many) for each in numbers]
    for n in gm.graph.nodes:
        a, b = runs[0][n], runs[-1][n]
        if (a.rows, a.mixed) != (b.rows, b.mixed):
            raise Mixed(f"where the rows are in `{n.name}` depends on the number of tokens")
        n.meta |= {name: value for name, value in (("rows", a.rows), ("mixed", a.mixed)) if value is not None}
        n.meta |= {"flops": Cost.of(a.flops, b.flops)}
        n.meta |= {} if a.bytes is None or b.bytes is None else {"bytes": Cost.of(a.bytes, b.bytes)}
    gm.meta["lengths"] = [{s: each[s] for s in many} for each in numbers]
    return gm


def _numbers(segment: Segment, many: set) -> list[dict]:
    """Numbers for the symbols of a graph, in which rows and lengths are unlike all else, and that its guards allow: one set
    of them, or two where the length is a symbol."""
    fakes = [x for x in segment.fakes if isinstance(x, torch.Tensor)]
    several = {s for x in fakes if x.dim() for s in compat.symbols.symbols_of(x.shape[0])}
    several |= {s for x in segment.fakes for s in compat.symbols.symbols_of(x) if isinstance(x, torch.SymInt)} - many
    if several & many:
        raise Mixed("the number of rows and that of tokens are one size in it")
    sizes = _fixed(segment)
    rows = next(n for n in PRIMES if n not in sizes)
    if not many:
        return [dict.fromkeys(several, rows)]
    found: list[dict] = []
    for n in (*PRIMES, *SMALLER):
        numbers = dict.fromkeys(several, rows) | dict.fromkeys(many, n)
        if n not in sizes and n != rows and compat.symbols.may_be(segment.context, numbers):
            found.append(numbers)
        if len(found) == 2:
            return found
    raise Mixed("its guards allow too few numbers of tokens")


class Note(NamedTuple):
    """What a run has found of a node, and what one row of it costs at so many positions."""

    rows: int | str | None
    mixed: bool | None
    flops: tuple[float, int]
    bytes: tuple[float, int] | None


def _noted(gm: fx.GraphModule, segment: Segment, args: list, numbers: dict, many: set) -> dict[fx.Node, Note]:
    """What one run finds of each node, with these numbers for the symbols."""
    rows = next((n for s, n in numbers.items() if s not in many), 0)
    count = next((numbers[s] for s in many), 1)
    sizes = _fixed(segment)
    mode = compat.fakes.FakeTensorMode(allow_non_fake_inputs=True)
    given, held = [], []
    for fake, arg in zip(segment.fakes, args, strict=True):
        if isinstance(fake, torch.SymInt):
            given.append(_number(fake, numbers))
        elif isinstance(arg, torch.Tensor) and any(isinstance(n, torch.SymInt) for n in fake.shape):
            if (
                any(compat.symbols.symbols_of(n) - many for n in fake.shape[1:])
                or _number(fake.shape[0], numbers) != rows
            ):
                raise Mixed("another size than the number of rows changes with them")
            with mode:
                shape = [_number(n, numbers) for n in fake.shape]
                given.append(torch.empty(shape, dtype=arg.dtype, device=arg.device))
            held.append(given[-1])
        else:
            given.append(mode.from_tensor(arg, static_shapes=True) if isinstance(arg, torch.Tensor) else arg)
    if not held:
        raise Mixed("no input of the graph holds the rows")
    follow = Rows(rows, held, sizes | {count})
    with torch.no_grad(), mode, FlopCounterMode(display=False) as flops, follow:
        run = Noting(gm, follow, flops, count)
        run.run(*given)
    return run.notes


def _number(size: int | torch.SymInt, numbers: dict) -> int:
    found = compat.symbols.size_at(size, numbers)
    if found is None:
        raise Mixed("another size than the number of rows changes with them")
    return found


class Noting(fx.Interpreter):
    """Notes of each node what `Rows` found, and what one row costs."""

    def __init__(self, gm: fx.GraphModule, follow: Rows, flops: FlopCounterMode, positions: int):
        super().__init__(gm)
        self.follow, self.counter, self.total, self.positions = follow, flops, 0, positions
        self.notes: dict[fx.Node, Note] = {}

    def run_node(self, n: fx.Node) -> object:
        rows, mixed, size = self.follow.rows, None, None
        value = self.env[marker_of(n).value] if n.target is site else super().run_node(n)
        total = self.counter.get_total_flops()
        spent, self.total = (total - self.total) / rows, total
        where: int | str | None = None
        if isinstance(value, torch.Tensor):
            dim = self.follow.dim(value)
            if dim is not None and value.dim() and value.shape[dim] == rows:
                where = dim
            elif dim is not None:
                mixed = True
            size = value.numel() * value.element_size() / rows if dim is not None else 0
        elif n.op == "placeholder" and isinstance(value, int) and value == rows:
            where = "count"
        self.notes[n] = Note(where, mixed, (spent, self.positions), None if size is None else (size, self.positions))
        return value
