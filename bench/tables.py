"""The tables of README.md and docs/performance.md, out of the committed figures in bench/results.

    python -m bench.tables            # write both, and the figures

A section of the page is of one file: one commit, one machine. README's table is of several: of those of the newest one's commit and
machine alone, and of ratios whose spread is known. A file without its setting, or of a tree that differs from its commit, is not in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, README, PAGE = ROOT / "bench" / "results", ROOT / "README.md", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- bench/tables.py -->\n", "<!-- end -->"
ALL_LOGITS = "ours, all logits saved too"
PAIRS = 3  # at least, for a spread

PAGE_TEXT = """# Performance

<!-- Written by bench/tables.py from bench/results/*.json. -->

Each table is one run of one command on one machine; `no_grad`, parameters frozen. Times of others' runs, and of other machines,
are not comparable: ratios are. A ratio is the median over pairs that were measured in turn, with its spread in brackets: from the
10th to the 90th percentile, or from the least to the most of fewer than ten pairs. Where the spread crosses 1 it says `equal`.
`[?]`: the spread was not kept. `make bench-figures` measures all of them anew.{gpu}

{tables}
"""

Found = dict[str, Any]


def read(folder: Path = RESULTS) -> dict[str, Found]:
    """The files, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def told(ratio: Any) -> str:
    """A ratio with its spread."""
    if ratio is None:
        return ""
    if not isinstance(ratio, dict):
        return f"{ratio:.2f} [?]"
    low, high = ratio["low"], ratio["high"]
    if ratio["pairs"] < PAIRS:
        return f"{ratio['median']:.2f} [of {ratio['pairs']}]"
    return f"{'equal' if low <= 1 <= high else _plain(ratio['median'])} [{_plain(low)}, {_plain(high)}]"


def _plain(x: float) -> str:
    return f"{x:.2f}" if x >= 0.1 else f"{x:.3f}"


def machine(found: Found) -> str:
    """Of what, where and when a file is."""
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    if "command" not in found:
        of = f"{found['commit'][:12]}, an earlier version" if "commit" in found else "an earlier version"
        return f"**Of {of}**, from before all of the setting was kept with the figures. {versions}."
    on, load = found["hardware"], found["load"]
    caches = ", ".join(f"{level} {size}" for level, size in on["caches"].items())
    numbers = ", ".join(f"{name} {n}" for name, n in on["processor_numbers"].items())
    gpus = "".join(f", {gpu}" for gpu in on["gpus"])
    return (
        f"`{found['command']}` at {found['commit'][:12]}, {found['date']}, in {found['took_s'] / 60:.0f} min. {on['processor']} ({numbers}; "
        f"{caches}), {on['physical_cores']} cores, {on['threads']} threads, {on['memory'] / 2**30:.0f} GiB{gpus}, load {load['before'][0]} "
        f"before and {load['after'][0]} after. {versions}."
    )


def sweep(found: Found) -> list[str]:
    ratio = found["ratio"]
    rows = [[who, f"{ms:.1f}", told(ratio.get(who))] for who, ms in found["ms_a_cell"].items()]
    steps = [
        [name, f"{each['ms_a_cell']:.1f}", told(each.get("ratio")), f"{each['flops_over_the_loops']:.2f}"]
        for name, each in found["steps"].items()
    ]
    return [
        f"## Patching grid: {found['workload']}",
        f"{machine(found)} Recording is part of the times; the first run, with {found['compiles']} compiles, takes "
        f"{found['first_s']:.0f} s. Largest difference to nnsight {found['largest_difference_to_peer']:.0e}.",
        table(["", "ms a cell", "our session over it"], rows),
        "![Cost against cells](figures/cells.svg)",
        "What each step of the forked strategy adds, timed in turn in the same process:",
        table(["steps", "ms a cell", "over hooks, one by one", "FLOPs over the naive loop's"], steps),
    ]


def suite(found: Found) -> list[str]:
    """A table a workload; a line an engine or peer."""
    return [
        "## Workloads",
        f"{machine(found)} `bench/workloads.py` has the texts and `bench/peers.py` says who runs them. The "
        "plain function, in eager and compiled, does no intervention: it gives the logits, or the blocks' outputs where those "
        "are what is asked for. What nobody reads is not computed on captured graphs (passes `prune`, `read_positions`): where not all "
        f"logits are saved, ours does without them, and nnsight, whose text has no `tracer.stop()`, does not. `{ALL_LOGITS}` is the same "
        "work as theirs, and each second ratio is its. On an AMD CPU our Inductor does products of up to 64 rows with large weights by "
        "`engine/products`, and torch by MKL. First calls have Inductor's caches as they were: `bench/first.py` has those from none. "
        "Differences are to raw hooks, at most. TransformerLens runs attention in eager.",
        "![Ratios](figures/ratios.svg)",
        *_workloads(found["rows"]),
    ]


def gpu(found: Found) -> list[str]:
    return ["## Workloads on a GPU", machine(found), *_workloads(found["rows"])]


def _workloads(measured: list[dict[str, Any]]) -> list[str]:
    text = []
    names = dict.fromkeys((r["workload"], r["what"], r["grad"]) for r in measured)
    for name, what, grad in names:
        mine = [r for r in measured if r["workload"] == name]
        shapes = [f"{r['model']}, {r['tokens'][0]} x {r['tokens'][1]}" for r in mine]
        whos = dict.fromkeys(who for r in mine for who in r["median_s"])
        rows = [[who, *(_cell(r, who) for r in mine)] for who in whos]
        head = "ms (ours over it" + ("; ours with all logits saved too over it)" if ALL_LOGITS in whos else ")")
        text += [f"**{name}**: {what}. {grad[0].upper()}{grad[1:]}.", table([head, *shapes], rows)]
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
    both = [told(row[key][who]) for key in ("ratio", "ratio_all_logits") if who in row.get(key, {})]
    return f"{1e3 * row['median_s'][who]:.1f}" + (f" ({'; '.join(both)})" if both and who != "ours" else "")


def layers(found: Found) -> list[str]:
    whos = ("ours", ALL_LOGITS, "torch.compile", "raw hooks", "nnsight 0.8.1")
    rows = [[r["layers"], *(_cell(r, who) for who in whos)] for r in found["rows"]]
    return [
        f"## Cost against layers: {found['rows'][0]['what']}, {' x '.join(map(str, found['rows'][0]['tokens']))} tokens",
        machine(found),
        "![Cost against layers](figures/layers.svg)",
        table(["layers", *(f"{who}, ms" for who in whos)], rows),
    ]


def harvest(found: Found) -> list[str]:
    rows = [[who, f"{n:.0f}", told(found["ratio"].get(who))] for who, n in found["tokens_a_second"].items()]
    return [
        f"## Harvest: {found['workload']}",
        f"{machine(found)} The first run, compiled, takes {found['first_s']:.0f} s; compiled and hooks differ "
        f"by {found['largest_difference']:.0e} at most. Ours hashes the weights, too, for the manifest; the loops write tensors only.",
        table(["", "tokens a second", "our time over it"], rows),
    ]


def heads(found: Found) -> list[str]:
    rows = [[who, f"{ms:.1f}", told(found["ratio"].get(who))] for who, ms in found["ms_a_cell"].items()]
    return [
        f"## Heads ablated over a data set: {found['workload']}",
        f"{machine(found)} One compile serves all lengths; the first run, with it, takes {found['first_s']:.0f} s. The intact runs of the prompts "
        f"are part of the times. Largest difference of all engines: {found['largest_difference']:.0e}.",
        table(["", "ms a cell", "our time over it"], rows),
    ]


def generation(found: Found) -> list[str]:
    rows = [
        [who, f"{s:.2f}", f"{found['tokens_a_second'][who]:.0f}", told(found["ratio"].get(who))]
        for who, s in found["s_a_cell"].items()
    ]
    widths = ", ".join(f"{cells} cells {n:.0f}" for cells, n in found["widths"].items())
    held = ", ".join(f"{who} {gib:.1f} GiB" for who, gib in found["resident_gib"].items())
    return [
        f"## A grid of steered generations: {found['workload']}",
        f"{machine(found)} Ours runs on hooks, recording included. Tokens a second by width: {widths}. Ours takes {found['python_ms_a_token']:.2f} ms "
        f"a token more than the rows batched by hand. Resident behind a run: {held}. Cells with other tokens: {found['cells_that_differ']}.",
        table(["", "s a cell", "tokens a second", "our time over it"], rows),
    ]


def memory(found: Found) -> list[str]:
    grown, peaks = dict(found["growth"]), found["peak"]
    workload = grown.pop("workload")
    rows = [[engine, each["objects"], f"{each['rss_mib']:.2f}"] for engine, each in grown.items()]
    high = [
        [who, f"{each['peak_mib']:.0f}"] for who, each in peaks.items() if isinstance(each, dict) and "peak_mib" in each
    ]
    return [
        f"## Memory: {workload}",
        machine(found),
        table(["engine", "Python objects more", "MiB resident more"], rows),
        f"{peaks['workload'][0].upper()}{peaks['workload'][1:]}. The logits' trace over `torch.compile`, which is the same work: "
        f"{told(peaks['ratio'])}. A trace of a block's output leaves out what is behind the block.",
        table(["", "MiB at the peak, above what was resident"], high),
    ]


def recording(found: Found) -> list[str]:
    rows = [[name, f"{us:.0f}", told(found["ratio"].get(name))] for name, us in found["us"].items()]
    more, saves = found.get("save_ratio", {}), found["us_a_save"]
    rows += [[f"{who}, a further save", f"{us:.0f}", told(more.get(who))] for who, us in saves.items()]
    imports = ", ".join(f"`{k}` {t:.1f}" for k, t in found["import_s"].items())
    return [
        f"## Our Python: {found['workload']}",
        f"{machine(found)} Imports, seconds: {imports}; ours over nnsight's: {told(found.get('import_ratio')) or 'not kept'}.",
        table(["", "us a call", "over nnsight's"], rows),
    ]


def first(found: Found) -> list[str]:
    rows = []
    for who, each in found["median_s"].items():
        ratios = found["ratio"].get(who, {})
        rows += [[who, kind, f"{s:.1f}", told(ratios.get(kind))] for kind, s in each.items()]
    return [
        f"## The first result: {found['workload']}",
        f"{machine(found)} `bench/first.py` says what each line is. Medians of {found['rounds']} new processes each.",
        table(["", "", "seconds", "over plain `torch.compile`"], rows),
    ]


def products(found: Found) -> list[str]:
    rows = [
        [
            " x ".join(map(str, r["weight"])),
            "back" if r["backward"] else "forward",
            r["rows"],
            *(f"{us:.0f}" for us in r["us"].values()),
            *(told(r["ratio"][who]) for who in ("MKL", "oneDNN")),
        ]
        for r in found["products"]
    ]
    return [
        "## Products of few rows",
        f"{machine(found)} Microseconds a product that Inductor has compiled, with a weight that "
        f"is in no cache; ours is by `engine/products`, {'which is used' if found['used_here'] else 'which is not used'} on this "
        "CPU from 256 KiB of weight (in a backward up to 32 rows and from 1 MiB; else it is MKL's).",
        table(["weight", "", "rows", "MKL", "oneDNN", "ours", "over MKL", "over oneDNN"], rows),
    ]


SECTIONS: dict[str, Callable[[Found], list[str]]] = {
    each.__name__: each
    for each in (suite, gpu, layers, sweep, generation, heads, harvest, first, recording, memory, products)
}


def page(files: dict[str, Found]) -> str:
    texts = [text for name, section in SECTIONS.items() if name in files for text in section(files[name])]
    return PAGE_TEXT.format(tables="\n\n".join(texts), gpu="" if "gpu" in files else " GPU: not measured.")


# -- README --------------------------------------------------------------------------------------------------------------


def version(found: Found) -> tuple[str, str] | None:
    """The commit and the machine, where a file says both and the commit is what ran."""
    if "command" not in found or "+" in found["commit"]:
        return None
    return found["commit"], json.dumps(found["hardware"], sort_keys=True)


def holding(files: dict[str, Found]) -> dict[str, Found]:
    """Those of one version on one machine: the newest one's."""
    known = {name: found for name, found in files.items() if version(found) is not None}
    if not known:
        return {}
    newest = version(max(known.values(), key=lambda found: found["date"]))
    return {name: found for name, found in known.items() if version(found) == newest}


def claims(files: dict[str, Found]) -> list[list[str]]:
    """README's rows: what, the peer's figure, ours, the ratio."""
    found: list[tuple[str, str, str, Any]] = []
    if "sweep" in files:
        grid = files["sweep"]
        ms, (peer, *_) = grid["ms_a_cell"], [who for who in grid["ms_a_cell"] if "rows a forward" in who]
        found.append(
            (
                f"patching grid: {grid['workload']}",
                f"{peer}: {ms[peer]:.1f} ms a cell",
                f"{ms['session']:.1f} ms a cell",
                grid["ratio"][peer],
            )
        )
    for r in files.get("suite", {"rows": []})["rows"]:
        peer = PEERS.get(r["workload"])
        if peer is None or r["model"] != "smollm2" or r["tokens"][0] != 1:
            continue
        name = f"{r['workload']}: {r['what']}; {r['layers']} layers, {r['tokens'][0]} x {r['tokens'][1]} tokens"
        ms = {who: f"{1e3 * s:.1f} ms" for who, s in r["median_s"].items()}
        if r["workload"] == "steer":
            found.append(
                (
                    f"{name}. The same work: all logits saved, too",
                    f"{peer}: {ms[peer]}",
                    ms[ALL_LOGITS],
                    r["ratio_all_logits"][peer],
                )
            )
            name += ". Logits, which nobody reads, left out by ours alone"
        found.append((name, f"{peer}: {ms[peer]}", ms["ours"], r["ratio"][peer]))
    if "first" in files:
        new = files["first"]
        s, peer = new["median_s"], "torch.compile"
        found.append(
            (
                f"the first result, nothing cached: {new['workload']}",
                f"{peer}: {s[peer]['cold']:.1f} s",
                f"{s['ours']['cold']:.1f} s",
                new["ratio"]["ours"]["cold"],
            )
        )
    return [
        [what, theirs, ours, told(ratio)]
        for what, theirs, ours, ratio in found
        if isinstance(ratio, dict) and ratio["pairs"] >= PAIRS
    ]


PEERS = {"steer": "torch.compile", "gradients": "nnsight 0.8.1", "generate": "torch.compile"}
SHOWN = ("sweep", "suite", "first")  # the files of README's rows


def short(files: dict[str, Found]) -> str:
    """README's table, and what it is of."""
    held = holding({name: files[name] for name in SHOWN if name in files})
    rows = claims(held)
    if not rows:
        return (
            "No figure stands here now: one without its commit, its machine and its spread does not count, and all that are there are "
            "earlier. `make bench-figures` measures them anew; the earlier ones are in [docs/performance.md](docs/performance.md)."
        )
    one = next(iter(held.values()))
    on, away = one["hardware"], [name for name in SHOWN if name not in held]
    return "\n\n".join(
        [
            f"Commit {one['commit'][:12]}, {one['date'][:10]}, {on['processor']}, {on['physical_cores']} cores, by `make bench-figures` "
            "(`make bench` is a short one, under pytest-benchmark). A ratio is the median of pairs measured in turn, with its spread; `equal` "
            "where the spread crosses 1." + (f" Not of this commit, so not here: {', '.join(away)}." if away else ""),
            table(["workload", "peer", "ours", "ours over the peer's"], rows),
            "Recording is part of these times; compiling is part of a first result alone. Plain `torch.compile` does no intervention.",
        ]
    )


def readme(files: dict[str, Found]) -> str:
    return re.sub(
        f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{short(files)}\n\n{END}", README.read_text(), flags=re.DOTALL
    )


def write() -> None:
    from . import plots

    files = read()
    plots.draw(files)
    PAGE.write_text(page(files))
    README.write_text(readme(files))


if __name__ == "__main__":
    write()
