"""`model.explain()` of what makes many traces says what ran: sweeps, ready-made experiments, harvests, sessions, generations, programs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nnsight_fx import LanguageModel, NNsight, patching
from nnsight_fx.sweep.executors import Devices

from .programs import X, mlp

IDS, OTHER = torch.tensor([[5, 7, 11, 2]]), torch.tensor([[5, 8, 11, 2]])
COUNTS = re.compile(r"\d+(\.\d+)? s\b")


def wrap(engine):
    model = NNsight(mlp())
    if engine != "hooks":
        model.compile(backend=engine)
    return model


def language(engine="hooks"):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
    }
    model = LanguageModel(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40)).eval().requires_grad_(False))
    if engine != "hooks":
        model.compile(backend=engine)
    return model


def scale(model):
    def body(tracer, layer, by):
        model.blocks[layer].output[:, 3] *= by
        return model.head.output[:, -1]

    return body


GRID = {"layer": range(3), "by": [0.5, 2.0]}


def metric(logits):
    return logits[:, -1, 4] - logits[:, -1, 5]


def told(model):
    """The lines about what ran last, without seconds."""
    text = COUNTS.sub("N s", str(model.explain()))
    return [line.strip() for line in text.split("\n") if "captur" not in line or "trace(s)" in line]


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_a_sweep(engine):
    model = wrap(engine)
    model.sweep(scale(model), X[0], GRID, chunk=4, progress=False)
    run = model.explain().to_dict()["run"]
    assert model.explain().to_dict()["trace"] is None
    assert run["what"] == "sweep" and re.search(r"test_explained\.py:\d+$", run["line"])
    (group,) = run["groups"]
    ways = {"hooks": ("batched", "hooks"), "eager": ("forked", "captured graphs")}
    assert (group["strategy"], group["engine"]) == ways[engine]
    assert (group["traces"], group["forwards"]) == (6, 2)  # a session of four, and one of two
    text = str(model.explain())
    assert re.search(r"sweep at test_explained\.py:\d+\n    6 cells\n", text)
    assert "hooks, 1 forward" not in text
    if engine == "eager":
        facts = model.explain().to_dict()["captures"][0]
        assert facts["captures"] == 1 and facts["row_graphs"] == [{"sites": 31, "shape": "any x 7 x 16"}]
        (spent,) = facts["spent"]
        assert spent["shape"] == "any x 7 x 16" and re.fullmatch(r"test_explained\.py:\d+", spent["plan"])
        assert (spent["captures"], spent["compiles"]) == (1, facts["compiles"]) and spent["capture_s"] > 0
        assert group["compiles"] == facts["compiles"] and f"{group['compiles']} graphs compiled for it" in text
        assert "graph for any number of rows (any x 7 x 16): 31 sites" in text
        model.sweep(scale(model), X[0], GRID, chunk=4, progress=False)
        again = model.explain().to_dict()
        assert again["captures"][0]["captures"] == 1 and again["run"]["groups"][0]["compiles"] == 0


def test_ready_made_experiments():
    model = language("eager")
    patching.patch(model, IDS, OTHER, metric, progress=False)
    run = model.explain().to_dict()["run"]
    assert run["what"] == "patch" and run["notes"][0] == "8 cells"
    first, cells = run["groups"]  # the clean run, and the metric of both prompts: not worth a compile
    assert (first["traces"], first["engine"]) == (3, "hooks")
    assert (cells["strategy"], cells["traces"], cells["engine"]) == ("forked", 8, "captured graphs")
    model = language()
    patching.ablate(model, IDS, metric, by="mean", layers=[1], progress=False)
    run = model.explain().to_dict()["run"]
    assert run["what"] == "ablate" and [g["traces"] for g in run["groups"]] == [2, 4]
    patching.attribution(model, IDS, OTHER, metric)
    assert [re.sub(r"\w+\.py:\d+|/\S*:\d+", "here", line) for line in told(model)[1:]] == [
        "attribution at here",
        "5 trace(s) from here: one by one on hooks, 5 forward(s), 3 structures",
    ]


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_a_harvest(engine, tmp_path):
    model = language(engine)
    for _ in range(2):  # the second has nothing to run
        model.harvest([[1, 2, 3], [3, 4], [4, 5, 6]], ["model.layers.0"], tmp_path / "a", batch_size=2, progress=False)
        run = model.explain().to_dict()["run"]
        assert run["what"] == "harvest" and re.search(r"test_explained\.py:\d+$", run["line"])
        if not _:
            (group,) = run["groups"]
            assert group["traces"] == group["forwards"] == 2
            assert group["engine"] == ("hooks" if engine == "hooks" else "captured graphs")
    assert run["groups"] == []


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_a_session_and_its_traces(engine):
    model = wrap(engine)
    with torch.no_grad(), model.session() as session:
        tracers = []
        for layer in range(3):
            with model.trace(X[0]) as tracer:
                model.blocks[layer].output[:] = 0
                model.head.output.save()
            tracers.append(tracer)
    assert model.explain().to_dict()["run"] == session.explain().to_dict()
    assert str(session.explain()).replace("\n", "\n  ") in str(model.explain())
    way = "batched" if engine == "hooks" else "forked"
    assert {t.explain().engine for t in tracers} == {way}
    shared = "hooks" if engine == "hooks" else "captured graphs"
    assert f"{shared}, in a forward that it shared with other traces" in str(tracers[0].explain())
    with model.trace(X[0]):  # and behind it a trace is what ran last
        model.head.output.save()
    assert model.explain().to_dict()["run"] is None and model.explain().to_dict()["trace"]["forwards"] == 1


def test_a_generation_counts_its_forwards():
    model = language("eager")
    for body_steps in (False, True):
        with model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False) as tracer:
            for _ in tracer.iter[:] if body_steps else ():
                model.model.layers[0].output[:] += 1
            ids = tracer.result.save()
        notes = model.explain().to_dict()["trace"]
        assert (notes["what"], notes["engine"], notes["forwards"], notes["segments"]) == ("generation", "spliced", 4, 4)
        assert notes["compiles"] + notes["hits"] == 4 and ids.shape == (1, 8)
    assert str(model.explain()).count("generation at test_explained.py:") == 1


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_a_program_tells_its_latest_run(engine):
    model = wrap(engine)

    def body(tracer, factor):
        model.blocks[0].output *= factor
        return model.head.output

    program = model.program(body)
    for run in range(4):
        with torch.no_grad():
            program(X[0], torch.tensor(2.0))
        notes = model.explain().to_dict()["trace"]
        assert notes["what"] == ("program, recorded" if run else "trace")
        assert (notes["forwards"], notes["saved"], notes["bytes"]) == (1, 1, 7 * 5 * 4)
        hits = (0, 1, 1, 1)[run] if engine == "eager" else 0
        assert (notes["engine"], notes["hits"]) == ("spliced" if engine == "eager" else "hooks", hits)


@pytest.mark.slow
def test_workers_tell_what_they_ran():
    model = wrap("hooks")
    model.sweep(scale(model), X[0], GRID, chunk=4, progress=False, executor=Devices(["cpu"]))
    run = model.explain().to_dict()["run"]
    assert run["notes"] == ["6 cells, with the executor Devices"]
    assert [(g["strategy"], g["traces"]) for g in run["groups"]] == [("batched", 6)]


def test_the_bar_says_what_it_waits_for(capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("tqdm.auto.tqdm.set_postfix_str", lambda bar, text="", refresh=True: shown.append(text))
    model = wrap("eager")
    model.sweep(scale(model), X[0], GRID)
    regions = [text for text in shown if text.startswith("compiling (region ")]
    assert shown[0] == "capturing the model" and shown[-1] == ""
    assert regions == [f"compiling (region {n} of {len(regions)})" for n in range(1, len(regions) + 1)] and regions
    assert "6/6" in capsys.readouterr().err
    shown.clear()
    model.sweep(scale(model), X[0], GRID, progress=False)
    assert not [text for text in shown if "compiling" in text]  # nothing to wait for
