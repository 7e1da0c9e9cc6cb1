"""The figures of docs/performance.md, out of the committed results: `python -m bench.tables` draws them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "nnsight_fx"  # the same figures, the same files
import matplotlib.pyplot as plt  # noqa: E402

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
PEERS = ("torch.compile", "eager", "raw hooks", "nnsight 0.8.1", "TransformerLens 4")


def _middle(ratio: Any) -> float:
    return ratio["median"] if isinstance(ratio, dict) else ratio


def _save(figure: Any, name: str) -> None:
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def ratios(found: dict[str, Any]) -> None:
    """Our time over each peer's, a group of bars a workload."""
    rows = found["rows"]
    labels = [f"{r['workload']}\n{r['model']}\n{r['tokens'][0]} x {r['tokens'][1]}" for r in rows]
    figure, axes = plt.subplots(figsize=(1.1 * len(rows) + 2, 4))
    for k, who in enumerate(PEERS):
        at = [(i, _middle(r["ratio"][who])) for i, r in enumerate(rows) if who in r["ratio"]]
        axes.bar([i + 0.16 * (k - 2) for i, _ in at], [n for _, n in at], 0.15, label=who)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), labels, fontsize=7)
    axes.set_ylabel("our time over theirs")
    axes.legend(fontsize=7, ncols=len(PEERS))
    _save(figure, "ratios")


def lines(name: str, x: str, y: str, series: dict[str, list[tuple[float, float]]]) -> None:
    figure, axes = plt.subplots(figsize=(5, 3.2))
    for who, points in series.items():
        axes.plot([a for a, _ in points], [b for _, b in points], marker="o", label=who)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=8)
    _save(figure, name)


def draw(files: dict[str, Any]) -> None:
    if (found := files.get("suite")) is not None:
        ratios(found)
    if (found := files.get("sweep")) is not None:
        whos = next(iter(found["cells"].values()))
        lines(
            "cells",
            "cells of a patching grid",
            "seconds, compiled",
            {who: [(int(n), each[who]) for n, each in found["cells"].items()] for who in whos},
        )
    if (found := files.get("layers")) is not None:
        whos = [w for w in ("ours", *PEERS) if w in found["rows"][0]["median_s"]]
        lines(
            "layers",
            "layers",
            "ms a trace",
            {who: [(r["layers"], 1e3 * r["median_s"][who]) for r in found["rows"]] for who in whos},
        )
