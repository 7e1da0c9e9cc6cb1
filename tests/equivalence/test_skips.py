"""Skips of every shape, stops and barriers among invokes: the same on every engine as with hooks written by hand."""

import contextlib

import pytest
import torch
import torch.nn as nn

import nnsight_fx
from nnsight_fx import MissedSiteError, NNsight, SkipError, UnsavedValueError, assert_max_compiles, assert_no_fallback

from .models import BatchNorm, Block, Recurrent, Returns, State, as_dict, as_tuple

ENGINES = ["hooks", "eager", pytest.param("aot_eager", marks=pytest.mark.slow)]  # `make test-slow`
PACKS = {"tuple": as_tuple, "dict": as_dict, "dataclass": State}


def wrap(engine, module, fullgraph=True):
    model = NNsight(module)
    if engine != "hooks":
        model.compile(backend=engine, fullgraph=fullgraph)
    return model


def made(make, *args):
    torch.manual_seed(0)
    return make(*args).requires_grad_(False)


def x(rows=3, seed=0):
    return torch.randn(rows, 7, 16, generator=torch.Generator().manual_seed(seed))


def same(got, want, engine):
    exact = engine in ("hooks", "eager")
    torch.testing.assert_close(got, want, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)


@contextlib.contextmanager
def replaced(module, forward):
    """`module.forward` is `forward`, and none of its own runs."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def twice(run):
    """A program, again with nothing left to compile."""
    first = run()
    with assert_max_compiles(0):
        again = run()
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    return again


# -- values of every structure ----------------------------------------------------------------------------------------


def parts(value):
    return (
        [value["h"], value["skip"]]
        if isinstance(value, dict)
        else [value.h, value.skip]
        if isinstance(value, State)
        else [*value[:2]]
    )


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("engine", ENGINES)
def test_structured_values_from_the_own_input_and_written_afterwards(engine, pack):
    module = made(Returns, PACKS[pack])
    model = wrap(engine, module)

    def run():
        with assert_no_fallback(), model.trace(x()) as tracer:
            h = model.part.input
            model.part.skip(PACKS[pack](h * 0.5, h + 1, 2))
            out = model.part.output
            before = [t.clone().save() for t in parts(out)]
            parts(out)[0][:, 0] = 3
            if pack == "tuple":
                model.part.output = (out[0], out[1] * 2, 4)
            elif pack == "dict":
                out["skip"], out["step"] = out["skip"] * 2, 4
            else:
                out.skip, out.step = out.skip * 2, 4
            after = [t.save() for t in parts(model.part.output)]
            result = nnsight_fx.save(tracer.result)
        return before, after, result

    h = module.a(x())
    changed = h * 0.5
    changed[:, 0] = 3

    with replaced(module.part, lambda *, x, scale: PACKS[pack](changed, (x + 1) * 2, 4)):
        want = module(x())
    before, after, result = twice(run)
    same(before, [h * 0.5, h + 1], engine)
    same(after, [changed, (h + 1) * 2], engine)
    same(result, want, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_nested_tuple_and_a_value_of_another_layer(engine):
    module = made(Recurrent)
    model = wrap(engine, module, fullgraph=False)  # Dynamo leaves an LSTM out

    def run():
        with assert_no_fallback(), model.trace(x()) as tracer:
            h = model.lstm.input
            model.lstm.skip((h.flip(1), (h[:, 0][None], h[:, 1][None] * 2)))
            model.b.skip(model.b.input + h)
            return_value = nnsight_fx.save(tracer.result)
        return return_value

    def lstm(h):
        return h.flip(1), (h[:, 0][None], h[:, 1][None] * 2)

    with replaced(module.lstm, lstm), replaced(module.b, lambda o: o + module.a(x())):
        want = module(x())
    same(twice(run), want, engine)


# -- in invokes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 2])
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("engine", ENGINES)
def test_all_invokes_skip_with_values_of_their_own(engine, pack, step):
    """With a number that the model did not have there, no scan tells what follows, and hooks do it."""
    module = made(Returns, PACKS[pack])
    model = wrap(engine, module)

    def run():
        kept = []
        with assert_no_fallback() if step == 3 else contextlib.nullcontext(), model.trace() as tracer:
            for rows, scale in ((2, 1.0), (1, -3.0), (3, 0.5)):
                with tracer.invoke(x(rows, rows)):
                    h = model.part.input
                    model.part.skip(PACKS[pack](h * scale, h + scale, step))
                    kept.append(parts(model.part.output)[1].save())
                    if scale < 0:
                        parts(model.part.output)[0][:] = 0
                    kept.append(model.output.save())
        return kept

    want = []
    for rows, scale in ((2, 1.0), (1, -3.0), (3, 0.5)):
        h = module.a(x(rows, rows))
        with replaced(
            module.part, lambda *, x, scale=scale, s=scale: PACKS[pack](x * (0 if s < 0 else s), x + s, step)
        ):
            want += [h + scale, module(x(rows, rows))]
    got = twice(run)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # other batch sizes round differently


@pytest.mark.parametrize("engine", ENGINES)
def test_a_value_of_an_earlier_invoke_as_the_skip_value_of_a_later_one(engine):
    module = made(Returns, as_tuple)
    model = wrap(engine, module)
    with assert_no_fallback(), model.trace() as tracer:
        with tracer.invoke(x()):
            h = model.a.output * 2
            model.b.skip(h)
        with tracer.invoke(x(3, 1)):
            model.b.skip(h + model.b.input)
            second, out = model.b.output.save(), model.output.save()
    _, skip, step = module.part(x=module.a(x(3, 1)), scale=2.0)
    b = module.a(x()) * 2 + module.part.up(module.a(x(3, 1))) * 2
    same(second, b, "aot_eager")
    same(out, module.head(b + skip * step), "aot_eager")


@pytest.mark.parametrize("engine", ENGINES)
def test_some_invokes_is_an_error_and_leaves_nothing(engine):
    module = made(Returns, as_tuple)
    model = wrap(engine, module)
    with (
        pytest.raises(SkipError, match=r"`b` is skipped in 1 of 2 invokes .*test_skips.py:\d+") as caught,
        model.trace() as tracer,
    ):
        with tracer.invoke(x()):
            model.b.skip(model.b.input)
        with tracer.invoke(x()):
            tracer.cache()  # observes, and is no invoke
    assert isinstance(caught.value, ValueError)
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in module.modules())
    with model.trace(x()):
        out = model.output.save()
    same(out, module(x()), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_invoke_over_the_whole_batch_skips_for_all(engine):
    module = made(Returns, as_tuple)
    model = wrap(engine, module)
    with assert_no_fallback(), model.trace() as tracer:
        with tracer.invoke(x(2)):
            first = model.b.output.save()
        with tracer.invoke(x(1, 1)):
            model.a.output[:] = 1
        with tracer.invoke():
            model.b.skip(model.b.input * 0 + 2)
            out = model.b.output.save()
    assert (first == 2).all() and (out == 2).all() and len(out) == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_of_a_skipped_module_happens(engine):
    """Its buffers do not move, its children do not run: reading one is an error that says so; the rest is delivered."""
    module = made(BatchNorm).train()
    model = wrap(engine, module)
    with assert_no_fallback(), model.trace(x()):
        model.bn.skip(model.bn.input)
        out = model.output.save()
    assert module.bn.num_batches_tracked == 0 and (module.bn.running_mean == 0).all()
    same(out, module.head(module.b(module.a(x()).relu())), engine)

    blocks = made(lambda: nn.Sequential(Block(), Block()))
    model = wrap(engine, blocks)
    with pytest.raises(MissedSiteError, match=r"`0.up.output` \(call 0\) was read.*skipped"), model.trace(x()):
        model[0].skip(model[0].input)
        out = model.output.save()
        model[0].up.output.save()
    same(out, blocks[1](x()), engine)


# -- stop and barrier -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_stop_in_one_of_two_invokes(engine):
    """The forward ends there for both; at the site itself the other invoke is still served, and caches see it."""
    module, ran = made(lambda: nn.Sequential(Block(), Block(), Block())), []
    model = wrap(engine, module)
    module[2].act.register_forward_hook(lambda *_: ran.append("act"))
    for stopper in (0, 1):
        got = {}
        with model.trace() as tracer:
            for i in range(2):
                with tracer.invoke(x(2, i)):
                    cache = tracer.cache()
                    got[i] = model[1].output.save()
                    if i == stopper:
                        tracer.stop()
                    model[1].output[:] = 7
                    got["lost"] = model[2].output.save()
        other = 1 - stopper
        assert (got[other] == 7).all()
        same(got[stopper], module[1](module[0](x(2, stopper))), "aot_eager")
        assert "model.1" in cache and "model.2" not in cache and "model.2.up" not in cache
        with pytest.raises(UnsavedValueError, match="2.output"):
            got["lost"].sum()
        ran_by_reference = len(ran)
        with model.trace(x()):
            model[1].output.save()
        assert len(ran) == ran_by_reference + 1  # the model itself is as it was
    ran.clear()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_barrier_orders_what_two_invokes_share(engine):
    module = made(lambda: nn.Sequential(Block(), Block(), Block()))
    model = wrap(engine, module)

    def run():
        with assert_no_fallback(), model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(x()):
                h = model[0].output[:, -1]
                barrier()
                first = model.output.save()
                barrier()
            with tracer.invoke(x(3, 1)):
                barrier()
                model[0].output[:, -1] = h
                barrier()
                second = model.output.save()
        return first, second

    h, g = module[0](x()), module[0](x(3, 1))
    g[:, -1] = h[:, -1]
    torch.testing.assert_close(twice(run), (module(x()), module[2](module[1](g))), rtol=1e-4, atol=1e-5)


def test_a_barrier_that_not_everybody_reaches():
    model = wrap("hooks", made(lambda: nn.Sequential(Block())))
    with (
        pytest.raises(ValueError, match=r"test_skips.py:\d+: a barrier was never reached by every block"),
        model.trace() as tracer,
    ):
        barrier = tracer.barrier(3)
        for i in range(2):
            with tracer.invoke(x(1, i)):
                barrier()
    with model.trace(x()):
        out = model.output.save()
    assert out.shape == x().shape
