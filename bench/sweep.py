"""A patching grid (every layer and position) through a session, against a loop of traces and nnsight 0.8.1.

    python -m bench.sweep [--layers 30] [--tokens 14] [--runs 3] [--sample 20] [--no-peer] [--out bench/results/sweep.json]

A model of SmolLM2-135M's shape with random weights; a cell puts one position of one layer's output of a clean run into a
corrupted one and reads the difference of two logits at the last position. Recording is part of every time, compiling is
told apart. `cells` has the seconds of smaller grids, compiled; the loops are timed on `--sample` cells, spread over the grid.
`hooks, a session` is the same session, all cells, on a model that is not compiled (what `patching.patch` does there): by turns
with the compiled one, `spread` has the fastest and the slowest of both.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from nnsight_fx import NNsight

from .measure import arguments, setting, timed, write
from .models import smollm2
from .peers import run_peer

ROWS = 16  # a forward of the peer, batched by hand


def grid(model: NNsight, clean: torch.Tensor, corrupt: torch.Tensor, cells: list, session: bool) -> tuple[Any, list]:
    """The difference of two logits for each cell: as a session, or one trace after the other."""
    layers, scores, scope = model.model.layers, [], None

    def patch(cached: list) -> None:
        for layer, position in cells:
            with model.trace(corrupt, use_cache=False):
                layers[layer].output[:, position] = cached[layer][:, position]
                logits = model.lm_head.output[:, -1]
                scores.append((logits[:, 7] - logits[:, 9]).save())

    with torch.no_grad():
        if session:
            with model.session() as scope:
                with model.trace(clean, use_cache=False):
                    cached = [layer.output for layer in layers]
                patch(cached)
        else:
            with model.trace(clean, use_cache=False):
                cached = [layer.output.save() for layer in layers]
            patch(cached)
    return scope, [s.item() for s in scores]


STEPS = {"fork": {"demand", "causal"}, "fork, demand": {"causal"}, "fork, causal": {"demand"}, "all": set()}


def steps(model: NNsight, clean: torch.Tensor, corrupt: torch.Tensor, cells: list, runs: int) -> dict[str, dict]:
    """What each step of the forked strategy adds: with the others off, compiled first, then timed in turn."""
    capture = model._host.capture_for(None)
    assert capture is not None
    found: dict[str, dict] = {name: {"ms_a_cell": [], "cpu_ms_a_cell": []} for name in STEPS}
    for run in range(runs + 1):
        for name, without in STEPS.items():
            capture.disable = frozenset(without)
            cpu = time.process_time()
            (scope, _), seconds = timed(lambda: grid(model, clean, corrupt, cells, True))
            cpu = time.process_time() - cpu
            if not run:
                found[name]["first_s"] = seconds
                continue
            found[name]["ms_a_cell"].append(seconds / len(cells) * 1e3)
            found[name]["cpu_ms_a_cell"].append(cpu / len(cells) * 1e3)
            told = scope.explain().to_dict()["groups"][-1]
            found[name]["flops_over_the_loops"] = told["flops"] / told["naive"]
    capture.disable = frozenset()
    for each in found.values():
        each |= {k: statistics.median(each[k]) for k in ("ms_a_cell", "cpu_ms_a_cell")}
    return found


PEER = """
import time
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
module = LlamaForCausalLM(LlamaConfig(**config)).eval().requires_grad_(False)
module.load_state_dict(torch.load(weights))
model = NNsight(module)
layers = model.model.layers

def metric(logits):
    return logits[:, 7] - logits[:, 9]

with torch.no_grad():
    with model.trace(input_ids=clean, use_cache=False):
        cached = nnsight.save([layer.output for layer in model.model.layers])
    cached = [c[0] if isinstance(c, tuple) else c for c in cached]

    def one(layer, position):
        with model.trace(input_ids=corrupt, use_cache=False):
            model.model.layers[layer].output[:, position] = cached[layer][:, position]
            score = metric(model.lm_head.output[:, -1]).save()
        return score

    def many(rows):
        here = [torch.zeros(len(rows), corrupt.shape[1], 1, dtype=torch.bool) for _ in cached]
        for row, (layer, position) in enumerate(rows):
            here[layer][row, position] = True
        with model.trace(input_ids=corrupt.repeat(len(rows), 1), use_cache=False):
            for layer, chosen, c in zip(model.model.layers, here, cached):
                layer.output = torch.where(chosen, c, layer.output)
            score = metric(model.lm_head.output[:, -1]).save()
        return score

    one(*cells[0])
    start, cpu = time.perf_counter(), time.process_time()
    out["loop"] = [one(*cell).item() for cell in cells]
    out["loop_s"] = (time.perf_counter() - start) / len(cells)
    out["loop_cpu_s"] = (time.process_time() - cpu) / len(cells)
    batch = (cells * rows)[:rows]
    many(batch)
    start, cpu = time.perf_counter(), time.process_time()
    out["batch"] = many(batch).tolist()
    out["batch_s"] = (time.perf_counter() - start) / rows
    out["batch_cpu_s"] = (time.process_time() - cpu) / rows
