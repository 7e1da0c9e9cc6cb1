"""What the README shows runs as it stands there, from a file and under `python -c`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_readmes_example_runs_where_no_source_file_exists():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Tensor" in done.stdout and "torch.Size([2, 100])" in done.stdout


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
