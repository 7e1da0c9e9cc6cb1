"""What the README shows runs as it stands there, from a file and under `python -c`."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import nnsight_fx

ERRORS = (Path(__file__).parent.parent / "docs" / "errors.md").read_text()
SETUP, *_ = re.findall(r"```python\n(.*?)```", ERRORS, re.S)
EXAMPLES = re.findall(r"## ([^\n]*)\n(?:(?!```|\n## ).)*```python\n(.*?)```\n\n```text\n(.*?)\n```", ERRORS, re.S)
README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_readmes_example_runs_where_no_source_file_exists():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Tensor" in done.stdout and "torch.Size([2, 100])" in done.stdout


def test_the_page_on_sweeps_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "sweeps.md").read_text()
    names: dict = {"__name__": "sweeps"}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(block, "sweeps.md", "exec"), names)
    assert names["found"]["result"].shape == (2, 2, 5) and names["mean"].errors["result"].shape == (2,)
    assert names["pairs"]["result"].shape == (2, 2) and len(names["acts"]) == 10 and len(names["frame"]) == 30
    assert names["batch"].shape == (2, 32) and names["batch"].dtype == names["torch"].float16
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"scale", "acts"}


def test_a_five_line_trace_under_python_c():
    text = (
        "import torch, nnsight_fx\n"
        "m = nnsight_fx.NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))\n"
        "with m.trace(torch.ones(1, 2)):\n"
        "    h = m[0].output.save()\n"
        "print(type(h).__name__, tuple(h.shape))\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.stdout.strip() == "Tensor (1, 2)", done.stderr


def test_the_readme_is_short():
    assert len(README.splitlines()) < 150


@pytest.mark.parametrize(("title", "code", "text"), EXAMPLES, ids=[title for title, _, _ in EXAMPLES])
def test_each_error_of_the_manual_is_raised_with_its_text(title, code, text):
    names: dict = {}
    exec(compile(SETUP, "setup.py", "exec"), names)
    with pytest.raises(Exception) as error:
        exec(compile(code, "example.py", "exec"), names)
    said = "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])
    assert said.startswith(text)
    if title.startswith("`"):
        cls, *also = re.findall(r"`(\w+)`", title)
        assert type(error.value).__name__ == cls
        assert set(also) <= {c.__name__ for c in type(error.value).__mro__}


def test_every_public_error_is_in_the_manual():
    public = {
        n for n in nnsight_fx.__all__ if n.endswith("Error") or n in {"PaddedLengthUnknown", "SourceNotAvailable"}
    }
    assert len(EXAMPLES) >= 12 and {n for n in public if f"`{n}`" not in ERRORS} == set()


def test_the_tables_are_those_of_the_committed_figures():
    names = runpy.run_path(str(Path(__file__).parent.parent / "bench" / "tables.py"))
    assert names["readme"]() == README, "run `python bench/tables.py`"
    assert names["page"]() == names["PAGE"].read_text(), "run `python bench/tables.py`"