"""


def peer(module: Any, clean: torch.Tensor, corrupt: torch.Tensor, cells: list, folder: Path) -> dict[str, Any]:
    """The same cells on nnsight 0.8.1: in a loop, and 16 rows a forward with a mask at every layer."""
    weights = folder / "weights.pt"
    torch.save(module.state_dict(), weights)
    config = {k: v for k, v in module.config.to_dict().items() if isinstance(v, int | float | bool)}
    values = {"config": config, "weights": str(weights), "rows": ROWS}
    return run_peer(PEER, clean=clean, corrupt=corrupt, cells=[list(c) for c in cells], **values)


def measure(layers: int, tokens: int, runs: int, sample: int, with_peer: bool, backend: str) -> dict[str, Any]:
    """Milliseconds a cell, each way; and the largest difference in the score."""
    module = smollm2(layers)
    clean, corrupt = torch.randint(0, 49152, (2, 1, tokens))
    cells = [(layer, position) for layer in range(layers) for position in range(tokens)]
    some = cells[:: max(1, len(cells) // sample)][:sample]
    model = NNsight(module)
    model.compile(backend=backend)
    (_, scores), first = timed(lambda: grid(model, clean, corrupt, cells, True))
    times, cpu, scope = [], [], None
    hooks, together, together_cpu = NNsight(module), [], []
    grid(hooks, clean, corrupt, some, True)
    for _ in range(runs):
        before = time.process_time()
        (scope, scores), seconds = timed(lambda: grid(model, clean, corrupt, cells, True))
        times.append(seconds / len(cells))
        cpu.append((time.process_time() - before) / len(cells))
        before = time.process_time()
        together.append(timed(lambda: grid(hooks, clean, corrupt, cells, True))[1] / len(cells))
        together_cpu.append((time.process_time() - before) / len(cells))
    grid(hooks, clean, corrupt, some[:1], False)
    before = time.process_time()
    (_, one), alone = timed(lambda: grid(hooks, clean, corrupt, some, False))
    alone_cpu = time.process_time() - before
    by_cell = dict(zip(cells, scores, strict=True))
    ours = statistics.median(times)
    found: dict[str, Any] = {
        "workload": f"{layers} x {tokens} cells, {layers} layers of SmolLM2's shape, 1 x {tokens} tokens",
        "backend": backend,
        "first_s": first,
        "ms_a_cell": {
            "session": ours * 1e3,
            "hooks, a session": statistics.median(together) * 1e3,
            "hooks, one by one": alone / (len(some) + 1) * 1e3,
        },
        "spread": {  # ms a cell: the fastest and the slowest run
            "session": [min(times) * 1e3, max(times) * 1e3],
            "hooks, a session": [min(together) * 1e3, max(together) * 1e3],
        },
        "over_own_hooks": statistics.median(together) / ours,
        "cpu_ms_a_cell": {  # of all threads: what other processes do to the clock is not in it
            "session": statistics.median(cpu) * 1e3,
            "hooks, a session": statistics.median(together_cpu) * 1e3,
            "hooks, one by one": alone_cpu / (len(some) + 1) * 1e3,
        },
        "largest_difference": max(abs(by_cell[c] - s) for c, s in zip(some, one, strict=True)),
        "explain": None if scope is None else scope.explain().to_dict(),
        "compiles": model.explain().to_dict()["captures"][0]["compiles"],
        "steps": steps(model, clean, corrupt, cells, runs),
    }
    found["cells"] = {}
    for n in sorted({max(1, len(cells) // part) for part in (30, 10, 3, 1)}):
        fewer = cells[:: len(cells) // n][:n]
        grid(model, clean, corrupt, fewer, True)
        found["cells"][n] = {"session": timed(lambda fewer=fewer: grid(model, clean, corrupt, fewer, True))[1]}
        found["cells"][n]["hooks, one by one"] = n * found["ms_a_cell"]["hooks, one by one"] / 1e3
    if with_peer:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            theirs = peer(module, clean, corrupt, some, Path(folder))
        found["ms_a_cell"] |= {"nnsight 0.8.1, loop": theirs["loop_s"] * 1e3}
        found["ms_a_cell"] |= {f"nnsight 0.8.1, {ROWS} rows a forward": theirs["batch_s"] * 1e3}
        found["cpu_ms_a_cell"] |= {"nnsight 0.8.1, loop": theirs["loop_cpu_s"] * 1e3}
        found["cpu_ms_a_cell"] |= {f"nnsight 0.8.1, {ROWS} rows a forward": theirs["batch_cpu_s"] * 1e3}
        found["ratio"] = {"loop": theirs["loop_s"] / ours, "batch": theirs["batch_s"] / ours}
        bare = found["steps"]["fork, causal"]["ms_a_cell"] / 1e3
        found["ratio_without_demand"] = {"loop": theirs["loop_s"] / bare, "batch": theirs["batch_s"] / bare}
        used = statistics.median(cpu)
        found["cpu_ratio"] = {"loop": theirs["loop_cpu_s"] / used, "batch": theirs["batch_cpu_s"] / used}
        found["largest_difference_to_peer"] = max(
            abs(by_cell[c] - s) for c, s in zip(some, theirs["loop"], strict=True)
        )
    if found["explain"] is not None:
        found["explain"]["line"] = found["explain"]["line"].rpartition("/")[2]
    for group in (found["explain"] or {"groups": []})["groups"]:
        group["lines"] = [line.rpartition("/")[2] for line in group["lines"]]
    found |= setting()
    return found


def main() -> None:
    parser = arguments(__doc__, "sweep", layers=30, tokens=14, runs=3, sample=20)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    write(measure(args.layers, args.tokens, args.runs, args.sample, not args.no_peer, args.backend), args.out)


if __name__ == "__main__":
    main()
