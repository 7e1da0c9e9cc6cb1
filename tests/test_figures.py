"""Figures that hold: each of one version on one machine, with its spread, and no other in what we print."""

from __future__ import annotations

import copy
import re
import subprocess
import sys

import pytest

from bench import figures, tables
from bench.measure import Told, interleaved, ratio, turns
from bench.setting import FIELDS, ROOT, setting

FILES = tables.read()
# Measured before each file kept all of its setting. `make bench-figures` takes a name off; none comes on.
EARLIER = {"check", "first", "harvest", "memory", "products", "recording", "suite"}

MEASURED_IN_PROSE = re.compile(
    r"\b\d[\d.,]* ?(?:ms|us|µs|s|seconds|MiB|GiB|tokens a second)\b"
    r"|\b\d[\d.,]* ?(?:x|times) (?:as fast|as slow|faster|slower|the time|less)\b"
    r"|\b(?:twice|half|third|quarter|tenth) (?:as fast|less time|the time|faster|slower)\b"
)
# Not documentation of what holds now: the figures (made from the files), and why things were decided, on that day.
OTHER_PAGES = {"performance.md", "decisions.md"}


def test_every_result_is_of_a_part_of_the_one_command():
    assert FILES.keys() <= figures.PARTS.keys(), "no program of `make bench-figures` makes it: delete it and its table"


def test_every_result_says_what_it_is_of_and_was_taken_on():
    assert {name for name, found in FILES.items() if not set(FIELDS) <= found.keys()} == EARLIER


def test_the_results_are_of_one_version_on_one_machine():
    rest = {name: found for name, found in FILES.items() if name not in EARLIER | {"gpu"}}
    assert tables.holding(rest).keys() == rest.keys(), (
        "of several commits or machines, or of a tree that is no commit's"
    )


def test_the_pages_are_those_of_the_results():
    assert tables.readme(FILES) == tables.README.read_text(), "run `python -m bench.tables`"
    assert tables.page(FILES) == tables.PAGE.read_text(), "run `python -m bench.tables`"


def test_no_figure_stands_in_prose():
    pages = [ROOT / "README.md", *(p for p in (ROOT / "docs").glob("*.md") if p.name not in OTHER_PAGES)]
    made = re.compile(f"{tables.BEGIN}.*?{tables.END}", re.S)
    found = [(p.name, m[0]) for p in pages for m in MEASURED_IN_PROSE.finditer(made.sub("", p.read_text()))]
    assert not found, (
        "a time or a ratio that no file in bench/results has: let bench/tables.py write it, or leave it out"
    )


@pytest.mark.parametrize("text", ["takes 9.1 s", "is 4.6 times as fast", "costs 51 ms a cell", "a tenth less time"])
def test_a_figure_in_prose_is_seen(text):
    assert MEASURED_IN_PROSE.search(text)


# -- what README's table takes -------------------------------------------------------------------------------------------


def made(commit: str = "a" * 40, date: str = "2026-12-01T00:00+00:00", **figures) -> dict:
    return {**setting(), "commit": commit, "date": date, **figures}


def spread(median: float, low: float, high: float, pairs: int = 5) -> dict:
    return {"median": median, "low": low, "high": high, "pairs": pairs}


def whole() -> dict:
    """Files as the parts write them, as far as README reads them."""
    peers = ("torch.compile", "nnsight 0.8.1")
    row = {"model": "smollm2", "layers": 30, "what": "this", "tokens": [1, 14]}
    row |= {"median_s": dict.fromkeys(("ours", tables.ALL_LOGITS, *peers), 0.05)}
    row |= {
        "ratio": dict.fromkeys(peers, spread(0.5, 0.4, 0.6)),
        "ratio_all_logits": dict.fromkeys(peers, spread(0.9, 0.8, 1.1)),
    }
    rows = [{**row, "workload": name, "tokens": t} for name in ("trace", *tables.PEERS) for t in ([1, 14], [8, 64])]
    batch = "nnsight 0.8.1, 16 rows a forward"
    return {
        "suite": made(rows=rows),
        "sweep": made(workload="a grid", ms_a_cell={"session": 5.0, batch: 20.0}, ratio={batch: spread(0.25, 0.2, 0.3)}),
        "first": made(
            workload="a trace",
            median_s={"ours": {"cold": 20.0}, "torch.compile": {"cold": 50.0}},
            ratio={"ours": {"cold": spread(0.4, 0.3, 0.5)}},
        ),
    }  # fmt: skip


def test_readme_has_six_rows_with_their_spread():
    rows = tables.claims(tables.holding(whole()))
    assert len(rows) == 6 and [row[-1] for row in rows].count("equal [0.80, 1.10]") == 1
    assert len(tables.claims(tables.holding(FILES))) <= 6
    (left_out,) = [row for row in rows if "left out by ours alone" in row[0]]
    assert rows[rows.index(left_out) - 1][0].endswith("all logits saved, too")  # the same work, beside it


def other_commit(found: dict) -> None:
    found["commit"] = "b" * 40


def other_machine(found: dict) -> None:
    found["hardware"] = {**found["hardware"], "cores": 64}


def dirty(found: dict) -> None:
    found["commit"] += "+dirty"


def no_setting(found: dict) -> None:
    del found["command"]


