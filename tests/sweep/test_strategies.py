"""A session gives the numbers of a loop of traces, whichever way it runs them."""

import contextlib

import pytest
import torch

from nnsight_fx import NNsight, assert_max_compiles, assert_no_fallback

from .programs import PROGRAMS, Breaks, InPlace, Late, Mixing, X, mlp, patching, same

ENGINES = ["hooks", "eager", "aot_eager"]


def wrap(engine, module):
    model = NNsight(module)
    if engine != "hooks":
        model.compile(backend=engine)
    return model


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_it_equals_the_loop(program, engine):
    module = mlp()
    want = program(NNsight(module))  # hooks, one trace after the other
    model = wrap(engine, module)
    for _ in range(2):
        with model.session() as session:
            got = program(model)
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            same(a, b)
    alone = {"chained"}
    ran = {g["strategy"] for g in session.explain().to_dict()["groups"]}
    together = "batched" if engine == "hooks" else "forked"
    assert (together in ran) == (program.__name__ not in alone), session.explain()


@pytest.mark.parametrize("cls", [Mixing, Breaks])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.filterwarnings("ignore:.*graph break.*")
def test_models_whose_rows_are_not_apart_run_one_by_one(cls, engine):
    module = mlp(cls)
    model, want = wrap(engine, module), None
    for scope in (contextlib.nullcontext(), model.session()):
        outs = []
        with scope:
            for i in range(3):
                with model.trace(X[i]):
                    model.blocks[1].output[:, i] = 0
                    outs.append(model.head.output.save())
        if want is None:
            want = outs
    for a, b in zip(outs, want, strict=True):
        same(a, b, exact=engine != "aot_eager")
    (group,) = scope.explain().to_dict()["groups"]
    assert group["strategy"] == "one by one" and group["forwards"] == 3, group
    assert group["why"]


def test_batches_have_few_forwards():
    module, ran = mlp(), []
    module.register_forward_hook(lambda m, a, out: ran.append(out.shape[0]))
    model = NNsight(module)
    with model.session() as session:
        for position in range(7):
            for _ in range(10):
                with model.trace(X[0]):
                    model.blocks[0].output[:, position] = 0
                    model.head.output.save()
    assert sum(ran) == 70 and len(ran) == 3
    (group,) = session.explain().to_dict()["groups"]
    assert (group["strategy"], group["forwards"], group["structures"], group["traces"]) == ("batched", 3, 1, 70)
    assert "70 trace(s)" in str(session.explain())


def test_out_of_memory_halves_the_batch(monkeypatch):
    module, tried = mlp(), []

    def full(m, args):
        tried.append(args[0].shape[0])
        if args[0].shape[0] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    module.register_forward_pre_hook(full)
    model, outs = NNsight(module), []
    with model.session() as session:
        for i in range(8):
            with model.trace(X[i % 4]):
                outs.append(model.head.output.save())
    for i, out in enumerate(outs):
        same(out, module(X[i % 4]))
    assert tried[:7] == [8, 4, 2, 2, 4, 2, 2]
    assert "halved" in str(session.explain())


@pytest.mark.inductor
def test_regions_are_compiled_once():
    """Every layer and position: three compiled regions whatever the depth, and none more for another grid."""
    module = mlp(blocks=6)
    want = patching(NNsight(module))
    model = NNsight(module)
    model.compile()
    for again in (False, True):
        with assert_no_fallback(), assert_max_compiles(0 if again else 4), model.session() as session:
            got = patching(model)
        for a, b in zip(got, want, strict=True):
            same(a, b)
        facts = session.explain().to_dict()["groups"][-1]
        assert facts["strategy"] == "forked" and facts["flops"] < 0.6 * facts["naive"]


def test_the_fork_is_bit_equal_and_computes_one_position():
    module = mlp()
    want = patching(NNsight(module))
    model = wrap("eager", module)
    with model.session() as session:
        got = patching(model)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    facts = session.explain().to_dict()["groups"][-1]
    assert facts["notes"][0] == "`head.output` was computed at one position of a row"
    assert facts["notes"][1].startswith("every position was computed: `aten.bmm")  # `causal @ x`, no attention
    assert "of the FLOPs of the loop" in str(session.explain())


@pytest.mark.parametrize(("cls", "together"), [(InPlace, True), (Late, False)])
@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_a_model_that_changes_values_in_place(cls, together, engine):
    """A saved value shows what the model does to it later, as in a trace alone."""
    module = mlp(cls)
    model, found = wrap(engine, module), []
    for scope in (contextlib.nullcontext(), model.session()):
        outs = []
        with scope:
            for i in range(3):
                with model.trace(X[0]):
                    model.blocks[0].output[:, i] = 0
                    outs += [model.blocks[1].output.save(), model.head.output.save()]
        found.append(outs)
    for a, b in zip(*found, strict=True):
        same(b, a)
    (group,) = scope.explain().to_dict()["groups"]
    assert (group["strategy"] == "forked") == (together and engine == "eager"), group
