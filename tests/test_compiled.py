"""What was compiled in one process, used in another."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight, compat
from nnsight_fx.errors import StoreError
from nnsight_fx.model.model import compiled

PROGRAM = """
import sys, torch, torch.nn as nn
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
from nnsight_fx import NNsight

built, build = [], cpp_builder.run_compile_cmd
cpp_builder.run_compile_cmd = lambda line, cwd: (built.append(line), build(line, cwd=cwd))[1]
torch.manual_seed(0)
model = NNsight(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)))
model.compile()
if sys.argv[1] == "load":
    model.load_compiled(sys.argv[2])
with torch.no_grad(), model.trace(torch.ones(2, 4)):
    model[0].output = model[0].output * 3
    out = model.output.save()
if sys.argv[1] == "save":
    model.save_compiled(sys.argv[2])
kernels = sum("main.cpp" in str(line) for line in built)
hit, miss = (counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss"))
print(hit, miss, kernels, out.flatten().tolist())
"""


@pytest.mark.inductor
def test_a_second_process_compiles_nothing(tmp_path):
    printed = []
    for do in ("save", "load"):
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"cache_of_{do}")}
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, do, str(tmp_path / "made")],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not ran.returncode, ran.stderr
        printed.append(ran.stdout.strip().split(" ", 3))
    first, later = printed
    assert first[:3] == ["0", "1", "1"]
    assert later[:3] == ["1", "0", "0"]
    assert later[3] == first[3]


def test_kernels_are_of_one_machine_and_stay_in_their_folder(model, tmp_path, monkeypatch):
    """Another CPU, C library or Python builds its own; what is there already stays."""
    (tmp_path / "built.so").write_bytes(b"kernel")
    inside, names = tmp_path / "inductor", ("ab/cabc.main.so", "ab/cabd.main.so", "../outside.so")
    (inside / "ab").mkdir(parents=True)
    (inside / names[1]).write_bytes(b"here")
    monkeypatch.setattr(compat.inductor, "kernels", lambda: dict.fromkeys(names, tmp_path / "built.so"))
    monkeypatch.setattr(compat.inductor, "kernel_folder", lambda: inside)
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"", None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda made: made)
    model.save_compiled(tmp_path / "made")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(compiled, "_native", lambda: "another machine")
        model.load_compiled(tmp_path / "made")
    assert not (inside / names[0]).exists()
    model.load_compiled(tmp_path / "made")
    assert [(inside / name).read_bytes() for name in names[:2]] == [b"kernel", b"here"]
    assert not (tmp_path / "outside.so").exists()
    (tmp_path / "made" / "kernels.zip").write_bytes(b"no zip")
    with pytest.raises(StoreError, match="kernels.zip` is damaged"):
        model.load_compiled(tmp_path / "made")


@pytest.fixture
def model():
    return NNsight(nn.Linear(2, 2))


def test_what_no_process_compiled_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    with pytest.raises(StoreError, match="nothing was compiled"):
        model.save_compiled(tmp_path / "made")
    assert not (tmp_path / "made").exists()


def written(tmp_path, monkeypatch, model, **other):
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"no artifacts", None))
    model.save_compiled(tmp_path / "made")
    file = tmp_path / "made" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **other}))
    return tmp_path / "made"


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"torch": "1.0"}, "by another torch: 1.0"),
        ({"machine": "abacus"}, "by another kind of machine: abacus"),
        ({"format": "nnsight_fx.sweep"}, "holds nothing that `save_compiled` wrote"),
    ],
)
def test_what_another_made_is_refused(model, tmp_path, monkeypatch, other, why):
    with pytest.raises(StoreError, match=why):
        model.load_compiled(written(tmp_path, monkeypatch, model, **other))


def test_a_damaged_file_is_refused(model, tmp_path, monkeypatch):
    with pytest.raises(StoreError, match="damaged"):
        model.load_compiled(written(tmp_path, monkeypatch, model))


def test_a_folder_that_is_not_there(model, tmp_path):
    with pytest.raises(StoreError, match="there is no"):
        model.load_compiled(tmp_path / "nowhere")
