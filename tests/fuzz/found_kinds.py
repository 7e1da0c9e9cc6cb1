"""What fuzzing of the newer kinds has found, shrunk, and mended since."""

from __future__ import annotations

from .compare import ROUNDS, Case
from .kinds import Attr
from .nets import Net, Place
from .verbs import Body, Call, Program, Read, Result, Save, SaveWhole, View, Write
from .wider import IfNumber, Look, SavePart, SizedInPlace, WriteNumber

VALUES = (Attr("layers"), 0, Attr("values"))
TWO = ROUNDS[:2]


def once(*ops) -> Program:
    return Program((Body(ops),))


FOUND_KINDS = {
    # Torch's own `DataDependentOutputException` came out of the fakes.
    "a module that values decide about, called on a value": Case(
        Net(("linear", "branch"), dynamic=True),
        (once(Read(Place("layers.0", "output")), Call("layers.1", 1), Save(1), Result()),),
        TWO,
    ),
    # The body got the scan's `SymFloat`, whose name no graph knows.
    "a number that data decides, and no branch": Case(
        Net(("dict, measured", "named, item"), dynamic=True),
        (
            once(Read(Place("layers.0", "input")), Look(Place("layers.0.give", "output", 0, "n"), 1), Save(1)),
            once(Read(Place("layers.0", "input")), Look(Place("layers.1.take", "input", 0, (Attr("n"),)), 1), Result()),
        ),
        TWO,
    ),
    # A flag that a module returns was the scan's guess: an error where the run had the other one.
    "a flag that data decides": Case(
        Net(("tuple, flag", "fields, flag"), dynamic=True),
        (
            once(Read(Place("layers.0", "input")), Look(Place("layers.0.give", "output", 0, 1), 1), Save(1)),
            once(
                Read(Place("layers.0", "input")),
                IfNumber(Place("layers.1.give", "output", 0, (Attr("n"),)), (Save(1),)),
            ),
        ),
        TWO,
    ),
    # On hooks the flag in an object that a module is given was the scan's guess.
    "a flag in an object that a module is given": Case(
        Net(("output, fixed", "output, flag"), dynamic=True),
        (once(Read(Place("", "input")), WriteNumber(Place("layers.1.take", "input", 0, "n"), 0)),),
        TWO,
    ),
    # A number behind a branch is the run's: hooks run it, and say so.
    "a number in a tuple, behind a branch": Case(
        Net(("branch", "tuple"), dynamic=True),
        (once(Read(Place("", "input")), SaveWhole(Place("layers.1.part", "output"))),),
        TWO,
    ),
    # As an input of a graph the number was a float64 tensor, and `index_put_` wants the dtype of what it changes.
    "a number written to places that tensors choose": Case(
        Net(("linear",), dynamic=True, lifted=True),
        (once(Read(Place("layers.0", "output")), SizedInPlace("set position of each row", 1), Save(1), Result()),),
        TWO,
    ),
    # A position that is an input of the graph was read as a copy.
    "a row of the user's input, saved": Case(
        Net(("linear",), dynamic=True, lifted=True), (once(Read(Place("", "input")), View("row", 1), Save(1)),), TWO
    ),
    # It was asked for when the body was done, and the run had passed it.
    "a saved object, and a look behind it": Case(
        Net(("cache, fixed", "state, fixed"), dynamic=True),
        (
            once(
                SaveWhole(Place("layers.0.give", "output")),
                SavePart(Place("layers.0.take", "input", 0, VALUES)),
                Result(),
            ),
            once(
                SavePart(Place("layers.1.give", "output")), SavePart(Place("layers.1.take", "input", 0, (Attr("h"),)))
            ),
        ),
        TWO,
    ),
    # What stood for a layer of the cache was put into the model's own list of layers.
    "a part of an object, written back": Case(
        Net(("linear", "keys"), root="keeping", dynamic=True),
        (
            once(
                Read(Place("inner.layers.0", "output")),
                Write(Place("", "output", 0, (Attr("memory"), *VALUES)), 1),
                SaveWhole(Place("", "output")),
                Result(),
            ),
        ),
        TWO,
    ),
    # Behind a guess the body had the real object, into which recorded values went.
    "a recorded value, written into an object behind a guess": Case(
        Net(("keys", "tuple, flag"), root="keeping", dynamic=True),
        (
            once(
                Read(Place("inner.layers.0", "output")),
                Write(Place("", "output", 0, (Attr("memory"), *VALUES)), 1),
                SaveWhole(Place("", "output")),
                Result(),
            ),
        ),
        TWO,
    ),
}
