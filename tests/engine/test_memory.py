"""What a trace leaves behind: nothing that grows."""

from __future__ import annotations

import gc
import os
import weakref

import psutil
import pytest
import torch
import torch.nn as nn

from nnsight_fx import NestedTraceError, NNsight
from nnsight_fx.engine.captured import entries, variants
from nnsight_fx.scan import scanner

ENGINES = ["hooks", "eager", "aot_eager", pytest.param("symbolic", marks=pytest.mark.slow)]


def wrap(engine, width=16):
    torch.manual_seed(0)
    model = NNsight(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)))
    if engine == "symbolic":
        model.compile(backend="eager", capture="symbolic")
    elif engine != "hooks":
        model.compile(backend=engine)
    return model


def trace(model, i, width=16):
    with model.trace(torch.randn(2, width)) as tracer:
        h = model[0].output
        if i % 10 == 0:
            print(end="" if h.sum() > -1e9 else "")  # a sync point
        model[0].output[:, i % width] = float(i)
        model[2].output = model[2].output + torch.randn(width)
        saved = tracer.result.save()
    return saved.sum().item()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_thousand_traces_do_not_grow(engine):
    """Other values every time, a sync point every tenth: neither objects nor memory."""
    model, me = wrap(engine), psutil.Process(os.getpid())

    def measure():
        gc.collect()
        return len(gc.get_objects()), me.memory_info().rss

    for i in range(100):
        trace(model, i)
    objects, memory = measure()
    for i in range(1000):
        trace(model, i)
    more, larger = measure()
    assert more - objects < 100, "objects grow"
    assert larger - memory < 8 * 2**20, "memory grows"


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_held_after_a_trace(engine):
    """No activation, no input, no trace: what was saved is the caller's alone."""
    model = wrap(engine)
    for error in (None, ZeroDivisionError):
        x = torch.randn(2, 16)
        held = []
        try:
            with model.trace(x) as tracer:
                held = [weakref.ref(tracer), weakref.ref(x)]
                saved = model[0].output.save()
                if error is not None:
                    raise error
        except ZeroDivisionError:
            pass
        del tracer, x
        if error is None:
            held.append(weakref.ref(saved))
        del saved
        gc.collect()
        assert [r() for r in held] == [None] * len(held)


def test_plans_and_captures_are_bounded(monkeypatch):
    monkeypatch.setattr(variants, "VARIANTS", 3)
    monkeypatch.setattr(entries, "ENTRIES", 3)
    monkeypatch.setattr(scanner, "STEPS", 40)
    model = wrap("eager")
    for i in range(8):
        for _ in range(2):
            with model.trace(torch.randn(2, 16)):
                h = model[0].output
                for _ in range(i):
                    h = h * 2
                found = h.save()
        with model.trace(torch.randn(2, 16)):  # another number of rows: a capture of its own
            model[2].output = model[2].output[:1].expand(i + 2, 16)
        assert found.shape == (2, 16)
    (capture,) = model._host.captures.values()
    assert len(capture.entries) <= 3
    assert all(len(s.variants) <= 3 for s in capture.segments) and len(capture.segments) <= 8
    assert all(s._root.size <= 40 + 16 for s in model._host.scanner.signatures.values())


def test_clearing():
    model = wrap("eager")
    trace(model, 0)
    (capture,) = model._host.captures.values()
    segment = weakref.ref(capture.segments[0])
    model.clear_cache()
    gc.collect()
    assert segment() is None and not model._host.scanner.signatures
    trace(model, 0)
    with pytest.raises(NestedTraceError, match=r"test_memory\.py:\d+: the open trace"), model.trace(torch.randn(2, 16)):
        model.clear_cache()


def test_a_model_that_is_dropped_is_gone():
    """Dynamo keeps what it compiled with the code; ours goes with the model."""
    model = wrap("eager")
    trace(model, 0)
    (capture,) = model._host.captures.values()
    held = [weakref.ref(capture.segments[0]), weakref.ref(model), weakref.ref(model._module)]
    del model, capture
    gc.collect()
    assert [r() for r in held] == [None] * 3
