"""What Hypothesis draws: nets, and programs that mostly run on them.

A program walks along the sites that a forward passes (`Net.places`), in order, with a step back now and then: then most of
what is drawn is legal, and what is not is an error on which both engines agree.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from .compare import ROUNDS, SIZES, Case
from .kinds import CONTAINED, KEPT, LOOPS, OBJECTS, ROOTS, SIZED
from .nets import AGAIN, LAYERS, Net, Place
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
from .wider import (
    SIZED as SIZED_PURE,
)
from .wider import (
    SIZED_IN_PLACE,
    Again,
    Hand,
    IfNumber,
    Look,
    Loop,
    NextCall,
    SavePart,
    SizedInPlace,
    SizedWrite,
    WriteNumber,
)
from .wider import (
    Sized as SizedOp,
)

BASE = {"read": 6, "write": 3, "augment": 2, "pure": 5, "view": 3, "in place": 4, "save": 4, "whole": 1, "call": 1}
THEMES: dict[str, dict[str, int]] = {
    "values": BASE,
    "control": BASE | {"skip": 4, "stop": 2},
    "looks": BASE | {"if": 3, "item": 2, "apply": 2},
    "invokes": BASE | {"barrier": 1, "if": 1, "stop": 1},
    "gradients": BASE | {"in place": 2, "grad": 5, "view": 1},
    "containers": BASE | {"whole": 3, "part": 4, "look": 3, "if number": 1, "write number": 2, "hand": 1, "item": 1},
    "loops": BASE | {"loop": 6, "next": 1, "if": 1, "stop": 1},
    "sizes": BASE | {"sized": 6, "sized in place": 4, "sized write": 3, "write": 1},
    "objects": BASE | {"whole": 2, "part": 5, "look": 2, "write number": 1, "hand": 1, "again": 2},
    "roots": BASE | {"loop": 1, "stop": 1, "if": 1},
}
# What the layers of a theme are: its own, every other time.
OWN: dict[str, list[str]] = {
    "containers": [name for name in CONTAINED if name.split(", ")[0] not in OBJECTS],
    "objects": [*(name for name in CONTAINED if name.split(", ")[0] in OBJECTS), *KEPT, *KEPT, *KEPT],
    "loops": [*LOOPS],
    "sizes": [*SIZED],
    "roots": [*KEPT, "caching"],
}

PER_CASE = 4  # programs that run on one model, one after the other

layer = st.sampled_from([*LAYERS, AGAIN])
age = st.integers(1, 4)
slot = st.integers(0, 2)


@st.composite
def nets(draw: Any, theme: str) -> Net:
    layers = draw(st.lists(layer, min_size=1, max_size=3))
    if theme in OWN and (theme != "roots" or draw(st.integers(0, 3)) == 3):
        layers = [draw(st.sampled_from(OWN[theme])) if draw(st.booleans()) else name for name in layers]
        layers[-1] = layers[-1] if theme == "roots" else draw(st.sampled_from(OWN[theme]))
    if "keys" in layers:  # one cache a model
        layers = ["linear" if name == "caching" else name for name in layers]
    if layers[0] == AGAIN:
        layers[0] = "linear"
    root = draw(st.sampled_from([*ROOTS])) if theme == "roots" else ""
    if theme == "objects" and draw(st.booleans()):
        root = "keeping"
    grad = theme == "gradients" or draw(st.integers(0, 3)) == 3
    dynamic = draw(st.sampled_from([True, True, True, None]))  # one capture for all shapes is half of the time
    return Net(tuple(layers), draw(st.booleans()), grad, dynamic, draw(st.booleans()), root)


LEAF, NUMBER = (bool, int, float, str, type(None)), (bool, int, float)
CONTAINER = None


def _is(value: Any, what: Any) -> bool:
    return isinstance(value, what) if what is not None else not isinstance(value, (torch.Tensor, *LEAF))


class Walk:
    """Where a body stands among the sites."""

    def __init__(self, draw: Any, theme: str, net: Net, parts: list[tuple[Place, Any]]):
        self.draw, self.theme, self.net, self.parts, self.at = draw, theme, net, parts, 0
        self.places = [place for place, value in parts if isinstance(value, torch.Tensor)]
        self.values = 0

    def place(self, where: Any = lambda place: True, what: Any = torch.Tensor) -> Place | None:
        """A site from here on; seldom one before."""
        back = self.draw(st.integers(0, 12)) == 12
        found = [i for i, (p, value) in enumerate(self.parts) if where(p) and _is(value, what)]
        ahead = [i for i in found if back or i >= self.at]
        if not ahead:
            return None
        i = ahead[self.draw(st.integers(0, min(len(ahead) - 1, len(ahead) if back else 4)))]
        self.at = max(self.at, i)
        return self.parts[i][0]

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
            paths = sorted(
                {
                    p.path
                    for p in self.places
                    if p.kind == "output" and p.leaf is None and p.path and not p.path.endswith(".take")
                }
            )
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
        return self.wider(verb, depth)

    def wider(self, verb: str, depth: int) -> Any:
        draw = self.draw
        if verb == "part":
            place = self.place(lambda p: p.leaf is not None, object)
            return place and SavePart(place)
        if verb == "look":
            a, place = self.value(), self.place(lambda p: p.leaf is not None, LEAF)
            return place and Look(place, a)
        if verb == "if number":
            place = self.place(lambda p: p.leaf is not None, LEAF)
            inner = [v for v in THEMES["values"] if v != "whole"]
            return place and IfNumber(place, self.ops(inner, 1, 3, depth + 1), self.ops(inner, 0, 2, depth + 1))
        if verb == "write number":
            place = self.place(lambda p: p.leaf is not None, NUMBER)
            return place and WriteNumber(place, draw(slot), draw(st.booleans()))
        if verb == "hand":
            place = self.place(lambda p: p.leaf is None, CONTAINER)
            kinds = {p: type(value) for p, value in self.parts if p.leaf is None}
            to = place and self.place(lambda p: kinds.get(p) is kinds[place], CONTAINER)
            return to and Hand(place, to)
        if verb == "loop":
            return self.loop(depth)
        if verb == "next":
            place = self.place()
            return place and NextCall(place, draw(st.integers(0, 2)), draw(st.integers(0, 3)) == 3)
        if verb == "sized":
            return SizedOp(draw(st.sampled_from(list(SIZED_PURE))), self.value(), draw(slot))
        if verb == "sized in place":
            return SizedInPlace(draw(st.sampled_from(list(SIZED_IN_PLACE))), self.value(), draw(slot))
        if verb == "sized write":
            place = self.place()
            return place and SizedWrite(place, draw(st.sampled_from(["set", "blend", "add"])))
        if verb == "again":
            to = self.place(lambda p: p.leaf is None, CONTAINER) if draw(st.integers(0, 3)) == 3 else None
            return Again(draw(slot), self.value(), to)
        raise AssertionError(verb)

    def loop(self, depth: int) -> Loop | None:
        draw = self.draw
        calls = {p.path for p, _ in self.parts if p.call}
        inside = draw(st.integers(0, 3)) > 0
        place = self.place(lambda p: p.call == 0 and (not inside or p.path in calls or p.path.endswith(".fc")))
        if place is None:
            return None
        start, stop = draw(st.sampled_from([0, 0, 0, 1])), draw(st.sampled_from([1, 2, 2, 3, 6, None]))
        on = draw(st.one_of(st.none(), st.integers(0, 2)))
        inner = self.ops(["pure", "in place", "save", "view"], 0, 2, depth + 1)
        if stop is None:  # the model has run to its end
            self.at = len(self.parts) - 1
        return Loop(place, start, stop, on, draw(slot), inner)

    def skip(self) -> Skip | None:
        a, place = self.value(), self.place(lambda p: p.kind == "input" and p.leaf is None and p.path)
        if place is None:
            return None
        self.at = max(self.at, self.behind(place))
        return Skip(place, a, self.net.pack(place.path))

    def behind(self, place: Place) -> int:
        """Where the module has returned."""
        return next(i for i, (p, _) in enumerate(self.parts) if p[:3] == (place.path, "output", place.call))

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


BATCHES = {"invokes": 1, "containers": 4, "objects": 4, "roots": 4, "sizes": 4}  # one of so many programs has invokes


@st.composite
def programs(draw: Any, theme: str, net: Net, parts: list[tuple[Place, Any]]) -> Program:
    most = 1 if theme == "sizes" else 2
    if theme not in BATCHES or draw(st.integers(1, BATCHES[theme])) < BATCHES[theme]:
        walk = Walk(draw, theme, net, parts)
        body, then = walk.body(most), None
        if theme == "objects" and draw(st.booleans()):
            walk.at, walk.values = 0, 0
            then = walk.body(most, (Read(walk.places[0]), Again(draw(slot), 1)))
        return Program((body,), then=then)
    rows = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3)))]
    together = draw(st.booleans())
    walk, bodies, skips = Walk(draw, theme, net, parts), [], draw(st.integers(0, 3)) == 3
    for n in rows:
        walk.at, first = 0, ()
        if skips:  # all invokes or none
            skip = bodies[0].ops[1] if bodies else walk.skip()
            first, walk.at = (Read(skip.place), skip), walk.behind(skip.place)
        bodies.append(walk.body(n, first, fresh=draw(st.integers(0, 2)) < 2))
    looks = {"If", "Item", "Apply", "Look", "IfNumber", "WriteNumber", "Loop"} & set(Program(tuple(bodies)).verbs())
    if not looks and draw(st.integers(0, 3)) == 3:
        walk.at = len(parts) // 2  # what it uses of the others is there by then
        bodies.append(walk.body(0))
    return Program(tuple(bodies), alone=False, together=together)


@st.composite
def cases(draw: Any, theme: str) -> Case:
    net = draw(nets(theme))
    parts = net.all_parts(ROUNDS[0].x(0, 2))
    rounds = SIZES if theme == "sizes" else ROUNDS
    return Case(net, tuple(draw(programs(theme, net, parts)) for _ in range(PER_CASE)), rounds)
