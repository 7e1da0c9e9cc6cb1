"""Reading all layers of a SmolLM2-shaped model: ours, plain `torch.compile`, raw hooks and nnsight 0.8.1, round by round.

    python bench/saves.py [--layers 30] [--rounds 5] [--runs 2] [--out bench/results/saves.json]

- steer: a vector added in the middle, the last position of every layer and the logits saved, 8 x 64, `no_grad`;
- saves: the full output of every layer saved, 8 x 64, `no_grad`; the plain compiled function returns the same tensors;
- gradients: of the logits' sum at the last position, to every layer's output, 1 x 14; parameters frozen, the embeddings' output
  requires grad. No plain compiled function gives these: its outputs cannot be differentiated in one another.

Parameters are frozen everywhere. Each number is the median over rounds of a round's mean; nnsight runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from steer import smollm2

import nnsight_fx
from nnsight_fx import NNsight

SHAPES = {"steer": (8, 64), "saves": (8, 64), "gradients": (1, 14)}

# The same text on both sides.
TEXT = """
def steer(model, ids, vector):
    layers = model.model.layers
    with torch.no_grad(), model.trace(input_ids=ids, use_cache=False):
        saved = nnsight.save([])
        for i, layer in enumerate(layers):
            if i == len(layers) // 2:
                layer.output = layer.output + vector
            saved.append(layer.output[:, -1])
        saved.append(model.lm_head.output)
    return saved

def saves(model, ids, vector):
    with torch.no_grad(), model.trace(input_ids=ids, use_cache=False):
        saved = nnsight.save([layer.output for layer in model.model.layers])
    return saved

def gradients(model, ids, vector):
    with model.trace(input_ids=ids, use_cache=False):
        model.model.embed_tokens.output.requires_grad_()
        outputs = [layer.output for layer in model.model.layers]
        loss = model.lm_head.output[:, -1].sum()
        with loss.backward():
            saved = nnsight.save([h.grad for h in outputs[::-1]])
    return saved[::-1]
"""

PEER = f"""
import time
from transformers import LlamaConfig, LlamaForCausalLM
{TEXT}
if "model" not in KEPT:
    module = LlamaForCausalLM(LlamaConfig(**config)).eval().requires_grad_(False)
    module.load_state_dict(torch.load(weights))
    KEPT["model"] = NNsight(module)
call, model = {{"steer": steer, "saves": saves, "gradients": gradients}}[workload], KEPT["model"]
call(model, ids, vector)
start = time.perf_counter()
for _ in range(runs):
    last = call(model, ids, vector)
out["seconds"] = (time.perf_counter() - start) / runs
out["values"] = [x.detach() for x in last] if values else []
"""
PEER = PEER.replace("KEPT", "torch.__dict__.setdefault('_bench_saves', {})")


def texts() -> dict[str, Callable]:
    here: dict[str, Any] = {"torch": torch, "nnsight": nnsight_fx}
    exec(compile(TEXT, "bench/saves.py: the text of both sides", "exec"), here)  # as the peer reads it
    return {name: here[name] for name in SHAPES}


def by_hooks(module: Any, name: str, ids: torch.Tensor, vector: torch.Tensor) -> list:
    """The same with forward hooks, in eager."""
    layers, found = module.model.layers, []

    def hook(i: int) -> Callable:
        def after(_: Any, __: Any, h: torch.Tensor) -> torch.Tensor | None:
            changed = h + vector if name == "steer" and i == len(layers) // 2 else None
            h = h if changed is None else changed
            found.append(h[:, -1] if name == "steer" else h)
            return changed

        return after

    handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
    if name == "gradients":
        handles.append(module.model.embed_tokens.register_forward_hook(lambda _, __, h: h.requires_grad_()))
    try:
        with torch.set_grad_enabled(name == "gradients"):
            logits = module(input_ids=ids, use_cache=False).logits
            if name == "gradients":
                return list(torch.autograd.grad(logits[:, -1].sum(), found))
    finally:
        for handle in handles:
            handle.remove()
    return [*found, logits] if name == "steer" else found


def plain_of(module: Any, name: str) -> Callable:
    """The limit: the bare model, compiled; it returns the layers' outputs where that is what is asked for."""

    def bare(ids: torch.Tensor) -> Any:
        out = module(input_ids=ids, use_cache=False, output_hidden_states=name != "steer")
        return out.logits if name == "steer" else (out.logits, *out.hidden_states[1:])

    return torch.no_grad()(torch.compile(bare))


def measure(layers: int, rounds: int, runs: int) -> dict[str, Any]:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests/peer"))
    from nnsight_peer import run_peer  # type: ignore[import-not-found]

    module = smollm2(layers)
    model = NNsight(module)
    model.compile()
    vector, text, found = torch.randn(576), texts(), {}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(module.state_dict(), Path(folder) / "weights.pt")
        given = {"config": module.config.to_diff_dict(), "weights": str(Path(folder) / "weights.pt"), "vector": vector}
        given["config"] = {k: v for k, v in given["config"].items() if isinstance(v, int | float | str | bool)}
        for name, shape in SHAPES.items():
            ids = torch.randint(0, 49152, shape)
            calls = {"ours": partial(text[name], model, ids, vector)}
            if name != "gradients":
                calls["torch.compile"] = partial(plain_of(module, name), ids)
            calls["raw hooks"] = partial(by_hooks, module, name, ids, vector)
            first = {}
            for who, call in calls.items():
                start = time.perf_counter()
                last = call()
                first[who] = time.perf_counter() - start
                if who == "ours":
                    values = last
                call()
            peers = run_peer(PEER, workload=name, ids=ids, runs=1, values=True, **given)["values"]
            largest = max(float((a.detach() - b).abs().max()) for a, b in zip(values, peers, strict=True))
            times: dict[str, list[float]] = {}
            for _ in range(rounds):
                for who, call in calls.items():
                    start = time.perf_counter()
                    for _ in range(runs):
                        call()
                    times.setdefault(who, []).append((time.perf_counter() - start) / runs)
                theirs = run_peer(PEER, workload=name, ids=ids, runs=runs, values=False, **given)
                times.setdefault("nnsight 0.8.1", []).append(theirs["seconds"])
            medians = {who: statistics.median(each) for who, each in times.items()}
            found[name] = {
                "tokens": list(shape),
                "median_s": medians,
                "first_call_s": first,
                "ratio": {who: medians["ours"] / s for who, s in medians.items() if who != "ours"},
                "largest_difference_to_peer": largest,
            }
            print(name, json.dumps(found[name]), flush=True)
    return {
        "workload": f"{layers} layers of SmolLM2's shape",
        "workloads": found,
        "grad": "parameters frozen; no_grad, but for the gradients",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "hardware": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 30, "rounds": 5, "runs": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "saves.json")
    args = parser.parse_args()
    found = measure(args.layers, args.rounds, args.runs)
    args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
