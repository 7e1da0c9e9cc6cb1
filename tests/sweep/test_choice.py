"""`engine=` of a sweep: hooks or compiled, by the work at hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from nnsight_fx import NNsight, assert_max_compiles
from nnsight_fx.engine import worth
from nnsight_fx.sweep import choice
from nnsight_fx.sweep.executors import Devices

from .programs import X, mlp
from .test_explained import scale

GRID = {"layer": range(3), "by": [i / 8 for i in range(8)]}  # 24 cells


@pytest.fixture
def estimated(monkeypatch):
    """Compiling with backend `eager` is said to take so many seconds: it is weighed like Inductor."""

    def says(cost):
        monkeypatch.setattr(choice, "EXACT", ())
        monkeypatch.setattr(choice, "estimate", lambda module: cost)

    monkeypatch.setattr(worth, "_learnt", [0.0, 0.0])
    return says


def compiled():
    model = NNsight(mlp())
    model.compile(backend="eager")
    return model


def run(model, **options):
    return model.sweep(scale(model), X[0], GRID, **({"progress": False} | options))["result"]


@pytest.fixture(scope="module")
def wanted():
    return run(NNsight(mlp()))


def why(model):
    (_, note) = model.explain().to_dict()["run"]["notes"]
    return note


def ways(model):
    return [(g["strategy"], g["traces"]) for g in model.explain().to_dict()["run"]["groups"]]


def test_where_compiling_costs_more_than_it_saves_it_is_hooks(estimated, wanted):
    estimated(1e6)
    model = compiled()
    with assert_max_compiles(0):
        torch.testing.assert_close(run(model), wanted)
    assert ways(model) == [("batched", 24)]
    assert why(model).startswith("hooks: compiling takes about 1000000 s, more than it saves: 14 cells left at ")
    assert why(model).endswith('`engine="compiled"` compiles')
    assert model._host.compiled is not None and model._host.compiled.captures == 0


def test_where_it_saves_more_it_compiles_behind_the_first_cells(estimated, wanted):
    estimated(0.0)
    model = compiled()
    torch.testing.assert_close(run(model), wanted)
    assert ways(model) == [("batched", 10), ("forked", 14)]
    assert why(model).startswith("compiled, after 10 cells on hooks: compiling takes about 0.0 s, less than it saves")
    with assert_max_compiles(0):
        torch.testing.assert_close(run(model), wanted)
    assert ways(model) == [("forked", 24)] and why(model) == "compiled: its graphs are compiled already"


def test_sweeps_on_hooks_add_up(estimated, wanted):
    """Who runs one after the other has it compiled in the end."""
    model = compiled()
    capture: Any = model._host.compiled
    estimated(1e6)
    run(model)
    assert capture.hooks_s > 0 and ways(model) == [("batched", 24)]
    estimated(capture.hooks_s * 0.7)
    run(model)
    assert ways(model)[-1] == ("forked", 14) and capture.hooks_s == 0


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_small_chunks(estimated, wanted, chunk):
    for cost in (1e6, 0.0):
        estimated(cost)
        model = compiled()
        torch.testing.assert_close(run(model, chunk=chunk), wanted)
        hooked = {"batched": 0, "one by one": 0} | dict(ways(model))
        on_hooks = sum(g["traces"] for g in model.explain().to_dict()["run"]["groups"] if g["engine"] == "hooks")
        assert on_hooks == (24 if cost else 10), hooked


def test_a_few_cells_are_not_worth_it(estimated):
    estimated(0.0)
    model = compiled()
    with assert_max_compiles(0):
        model.sweep(scale(model), X[0], {"layer": range(3), "by": [1.0, 2.0]}, progress=False)
    assert why(model) == "hooks: there are too few cells to compile for"


def test_it_can_be_said(estimated, wanted):
    estimated(1e6)
    model = compiled()
    torch.testing.assert_close(run(model, engine="compiled"), wanted)
    assert ways(model) == [("forked", 24)] and why(model) == 'compiled: `engine="compiled"`'
    estimated(0.0)
    model = compiled()
    torch.testing.assert_close(run(model, engine="hooks"), wanted)
    assert ways(model) == [("batched", 24)] and why(model) == 'hooks: `engine="hooks"`'
    with pytest.raises(
        ValueError, match=r"test_choice\.py:\d+: there is no engine `compile` for a sweep; did you mean"
    ):
        run(model, engine="compile")
    with pytest.raises(
        ValueError, match=r'`engine="compiled"` needs a compiled model: call `model.compile\(\)` before'
    ):
        run(NNsight(mlp()), engine="compiled")
    assert ways(model) == [("batched", 24)]


def test_a_backend_that_compiles_nothing_is_taken_at_its_word():
    model = compiled()
    run(model)
    assert ways(model) == [("forked", 24)] and why(model) == "compiled: this backend's compiling is not estimated"


def test_what_the_sweep_prepares_runs_where_it_does(estimated):
    estimated(1e6)
    model, engines = compiled(), []

    def prepare(prompts):
        with model.trace(X[0]) as tracer:
            model.head.output.save()
        engines.append(tracer.explain().engine)

    with assert_max_compiles(0):
        run(model, prepare=prepare)
    assert engines == ["hooks"]


def test_a_store_goes_on_with_its_engine(estimated, tmp_path):
    estimated(0.0)
    first = run(compiled(), store=tmp_path / "a", chunk=12)
    about = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert about["ran"] == "compiled, after 10 cells on hooks"
    (tmp_path / "a" / "000000.safetensors").unlink()
    estimated(1e6)
    model = compiled()
    assert torch.equal(run(model, store=tmp_path / "a"), first)
    assert ways(model) == [("batched", 10), ("forked", 2)]
    assert why(model) == "compiled, after 10 cells on hooks: so this store was begun"


@pytest.mark.slow
def test_workers_compile(estimated, wanted):
    estimated(1e6)
    model = compiled()
    torch.testing.assert_close(run(model, executor=Devices(["cpu"])), wanted)
    assert ways(model) == [("forked", 24)]


def test_the_estimate(monkeypatch):
    """By the modules, each distinct one once, and by what compiling took in this process."""
    small, large = (worth.work(mlp(blocks=n)) for n in (3, 30))
    assert small < large < 1.5 * small  # 30 equal blocks are read, and compiled once
    monkeypatch.setattr(worth, "_learnt", [0.0, 0.0])
    for turns, slower in ((worth.TURNS_S, 1), (4 * worth.TURNS_S, 4)):  # a busy machine
        monkeypatch.setattr(worth, "_turns", lambda turns=turns: turns)
        assert worth.estimate(mlp(blocks=3)) == pytest.approx(slower * (worth.BEGIN_S + small))
    monkeypatch.setattr(worth, "_learnt", [10.0, 5.0])
    assert worth.estimate(mlp(blocks=3)) == pytest.approx(2 * small)
