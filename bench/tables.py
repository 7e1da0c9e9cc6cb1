"""The tables of README.md and docs/performance.md, out of the committed figures in bench/results.

python bench/tables.py            # write both
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, README, PAGE = ROOT / "bench" / "results", ROOT / "README.md", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- bench/tables.py -->\n", "<!-- end -->"

PAGE_TEXT = """# Performance

<!-- Written by bench/tables.py from bench/results/*.json. -->

Each table is one run of one command on one machine; `no_grad`, parameters frozen. Times of others' runs, and of other machines,
are not comparable: ratios are. GPU: not measured.

{tables}
"""


def kept(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['hardware']['threads']} threads, {versions}."


def sweep() -> list[str]:
    found = kept("sweep")
    if found is None:
        return []
    times, ratio = found["ms_a_cell"], found["ratio"]
    ours = times["session"]
    rows = [[who, f"{ms:.1f}", f"{ms / ours:.2f}"] for who, ms in times.items()]
    steps = [
        [
            name,
            f"{each['ms_a_cell']:.1f}",
            f"{times['nnsight 0.8.1, loop'] / each['ms_a_cell']:.1f}",
            f"{each['flops_over_the_loops']:.2f}",
        ]
        for name, each in found["steps"].items()
    ]
    return [
        f"## Patching grid: {found['workload']}",
        f"`python bench/sweep.py`. {machine(found)} Recording is part of the times; the first run, with {found['compiles']} "
        f"compiles, takes {found['first_s']:.0f} s. {ratio['loop']:.1f} times nnsight's loop, {ratio['batch']:.1f} times its batches; "
        f"largest difference {found['largest_difference_to_peer']:.0e}.",
        table(["", "ms a cell", "over ours"], rows),
        "What each step of the forked strategy adds, timed in turn in the same process:",
        table(["steps", "ms a cell", "times nnsight's loop", "FLOPs over the naive loop's"], steps),
    ]  # fmt: skip


def steer() -> list[str]:
    found = kept("steer")
    if found is None:
        return []
    rows = [[who, f"{1e3 * s:.1f}", f"{found['first_call_s'][who]:.1f}"] for who, s in found["median_s"].items()]
    return [
        f"## {found['workload'][0].upper()}{found['workload'][1:]}",
        f"`python bench/steer.py`. {machine(found)} Ratio {found['ratio']:.3f}, of `model.program` {found['ratio_program']:.3f}. "
        "First calls with Inductor's caches as they were: `bench/first.py` has those from none.",
        table(["", "ms", "first call, s"], rows),
    ]


def saves() -> list[str]:
    found = kept("saves")
    if found is None:
        return []
    rows = []
    for name, each in found["workloads"].items():
        shape = " x ".join(map(str, each["tokens"]))
        rows += [
            [f"{name}, {shape}", who, f"{1e3 * s:.1f}", f"{each['ratio'][who]:.2f}" if who in each["ratio"] else ""]
            for who, s in each["median_s"].items()
        ]
    largest = max(each["largest_difference_to_peer"] for each in found["workloads"].values())
    return [
        f"## Reading all layers: {found['workload']}",
        f"`python bench/saves.py`, which says what each workload is. {machine(found)} {found['grad'][0].upper()}{found['grad'][1:]}. "
        f"Largest difference to nnsight {largest:.0e}.",
        table(["workload", "", "ms", "ours over it"], rows),
    ]


def memory() -> list[str]:
    found = kept("memory")
    if found is None:
        return []
    grown, peaks = dict(found["growth"]), found["peak"]
    workload = grown.pop("workload")
    rows = [[engine, each["objects"], f"{each['rss_mib']:.2f}"] for engine, each in grown.items()]
    high = [[who, f"{peaks[who]['peak_mib']:.0f}"] for who in ("trace", "torch.compile")]
    return [
        f"## Memory: {workload}",
        f"`python bench/memory.py`. {machine(found)}",
        table(["engine", "Python objects more", "MiB resident more"], rows),
        f"{peaks['workload'][0].upper()}{peaks['workload'][1:]}: ratio {peaks['ratio']:.3f}.",
        table(["", "MiB at the peak, above what was resident"], high),
    ]


def recording() -> list[str]:
    found = kept("recording")
    if found is None:
        return []
    rows = [[name, f"{us:.0f}", f"{us / found['us']['nnsight 0.8.1, one']:.2f}"] for name, us in found["us"].items()]
    saves = ", ".join(f"{who} {us:.1f}" for who, us in found["us_a_save"].items())
    return [
        f"## Our Python: {found['workload']}",
        f"`python bench/recording.py`. {machine(found)} Microseconds a further save: {saves}.",
        table(["", "us a call", "over nnsight's with one save"], rows),
    ]


def first() -> list[str]:
    found = kept("first")
    if found is None:
        return []
    rows = []
    for who, each in found["median_s"].items():
        ratios = found["ratio"].get(who, {})
        rows += [[who, kind, f"{s:.1f}", f"{ratios[kind]:.2f}" if kind in ratios else ""] for kind, s in each.items()]
    return [
        f"## The first result: {found['workload']}",
        f"`python bench/first.py`, which says what each line is. {machine(found)} Medians of {found['rounds']} new processes each.",
        table(["", "", "seconds", "over plain `torch.compile`"], rows),
    ]


SECTIONS = (sweep, steer, saves, first, recording, memory)


def short() -> str:
    """README's table: one line a bench."""
    rows = []
    if (grid := kept("sweep")) is not None:
        ours = f"a session: {grid['ms_a_cell']['session']:.1f} ms a cell"
        for name, ratio in grid["ratio"].items():
            who = next(w for w in grid["ms_a_cell"] if w.startswith("nnsight") and ("loop" in w) == (name == "loop"))
            rows.append(
                [
                    f"patching grid: {grid['workload']}",
                    f"{who}: {grid['ms_a_cell'][who]:.1f} ms a cell",
                    ours,
                    f"{ratio:.1f} times as fast",
                ]
            )
    if (vector := kept("steer")) is not None:
        ours, plain = (f"{1e3 * vector['median_s'][who]:.1f} ms" for who in ("ours", "torch.compile"))
        rows.append(
            [
                vector["workload"],
                f"plain `torch.compile` of the model: {plain}",
                ours,
                f"{vector['ratio']:.2f} times the time",
            ]
        )
    if (all_layers := kept("saves")) is not None:
        times = all_layers["workloads"]["saves"]["median_s"]
        ratio = all_layers["workloads"]["saves"]["ratio"]["torch.compile"]
        rows.append(
            [
                f"30 full saves, {all_layers['workload']}, 8 x 64 tokens",
                f"`torch.compile` of a function that returns them: {1e3 * times['torch.compile']:.0f} ms",
                f"{1e3 * times['ours']:.0f} ms",
                f"{ratio:.2f} times the time",
            ]
        )
    if (new := kept("first")) is not None:
        for who, each in new["ratio"].items():
            rows.append(
                [
                    f"its first result, nothing cached{who.removeprefix('ours')}",
                    f"`torch.compile`: {new['median_s']['torch.compile']['cold']:.1f} s",
                    f"{new['median_s'][who]['cold']:.1f} s",
                    f"{each['cold']:.2f} times the time",
                ]
            )
    if (held := kept("memory")) is not None:
        ours, plain = (f"{held['peak'][who]['peak_mib']:.0f} MiB" for who in ("trace", "torch.compile"))
        rows.append(
            [
                held["peak"]["workload"],
                f"plain `torch.compile`: {plain} at the peak",
                ours,
                f"{held['peak']['ratio']:.2f} times the memory",
            ]
        )
    return table(["workload", "peer", "ours", ""], rows)  # fmt: skip


def page() -> str:
    return PAGE_TEXT.format(tables="\n\n".join(text for section in SECTIONS for text in section()))


def readme() -> str:
    text = README.read_text()
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{short()}\n\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page())
    README.write_text(readme())
    print(page())
