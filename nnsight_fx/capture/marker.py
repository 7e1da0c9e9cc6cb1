"""The marker node: the seam at which interventions enter captured code, and the one schema of its arguments.

While a model is captured, a hooked module passes each tensor of its inputs and outputs through `site`, an identity that
becomes a graph node. `supply` stands where the plan puts a tensor that the model did not have. Passes learn what a node
says from `marker_of`; nothing else knows the order of its arguments.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ..plan.verbs import Site

active = threading.local()  # .run: the run that this thread's markers belong to; .capture: what Dynamo traces for
WHOLE = 2  # `Marker.last` of a tensor that is the value itself: the last, and the only one


def site(x: torch.Tensor, path: str, kind: str, leaf: int, left: int) -> torch.Tensor:
    """Tensor leaf `leaf` of a site; how many tensors of the value are left, with this one. A graph node; identity.

    Where nobody has counted them `left` is 0, -1, -2, ...; of a tensor that is the value itself it is True. In the graph of a
    segment `close` has made it `last`: False, True, or `WHOLE`.
    """
    capture = getattr(active, "capture", None)
    return x if capture is None else capture.fake_site(x, path, kind, leaf, left)


def anchor() -> torch.Tensor:
    """What a marker passes where a site has no tensor. A graph node."""
    capture = getattr(active, "capture", None)
    return torch.empty(0) if capture is None else capture.fake_anchor()


def supply(path: str, kind: str, call: int, leaf: int) -> torch.Tensor:
    """A tensor that the plan puts where the model had none of this kind. A graph node."""
    return active.capture.fake_supply(path, kind, call, leaf)


def taken(path: str, kind: str, call: int) -> bool:
    """Has the plan replaced this site, or skipped this call, when the model comes by? Not where it waits for a later site.

    A constant to Dynamo (`Capture` says so, since saying it imports Dynamo)."""
    return active.capture.taken((path, kind, call))


@dataclass(frozen=True, slots=True)
class Marker:
    """What a marker node says: which tensor it is of the value at a site."""

    path: str
    kind: str
    leaf: int
    value: Any = None  # of a `site`: the node whose tensor goes through
    last: Any = False  # of a `site`: is it the last of its value (`WHOLE`: the only one, and the value itself)
    call: int | None = None  # of a `supply`: which call of the module; a `site` is counted

    @property
    def name(self) -> tuple[str, str]:
        """The site without the number of its call."""
        return self.path, self.kind

    @property
    def site(self) -> Site:
        """The site of a `supply`."""
        assert self.call is not None
        return self.path, self.kind, self.call

    def arguments(self, value: fx.Node) -> tuple:
        """The arguments of a `site` node that says the same of another value."""
        return value, self.path, self.kind, self.leaf, self.last


def marker_of(node: fx.Node) -> Marker:
    """What a `site` or `supply` node says."""
    args: tuple = node.args
    if node.target is supply:
        path, kind, call, leaf = args
        return Marker(path, kind, leaf, call=call)
    value, path, kind, leaf, last = args
    return Marker(path, kind, leaf, value, last)


def is_marker(node: object) -> bool:
    """Is it a `site` node?"""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is site


def pass_through(node: fx.Node, value: fx.Node) -> None:
    """Let another value go through a `site` node."""
    node.update_arg(0, value)


def close(graph: fx.Graph) -> None:
    """Say of each marker of a graph that has arrived whether it is the last of its value.

    ```
    site(a, "l", "input", 0, 0)           site(a, "l", "input", 0, False)
    site(b, "l", "input", 2, -1)    ->    site(b, "l", "input", 2, True)
    site(c, "m", "input", 0, 1)           site(c, "m", "input", 0, True)
    site(d, "m", "output", 0, True)       site(d, "m", "output", 0, WHOLE)
    ```
    """
    begins = True  # does the marker behind this one begin a value
    for node in reversed(graph.find_nodes(op="call_function", target=site)):
        left = marker_of(node).last
        node.update_arg(4, WHOLE if left is True else left == 1 if left > 0 else begins)
        begins = left >= 0
