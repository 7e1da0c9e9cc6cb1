"""Sweeps on several workers: the numbers of one process, to the bit, whoever dies on the way."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from nnsight_fx import LanguageModel, NNsight, WorkerLostError
from nnsight_fx.sweep import pool
from nnsight_fx.sweep.executors import Devices, Ray
from nnsight_fx.sweep.job import SweepJob
from nnsight_fx.sweep.packing import pack, unpack

from .programs import X, mlp

OVER = {"layer": range(3), "scale": [0.5, 2.0, 3.0, -1.0]}
TWO = ["cpu", "cpu"]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """What the tests' modules are imported from; one thread, as the workers have."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent.parent.parent), *sys.path])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wrap(engine="hooks"):
    model = NNsight(mlp())
    if engine != "hooks":
        model.compile(backend=engine)
    return model


def body(model, die=None, who=None):
    """Scales a layer; where `die` is a file, the process that gets to layer 1 first takes it away, and dies."""
    block = model.blocks

    def scale(tracer, layer, scale):
        if die is not None and layer == 1 and die.exists():
            die.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if who is not None:
            (who / f"{os.getpid()}").touch()
        block[layer].output = block[layer].output * scale
        return model.head.output[:, -1]

    return scale


def executor(kind):
    if kind == "devices":
        return Devices(TWO, threads=1)
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: `make test-ray`")
    return Ray(workers=2, cpus=1)


RAY = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")]  # its own
CASES = [
    ("devices", "hooks"),
    pytest.param("devices", "eager", marks=pytest.mark.slow),
    pytest.param("ray", "eager", marks=RAY),
]


@pytest.mark.parametrize(("kind", "engine"), CASES)
def test_a_worker_killed_midway(tmp_path, kind, engine):
    die, who = tmp_path / "die", tmp_path / "who"
    who.mkdir()
    model = wrap(engine)
    here = model.sweep(body(model), X[0], OVER, chunk=2, store=tmp_path / "here", progress=False)
    die.touch()
    there = model.sweep(
        body(model, die, who), X[0], OVER, chunk=2, store=tmp_path / "there", executor=executor(kind), progress=False
    )
    assert not die.exists() and len(list(who.iterdir())) >= 2 and str(os.getpid()) not in os.listdir(who)
    assert torch.equal(here["result"], there["result"])
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).glob("*.safetensors")} for n in ("here", "there")]
    assert files[0] == files[1] and len(files[0]) == 6
    about = [json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("here", "there")]
    assert about[0]["plans"] == about[1]["plans"] and about[0]["weights"] == about[1]["weights"]


def test_one_that_always_dies_is_told(monkeypatch):
    monkeypatch.setattr(pool, "TRIES", 1)
    model = wrap()

    def dies(tracer, layer):
        os._exit(3)

    with pytest.raises(
        WorkerLostError, match=r"test_executors\.py:\d+: 1 worker\(s\) died on the same 1 cells, from layer=0"
    ) as e:
        model.sweep(dies, X[0], {"layer": [0]}, executor=Devices(["cpu"]), progress=False)
    assert "ended with 3" in str(e.value)


@pytest.mark.slow
def test_an_error_of_the_body_is_its_own():
    model = wrap()
    with pytest.raises(IndexError) as error:
        model.sweep(body(model), X[0], {**OVER, "layer": [0, 7]}, executor=Devices(["cpu"]), progress=False)
    notes = "\n".join(error.value.__notes__)
    assert "in the sweep's cell layer=7" in notes and "in a worker" in notes


def test_names_and_objects():
    model = wrap()
    run = {"over": {"layer": [1], "scale": [2.0]}, "progress": False}
    want = model.sweep(body(model), X[0], **run)["result"]

    class Backwards:
        def run(self, job, chunks):
            assert isinstance(job, SweepJob)
            for chunk in reversed(chunks):
                yield chunk, job(chunk)

    found = model.sweep(body(model), X[0], OVER, executor=Backwards(), chunk=2, progress=False)
    assert torch.equal(found["result"][1, 1], want[0, 0])
    assert torch.equal(model.sweep(body(model), X[0], executor="serial", **run)["result"], want)
    with pytest.raises(ValueError, match=r"test_executors\.py:\d+: there is no executor `rey`; did you mean `ray`"):
        model.sweep(body(model), X[0], executor="rey", **run)
    with pytest.raises(TypeError, match="an executor has"):
        model.sweep(body(model), X[0], executor=3, **run)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"test_executors\.py:\d+: no GPU is here"):
            model.sweep(body(model), X[0], executor="devices", **run)
    with model.edit(inplace=True):
        model.blocks[0].output *= 2
    with pytest.raises(ValueError, match="a model with edits"):
        model.sweep(body(model), X[0], executor=Devices(["cpu"]), **run)


def test_a_job_goes_through_bytes():
    """The model, its envoys, a module of the user's and the compile options arrive; the body means the new model."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    model = LanguageModel(tf.GPT2LMHeadModel(config).eval(), rename={"transformer.h": "layers"})
    model.compile(backend="eager", dynamic=True)
    block, probe = model.layers[1], torch.nn.Linear(16, 2)

    def fn(tracer, p):
        return probe(block.output[:, p])

    job = SweepJob(model, fn, [torch.tensor([[1, 2, 3]])], {"p": [0, 2]}, {"compile": False})
    made = unpack(pack(job), "cpu")
    assert type(made.model) is LanguageModel and made.model is not model
    assert made.model._host.compiled.options == model._host.compiled.options
    with torch.no_grad():
        for parameter in made.model._module.parameters():
            parameter += 0.1  # of the copy: its results change, the original's do not
    before = [r["result"] for r in job([0, 1]).results]
    after = [r["result"] for r in made([0, 1]).results]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    again = unpack(pack(job), "cpu")
    assert all(torch.equal(a, r["result"]) for a, r in zip(before, again([0, 1]).results, strict=True))


@pytest.mark.slow
@pytest.mark.inductor
def test_workers_share_what_the_first_compiled(tmp_path, monkeypatch):
    """Each worker has an empty cache of its own; those behind the first load its artifacts, and compile nothing."""
    seen = tmp_path / "seen"
    seen.mkdir()
    model = wrap("inductor")

    def fn(tracer, scale):
        from torch._dynamo.utils import counters

        cache = {k: v for name in ("aot_autograd", "inductor") for k, v in counters[name].items() if "cache" in k}
        (seen / f"{os.getpid()}").write_text(json.dumps(cache))
        if cache.get("fxgraph_cache_miss"):
            time.sleep(2)  # so that the other gets several chunks
        model.blocks[0].output = model.blocks[0].output * scale
        return model.head.output[:, -1]

    class Apart(Devices):
        def start(self, slot, artifacts):
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"cache{slot}"))
            return super().start(slot, artifacts)

    found = model.sweep(
        fn,
        X[0],
        {"scale": [float(i) for i in range(1, 15)]},
        chunk=1,
        executor=Apart(TWO),
        progress=False,
        engine="compiled",
    )
    here = model.sweep(
        fn, X[0], {"scale": [float(i) for i in range(1, 15)]}, chunk=1, progress=False, engine="compiled"
    )
    torch.testing.assert_close(found["result"], here["result"])
    first, second = sorted(
        (json.loads(p.read_text()) for p in seen.iterdir() if p.name != f"{os.getpid()}"),
        key=lambda cache: cache.get("fxgraph_cache_hit", 0),
    )
    assert first["fxgraph_cache_miss"] > 0 and "fxgraph_cache_hit" not in first
    assert second["fxgraph_cache_hit"] > 0 and "fxgraph_cache_miss" not in second
