"""A sweep on disk: what its manifest tells, what tells two sweeps apart, and that a killed one ends as if nothing had been."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn as nn
import transformers as tf

from nnsight_fx import LanguageModel, NNsight, StoreError
from nnsight_fx.report.provenance import hashed, of_model

from .programs import X, mlp

OVER = {"layer": range(3), "by": [0.5, 2.0, 3.0, -1.0]}


def body(model):
    def scale(tracer, layer, by):
        h = model.blocks[layer].output
        model.blocks[layer].output = h * by + torch.randn_like(h)  # which the seed and the cell's number decide
        return model.head.output[:, -1]

    return scale


def run(model, **options):
    return model.sweep(body(model), X[0], OVER, progress=False, **options)


def content(folder):
    """All bytes of a sweep, but for when it was run."""
    found = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    return {k: v for k, v in json.loads(found.pop("manifest.json")).items() if k != "created"}, found


# -- random draws ----------------------------------------------------------------------------------------------------


def test_a_cells_draws_are_its_own(tmp_path):
    """Whatever ran before it, and in which chunk."""
    model = NNsight(mlp())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = run(model)["result"]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator stays where it was
    assert torch.equal(first, run(model, chunk=5)["result"])
    assert torch.equal(first, run(model, seed=3)["result"])
    assert not torch.equal(first, run(model, seed=4)["result"])
    assert len(first.flatten(0, 1).unique(dim=0)) == 12


def test_a_store_goes_on_as_it_was_begun(tmp_path):
    model = NNsight(mlp())
    first = run(model, store=tmp_path / "a", chunk=5, seed=7)
    for name in ("000005.safetensors", "000010.safetensors"):
        (tmp_path / "a" / name).unlink()
    again = run(model, store=tmp_path / "a")
    assert torch.equal(first["result"], again["result"]) and again.manifest["seed"] == 7
    assert sorted(p.name for p in (tmp_path / "a").glob("0*")) == [f"{i:06d}.safetensors" for i in (0, 5, 10)]
    with pytest.raises(StoreError, match=r"test_store\.py:\d+: the sweep in `.*` was begun with `seed=7`"):
        run(model, store=tmp_path / "a", seed=8)


# -- the manifest ------------------------------------------------------------------------------------------------------


def test_what_a_paper_can_cite(tmp_path):
    model = NNsight(mlp())
    model.compile(backend="eager")
    about = run(model, store=tmp_path / "a", seed=5).manifest
    assert about == json.loads((tmp_path / "a" / "manifest.json").read_text())
    digests = {"weights", "structure", "inputs", "program", "plans", "options"}
    assert all(len(about[name]) == 32 and int(about[name], 16) for name in digests)
    assert about["versions"]["torch"] == torch.__version__ and about["versions"]["python"]
    assert about["hardware"]["processor"] and about["hardware"]["cores"] == os.cpu_count()
    assert (about["model"], about["seed"], about["threads"]) == ("MLP", 5, torch.get_num_threads())
    assert "eager" in about["engine"] and about["created"].startswith("20")
    on_hooks = run(model, store=tmp_path / "b", seed=5, compile=False).manifest
    assert on_hooks["engine"] == "hooks"
    assert [on_hooks[name] for name in sorted(digests)] == [about[name] for name in sorted(digests)]


class Scale:
    def __init__(self, by):
        self.by = by

    def __call__(self, h):
        return h * self.by


def changes():
    """Pairs of programs that must not be taken for one another; each is made twice, to be the same."""

    def closed(held):
        return lambda h: held(h) if callable(held) else h * held

    def linear(seed):
        torch.manual_seed(seed)
        return nn.Linear(2, 2)

    text = "lambda h: h * {}"
    inner = "def f(h):\n    def g(x):\n        return x + {}\n    return g(h)\n"

    def executed(number):
        names = {}
        exec(inner.format(number), names)
        return names["f"]

    return {
        "a number in a text without source": lambda n: eval(text.format(n)),
        "a number in an inner function": executed,
        "a number that it closes over": lambda n: closed(float(n)),
        "a tensor": lambda n: closed(torch.full((2,), n)),
        "an array": lambda n: closed(torch.full((2,), n).numpy()),
        "a module's weights": lambda n: closed(linear(n)),
        "a module's structure": lambda n: closed(nn.GELU() if n == 1 else nn.ReLU()),
        "an object's state": lambda n: closed(Scale(n)),
        "a method": lambda n: Scale(n).__call__,
        "a partial": lambda n: functools.partial(torch.add, alpha=n),
        "a default": lambda n: eval(f"lambda h, by={n}: h * by"),
        "a keyword's default": lambda n: eval(f"lambda h, *, by={n}: h * by"),
        "a container": lambda n: closed({"a": [1, (n, None)]}),
        "a dtype": lambda n: closed([torch.float16, torch.bfloat16][n - 1]),
        "a negative zero": lambda n: closed(0.0 if n == 1 else -0.0),
    }


@pytest.mark.parametrize("make", changes().values(), ids=changes())
def test_what_makes_another_program(make):
    assert hashed(make(1)) == hashed(make(1)) != hashed(make(2))


def test_what_makes_another_model():
    def gpt2(seed=0, **changed):
        torch.manual_seed(seed)
        config = {"vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
        return LanguageModel(tf.GPT2LMHeadModel(tf.GPT2Config(**config | changed)).eval())

    def about(model):
        found = of_model(model)
        return found["structure"], found["weights"]

    same = about(gpt2())
    assert about(gpt2()) == same
    structure, weights = about(gpt2(n_head=4))  # equal weights, another computation
    assert structure != same[0] and weights == same[1]
    structure, weights = about(gpt2(seed=1))
    assert structure == same[0] and weights != same[1]
    training = gpt2()
    training._module.train()
    assert about(training)[0] != same[0]
    edited = gpt2()
    with edited.edit(inplace=True):
        edited.transformer.h[0].mlp.output *= 2
    assert about(edited)[0] != same[0]


def test_a_folder_of_another_sweep_stays_as_it_is(tmp_path):
    model = NNsight(mlp())
    run(model, store=tmp_path / "a", chunk=5)
    before = content(tmp_path / "a")
    with pytest.raises(StoreError, match="is of another body"):
        model.sweep(lambda t, layer, by: model.head.output, X[0], OVER, store=tmp_path / "a", progress=False)
    with pytest.raises(StoreError, match="is of other options"):
        run(model, store=tmp_path / "a", pad_to=9)
    assert content(tmp_path / "a") == before
    (tmp_path / "a" / "manifest.json").write_text('{"format": "nnsi')
    with pytest.raises(StoreError, match=r"manifest.json` is damaged"):
        run(model, store=tmp_path / "a")


# -- kill -9 -----------------------------------------------------------------------------------------------------------

KILLED = """
import sys, time, torch
from nnsight_fx import NNsight
torch.set_num_threads(1)
torch.manual_seed(0)
model = NNsight(torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4))).requires_grad_(False))
if sys.argv[2] == "eager":
    model.compile(backend="eager")
