"""The tables of README.md and docs/performance.md, out of the committed figures in bench/results.

python bench/tables.py            # write both, and the figures
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
    own = ""
    if "over_own_hooks" in found:
        (a, b), (c, d) = found["spread"]["session"], found["spread"]["hooks, a session"]
        own = f" {found['over_own_hooks']:.1f} times our own session on hooks: {a:.1f} to {b:.1f} ms a cell against {c:.1f} to {d:.1f}."
    return [
        f"## Patching grid: {found['workload']}",
        f"`python -m bench.sweep`. {machine(found)} Recording is part of the times; the first run, with {found['compiles']} "
        f"compiles, takes {found['first_s']:.0f} s. {ratio['loop']:.1f} times nnsight's loop, {ratio['batch']:.1f} times its batches; "
        f"largest difference {found['largest_difference_to_peer']:.0e}.{own}",
        table(["", "ms a cell", "over ours"], rows),
        *(["![Cost against cells](figures/cells.svg)"] if "cells" in found else []),
        "What each step of the forked strategy adds, timed in turn in the same process:",
        table(["steps", "ms a cell", "times nnsight's loop", "FLOPs over the naive loop's"], steps),
    ]  # fmt: skip


def suite() -> list[str]:
    """A table a workload; a line an engine or peer."""
    found = kept("suite")
    if found is None:
        return []
    return [
        "## Workloads",
        f"`python -m bench.suite`; `bench/workloads.py` has the texts and `bench/peers.py` says who runs them. {machine(found)} The "
        "plain function, in eager and compiled, does no intervention: it gives the logits, or the blocks' outputs where those "
        "are what is asked for. What nobody reads is not computed on captured graphs (passes `prune`, `read_positions`): where no "
        "logits are saved, ours does without them, and nnsight, whose text has no `tracer.stop()`, does not. On an AMD CPU, as this "
        "is, our Inductor does products of up to 64 rows with large weights by `engine/products`, and torch by MKL. First calls have "
        "Inductor's caches as they were: `bench/first.py` has those from none. "
        "Differences are to raw hooks, at most. TransformerLens runs attention in eager.",
        "![Ratios](figures/ratios.svg)",
        *_workloads(found["rows"]),
    ]


def _workloads(measured: list[dict[str, Any]]) -> list[str]:
    text = []
    names = dict.fromkeys((r["workload"], r["what"], r["grad"]) for r in measured)
    for name, what, grad in names:
        mine = [r for r in measured if r["workload"] == name]
        shapes = [f"{r['model']}, {r['tokens'][0]} x {r['tokens'][1]}" for r in mine]
        whos = dict.fromkeys(who for r in mine for who in r["median_s"])
        rows = []
        for who in whos:
            cells = [_cell(r, who) for r in mine]
            rows.append([who, *cells])
        text += [f"**{name}**: {what}. {grad[0].upper()}{grad[1:]}.", table(["ms (ours over it)", *shapes], rows)]
        away = ", ".join(f"{s} {max(r['largest_difference'].values()):.0e}" for s, r in zip(shapes, mine, strict=True))
        firsts = ", ".join(
            f"{s} {r['first_call_s']['ours']:.0f} s"
            + (f" ({r['first_call_s']['torch.compile']:.0f} s)" if "torch.compile" in r["first_call_s"] else "")
            for s, r in zip(shapes, mine, strict=True)
        )
        text.append(f"Largest difference of all engines: {away}. First call, ours (`torch.compile`): {firsts}.")
    return text


def _cell(row: dict[str, Any], who: str) -> str:
    if who not in row["median_s"]:
        return ""
    ms = f"{1e3 * row['median_s'][who]:.1f}"
    return ms if who == "ours" else f"{ms} ({row['ratio'][who]:.2f})"


def layers() -> list[str]:
    found = kept("layers")
    if found is None:
        return []
    rows = []
    for r in found["rows"]:
        rows.append([r["layers"], *(_cell(r, who) for who in ("ours", "torch.compile", "raw hooks", "nnsight 0.8.1"))])
    return [
        f"## Cost against layers: {found['rows'][0]['what']}, {' x '.join(map(str, found['rows'][0]['tokens']))} tokens",
        f"`python -m bench.suite --models smollm2 --workloads 'steer, logits' --layers 3 6 12 30 --out bench/results/layers.json`. {machine(found)}",
        "![Cost against layers](figures/layers.svg)",
        table(["layers", "ours, ms", "torch.compile", "raw hooks", "nnsight 0.8.1"], rows),
    ]


def harvest() -> list[str]:
    found = kept("harvest")
    if found is None:
        return []
    rows = [
        [who, f"{n:.0f}", f"{found['ratio'][who]:.2f}" if who in found["ratio"] else ""]
        for who, n in found["tokens_a_second"].items()
    ]
    return [
        f"## Harvest: {found['workload']}",
        f"`python -m bench.harvest`. {machine(found)} The first run, compiled, takes {found['first_s']:.0f} s; compiled and hooks differ "
        f"by {found['largest_difference']:.0e} at most. Ours hashes the weights, too, for the manifest; the loops write tensors only.",
        table(["", "tokens a second", "our time over it"], rows),
    ]


def memory() -> list[str]:
    found = kept("memory")
    if found is None:
        return []
    grown, peaks = dict(found["growth"]), found["peak"]
    workload = grown.pop("workload")
    rows = [[engine, each["objects"], f"{each['rss_mib']:.2f}"] for engine, each in grown.items()]
    high = [[who, f"{each['peak_mib']:.0f}"] for who, each in peaks.items() if isinstance(each, dict)]
    return [
        f"## Memory: {workload}",
        f"`python -m bench.memory`. {machine(found)}",
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
        f"`python -m bench.recording`. {machine(found)} Microseconds a further save: {saves}. "
        + (
            f"Imports, seconds: {', '.join(f'`{k}` {t:.1f}' for k, t in found['import_s'].items())}."
            if "import_s" in found
            else ""
        ),
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
        f"`python -m bench.first`, which says what each line is. {machine(found)} Medians of {found['rounds']} new processes each.",
        table(["", "", "seconds", "over plain `torch.compile`"], rows),
    ]


def products() -> list[str]:
    found = kept("products")
    if found is None:
        return []
    rows = [
        [
            " x ".join(map(str, r["weight"])),
            "back" if r["backward"] else "forward",
            r["rows"],
            *(f"{us:.0f}" for us in r["us"].values()),
            *(f"{ratio:.2f}" for ratio in r["ratio"].values()),
        ]
        for r in found["products"]
    ]
    return [
        "## Products of few rows",
        f"`python -m bench.products`. {machine(found)} Microseconds a product that Inductor has compiled, with a weight that "
        f"is in no cache; ours is by `engine/products`, {'which is used' if found['used_here'] else 'which is not used'} on this "
        "CPU from 256 KiB of weight (in a backward up to 32 rows and from 1 MiB; else it is MKL's).",
        table(["weight", "", "rows", "MKL", "oneDNN", "ours", "over MKL", "over oneDNN"], rows),
    ]


SHORT = ("last", "steer", "steer, logits", "saves", "gradients", "logit lens", "generate")
SECTIONS = (suite, layers, sweep, harvest, first, recording, memory, products)


def short() -> str:
    """README's table: one line a bench."""
    rows = []
    if (grid := kept("sweep")) is not None:
        ours = f"a session: {grid['ms_a_cell']['session']:.1f} ms a cell"
        if "over_own_hooks" in grid:
            low, high = grid["spread"]["hooks, a session"]
            rows.append(
                [
                    f"patching grid: {grid['workload']}",
                    f"ours, not compiled: {grid['ms_a_cell']['hooks, a session']:.1f} ms a cell ({low:.1f} to {high:.1f})",
                    ours,
                    f"{grid['over_own_hooks']:.1f} times as fast",
                ]
            )
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
    for r in (kept("suite") or {"rows": []})["rows"]:
        if r["model"] == "smollm2" and r["workload"] in SHORT:
            peer = "torch.compile" if "torch.compile" in r["median_s"] else "nnsight 0.8.1"
            what = "plain `torch.compile`" if peer == "torch.compile" else peer
            rows.append(
                [
                    f"{r['workload']}: {r['what']}; {r['layers']} layers, {r['tokens'][0]} x {r['tokens'][1]}",
                    f"{what}: {1e3 * r['median_s'][peer]:.1f} ms",
                    f"{1e3 * r['median_s']['ours']:.1f} ms",
                    f"{r['ratio'][peer]:.2f} times the time",
                ]
            )
    if (new := kept("first")) is not None:
        for who, each in new["ratio"].items():
            rows.append(
                [
                    f"the first result, nothing cached{who.removeprefix('ours')}: {new['workload']}",
                    f"`torch.compile`: {new['median_s']['torch.compile']['cold']:.1f} s",
                    f"{new['median_s'][who]['cold']:.1f} s",
                    f"{each['cold']:.2f} times the time",
                ]
            )
    if (held := kept("memory")) is not None:
        ours, plain = (f"{held['peak'][who]['peak_mib']:.0f} MiB" for who in ("trace, the logits", "torch.compile"))
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
    import plots

    plots.draw()
    PAGE.write_text(page())
    README.write_text(readme())
    print(page())