@pytest.mark.parametrize("change", [other_commit, other_machine, dirty, no_setting])
def test_results_of_several_versions_are_in_no_table(change):
    files = whole()
    files["first"]["date"] = "2026-11-01T00:00+00:00"
    change(files["first"])
    text = tables.short(files)
    assert "the first result, nothing" not in text and "Not of this commit, so not here: first." in text


def test_a_ratio_without_a_spread_is_no_claim():
    files = whole()
    files["first"]["ratio"]["ours"]["cold"]["pairs"] = 1
    files["sweep"]["ratio"] = dict.fromkeys(files["sweep"]["ratio"], 0.2)
    assert len(tables.claims(files)) == 4
    for found in files.values():
        no_setting(found)
    assert "No figure stands here now" in tables.short(files)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (spread(0.9, 0.8, 0.95), "0.90 [0.80, 0.95]"),
        (spread(0.97, 0.8, 1.05), "equal [0.80, 1.05]"),
        (spread(1.2, 1.1, 1.3), "1.20 [1.10, 1.30]"),
        (spread(0.05, 0.04, 0.06), "0.050 [0.040, 0.060]"),
        (spread(0.5, 0.4, 0.6, pairs=2), "0.50 [of 2]"),
        (None, ""),
    ],
)
def test_a_ratio_is_printed_with_its_spread(found, text):
    assert tables.told(found) == text


# -- how they are measured -----------------------------------------------------------------------------------------------


def test_a_ratio_is_over_pairs():
    assert ratio([1, 4, 3], [2, 4, 2]) == spread(1.0, 0.5, 1.5, pairs=3)
    many = ratio([float(i) for i in range(101)], [1.0] * 101)
    assert many == spread(50.0, 10.0, 90.0, pairs=101)  # one that is far out says nothing
    with pytest.raises(ValueError):
        ratio([1, 2], [1])


def test_all_have_their_turn_in_each_round():
    assert list(turns(["a", "b", "c"], 4)) == [*"abc", *"bca", *"cab", *"abc"]
    called = []
    found = interleaved(
        {"ours": lambda: called.append("ours"), "theirs": Told(lambda: called.append("theirs") or 7.0)}, 3, 2
    )
    assert called == ["ours", "ours", "theirs"] + ["theirs", "ours", "ours"] + ["ours", "ours", "theirs"]
    assert found["theirs"] == [7.0] * 3 and len(found["ours"]) == 3


# -- the one command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`make bench-figures` on a quiet machine and a clean tree, where each part writes what it is told to."""
    results, work = tmp_path / "results", tmp_path / "work"
    results.mkdir()
    monkeypatch.setattr(tables, "RESULTS", results)
    monkeypatch.setattr(tables, "read", lambda folder=results, read=tables.read: read(folder))
    monkeypatch.setattr(tables, "write", lambda: None)
    monkeypatch.setattr(figures, "WORK", work)
    monkeypatch.setattr(figures, "commit", lambda: "c" * 40)
    monkeypatch.setattr(figures.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    ran = []

    def part(given, **_):
        import json
        from pathlib import Path

        name, out = given[2].removeprefix("bench."), given.index("--out")
        ran.append(name)
        if name in command.broken:
            return subprocess.CompletedProcess(given, 1)
        of = " ".join(["python -m", *given[2:out]])
        Path(given[out + 1]).write_text(json.dumps(made(commit="c" * 40, command=of)))
        return subprocess.CompletedProcess(given, 0)

    def command(*args: str) -> tuple[int, list[str], dict]:
        monkeypatch.setattr(sys, "argv", ["figures", *args])
        ran.clear()
        with monkeypatch.context() as m:
            m.setattr(figures.subprocess, "run", part)
            status = figures.main()
        return status, list(ran), tables.read(results)

    command.broken = set()
    return command


def test_what_is_done_is_not_run_again(command):
    status, ran, there = command("--only", "recording,harvest")
    assert (status, ran, there.keys()) == (0, ["recording", "harvest"], {"recording", "harvest"})
    assert command("--only", "recording,harvest")[1] == []
    assert command("--only", "recording,harvest", "--again")[1] == ["recording", "harvest"]
    assert command("--only", "recording", "--rounds", "2")[1] == ["recording"]  # another command


def test_a_part_that_fails_leaves_the_earlier_file(command, capsys):
    earlier = copy.deepcopy(command("--only", "recording,harvest")[2])
    command.broken = {"recording"}
    status, ran, there = command("--only", "recording,harvest", "--again")
    assert status == 1 and ran == ["recording", "harvest"] and there["recording"] == earlier["recording"]
    assert "FAILED, the earlier file stays" in capsys.readouterr().out


def test_nothing_starts_on_a_tree_that_is_no_commits(command, monkeypatch, capsys):
    monkeypatch.setattr(figures, "commit", lambda: "c" * 40 + "+dirty")
    assert command("--only", "recording")[:2] == (2, [])
    assert "commit first" in capsys.readouterr().err


def test_no_part_runs_on_a_loaded_machine(command, monkeypatch):
    monkeypatch.setattr(figures.os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    assert command("--only", "recording", "--wait", "0")[:2] == (1, [])
    assert command("--only", "recording", "--wait", "0", "--anyway")[:2] == (0, ["recording"])


def test_an_unknown_part(command, capsys):
    with pytest.raises(SystemExit):
        command("--only", "sweeps")
    assert "no such part: sweeps; there are check, recording" in capsys.readouterr().err
