"""What the passes of one variant share: the plan, where it stands at the segment's start, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.fx as fx

from nnsight_fx.plan.keys import Value
from nnsight_fx.plan.plan import InterventionGraph
from nnsight_fx.plan.verbs import Site


class TakesConstant(NamedTuple):
    """An extra input: a lifted constant of the recording."""

    slot: int
    kind: str  # "tensor", or the kind of a number

    @property
    def number(self) -> bool:
        """Is it a lifted number?"""
        return self.kind != "tensor"


class TakesParameter(NamedTuple):
    """An extra input: a parameter or buffer of the model that the segment does not hold."""

    path: str
    name: str


class TakesMemory(NamedTuple):
    """An extra input: all of the memory that several constants lie in, of which one is in a slot."""

    slot: int


Take = TakesConstant | TakesParameter | TakesMemory | Value  # a value is one from outside the segment


@dataclass
class Progress:
    """How far a plan has come when a segment starts."""

    at: list[int]
    done: set[int]
    counts: dict[tuple[str, str], int]
    known: set[Value]  # values that earlier segments or live sites have made
    skipped: dict[Site, dict[int, tuple]] = field(default_factory=dict)


@dataclass
class CutSite:
    """A site at which a segment is cut in two, because the plan needs real values there."""

    site: Site
    last: int  # index, in the pristine graph, of the site's last marker
    leaves: list  # the values of the site's leaves so far (`None` where a leaf is no tensor)
    written: dict[fx.Node, object] = field(default_factory=dict)  # marker -> what the model goes on with


@dataclass
class Job:
    """The compile job of one variant of a segment."""

    plan: InterventionGraph
    entry: Progress
    closed: bool = True  # is the plan whole
    raw_numbers: bool = False  # give lifted numbers as Python numbers (a backend that runs the graph as it is)
    skeleton: Callable[[str], object] | None = None  # the structure of a module, to call it on values
    half: frozenset = frozenset()  # the sites that the plan replaced while Dynamo traced
    lines: Sequence = ()  # where each operation was written
    modes: object = None  # the modes that the trace was opened under
    begun: bool = False  # did the run begin before the plan was complete? Then a stop cuts the segment
    removes: bool = False  # are skips and stops made in this graph, and not while Dynamo traces
    unread: bool = False  # does nobody take what the model returns
    emitted: set[fx.Node] = field(default_factory=set)
    takes: list[Take] = field(default_factory=list)  # extra inputs
    gives: list[Value] = field(default_factory=list)  # extra outputs
    # What lies in the memory of an input, of the segment's own (its number) or an extra one, and how it is a view of that.
    aliases: dict[Take, tuple[int | Take, tuple | None]] = field(default_factory=dict)
    exports: dict[Value, fx.Node] = field(default_factory=dict)
    exit: Any = None  # the interleaver after the segment
    cut: CutSite | None = None
    stop: fx.Node | None = None  # the last marker of the site at which the plan stops the model
    removed: set[Site | None] = field(default_factory=set)  # the skips that were made, and `None` for the stop
    inputs: Callable[[], list] | None = None  # the fakes of all inputs, for passes that trace
    differentiates: bool = False  # may a backward be part of this graph
    requires: list[bool] | None = None  # which outputs eager would have on the autograd graph that a backward has freed
    accumulates: list[int] = field(default_factory=list)  # of which inputs the further outputs are gradients
    linear: Any = None  # the derivative, of a plan that keeps it: `passes.linearize.Derivative`
    blocks: list[fx.Node] = field(default_factory=list)  # the nodes with which the model's equal blocks begin
    whole: str | None = None  # why it was compiled in one piece, where blocks could have been
    own: int = 0  # how many outputs are the segment's own
    report: list[tuple[str, int, int]] = field(default_factory=list)  # pass, rewrites, nodes after

    def keeps_graph(self, node: fx.Node) -> bool:
        """Does a `backward` leave the autograd graph as it was?"""
        return bool(node.args[3]["retain_graph"])  # type: ignore[index, call-overload]


class NotDifferentiable(Exception):
    """A backward that cannot be part of a captured graph; the hook engine runs it. Never reaches the user."""


class Unfit(Exception):
    """A plan's skips and stops cannot be made in the shared graph. Never reaches the user."""


def tap(x: object, n: int) -> object:
    """A value whose gradient is asked for, before `differentiate`."""
    raise RuntimeError("lowered by differentiate")


def backward(loss: object, weight: object, taps: tuple, options: dict, only: bool) -> object:
    """A backward of the body, before `differentiate`."""
    raise RuntimeError("lowered by differentiate")


def gradient(back: object, tapped: object) -> Any:
    """What a tap got in a backward, before `differentiate`."""
    raise RuntimeError("lowered by differentiate")


def set_gradient(got: object, new: object) -> object:
    """What flows on in place of a gradient, before `differentiate`."""
    raise RuntimeError("lowered by differentiate")


def settled(back: object) -> object:
    """The end of what runs while a backward does, before `differentiate`."""
    raise RuntimeError("lowered by differentiate")


def source(x: object, op: int, leaf: int) -> object:
    """A value by which the forward is differentiated, where the model goes on with it, before `linearize`."""
    raise RuntimeError("lowered by linearize")


def linear(targets: tuple, sources: tuple, freeze: tuple[str, ...]) -> object:
    """Where the derivative of the forward is kept, before `linearize`."""
    raise RuntimeError("lowered by linearize")


def constant(slot: int, kind: str) -> Any:
    """A lifted constant of the recording, before `lift_constants`."""
    raise RuntimeError("lowered by lift_constants")


def fetch(op: int, leaf: int) -> object:
    """A value from outside the segment, before `lift_constants`."""
    raise RuntimeError("lowered by lift_constants")


def parameter(path: str, name: str) -> object:
    """A parameter or buffer of the model that the segment does not hold, before `lift_constants`."""
    raise RuntimeError("lowered by lift_constants")


def rows(x: Any, start: int, size: int, total: int, batched: bool | None) -> Any:
    """An invoke's rows of a leaf, before `narrow`."""
    raise RuntimeError("lowered by narrow")


def select(holds: object, new: object, old: object) -> object:
    """`new` where a condition holds, before `conditional`."""
    raise RuntimeError("lowered by conditional")


def put_rows(x: object, new: object, start: int, size: int, total: int, batched: bool | None) -> Any:
    """A leaf with an invoke's rows replaced, before `narrow`."""
    raise RuntimeError("lowered by narrow")
