"""`tracer.bug_report(path)`: one archive, without weights and prompts."""

import json
import os
import zipfile

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load

from nnsight_fx import NNsight

SECRET = 0.7310585


def traced(tmp_path, fail=False, **options):
    torch.manual_seed(0)
    model = NNsight(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    model.compile(backend="eager")
    path = tmp_path / "report.zip"
    try:
        with model.trace(torch.full((2, 4), SECRET)) as tracer:
            model[0].output = model[0].output + torch.full((4,), SECRET)
            if fail:
                model[0].output = model[0].output[:, :2]
            model[2].output.save()
    except RuntimeError:
        assert fail
    tracer.bug_report(path, **options)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_what_is_in_it(tmp_path):
    found = traced(tmp_path)
    assert set(found) == {
        *(
            "versions.json",
            "model.txt",
            "explain.txt",
            "explain.json",
            "plan_0.py",
            "segment_0.py",
            "guards.txt",
        ),
    }
    assert json.loads(found["versions.json"])["torch"] == torch.__version__
    assert "model[0].output = " in found["plan_0.py"].decode() and "test_bug_report.py:" in found["plan_0.py"].decode()
    assert json.loads(found["explain.json"])["captures"][0]["compiles"] == 1
    assert "site(" in found["segment_0.py"].decode() and "args" in found["guards.txt"].decode()
    assert all(str(SECRET)[:6].encode() not in content for content in found.values())
    assert os.listdir(tmp_path) == ["report.zip"]


def test_inputs_only_when_asked(tmp_path):
    found = traced(tmp_path, inputs=True)
    assert torch.equal(load(found["inputs.safetensors"])["input_0"], torch.full((2, 4), SECRET))


def test_after_an_error(tmp_path):
    assert "model[0].output = " in traced(tmp_path, fail=True)["plan_0.py"].decode()


def test_nothing_is_left_where_it_cannot_be_written(tmp_path):
    model = NNsight(nn.Linear(4, 4))
    with model.trace(torch.ones(2, 4)) as tracer:
        model.output.save()
    with pytest.raises(OSError):
        tracer.bug_report(tmp_path / "no" / "folder.zip")
    assert os.listdir(tmp_path) == []
