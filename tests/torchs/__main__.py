"""Run the chosen suites with the torch, the transformers and the Python of this interpreter, and write docs/torch.md anew."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")
SUITES = {  # by file; of the Inductor suite one program
    "contract": ["tests/equivalence/test_contract.py", "tests/tracing/test_entry_points.py"],
    "compat": ["tests/compat"],
    "passes": ["tests/passes", "tests/engine/test_removal.py"],
    "regions": ["tests/engine/test_regions.py"],
    "generation": ["tests/generation/test_generate.py", "tests/generation/test_iteration.py"],
    "gradients": ["tests/equivalence/test_gradients.py"],
    "sweeps": ["tests/sweep/test_strategies.py", "tests/sweep/test_sweep.py"],
    "errors": ["tests/tracing/test_errors.py"],
    "inductor": ["tests/equivalence/test_programs.py"],
}
CHOSEN = {"inductor": ["-m", "inductor and not slow and not gpu", "-k", "steer"]}
OTHERS = ["-m", "not inductor and not slow and not gpu and not peer"]

# What a first user does: a trace, a generation, a gradient. It tells what this torch lacks and what ran on hooks.
PROGRAM = """
import json, torch
from transformers import GPT2Config, GPT2LMHeadModel
from nnsight_fx import LanguageModel

net = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=100, bos_token_id=None, eos_token_id=None))
model = LanguageModel(net.eval())
model.compile(backend="eager")
with torch.no_grad(), model.trace([[5, 7, 11], [3, 2]]):
    model.transformer.h[1].output[:, -1] += torch.ones(64)
    model.lm_head.output[:, -1].save()
with torch.no_grad(), model.generate([[5, 7, 11]], max_new_tokens=3) as tracer:
    for step in tracer.iter[:]:
        model.lm_head.output[:, -1].save()
with model.trace([[5, 7, 11]]):
    h = model.transformer.h[0].output
    h.grad.save()
    model.lm_head.output.sum().backward()
facts = model.explain().to_dict()
print(json.dumps([facts["missing"], [why for each in facts["captures"] for why in each["fallbacks"]]]))
"""


def run(names: list[str], options: list[str]) -> int:
    """Run some suites, each in a process of its own, and write down what came of it."""
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        for name in names:
            args = [*SUITES[name], *CHOSEN.get(name, OTHERS), "-q", f"--junitxml={report}", *options]
            code = subprocess.run([sys.executable, "-m", "pytest", *args], cwd=ROOT).returncode
            if code not in (0, 1):
                return code  # stopped, or nothing there: no result
            worst = max(worst, code)
            write({"suites": {name: counted(report)}})
    told = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, text=True, capture_output=True)
    if told.returncode:
        print(told.stderr, file=sys.stderr)
        return told.returncode
    missing, fallbacks = json.loads(told.stdout.splitlines()[-1])
    write({"missing": missing, "falls back": fallbacks, "date": datetime.date.today().isoformat()})
    return worst


def counted(report: Path) -> dict:
    """How many tests of a suite passed, failed and were left out, and which failed."""
    found, failed = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[outcome] += 1
        if outcome == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return {**found, "tests": failed}


def write(facts: dict) -> None:
    """Put facts into the row of these versions, and write the table."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    key = {
        "torch": torch.__version__.split("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
        "transformers": transformers.__version__,
    }
    row = next((r for r in rows if key.items() <= r.items()), None)
    if row is None:
        row = {**key, "date": "", "suites": {}, "missing": [], "falls back": []}
        rows.append(row)
    row["suites"].update(facts.pop("suites", {}))
    row.update(facts)
    rows.sort(key=lambda r: [[int(n) for n in re.findall(r"\d+", r[k])] for k in key])
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    (ROOT / "docs/torch.md").write_text(page(rows))


def page(rows: list[dict]) -> str:
    names = [name for name in SUITES if any(name in r["suites"] for r in rows)]
    head = ["torch", "Python", "transformers", *names, "missing", "falls back", "run on"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for r in rows:
        cells = [_cell(r["suites"].get(name, {})) for name in names]
        rest = [str(len(r["missing"]) or "nothing"), str(len(r["falls back"]) or "nothing"), r["date"]]
        lines.append("| " + " | ".join([r["torch"], r["python"], r["transformers"], *cells, *rest]) + " |")
    notes = [f"- torch {r['torch']}: {text}" for r in rows for text in (*r["missing"], *r["falls back"])]
    notes += [
        f"- torch {r['torch']}, Python {r['python']}, transformers {r['transformers']}: `{test}` failed"
        for r in rows
        for suite in r["suites"].values()
        for test in suite["tests"]
    ]
    return PAGE.format(table="\n".join(lines), notes="\n".join(notes) or "Nothing to say of what was run.")


def _cell(found: dict) -> str:
    if not found:
        return "not run"
    failed = f", **{found['failed']} failed**" if found.get("failed") else ""
    skipped = f", {found['skipped']} skipped" if found.get("skipped") else ""
    return f"{found.get('passed', 0)} passed{failed}{skipped}"


PAGE = """# Versions of torch

<!-- written by `make test-torch` (tests/torchs); not by hand -->

A line holds the latest run of each suite by `python -m tests.torchs`, which `make test-torch TORCH=<version> PYTHON=<version>` calls, in an
environment of its own, on a CPU. Runs of one line may be of different days and commits; "not run" is not passed.
The declared floors are torch 2.11, transformers 5.3 (before it, a block of GPT-2 gives a tuple, and README's example does not run) and
Python 3.11. There is no ceiling: on a torch that is not in this table nnsight_fx imports, runs,
and `model.explain()` names what that torch lacks and what is done instead (`nnsight_fx/compat`). CI runs the newest line
(`.ci/newest.txt`).

{table}

"missing" counts private names of torch that this version lacks, "falls back" what a trace, a generation and a gradient of a GPT-2 ran on
hooks.

{notes}
"""


if __name__ == "__main__":
    chosen = [name for name in sys.argv[1:] if name in SUITES]
    sys.exit(run(chosen or list(SUITES), [option for option in sys.argv[1:] if option not in SUITES]))
