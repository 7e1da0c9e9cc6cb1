"""What fuzzing has found, shrunk, and mended since."""

from __future__ import annotations

from .compare import Case
from .nets import Net, Place
from .verbs import (
    Augment,
    Backward,
    Body,
    Call,
    Grad,
    If,
    Program,
    Read,
    Save,
    View,
    Write,
)

FOUND = {
    # The value of an invoke, used by a later one that overtakes it, was freed before the first one was done with it.
    "an invoke overtakes another": Case(
        Net(("double",)),
        (
            Program(
                (
                    Body((Read(Place("layers.0", "input")), Write(Place("layers.0.fc", "output", 1), 1))),
                    Body((Read(Place("layers.0.fc", "input")), View("detach", 2), Save(1)), rows=0),
                ),
                alone=False,
            ),
        ),
    ),
    # The children of a module that the body calls passed their sites once more, in the middle of the call: without end.
    "a module with children, called": Case(
        Net(("residual", "again")),
        (
            Program((Body((Read(Place("layers.0", "output")), If(1, 0), Call("layers.0", 1), If(1, 0), Save(1))),)),
            Program((Body((Read(Place("layers.0", "output")), Call("layers.0", 1), Read(Place("layers.0.up", "output", 1)), Save(1))),)),
        ),
    ),
    # `make_fx` kept the number of the first run.
    "a number on a gradient": Case(
        Net(("linear", "linear"), grad=True),
        (
            Program((Body((Read(Place("layers.0.fc", "output")), Grad(1, slot=0), Read(Place("", "output")), Backward(1))),)),
            Program((Body((Augment(Place("layers.0", "output"), 0, False), Read(Place("", "output")), Backward(1), Save(1))),)),
        ),
    ),
}
