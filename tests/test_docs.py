"""What the README shows runs as it stands there, from a file and under `python -c`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import nnsight_fx

ROOT = Path(__file__).parents[1]
ERRORS = (Path(__file__).parent.parent / "docs" / "errors.md").read_text()
SETUP, *_ = re.findall(r"```python\n(.*?)```", ERRORS, re.S)
EXAMPLES = re.findall(r"## ([^\n]*)\n(?:(?!```|\n## ).)*```python\n(.*?)```\n\n```text\n(.*?)\n```", ERRORS, re.S)
README = (Path(__file__).parent.parent / "README.md").read_text()

WALK = """
import os, sys, torch, nnsight_fx
PLACES = {os.path.realpath("nnsight_fx") + "/": "", os.path.realpath("passes") + "/": "passes/"}
names = []

def note(frame, event, arg):
    if event == "call":
        file = os.path.realpath(frame.f_code.co_filename)
        for place, shown in PLACES.items():
            if file.startswith(place):
                names.append(f"{shown}{file[len(place):]}:{frame.f_code.co_qualname}")

model = nnsight_fx.NNsight(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).requires_grad_(False))
model.compile(backend="aot_eager")
v = torch.ones(4)
for _ in range(2):
    with model.trace(torch.ones(2, 4)):
        h = model[0].output
        sys.setprofile(note)
        h += v
        out = model.output.save()
    sys.setprofile(None)
    print("== a trace", *names, sep="\\n")
    names.clear()
"""


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


def test_the_page_on_derivatives_runs():
    page = (ROOT / "docs" / "gradients.md").read_text()
    names: dict = {"__name__": "gradients"}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(block, "gradients.md", "exec"), names)
    assert [tuple(g.shape) for g in names["grads"]] == [(3, 1, 8, 32)] * 3
    assert names["jacobian"].shape == (32, 1, 8, 32) and names["changes"].shape == (5, 32)


def test_the_walk_of_the_design_page_is_what_runs():
    """Each function that the page names for `h += v` is called, in that order, in a trace seen before and in a first one."""
    text = (ROOT / "docs" / "design.md").read_text()
    walk = text.partition("## `h += v`")[2].partition("## Words")[0]
    again, first = ([row for row in table if "---" not in row] for table in _tables(walk))
    done = subprocess.run([sys.executable, "-c", WALK], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    runs = [run.splitlines() for run in done.stdout.split("== a trace\n")[1:]]
    assert len(_rows(again)) == 6 and len(_rows(first)) == 5
    assert _missing(_rows(again), runs[1]) is None
    assert _missing(_rows(first), runs[0]) is None
    assert len({file for file, _ in _rows(again)}) <= 6


def _tables(text: str) -> list[list[str]]:
    return [table.splitlines()[1:] for table in re.findall(r"(?:^\|.*\n)+", text, re.M)]


def _rows(table: list[str]) -> list[tuple[str, str]]:
    """`(file, function)` of each row; a row without a file goes on in the last one."""
    rows: list[tuple[str, str]] = []
    for line in table:
        file, function = (cell.strip(" `") for cell in line.split("|")[1:3])
        rows.append((file or rows[-1][0], function))
    return rows


def _missing(rows: list[tuple[str, str]], called: list[str]) -> str | None:
    """The first function of the rows that was not called behind the one before it."""
    left = iter(called)
    return next((f"{file}:{name}" for file, name in rows if f"{file}:{name}" not in left), None)


def test_the_links_of_the_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())]
    assert len(links) > 20 and [f"{p.name}: {link}" for p, link in links if not (p.parent / link).exists()] == []


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
