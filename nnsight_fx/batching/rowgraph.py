"""The captured graph of a forward over any number of rows, and what is known of each of its values."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

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
from ..plan import tree
from .rows import Mixed, Rows

PRIMES = (53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113)

_known: weakref.WeakKeyDictionary[Segment, fx.GraphModule | str] = weakref.WeakKeyDictionary()


class Captured(Exception):
    """What Dynamo would call instead of the model: a graph and its inputs. Never reaches the user."""

    def __init__(self, segment: Segment, args: tuple):
        self.segment, self.args = segment, args


def captured(host: Any, capture: Capture, fn: str | None, batch: Any, line: Any) -> tuple[Segment, list]:
    """The graph of the model over the rows of `batch`, two at least, and its inputs, for traces at `line`. Nothing runs.

    Dynamo guards it: the next batch of the kind gets the same graph. `Mixed` where the model is not one graph for any
    number of rows.
    """
    if capture.options.capture == "symbolic":
        raise Mixed("a symbolic capture is for one number of rows")
    key = (fn, host.markers.own())
    if key not in capture.rowwise:
        if host.scanner.collects():
            settle(host.module)
        key = (fn, host.markers.own())
        while len(capture.rowwise) >= ENTRIES:
            del capture.rowwise[next(iter(capture.rowwise))]
        capture.rowwise[key], _ = compat.dynamo.dynamo_compile(entry_point(host.module, fn), _backend, False, True)
    for x in tree.flatten((batch.args, batch.kwargs))[0]:
        if isinstance(x, torch.Tensor):
            compat.dynamo.any_size(x, 0)
    markers, begun = host.markers, time.perf_counter()
    outer, active.run = getattr(active, "run", None), None
    clock.say("capturing the model")
    try:
        with markers.installed(list(markers.paths), {}), compat.dynamo.capturing(len(markers.paths)):
            capture.rowwise[key](batch.args, batch.kwargs)
    except Captured as found:
        if found.segment not in capture.row_graphs:  # else Dynamo knew it
            shape = clock.shape_of((batch.args, batch.kwargs), any_rows=True)
            capture.row_graphs[found.segment] = shape
            capture.captures += 1
            capture.took(clock.CAPTURE, time.perf_counter() - begun, shape, line)
        return found.segment, list(found.args)
    except Exception as error:
        why = str(error).strip().partition("\n")[0]
        raise Mixed(f"the model is not one graph for any number of rows: {type(error).__name__}: {why}") from error
    finally:
        active.run = outer
        clock.say("")
    raise Mixed("Dynamo ran the model as it is")


def _backend(gm: fx.GraphModule, inputs: list) -> Callable:
    segment = Segment.captured(gm)

    @compat.frames.undisturbed
    def found(*args: Any) -> Any:
        raise Captured(segment, args)

    return found


def annotated(segment: Segment, args: list) -> fx.GraphModule:
    """A copy of the graph with what is known of each value for one row: `rows`, `mixed`, `bytes`, `flops`.

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
    return copy_of(found)


def copy_of(found: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph, with what its nodes are known for."""
    copied = fx.GraphModule(found, fx.Graph())
    mapping: dict[fx.Node, fx.Node] = {}
    out = copied.graph.graph_copy(found.graph, mapping)
    copied.graph.output(out)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return copied


def _annotated(segment: Segment, args: list) -> fx.GraphModule:
    gm = segment.copy()
    if not segment.pure:
        raise Mixed("the model's Python changes an object that existed before")
    sizes = {n for x in args if isinstance(x, torch.Tensor) for n in x.shape}
    rows = next(n for n in PRIMES if n not in sizes)
    mode = compat.fakes.FakeTensorMode(allow_non_fake_inputs=True)
    given, held = [], []
    for fake, arg in zip(segment.fakes, args, strict=True):
        if isinstance(fake, torch.SymInt):
            given.append(rows)
        elif isinstance(arg, torch.Tensor) and any(isinstance(n, torch.SymInt) for n in fake.shape):
            if any(isinstance(n, torch.SymInt) for n in fake.shape[1:]) or not fake.shape[0].node.expr.is_symbol:
                raise Mixed("another size than the number of rows changes with them")
            with mode:
                given.append(torch.empty([rows, *fake.shape[1:]], dtype=arg.dtype, device=arg.device))
            held.append(given[-1])
        else:
            given.append(mode.from_tensor(arg, static_shapes=True) if isinstance(arg, torch.Tensor) else arg)
    if not held:
        raise Mixed("no input of the graph holds the rows")
    follow = Rows(rows, held, sizes)
    with torch.no_grad(), mode, FlopCounterMode(display=False) as flops, follow:
        Noting(gm, follow, flops).run(*given)
    return gm


class Noting(fx.Interpreter):
    """Leaves on each node what `Rows` found, and what one row costs."""

    def __init__(self, gm: fx.GraphModule, follow: Rows, flops: FlopCounterMode):
        super().__init__(gm)
        self.follow, self.counter, self.total = follow, flops, 0

    def run_node(self, n: fx.Node) -> Any:
        rows = self.follow.rows
        value = self.env[marker_of(n).value] if n.target is site else super().run_node(n)
        total = self.counter.get_total_flops()
        n.meta["flops"], self.total = (total - self.total) / rows, total
        if isinstance(value, torch.Tensor):
            dim = self.follow.dim(value)
            if dim is not None and value.dim() and value.shape[dim] == rows:
                n.meta["rows"] = dim
            elif dim is not None:
                n.meta["mixed"] = True
            n.meta["bytes"] = value.numel() * value.element_size() / rows if dim is not None else 0
        elif n.op == "placeholder" and isinstance(value, int):
            n.meta["rows"] = "count"
        return value
