"""Which backend pays for a model: one steering trace on hooks and on each backend, beside the bare model."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..analysis.parts import Parts, parts_of
from ..envoys.envoy import host_of
from ..plan.tree import first
from ..tracing.saving import save


@dataclass(frozen=True)
class Row:
    """One way to run the trace."""

    name: str
    first_s: float  # the first call: capture, compilation, and the run
    ms: float  # median of the later ones
    pays_after: float  # traces until it has cost less than hooks have; infinite where it never will
    difference: float  # of its logits to those on hooks, at most
    compiles: int
    fallbacks: tuple[str, ...] = ()


def compare(
    model: Any,
    inputs: object = "The quick brown fox jumps over the lazy dog",
    backends: Sequence[str] = ("eager", "inductor"),
    runs: int = 10,
    parts: Parts | None = None,
) -> list[Row]:
    """Time a trace that adds a vector in the middle of a decoder and saves every layer's last position and the logits.

    All ways run in turn, `runs` times, under `no_grad`. The first row is the bare model in eager, which saves nothing, the
    second hooks.

    Raises:
        UnknownModuleError: the model is of a family whose parts are not known; give `parts`.
    """
    at = parts_of(model, parts)
    layers, head = model.get(at.layers), model.get(at.unembed)
    size = model._module.get_submodule(at.unembed).weight.shape[-1]
    vector = torch.full((size,), 0.01, dtype=model.dtype, device=model.device)

    def trace(compiled: object) -> torch.Tensor:
        with torch.no_grad(), model.trace(inputs, compile=compiled):
            kept = save([])
            for i, layer in enumerate(layers):
                if i == len(layers) // 2:
                    first(layer.output)[:] += vector
                kept.append(first(layer.output)[:, -1])
            logits = head.output.save()
        return logits

    batch = host_of(model).inputs.collate([host_of(model).inputs.prepare((inputs,), {})])

    def bare() -> None:
        with torch.no_grad():
            model._module(*batch.args, **batch.kwargs)

    ways: dict[str, Callable[[], object]] = {"bare model, eager": bare, "hooks": lambda: trace(False)}
    ways |= {name: lambda name=name: trace({"backend": name}) for name in backends}
    firsts, kept, times = {}, {}, {name: [] for name in ways}
    for name, run in ways.items():
        start = time.perf_counter()
        kept[name] = run()
        firsts[name] = time.perf_counter() - start
        run()
    for _ in range(runs):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            _settle(model.device)
            times[name].append(time.perf_counter() - start)
    told = {facts["options"].get("backend"): facts for facts in model.explain().to_dict()["captures"]}
    medians = {name: statistics.median(each) for name, each in times.items()}
    rows = []
    for name in ways:
        gain = medians["hooks"] - medians[name]
        pays = max(0.0, firsts[name] - firsts["hooks"]) / gain if gain > 0 else math.inf
        facts = told.get(name, {"compiles": 0, "fallbacks": ()})
        other = kept[name]
        away = 0.0 if other is None else float((other - kept["hooks"]).abs().max())
        rows.append(
            Row(name, firsts[name], 1e3 * medians[name], pays, away, facts["compiles"], tuple(facts["fallbacks"]))
        )
    return rows


def text(rows: Sequence[Row]) -> str:
    """A table, and which backend pays."""
    lines = [f"{'':20}{'first call':>12}{'ms a trace':>12}{'x hooks':>9}{'pays after':>15}{'difference':>12}"]
    hooks = next(r for r in rows if r.name == "hooks")
    for r in rows:
        known = r.name in ("hooks", "bare model, eager")
        pays = "" if known else "never" if math.isinf(r.pays_after) else f"{math.ceil(r.pays_after)} traces"
        away = "" if known else f"{r.difference:.0e}"
        lines.append(f"{r.name:20}{r.first_s:10.2f} s{r.ms:12.1f}{hooks.ms / r.ms:9.2f}{pays:>15}{away:>12}")
        lines += [f"    fell back: {why}" for why in r.fallbacks]
    able = [r for r in rows if r.name not in ("hooks", "bare model, eager") and not math.isinf(r.pays_after)]
    best = min(able, key=lambda r: r.ms, default=None)
    if best is None:
        lines.append("No backend pays for this model here: stay on hooks, or give it longer inputs.")
    else:
        lines.append(
            f'`model.compile(backend="{best.name}")` pays from {math.ceil(best.pays_after)} traces of one kind on: '
            f"{hooks.ms / best.ms:.2f} times as fast as hooks."
        )
    return "\n".join(lines)


def _settle(device: Any) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
