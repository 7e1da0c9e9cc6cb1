"""Importing nnsight_fx leaves torch and Python as they were, and a pass has one module and one name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SNAPSHOT = """
import builtins, importlib, inspect, json, sys, threading, warnings

def snapshot():
    seen = {}
    modules = {name: m for name, m in sys.modules.items() if name.split(".")[0] in ("torch", "transformers")}
    for name, module in {**modules, "builtins": builtins}.items():
        for key, value in list(vars(module).items()):
            if key == "__warningregistry__":
                continue
            seen[name, key] = size(value)
            if inspect.isclass(value) and value.__module__ == name:
                seen.update({(name, key, k): size(v) for k, v in vars(value).items()})
    for key in ("meta_path", "path_hooks", "excepthook", "displayhook", "stdout", "stderr"):
        seen["sys", key] = size(getattr(sys, key))
    seen["trace"] = sys.gettrace(), sys.getprofile(), threading.active_count()
    seen["warnings"] = size(warnings.filters)
    return seen

def size(value):
    "Which object it is and, for a registry, how much it holds. Held in `alive`, so that no id is used twice."
    alive.append(value)
    return id(value), len(value) if type(value) in (dict, list, set) else None

alive = []
"""

WHAT_IT_IMPORTS = "import json, sys, nnsight_fx; print(json.dumps(list(sys.modules)))"

WHAT_IT_CHANGES = """
for name in json.loads(sys.argv[1]):  # what others' modules do as they are imported is not ours
    if name.split(".")[0] != "nnsight_fx":
        try:
            importlib.import_module(name)
        except ImportError:
            pass  # a module that exists only inside another, like six.moves
before = snapshot()
import nnsight_fx
after = snapshot()
print(json.dumps([str(key) for key in before.keys() | after.keys() if before.get(key) != after.get(key)]))
"""


def python(program: str, *args: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", program, *args], cwd=cwd, text=True, capture_output=True)
    if done.returncode:
        pytest.fail(done.stderr, pytrace=False)
    return done.stdout


def test_importing_changes_nothing(tmp_path):
    imported = python(WHAT_IT_IMPORTS, cwd=tmp_path)
    changed = python(SNAPSHOT + WHAT_IT_CHANGES, imported, cwd=tmp_path)
    assert json.loads(changed) == []


EVERY_PASS = """
import importlib, json, os, pkgutil, sys, nnsight_fx.passes as passes
for found in pkgutil.iter_modules(passes.__path__):
    importlib.import_module(f"nnsight_fx.passes.{found.name}")
files = [(os.path.realpath(getattr(m, "__file__", None) or ""), name) for name, m in sys.modules.items()]
folder = os.path.realpath(passes.__path__[0])
print(json.dumps([(file, name) for file, name in files if os.path.dirname(file) == folder]))
"""


@pytest.mark.parametrize("where", ["in the checkout", "elsewhere"])
def test_a_pass_has_one_module(where, tmp_path):
    # The checkout has the files under two names, passes/ and nnsight_fx/passes/: one of them may be imported.
    cwd = ROOT if where == "in the checkout" else tmp_path
    loaded = json.loads(python(EVERY_PASS, cwd=cwd))
    files, names = zip(*loaded, strict=True)
    assert "nnsight_fx.passes.splice" in names
    assert all(name.startswith("nnsight_fx.passes") for name in names)
    assert len(set(files)) == len(files)

    twice = "try: import passes\nexcept ImportError: print('refused')"
    assert python(twice, cwd=cwd) == "refused\n"


def test_it_does_not_import_the_compiler(tmp_path):
    """Dynamo takes longer to import than all of ours."""
    imported = json.loads(python(WHAT_IT_IMPORTS, cwd=tmp_path))
    assert not [name for name in imported if name.startswith(("torch._dynamo", "torch._inductor"))]
