"""What Hypothesis draws: nets, and programs that mostly run on them.

A program walks along the sites that a forward passes (`Net.places`), in order, with a step back now and then: then most of
what is drawn is legal, and what is not is an error on which both engines agree.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from .compare import ROUNDS, Case
from .nets import AGAIN, LAYERS, PACKS, Net, Place
from .verbs import (
    IN_PLACE,
    PURE,
    VIEWS,
    Apply,
    Augment,
    Backward,
    Barrier,
    Body,
    Call,
    Grad,
    If,
    InPlace,
    Item,
    Program,
    Pure,
    Read,
    Result,
    Save,
    SaveWhole,
    Skip,
    Stop,
    View,
    Write,
)

BASE = {"read": 6, "write": 3, "augment": 2, "pure": 5, "view": 3, "in place": 4, "save": 4, "whole": 1, "call": 1}
THEMES: dict[str, dict[str, int]] = {
    "values": BASE,
    "control": BASE | {"skip": 4, "stop": 2},
    "looks": BASE | {"if": 3, "item": 2, "apply": 2},
    "invokes": BASE | {"barrier": 1, "if": 1, "stop": 1},
    "gradients": BASE | {"in place": 2, "grad": 5, "view": 1},
}

PER_CASE = 4  # programs that run on one model, one after the other

layer = st.sampled_from([*LAYERS, AGAIN])
age = st.integers(1, 4)
slot = st.integers(0, 2)


@st.composite
def nets(draw: Any, theme: str) -> Net:
    layers = draw(st.lists(layer, min_size=1, max_size=3))
    if layers[0] == AGAIN:
        layers[0] = "linear"
    grad = theme == "gradients" or draw(st.integers(0, 3)) == 3
    dynamic = draw(st.sampled_from([True, True, True, None]))  # one capture for all shapes is half of the time
    return Net(tuple(layers), draw(st.booleans()), grad, dynamic, draw(st.booleans()))


class Walk:
    """Where a body stands among the sites."""

    def __init__(self, draw: Any, theme: str, net: Net, places: list[Place]):
        self.draw, self.theme, self.net, self.places, self.at = draw, theme, net, places, 0
        self.values = 0

    def place(self, where: Any = lambda place: True) -> Place | None:
        """A site from here on; seldom one before."""
        back = self.draw(st.integers(0, 12)) == 12
        ahead = [i for i, p in enumerate(self.places) if where(p) and (back or i >= self.at)]
        if not ahead:
            return None
        i = ahead[self.draw(st.integers(0, min(len(ahead) - 1, len(ahead) if back else 4)))]
        self.at = max(self.at, i)
        return self.places[i]

    def value(self) -> int:
        return self.draw(age)

    def op(self, verb: str, depth: int = 0) -> Any:
        draw = self.draw
        if verb == "read" or not self.values:
            place = self.place()
            self.values += 1
            return place and Read(place)
        if verb == "write":
            a, fits, place = self.value(), draw(st.integers(0, 9)) < 9, self.place()
            return place and Write(place, a, fits)
        if verb == "augment":
            place = self.place()
            return place and Augment(place, draw(slot), draw(st.booleans()))
        if verb == "whole":
            place = self.place(lambda p: p.leaf is not None)
            return place and SaveWhole(place._replace(leaf=None))
        if verb == "pure":
            return Pure(draw(st.sampled_from(list(PURE))), self.value(), self.value(), draw(slot))
        if verb == "view":
            return View(draw(st.sampled_from(list(VIEWS))), self.value(), draw(slot))
        if verb == "in place":
            return InPlace(draw(st.sampled_from(list(IN_PLACE))), self.value(), self.value(), draw(slot))
        if verb == "save":
            return Save(self.value())
        if verb == "call":
            paths = sorted({p.path for p in self.places if p.kind == "output" and p.leaf is None and p.path})
            return Call(draw(st.sampled_from(paths)), self.value())
        if verb == "skip":
            return self.skip()
        if verb == "if":
            inner = [v for v in THEMES["values"] if v != "whole"] + ["item"] * (depth == 0)
            at = self.at
            then = self.ops(inner, 1, 3, depth + 1)
            self.at, at = at, self.at
            orelse = self.ops(inner, 0, 2, depth + 1)
            self.at = max(at, self.at)
            return If(self.value(), draw(slot), then, orelse)
        if verb == "item":
            return Item(self.value(), self.value())
        if verb == "apply":
            return Apply(self.value())
        if verb == "barrier":
            return Barrier()
        if verb == "grad":
            return Grad(self.value() if depth else 1, draw(st.one_of(st.none(), slot)))
        raise AssertionError(verb)

    def skip(self) -> Skip | None:
        a, place = self.value(), self.place(lambda p: p.kind == "input" and p.path)
        if place is None:
            return None
        name = self.net.layers[int(place.path.split(".")[1])] if place.path.endswith(".part") else None
        self.at = max(self.at, self.behind(place))
        return Skip(place, a, name if name in PACKS else None)

    def behind(self, place: Place) -> int:
        """Where the module has returned."""
        return next(i for i, p in enumerate(self.places) if p[:3] == (place.path, "output", place.call))

    def ops(self, verbs: list[str], least: int, most: int, depth: int = 0) -> tuple:
        made = []
        for _ in range(self.draw(st.integers(least, most))):
            verb = self.draw(st.sampled_from(verbs))
            if verb == "grad" and not depth:  # of what the model itself goes on with, mostly
                made.append(self.op("read"))
            made.append(self.op(verb, depth))
        return tuple(op for op in made if op is not None)

    def body(self, rows: int, first: tuple = (), fresh: bool = False) -> Body:
        draw = self.draw
        self.values *= not fresh
        verbs = [v for v, weight in THEMES[self.theme].items() for _ in range(weight) if v != "stop"]
        ops = first + self.ops(verbs, 2, 9)
        if self.theme == "gradients":
            ops += self.backward()
        elif draw(st.integers(0, 19)) < THEMES[self.theme].get("stop", 0):
            ops += (Stop(),)
        if draw(st.booleans()):
            ops += (Save(self.value()),)
        if "Stop" not in map(lambda op: type(op).__name__, ops) and draw(st.integers(0, 3)):
            ops += (Result(),)
        return Body(ops, rows, cache=draw(st.integers(0, 7)) == 7, fresh=fresh)

    def backward(self) -> tuple:
        draw = self.draw
        twice = draw(st.integers(0, 3)) == 3
        inner = ("grad", "pure", "save", "in place")
        around = self.ops([*inner], 0, 3, depth=1)
        ops = (Read(self.places[-1]), Backward(1, around, retain=twice))
        return (*ops, Backward(1)) if twice else ops


@st.composite
def programs(draw: Any, theme: str, net: Net, places: list[Place]) -> Program:
    if theme != "invokes":
        return Program((Walk(draw, theme, net, places).body(2),))
    rows = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3)))]
    together = draw(st.booleans())
    walk, bodies, skips = Walk(draw, theme, net, places), [], draw(st.integers(0, 3)) == 3
    for n in rows:
        walk.at, first = 0, ()
        if skips:  # all invokes or none
            skip = bodies[0].ops[1] if bodies else walk.skip()
            first, walk.at = (Read(skip.place), skip), walk.behind(skip.place)
        bodies.append(walk.body(n, first, fresh=draw(st.integers(0, 2)) < 2))
    looks = any(type(op) in (If, Item, Apply) for body in bodies for op in body.ops)
    if not looks and draw(st.integers(0, 3)) == 3:
        walk.at = len(places) // 2  # what it uses of the others is there by then
        bodies.append(walk.body(0))
    return Program(tuple(bodies), alone=False, together=together)


@st.composite
def cases(draw: Any, theme: str) -> Case:
    net = draw(nets(theme))
    places = net.places(ROUNDS[0].x(0, 2))
    return Case(net, tuple(draw(programs(theme, net, places)) for _ in range(PER_CASE)))
