"""CONTRIBUTING.md: its examples, applied to a copy of the package as a newcomer would, and run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^## (Example \d: [^\n]*)\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M))


def blocks(section: str, language: str) -> list[str]:
    """The code blocks of a section; a fence inside a docstring is indented, and ends none."""
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.S | re.M)


def files(section: str) -> dict[str, str]:
    """The new files of a section: the blocks that begin with a path."""
    found = (re.match(r"# (\S+\.py)\n(.*)", block, re.S) for block in blocks(section, "python"))
    return {m[1]: m[2] for m in found if m}


def scripts(section: str) -> list[str]:
    return [block for block in blocks(section, "python") if not re.match(r"# \S+\.py\n", block)]


def apply(diff: str, tree: Path) -> None:
    """Make the changes of a block. Each hunk's old lines stand in its file, whole and exactly once."""
    for part in re.split(r"^\+\+\+ ", diff, flags=re.M)[1:]:
        name, *hunks = re.split(r"^@@\n", part, flags=re.M)
        path = tree / name.strip()
        text = "\n" + path.read_text()
        for hunk in hunks:
            lines = [line or " " for line in hunk.splitlines()]
            old, new = ("\n" + "".join(x[1:] + "\n" for x in lines if x[0] in marks) for marks in (" -", " +"))
            assert text.count(old) == 1, (
                f"CONTRIBUTING.md, {name.strip()}: these lines stand {text.count(old)} times:{old}"
            )
            text = text.replace(old, new)
        path.write_text(text[1:])


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the package."""
    made = tmp_path_factory.mktemp("contributor")
    leave_out = shutil.ignore_patterns("__pycache__", "passes")
    shutil.copytree(ROOT / "nnsight_fx", made / "nnsight_fx", ignore=leave_out)
    shutil.copytree(ROOT / "passes", made / "passes", ignore=shutil.ignore_patterns("__pycache__"))
    (made / "nnsight_fx" / "passes").symlink_to("../passes", target_is_directory=True)
    shutil.copy(ROOT / "pyproject.toml", made)
    return made


def run(tree: Path, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_the_three_examples_are_there() -> None:
    assert [title.split(": ")[1] for title in SECTIONS] == ["add a pass", "add a verb", "support a new torch"]


@pytest.mark.parametrize("title", [title for title, section in SECTIONS.items() if blocks(section, "diff")])
def test_what_it_adds_works(title: str, tree: Path) -> None:
    section = SECTIONS[title]
    made = files(section)
    for name, text in made.items():
        path = tree / name
        assert not path.exists() and not (ROOT / name).exists(), f"{name} is there already"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for script in scripts(section):  # before anything of ours is changed
        assert "join_scales: 2 rewrites" in run(tree, "-W", "error", "-c", script)
    for diff in blocks(section, "diff"):
        apply(diff, tree)
    tests = [name for name in made if name.startswith("tests/")]
    options = ("-q", "-n0", "-p", "no:cacheprovider", "-o", "pythonpath=")
    said = run(tree, "-m", "pytest", *tests, *options)
    assert tests and "passed" in said and "skipped" not in said
    if importlib.util.find_spec("ruff") is not None:
        run(tree, "-m", "ruff", "check", "--no-cache", ".")
        run(tree, "-m", "ruff", "format", "--no-cache", "--check", ".")
    where = run(tree, "-c", "import nnsight_fx, nnsight_fx.passes as p; print(nnsight_fx.__file__, p.__file__)")
    assert all(each.startswith(str(tree)) for each in where.split())


def test_what_it_says_of_a_new_torch_runs() -> None:
    first, second = scripts(SECTIONS["Example 3: support a new torch"])
    run(ROOT, "-W", "error", "-c", first)
    assert "is_traceable_wrapper_subclass` is missing: tensors" in run(ROOT, "-W", "error", "-c", second)
