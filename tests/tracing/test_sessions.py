"""`model.session()`: values flow from one trace to the next without `.save()`, and end with the session."""

import gc
import weakref

import pytest
import torch
import torch.nn as nn

import nnsight_fx
from nnsight_fx import NNsight, OutsideTraceError, UnsavedValueError, assert_max_compiles, assert_no_fallback

ENGINES = ["hooks", "eager", "aot_eager"]
CLEAN, CORRUPT = torch.linspace(-1, 1, 12).reshape(3, 4), torch.linspace(2, -1, 12).reshape(3, 4)


def net():
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(4, 4), nn.Tanh())]).requires_grad_(False)


def wrap(engine, module):
    model = NNsight(module)
    if engine != "hooks":
        model.compile(backend=engine, fullgraph=True)
    return model


def same(got, want, engine):
    exact = engine in ("hooks", "eager")
    assert type(got) is torch.Tensor
    torch.testing.assert_close(got, want, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_patching_in_a_loop(engine):
    """The sweep that a researcher writes: every layer and position, one plan a layer."""
    module = net()
    model = wrap(engine, module)

    def sweep(scores):
        with assert_no_fallback(), torch.no_grad(), model.session():
            with model.trace(CLEAN):
                cached = [layer.output for layer in model]
            for layer in range(6):
                for position in range(4):
                    with model.trace(CORRUPT):
                        model[layer].output[:, position] = cached[layer][:, position]
                        scores[layer, position] = model.output.sum().save()

    for again in (False, True):
        scores = {}
        with assert_max_compiles(0 if again else 7):  # the clean run, and one for each layer
            sweep(scores)
    clean = [module[: i + 1](CLEAN) for i in range(6)]
    for (layer, position), score in scores.items():
        h = module[: layer + 1](CORRUPT).clone()
        h[:, position] = clean[layer][:, position]
        same(score, module[layer + 1 :](h).sum(), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_values_between_traces_and_as_inputs(engine):
    module = net()
    model = wrap(engine, module)
    with assert_no_fallback(), model.session():
        with model.trace(CLEAN):
            h, (top, where) = model[1].output, model[3].output.topk(2, -1)
        with model.trace(CORRUPT):
            g = model[1].output
        assert isinstance(h, torch.Tensor) and h.shape == (3, 4) and float(h.sum()) == module[:2](CLEAN).sum().item()
        mixed = torch.stack([h, g]).mean(0) - 1
        assert type(mixed) is torch.Tensor and [len(row) for row in h] == [4, 4, 4]
        doubled = h
        doubled *= 2
        with model.trace(h):
            first = model[0].output.save()
        with model.trace() as tracer:
            with tracer.invoke(g):
                second = model[0].output.save()
            with tracer.invoke(mixed):
                model[0].output = model[0].output + where[:, :1] + top[:, :1]
                third = model.output.save()
    same(first, module[0](module[:2](CLEAN) * 2), engine)
    same(second, module[0](module[:2](CORRUPT)), engine)
    top, where = module[:4](CLEAN).topk(2, -1)
    mix = (module[:2](CLEAN) + module[:2](CORRUPT)) / 2 - 1
    same(third, module[1:](module[0](mix) + where[:, :1] + top[:, :1]), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_there_afterwards(engine):
    module = net()
    model = wrap(engine, module)
    with model.session():
        kept, table = nnsight_fx.save([]), nnsight_fx.save({})
        for i, x in enumerate((CLEAN, CORRUPT)):
            with model.trace(x):
                kept.append(model[i].output)
                table[i] = {"out": model.output, "n": i}
                late, lost = model[2].output, model[4].output
            if i == 0:
                late.save()
                first_late = late
    same(kept[1], module[:2](CORRUPT), engine)
    same(table[0]["out"], module(CLEAN), engine)
    same(first_late, module[:3](CLEAN), engine)
    for value in (late, lost):
        with pytest.raises(UnsavedValueError, match=r"4.output|2.output"):
            value + 1
    with pytest.raises(UnsavedValueError), model.trace(CLEAN):
        model[4].output = lost


@pytest.mark.parametrize("engine", ENGINES)
def test_a_value_of_another_model_and_of_an_earlier_invoke(engine):
    one, two = net(), net()
    a, b = wrap(engine, one), wrap(engine, two)
    with assert_no_fallback(), a.session():
        with a.trace() as tracer:
            with tracer.invoke(CLEAN):
                h = a[1].output
            with tracer.invoke(CORRUPT):
                g = a[3].output
                total = a[0].output.sum().item()
        with b.trace(CORRUPT):
            b[1].output = h + g + total
            out = b.output.save()
    want = one[:2](CLEAN) + one[:4](CORRUPT) + one[0](CORRUPT).sum().item()
    torch.testing.assert_close(out, two[2:](want))


def test_only_what_somebody_holds_is_kept():
    model = wrap("eager", net())
    with model.session():
        with model.trace(CLEAN):
            h = model[1].output
            unheld = [model[3].output.sum()]
            unheld.clear()
        assert h.sum() is not None  # used outside of traces: it runs
        (variant,) = [v for vs in model._host.compiled.segments[-1].variants.values() for v in vs]
        assert len(variant.gives) == 1
        real = weakref.ref(h._held)
        del h
        gc.collect()
        assert real() is None


def test_stop_leaves_the_session():
    module = net()
    model = wrap("hooks", module)
    ran = []
    for inside in (False, True):
        with model.session() as session:
            with model.trace(CLEAN):
                out = model[1].output.save()
                if inside:
                    session.stop()
            ran.append("between")
            session.stop()
            ran.append("never")
        assert torch.equal(out, module[:2](CLEAN))
    assert ran == ["between"]
    with model.session() as outer, model.session():
        outer.stop()
    with pytest.raises(OutsideTraceError, match="has ended"):
        outer.stop()


def test_an_exception_names_the_trace_and_leaves_nothing_open():
    model = wrap("hooks", net())
    with pytest.raises(RuntimeError) as caught, model.session():
        with model.trace(CLEAN):
            before = model[1].output
        with model.trace(CLEAN):
            model[1].output = before[:, :3]
    assert any("in the trace at" in note and "test_sessions.py" in note for note in caught.value.__notes__)
    with pytest.raises(UnsavedValueError):
        before.sum()
    with pytest.raises(KeyError), model.session(), model.trace(CLEAN):
        raise KeyError("mine")
    assert model.tracer is None and nnsight_fx.tracing.saving.session() is None
    with pytest.raises(OutsideTraceError):
        nnsight_fx.save([])


def test_without_a_session_it_is_a_named_error():
    model = wrap("hooks", net())
    with model.trace(CLEAN):
        h = model[1].output
    with pytest.raises(UnsavedValueError, match=r"test_sessions.py:\d+.*model.session"), model.trace(CLEAN):
        model[1].output = h


@pytest.mark.parametrize("engine", ENGINES)
def test_a_vector_trained_over_the_traces_of_a_session(engine):
    module = net()
    model, v = wrap(engine, module), torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([v], lr=0.5)
    losses, want = [], []
    with assert_no_fallback(), assert_max_compiles(2), model.session():
        with model.trace(CLEAN):
            target = model.output
        for _ in range(4):
            with model.trace(CORRUPT):
                model[1].output = model[1].output + v
                loss = (model.output - target).square().mean().save()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    w = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.5)
    for _ in range(4):
        loss = (module[2:](module[:2](CORRUPT) + w) - module(CLEAN)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        want.append(loss.detach())
    torch.testing.assert_close(losses, want)
    assert losses[-1] < losses[0]


def test_a_scan_and_an_edit_in_a_session():
    model = wrap("hooks", net())
    with model.session():
        with model.scan(CLEAN):
            h = model[1].output
        assert h.shape == (3, 4) and (h + 1).device.type == "meta"
        with model.edit() as (_, edited):
            edited[1].output[:] = 0
        with edited.trace(CLEAN):
            zero = edited[1].output
        assert (zero == 0).all()