x = torch.linspace(-1, 1, 16)[None]

def body(tracer, layer, by):
    h = model[layer].output
    model[layer].output = h * by + torch.randn_like(h) if layer == 2 else h * by
    return model[3].output

class Slowly:  # an executor's chunks take their time, so that there is some to kill it in
    def run(self, job, chunks):
        for chunk in chunks:
            time.sleep(float(sys.argv[3]))
            yield chunk, job(chunk)

over = {"layer": range(4), "by": [i / 10 for i in range(15)]}
model.sweep(body, x, over, store=sys.argv[1], chunk=7, seed=1, executor=Slowly(), progress=False)
"""


@pytest.mark.parametrize("engine", ["hooks", pytest.param("eager", marks=pytest.mark.slow)])
def test_kill_9(tmp_path, monkeypatch, engine):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "a"), engine, "0.3"])
    threads = torch.get_num_threads()

    def here(name):
        monkeypatch.setattr(sys, "argv", ["", str(tmp_path / name), engine, "0"])
        exec(KILLED, {"__name__": "killed"})
        return content(tmp_path / name)

    try:
        whole = here("whole")
        until = time.monotonic() + 120
        while len(list((tmp_path / "a").glob("[0-9]*.safetensors"))) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert len(list((tmp_path / "a").glob("[0-9]*.safetensors"))) < 9 == len(whole[1])
        assert "plans" not in json.loads((tmp_path / "a" / "manifest.json").read_text())
        (tmp_path / "a" / ".nnsight_fx-half").write_bytes(b"what a kill in the middle of a file leaves")
        assert here("a") == whole
    finally:
        torch.set_num_threads(threads)
