"""What fuzzing has found, shrunk, and mended since."""

from __future__ import annotations

from .compare import Case
from .nets import Net, Place
from .verbs import (
    Apply,
    Augment,
    Backward,
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
            Program(
                (
                    Body(
                        (
                            Read(Place("layers.0", "output")),
                            Call("layers.0", 1),
                            Read(Place("layers.0.up", "output", 1)),
                            Save(1),
                        )
                    ),
                )
            ),
        ),
    ),
    # `make_fx` kept the number of the first run.
    "a number on a gradient": Case(
        Net(("linear", "linear"), grad=True),
        (
            Program(
                (Body((Read(Place("layers.0.fc", "output")), Grad(1, slot=0), Read(Place("", "output")), Backward(1))),)
            ),
            Program(
                (
                    Body(
                        (
                            Augment(Place("layers.0", "output"), 0, False),
                            Read(Place("", "output")),
                            Backward(1),
                            Save(1),
                        )
                    ),
                )
            ),
        ),
    ),
    # The capture half has Dynamo's fakes; the module had the scan's.
    "a module called under a capture of its own": Case(
        net=Net(layers=("linear", "double", "counter"), train=False, grad=False, dynamic=None),
        programs=(
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="layers.0.fc", kind="output", call=0, leaf=None)),
                            Read(place=Place(path="layers.1.fc", kind="input", call=1, leaf=None)),
                            View(fn="diagonal", a=1, slot=1),
                            InPlace(fn="masked_fill_", a=1, b=2, slot=2),
                            Skip(place=Place(path="layers.1.fc", kind="input", call=1, leaf=None), a=4, pack=None),
                            Pure(fn="flip", a=3, b=1, slot=1),
                            Write(place=Place(path="layers.2.act", kind="output", call=0, leaf=None), a=1, fits=True),
                            Call(path="layers.0.fc", a=4),
                            Stop(),
                            Save(a=3),
                        ),
                        rows=2,
                        cache=False,
                        fresh=False,
                    ),
                ),
                alone=True,
                together=False,
            ),
        ),
    ),
    # A sync point cuts the segment at a site that is written with other metadata: the tail's `supply` node finds no value.
    "a write that does not fit, and a sync point behind it": Case(
        net=Net(layers=("norm", "again", "record"), train=True, grad=True, dynamic=None),
        programs=(
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="layers.0", kind="input", call=0, leaf=None)),
                            Write(place=Place(path="layers.0", kind="output", call=0, leaf=None), a=1, fits=True),
                            If(
                                a=2,
                                slot=0,
                                then=(
                                    Item(a=2, b=1),
                                    Read(place=Place(path="layers.0.bn", kind="output", call=1, leaf=None)),
                                    Item(a=1, b=2),
                                ),
                                orelse=(Read(place=Place(path="layers.1", kind="output", call=0, leaf=None)),),
                            ),
                            InPlace(fn="out", a=1, b=2, slot=2),
                            If(
                                a=4,
                                slot=1,
                                then=(Call(path="layers.1.part.fc", a=1), Save(a=3)),
                                orelse=(Item(a=2, b=2), Save(a=2)),
                            ),
                            Save(a=1),
                            Augment(place=Place(path="", kind="output", call=0, leaf=None), slot=0, whole=True),
                            Save(a=1),
                            Result(),
                        ),
                        rows=2,
                        cache=False,
                        fresh=False,
                    ),
                ),
                alone=True,
                together=False,
            ),
        ),
    ),
    # The same with a branch of the model behind it: what a called module draws was recorded, on fakes.
    "a write that does not fit, a sync point and a graph break": Case(
        net=Net(layers=("dropout", "record", "branch"), train=False, grad=False, dynamic=True),
        programs=(
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="layers.0", kind="input", call=0, leaf=None)),
                            Write(place=Place(path="layers.0.drop", kind="input", call=0, leaf=None), a=1, fits=True),
                            Write(place=Place(path="layers.0.drop", kind="output", call=0, leaf=None), a=4, fits=False),
                            If(
                                a=3,
                                slot=2,
                                then=(
                                    Write(
                                        place=Place(path="layers.1.part", kind="input", call=0, leaf=None),
                                        a=1,
                                        fits=True,
                                    ),
                                    Read(place=Place(path="layers.1.part.fc", kind="output", call=0, leaf=None)),
                                    Pure(fn="clone", a=1, b=3, slot=2),
                                ),
                                orelse=(
                                    Write(
                                        place=Place(path="layers.0", kind="output", call=0, leaf=None), a=3, fits=False
                                    ),
                                    Pure(fn="divide", a=1, b=4, slot=0),
                                ),
                            ),
                            Pure(fn="steer", a=4, b=2, slot=1),
                            Call(path="layers.0.drop", a=4),
                            Read(place=Place(path="layers.1", kind="output", call=0, leaf=None)),
                            If(
                                a=3,
                                slot=1,
                                then=(
                                    Augment(
                                        place=Place(path="layers.1", kind="output", call=0, leaf=None),
                                        slot=0,
                                        whole=True,
                                    ),
                                    Call(path="layers.1", a=4),
                                    Call(path="layers.0.drop", a=2),
                                ),
                                orelse=(Pure(fn="bfloat16", a=2, b=4, slot=0), Call(path="layers.1.part.fc", a=2)),
                            ),
                            Result(),
                        ),
                        rows=2,
                        cache=False,
                        fresh=False,
                    ),
                ),
                alone=True,
                together=False,
            ),
        ),
    ),
    # Behind a graph break, two layers of one class share their frame's captures, whose guards did not tell them apart.
    "a write that does not fit, behind a graph break": Case(
        net=Net(layers=("alias", "branch", "alias"), train=True, grad=False, dynamic=True),
        programs=(
            Program(bodies=(Body(ops=(), rows=2, cache=True, fresh=False),), alone=True, together=False),
            Program(
                bodies=(
                    Body(
                        ops=(
                            InPlace(fn="masked_fill_", a=2, b=1, slot=0),
                            Augment(place=Place(path="layers.2", kind="input", call=0, leaf=None), slot=2, whole=False),
                            Save(a=4),
                        ),
                        rows=2,
                        cache=False,
                        fresh=False,
                    ),
                ),
                alone=True,
                together=False,
            ),
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="", kind="input", call=0, leaf=None)),
                            Save(a=1),
                            Write(place=Place(path="layers.2.same", kind="input", call=0, leaf=None), a=4, fits=False),
                        ),
                        rows=2,
                        cache=False,
                        fresh=False,
                    ),
                ),
                alone=True,
                together=False,
            ),
        ),
    ),
    # The first one's error names a size, which made a number of it; symbols kept that for the second one's graph.
    "two backwards over other sizes": Case(
        net=Net(layers=("record",), train=True, grad=True, dynamic=True),
        programs=(
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="", kind="output", call=0, leaf=None)),
                            Backward(
                                a=1,
                                around=(
                                    InPlace(fn="masked_fill_", a=3, b=3, slot=1),
                                    InPlace(fn="masked_fill_", a=3, b=1, slot=2),
                                    Pure(fn="bfloat16", a=3, b=3, slot=2),
                                ),
                                retain=False,
                            ),
                        ),
                        rows=2,
                        cache=False,
                        fresh=False,
                    ),
                ),
                alone=True,
                together=False,
            ),
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="", kind="output", call=0, leaf=None)),
                            Backward(a=1, around=(Save(a=3),), retain=False),
                        ),
                        rows=2,
                        cache=False,
                        fresh=False,
                    ),
                ),
                alone=True,
                together=False,
            ),
        ),
    ),
    # A scan with the plan's writes took the sites of the called module's children for the run's: without end.
    "a module with children, called behind a write": Case(
        net=Net(layers=("tuple", "attention", "norm"), train=True, grad=True, dynamic=True),
        programs=(
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="layers.0.part", kind="input", call=0, leaf=None)),
                            Write(place=Place(path="layers.0.part", kind="output", call=0, leaf=0), a=1, fits=True),
                            Call(path="layers.2", a=3),
                            Result(),
                        ),
                        rows=2,
                        cache=True,
                        fresh=False,
                    ),
                ),
                alone=True,
                together=False,
            ),
        ),
    ),
    # The graph ends at the site's marker, and what the site is written with came behind it.
    "a write that does not fit where the model is stopped": Case(
        net=Net(layers=("residual", "norm", "record"), train=True, grad=False, dynamic=True),
        programs=(
            Program(
                bodies=(
                    Body(
                        ops=(
                            Augment(place=Place(path="layers.1", kind="input", call=0, leaf=None), slot=0, whole=False),
                            Skip(place=Place(path="layers.1", kind="input", call=0, leaf=None), a=2, pack=None),
                            Skip(place=Place(path="layers.1", kind="input", call=0, leaf=None), a=1, pack=None),
                            Save(a=2),
                        ),
                        rows=2,
                        cache=False,
                        fresh=False,
                    ),
                ),
                alone=True,
                together=False,
            ),
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="layers.0.act", kind="input", call=0, leaf=None)),
                            Pure(fn="norm", a=4, b=4, slot=1),
                            Write(place=Place(path="layers.0", kind="output", call=0, leaf=None), a=1, fits=False),
                            Pure(fn="noise", a=4, b=1, slot=0),
                            Stop(),
                        ),
                        rows=2,
                        cache=False,
                        fresh=False,
                    ),
                ),
                alone=True,
                together=False,
            ),
        ),
    ),
    # At a cut, a site has its tensors alone, and the object of the written tree was looked up among them.
    "a write into a container with an object, behind a sync point at its site": Case(
        net=Net(layers=("branch", "record"), train=False, grad=False, dynamic=True),
        programs=(
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="layers.1", kind="input", call=0, leaf=None)),
                            Augment(
                                place=Place(path="layers.1.part", kind="output", call=0, leaf="h"), slot=1, whole=False
                            ),
                            If(
                                a=2,
                                slot=0,
                                then=(
                                    Write(
                                        place=Place(path="layers.1.part", kind="output", call=0, leaf="h"),
                                        a=2,
                                        fits=True,
                                    ),
                                ),
                                orelse=(Save(a=1),),
                            ),
                        ),
                        rows=2,
                        cache=False,
                        fresh=False,
                    ),
                ),
                alone=True,
                together=False,
            ),
        ),
    ),
    # The passes refused before the model had run, and what else was saved was not delivered.
    "a skip in the shared graph that comes too late": Case(
        net=Net(layers=("record", "attention"), train=True, grad=False, dynamic=None),
        programs=(
            Program(bodies=(Body(ops=(), rows=2, cache=False, fresh=False),), alone=True, together=False),
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="layers.1.qkv", kind="input", call=0, leaf=None)),
                            Skip(place=Place(path="layers.0.part.fc", kind="input", call=0, leaf=None), a=3, pack=None),
                            Result(),
                        ),
                        rows=2,
                        cache=False,
                        fresh=False,
                    ),
                ),
                alone=True,
                together=False,
            ),
        ),
    ),
    # With no site in between the model went on with what it had computed itself.
    "a write before a sync point, used behind it": Case(
        net=Net(layers=("caching", "again"), train=True, grad=False, dynamic=True),
        programs=(
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="layers.0.fc", kind="output", call=0, leaf=None)),
                            Write(place=Place(path="layers.0.fc", kind="output", call=1, leaf=None), a=2, fits=True),
                            Read(place=Place(path="layers.0", kind="output", call=1, leaf=None)),
                            If(a=1, slot=0, then=(), orelse=()),
                        ),
                        rows=2,
                        cache=True,
                        fresh=False,
                    ),
                ),
                alone=True,
                together=False,
            ),
        ),
    ),
    # Where it stops was asked of both invokes together, and the second forward ran to its end.
    "a stop in the second of two forwards": Case(
        net=Net(layers=("alias", "counter"), train=True, grad=False, dynamic=None),
        programs=(
            Program(
                bodies=(
                    Body(
                        ops=(Read(place=Place(path="layers.0", kind="output", call=0, leaf=None)),),
                        rows=3,
                        cache=False,
                        fresh=True,
                    ),
                    Body(
                        ops=(
                            Write(place=Place(path="layers.0.act", kind="output", call=0, leaf=None), a=1, fits=True),
                            Stop(),
                        ),
                        rows=2,
                        cache=False,
                        fresh=False,
                    ),
                ),
                alone=False,
                together=False,
            ),
        ),
    ),
    # Dynamo traced on with the rows of one invoke only.
    "a call skipped by one of two invokes while Dynamo traces": Case(
        net=Net(layers=("alias", "counter"), train=True, grad=False, dynamic=None),
        programs=(
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="layers.0.act", kind="input", call=0, leaf=None)),
                            Skip(place=Place(path="layers.0.act", kind="input", call=0, leaf=None), a=4, pack=None),
                            Read(place=Place(path="layers.1.act", kind="output", call=0, leaf=None)),
                            Read(place=Place(path="layers.1.act", kind="output", call=0, leaf=None)),
                            Pure(fn="add", a=2, b=4, slot=1),
                        ),
                        rows=1,
                        cache=False,
                        fresh=False,
                    ),
                    Body(
                        ops=(
                            Read(place=Place(path="layers.0.act", kind="input", call=0, leaf=None)),
                            Skip(place=Place(path="layers.0.act", kind="input", call=0, leaf=None), a=4, pack=None),
                        ),
                        rows=1,
                        cache=False,
                        fresh=False,
                    ),
                ),
                alone=False,
                together=True,
            ),
        ),
    ),
    # One invoke of several rows is all of them: on hooks a write of it hung what was there before on the graph, with gradients of 0.
    "an only invoke writes all rows": Case(
        net=Net(layers=("residual", "views", "again"), train=True, grad=True, dynamic=True),
        programs=(
            Program(bodies=(Body(ops=(), rows=3, cache=False, fresh=False),), alone=False, together=False),
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="layers.0.up", kind="input", call=0, leaf=None)),
                            Pure(fn="double", a=4, b=1, slot=1),
                            View(fn="same", a=2, slot=0),
                            Pure(fn="flip", a=3, b=3, slot=0),
                            InPlace(fn="index_add_", a=2, b=3, slot=1),
                            Save(a=1),
                            Result(),
                        ),
                        rows=2,
                        cache=False,
                        fresh=True,
                    ),
                    Body(
                        ops=(
                            Read(place=Place(path="layers.0.up", kind="input", call=0, leaf=None)),
                            Pure(fn="lerp", a=1, b=3, slot=0),
                            Pure(fn="add", a=3, b=4, slot=1),
                            Read(place=Place(path="layers.0.act", kind="input", call=0, leaf=None)),
                            Read(place=Place(path="layers.0.down", kind="output", call=0, leaf=None)),
                            Save(a=2),
                            Result(),
                        ),
                        rows=3,
                        cache=False,
                        fresh=True,
                    ),
                    Body(
                        ops=(
                            Read(place=Place(path="layers.0.up", kind="output", call=0, leaf=None)),
                            Pure(fn="top", a=3, b=4, slot=2),
                            Write(place=Place(path="layers.0.down", kind="input", call=0, leaf=None), a=3, fits=True),
                            Save(a=2),
                            Save(a=3),
                            Result(),
                        ),
                        rows=2,
                        cache=False,
                        fresh=True,
                    ),
                ),
                alone=False,
                together=False,
            ),
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="layers.1", kind="input", call=0, leaf=None)),
                            Skip(place=Place(path="layers.1", kind="input", call=0, leaf=None), a=4, pack=None),
                            Read(place=Place(path="layers.1", kind="input", call=1, leaf=None)),
                            Write(place=Place(path="layers.1.fc", kind="output", call=1, leaf=None), a=4, fits=True),
                            Write(place=Place(path="layers.1", kind="output", call=1, leaf=None), a=1, fits=True),
                            Read(place=Place(path="layers.0.up", kind="input", call=0, leaf=None)),
                            Read(place=Place(path="layers.1", kind="output", call=1, leaf=None)),
                            Write(place=Place(path="", kind="output", call=0, leaf=None), a=1, fits=True),
                            View(fn="row", a=3, slot=1),
                            Pure(fn="flip", a=3, b=3, slot=2),
                            InPlace(fn="relu_", a=3, b=1, slot=0),
                            Save(a=3),
                            Result(),
                        ),
                        rows=2,
                        cache=False,
                        fresh=True,
                    ),
                ),
                alone=False,
                together=True,
            ),
        ),
    ),
    # The model's error came as Dynamo's.
    "a view of several, changed in place while Dynamo traces": Case(
        net=Net(layers=("parallel", "views", "again"), train=True, grad=True, dynamic=True),
        programs=(
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="layers.0.fc", kind="input", call=0, leaf=None)),
                            Write(place=Place(path="layers.0.fc", kind="output", call=0, leaf=None), a=1, fits=True),
                        ),
                        rows=3,
                        cache=False,
                        fresh=True,
                    ),
                ),
                alone=False,
                together=False,
            ),
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="layers.0.attn", kind="output", call=0, leaf=None)),
                            Pure(fn="top", a=3, b=4, slot=2),
                            Write(place=Place(path="layers.0", kind="output", call=0, leaf=None), a=3, fits=True),
                            Save(a=2),
                            Save(a=3),
                            Result(),
                        ),
                        rows=2,
                        cache=False,
                        fresh=True,
                    ),
                ),
                alone=False,
                together=False,
            ),
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="layers.1.fc", kind="input", call=0, leaf=None)),
                            Skip(place=Place(path="layers.1.fc", kind="input", call=0, leaf=None), a=4, pack=None),
                            Read(place=Place(path="layers.1.view", kind="input", call=0, leaf=None)),
                            Write(place=Place(path="layers.1", kind="output", call=0, leaf=None), a=4, fits=True),
                            Write(place=Place(path="layers.1.fc", kind="output", call=1, leaf=None), a=1, fits=True),
                            Read(place=Place(path="layers.0.attn", kind="input", call=0, leaf=None)),
                            Read(place=Place(path="layers.1.view", kind="output", call=1, leaf=None)),
                            Write(place=Place(path="layers.1", kind="output", call=1, leaf=None), a=1, fits=True),
                            View(fn="row", a=3, slot=1),
                            Pure(fn="flip", a=3, b=3, slot=2),
                            InPlace(fn="relu_", a=3, b=1, slot=0),
                            Save(a=3),
                            Result(),
                        ),
                        rows=2,
                        cache=False,
                        fresh=True,
                    ),
                ),
                alone=False,
                together=True,
            ),
        ),
    ),
    # Written in place while Dynamo traced, an input's fake came to require grad.
    "the input becomes a result, behind its backward": Case(
        net=Net(layers=("alias", "linear"), train=False, grad=True, dynamic=True),
        programs=(
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="", kind="input", call=0, leaf=None)),
                            Read(place=Place(path="", kind="output", call=0, leaf=None)),
                            Backward(a=1, around=(InPlace(fn="iadd", a=2, b=1, slot=0),), retain=False),
                        ),
                        rows=2,
                        cache=False,
                        fresh=False,
                    ),
                ),
                alone=True,
                together=False,
            ),
        ),
    ),
    # Tracing a backward without the Python dispatcher, C++ expanded to no symbolic size.
    "a number beside a value of symbolic sizes, behind a backward": Case(
        net=Net(layers=("linear",), train=False, grad=True, dynamic=True),
        programs=(
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="", kind="input", call=0, leaf=None)),
                            View(fn="select", a=1, slot=0),
                            Read(place=Place(path="", kind="output", call=0, leaf=None)),
                            Backward(a=1, around=(Pure(fn="lerp", a=1, b=2, slot=0),), retain=False),
                        ),
                        rows=2,
                        cache=False,
                        fresh=False,
                    ),
                ),
                alone=True,
                together=False,
            ),
        ),
    ),
    # What was written before a sync point was what the rest was captured for.
    "another shape is written, and behind a sync point the old one": Case(
        net=Net(layers=("linear",), train=False, grad=False, dynamic=True),
        programs=(
            Program(bodies=(Body(ops=(), rows=2, cache=False, fresh=False),), alone=True, together=False),
            Program(
                bodies=(
                    Body(
                        ops=(
                            Read(place=Place(path="", kind="input", call=0, leaf=None)),
                            View(fn="select", a=1, slot=0),
                            Write(place=Place(path="", kind="input", call=0, leaf=None), a=1, fits=False),
                            Apply(a=1),
                            Write(place=Place(path="", kind="input", call=0, leaf=None), a=3, fits=False),
                        ),
                        rows=2,
                        cache=False,
                        fresh=False,
                    ),
                ),
                alone=True,
                together=False,
            ),
        ),
    ),
    # Traced with its backward, a dropout that drops nothing was a copy, and in eager it gives back its input itself.
    "a dropout in evaluation, behind a backward": Case(
        Net(("linear", "dropout"), grad=True, dynamic=True),
        (
            Program(
                (
                    Body(
                        (
                            Read(Place("layers.0.fc", "output")),
                            Save(1),
                            Read(Place("", "output")),
                            Backward(1, (), False),
                            Result(),
                        )
                    ),
                )
            ),
        ),
    ),
    # What one of two invokes wrote with another gradient flag took the place of the other's rows, too.
    "a write that requires grad, in one of two invokes": Case(
        Net(("alias", "again", "dict"), grad=True, dynamic=True),
        (
            Program(
                (
                    Body((Read(Place("", "input")), Result()), rows=1, fresh=True),
                    Body(
                        (
                            Read(Place("", "input")),
                            SaveWhole(Place("layers.1.part", "output")),
                            Read(Place("layers.1.part", "output", 0, "h")),
                            Write(Place("layers.1.part", "output", 0, "skip"), 1, True),
                        ),
                        rows=1,
                        fresh=True,
                    ),
                ),
                alone=False,
            ),
        ),
    ),
}
