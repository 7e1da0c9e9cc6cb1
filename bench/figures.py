"""Every committed figure, of one version, on one machine: `make bench-figures`.

    python -m bench.figures [--only sweep,first] [--rounds N] [--short] [--again] [--anyway] [--wait 10] [--allow-dirty]

Each part is a program of its own and a process of its own. Its file takes the place of the earlier one when it is whole: where a part
fails, the earlier file stays, and this says so. Parts whose file is of this commit, this machine and this command are not run again.
Nothing starts on a tree that differs from its commit, and no part on a machine whose load is above half its cores. `--short` tries
all of it on small models, in .cache/figures/short, and writes no page.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import tables
from .setting import DIRTY, FIELDS, ROOT, commit, machine

WORK = ROOT / ".cache" / "figures"


@dataclass(frozen=True)
class Part:
    command: str  # behind `python -m bench.`
    short: str  # what makes it small
    minutes: int  # on two cores, where no file says it
    default: bool = True


PARTS = {
    "check": Part("check --write", "", 2),
    "recording": Part("recording", "--runs 20", 2),
    "memory": Part("memory", "--traces 20 --layers 2", 11),
    "products": Part("products", "--weights 1 --runs 2", 12),
    "harvest": Part("harvest", "--prompts 8 --layers 2", 7),
    "sweep": Part("sweep", "--layers 2 --tokens 4 --sample 4 --backend eager", 9),
    "heads": Part("heads", "--prompts 9 --layers 3", 8),
    "generation": Part("generation", "--layers 2 --tokens 4 --strengths 2 --prompts 2", 12),
    "first": Part("first", "--layers 6", 16),
    "layers": Part("suite --models smollm2 --workloads steer --layers 3 6 12 30", "--layers 1 2", 6),
    "suite": Part("suite", "--models tiny --workloads trace steer --runs 1", 60),
    "gpu": Part("suite --models llama-1b llama-8b --no-peers", "", 60, default=False),
}


def due(name: str, command: list[str], of: str, on: dict[str, Any], into: Path) -> bool:
    """Is there no such file, of this command, commit and machine?"""
    found = tables.read(into).get(name, {})
    return any(
        found.get(k) != v
        for k, v in (("command", f"python -m bench.{' '.join(command)}"), ("commit", of), ("hardware", on))
    )


def about(name: str, command: list[str]) -> float:
    """Minutes: those that the committed file took by the same command, or else a guess."""
    found = tables.read(tables.RESULTS).get(name, {})
    same = found.get("command") == f"python -m bench.{' '.join(command)}"
    return found["took_s"] / 60 if same else PARTS[name].minutes


def quiet(minutes: float) -> str | None:
    """Wait until the machine is; what is wrong if it does not come to that."""
    most, until, said = (os.cpu_count() or 1) / 2, time.monotonic() + 60 * minutes, False
    while (now := os.getloadavg()[0]) > most:
        if time.monotonic() > until:
            return f"the load is {now:.2f}, above {most:g}: stop what runs, or `--anyway`"
        if not said:
            print(f"  the load is {now:.2f}: waiting until it is below {most:g}, {minutes:g} min at most", flush=True)
        said = True
        time.sleep(5)
    return None


def run(name: str, command: list[str], of: str, into: Path) -> str | None:
    """One part; what is wrong, where its file is not there."""
    new, log = WORK / f"{name}.json", WORK / f"{name}.log"
    new.unlink(missing_ok=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("w") as out:
        done = subprocess.run(
            [sys.executable, "-m", f"bench.{command[0]}", *command[1:], "--out", str(new)],
            cwd=ROOT,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    if done.returncode or not new.exists():
        return f"exit status {done.returncode}, see {log}"
    found = json.loads(new.read_text())
    if missing := [field for field in FIELDS if field not in found]:
        return f"its file lacks {missing}"
    if {found["commit"], commit()} != {of}:
        return f"the tree changed while it ran: it began as {of}"
    shutil.move(new, into / new.name)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, help="in each part, in place of its own number")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--again", action="store_true", help="what is done, too")
    parser.add_argument("--anyway", action="store_true", help="on a loaded machine")
    parser.add_argument("--wait", type=float, default=10, help="minutes for the load to go down, before each part")
    parser.add_argument("--allow-dirty", action="store_true", help="the figures are of no commit: no page takes them")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else [name for name, part in PARTS.items() if part.default]
    if unknown := set(names) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    of, on, into = commit(), machine(), WORK / "short" if args.short else tables.RESULTS
    if of.endswith(DIRTY) and not args.allow_dirty:
        print(f"The tree differs from {of.removesuffix(DIRTY)}: commit first, or `--allow-dirty`.", file=sys.stderr)
        return 2
    rounds = args.rounds or (3 if args.short else None)
    more = ["--rounds", str(rounds)] if rounds else []
    commands = {
        name: [*PARTS[name].command.split(), *(PARTS[name].short.split() if args.short else ()), *more]
        for name in names
    }
    WORK.mkdir(parents=True, exist_ok=True)
    into.mkdir(exist_ok=True)
    left = {name: command for name, command in commands.items() if args.again or due(name, command, of, on, into)}
    if done := [name for name in names if name not in left]:
        print(f"Done already at this commit on this machine: {', '.join(done)} (`--again` runs them anew).")
    minutes = {name: 2 if args.short else about(name, command) for name, command in left.items()}
    each = ", ".join(f"{name} {m:.0f}" for name, m in minutes.items())
    print(f"{of}: about {sum(minutes.values()):.0f} minutes ({each}).", flush=True)
    failed = {}
    for name, command in left.items():
        print(f"{name}: python -m bench.{' '.join(command)}", flush=True)
        start = time.monotonic()
        wrong = None if args.anyway else quiet(args.wait)
        wrong = wrong or run(name, command, of, into)
        if wrong is not None:
            failed[name] = wrong
        told = "there" if wrong is None else f"FAILED, the earlier file stays: {wrong}"
        print(f"  {told} ({(time.monotonic() - start) / 60:.1f} min)", flush=True)
    if args.short:
        print(tables.page(tables.read(into)))
    elif left.keys() - failed.keys():
        tables.write()
    print("\n".join(f"{name}: {wrong}" for name, wrong in failed.items()) or f"All {len(names)} are there.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
