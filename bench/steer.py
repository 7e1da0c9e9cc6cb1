"""Steer and save the last position of every layer: our compiled trace against a plain `torch.compile` of the same model.

    python bench/steer.py [--layers 30] [--rows 1] [--tokens 14] [--runs 40] [--out result.json]

Both run in one process, interleaved, under `no_grad` on frozen parameters; the medians and their ratio are printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import nnsight_fx
from nnsight_fx import NNsight


def smollm2(layers: int = 30) -> LlamaForCausalLM:
    """A Llama of SmolLM2-135M's shape, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def steer_and_save(model: NNsight, ids: torch.Tensor, vector: torch.Tensor) -> list[torch.Tensor]:
    """One steering write in the middle, one save of the last position a layer."""
    layers = model.model.layers
    with torch.no_grad(), model.trace(ids, use_cache=False):
        saved = nnsight_fx.save([])
        for i, layer in enumerate(layers):
            if i == len(layers) // 2:
                layer.output = layer.output + vector
            saved.append(layer.output[:, -1])
        saved.append(model.lm_head.output)
    return saved


def program(model: NNsight) -> Callable[..., list[torch.Tensor]]:
    """The same, recorded once."""

    def body(_: Any, vector: torch.Tensor) -> list:
        layers, saved = model.model.layers, []
        for i, layer in enumerate(layers):
            if i == len(layers) // 2:
                layer.output = layer.output + vector
            saved.append(layer.output[:, -1])
        return [*saved, model.lm_head.output]

    made = model.program(body)
    return torch.no_grad()(lambda ids, vector: made({"input_ids": ids, "use_cache": False}, vector))


def interleaved(functions: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """The median seconds of each function, called in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def measure(layers: int, rows: int, tokens: int, runs: int, backend: str = "inductor") -> dict[str, Any]:
    """First calls and medians of ours and of the plain compiled model."""
    module = smollm2(layers)
    ids, vector = torch.randint(0, 49152, (rows, tokens)), torch.randn(576)
    model = NNsight(module)
    model.compile(backend=backend)
    plain = torch.compile(module, backend=backend)

    def bare() -> None:
        with torch.no_grad():
            plain(input_ids=ids, use_cache=False)

    def ours() -> None:
        steer_and_save(model, ids, vector)

    recorded = program(model)
    ways = {"ours": ours, "ours, model.program": lambda: recorded(ids, vector), "torch.compile": bare}
    first = {}
    for name, function in ways.items():
        start = time.perf_counter()
        function()
        first[name] = time.perf_counter() - start
        function()
    medians = interleaved(ways, runs)
    return {
        "workload": f"steer + {layers} last-position saves, {layers} layers of SmolLM2's shape, {rows} x {tokens} tokens",
        "grad": "no_grad, parameters frozen",
        "backend": backend,
        "first_call_s": first,
        "median_s": medians,
        "ratio": medians["ours"] / medians["torch.compile"],
        "ratio_program": medians["ours, model.program"] / medians["torch.compile"],
        "compiles": model.explain().to_dict()["captures"][0]["compiles"],
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "hardware": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 30, "rows": 1, "tokens": 14, "runs": 40}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = measure(args.layers, args.rows, args.tokens, args.runs, args.backend)
    print(json.dumps(found, indent=2))
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    ours, plain = (found["median_s"][n] * 1e3 for n in ("ours", "torch.compile"))
    print(
        f"{found['workload']}: ours {ours:.1f} ms, plain torch.compile {plain:.1f} ms, ratio {found['ratio']:.3f}, program {found['ratio_program']:.3f}"
    )


if __name__ == "__main__":
    main()
