"""What figures are of, and what they were taken on: the version, the machine, how busy it was, and when. In every result file."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import nnsight_fx
from nnsight_fx.report.provenance import hardware

ROOT = Path(__file__).resolve().parents[1]
FIELDS = ("commit", "command", "date", "took_s", "load", "versions", "hardware")
MEASURED = ("nnsight_fx", "passes", "bench", ":!bench/results", "tests/peer", "constraints.txt")
DIRTY = "+dirty"


def commit() -> str:
    """The commit that is measured, `+dirty` where a file that counts differs from it; without git the library's version."""
    if (used := Path(nnsight_fx.__file__).resolve().parents[1]) != ROOT:
        raise RuntimeError(f"nnsight_fx is imported from {used}, not from {ROOT}: start with PYTHONPATH={ROOT}")

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (DIRTY if git("status", "--porcelain", "--", *MEASURED) else "")
    except (OSError, subprocess.CalledProcessError):
        return f"version {importlib.metadata.version('nnsight_fx')}"


def machine() -> dict[str, Any]:
    """The processor as it names itself (behind a hypervisor that is little: its numbers too), cores, caches, memory, GPUs."""
    return {
        **hardware(),
        "processor_numbers": _numbers(),
        "physical_cores": psutil.cpu_count(logical=False),
        "caches": _caches(),
        "threads": torch.get_num_threads(),
    }


def load() -> list[float]:
    """Processes that ran or waited to, over the last 1, 5 and 15 minutes."""
    return [round(x, 2) for x in os.getloadavg()]


# Before anything is measured: a program's first lines import this. Its sources are those of this moment, whatever git does later.
BEGUN = (commit(), datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"), load(), time.monotonic())


def setting() -> dict[str, Any]:
    """The fields, when the figures are there."""
    of, date, before, start = BEGUN
    given = sys.argv[1 : sys.argv.index("--out")] if "--out" in sys.argv else sys.argv[1:]
    return {
        "commit": of,
        "command": " ".join(["python -m bench." + Path(sys.argv[0]).stem, *given]),
        "date": date,
        "took_s": round(time.monotonic() - start, 1),
        "load": {"before": before, "after": load()},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "hardware": machine(),
    }


def _numbers() -> dict[str, str]:
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return {}
    found = {name.strip(): value.strip() for name, _, value in reversed(lines)}  # of the first core
    return {name: found[name] for name in ("cpu family", "model", "stepping") if name in found}


def _caches() -> dict[str, str]:
    """The caches of the first core, by level and kind: `{"L2": "1024K", ...}`."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (folder.joinpath(name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return found
