"""The wheel: complete, without a second copy of anything, and at work away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TRACE = """
import sys
import torch, nnsight_fx, nnsight_fx.passes

for module in (nnsight_fx, nnsight_fx.passes):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
m = nnsight_fx.NNsight(net)
with m.trace(torch.ones(1, 2)):
    h = m[0].output.save()
assert type(h) is torch.Tensor, type(h)
assert torch.equal(h, net[0](torch.ones(1, 2)))
"""


def run(*command: str | Path, **options) -> None:
    done = subprocess.run([str(part) for part in command], text=True, capture_output=True, **options)
    if done.returncode:
        pytest.fail(f"{done.args}\n{done.stdout}\n{done.stderr}", pytrace=False)


@pytest.fixture(scope="module", params=["checkout", "sdist"])
def wheel(request, tmp_path_factory) -> Path:
    """A wheel built from the checkout or, as `python -m build` does unless told otherwise, from an sdist."""
    tmp = tmp_path_factory.mktemp(request.param)
    tree = tmp / "tree"
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "tests", "runs")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=leave_out)
    only = ["--wheel"] if request.param == "checkout" else []
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp / "dist", *only, tree)
    (built,) = (tmp / "dist").glob("*.whl")
    return built


def test_it_holds_every_module_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    code = Counter(name for name in names if ".dist-info/" not in name)

    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nnsight_fx").rglob("*.py")}
    # Said apart, for rglob follows the link to passes/ in some versions of Python and not in others.
    expected |= {f"nnsight_fx/passes/{path.name}" for path in (ROOT / "passes").glob("*.py")}
    assert code == Counter(expected | {"nnsight_fx/py.typed"})
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_it_runs_a_trace_outside_the_checkout(wheel, tmp_path):
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    run(*pip, target, wheel)
    away = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(target)}}
    run(sys.executable, "-W", "error", "-c", TRACE, target, **away)
    run(sys.executable, "-c", "from nnsight_fx.cli.command import main; assert callable(main)", **away)
