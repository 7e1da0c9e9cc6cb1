"""Activations of a data set to disk: `model.harvest`, compiled and on hooks, against loops over the same batches.

    python -m bench.harvest [--prompts 256] [--layers 30] [--rounds 3] [--out bench/results/harvest.json]

Prompts of 16 to 64 tokens on a model of SmolLM2's shape; the output of the middle layer at every token, float32, written to files.
`harvest` batches as it does by default. The loops (raw hooks, nnsight 0.8.1) get prompts sorted by length in batches of 4096
padded tokens, and the raw hooks in batches of the size that `harvest` chose as well; they write each with `torch.save`. All
of them stop behind the middle layer. `--shortest 64 --longest 512 --out ...` has longer ones.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nnsight_fx import LanguageModel
from nnsight_fx.harvest.harvest import CACHED

from .measure import arguments, interleaved, medians, ratios, timed, write
from .models import MODELS
from .peers import BEGIN, Bench, Peer

TOKENS = 4096  # a batch

PEER = f"""
{BEGIN}
def call():
    with torch.no_grad():
        for i, (ids, mask) in enumerate(batches):
            with model.trace(input_ids=ids, attention_mask=mask, use_cache=False) as tracer:
                h = blocks[len(blocks) // 2].output.save()
                tracer.stop()
            torch.save(h[mask.bool()], folder + f"/{{i}}.pt")
    return [torch.load(folder + "/0.pt")]
if values:
    out["values"] = call()
else:
    start = time.perf_counter()
    call()
    out["seconds"] = time.perf_counter() - start
"""


def batched(prompts: list[torch.Tensor], tokens: int = TOKENS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and mask of batches of so many padded tokens, by length."""
    left, found = sorted(prompts, key=len, reverse=True), []
    while left:
        rows = max(1, tokens // len(left[0]))
        part, left = left[:rows], left[rows:]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in part], batch_first=True)
        found.append((ids, mask))
    return found


class Enough(Exception):
    """Ends a forward of the raw hooks' loop."""


def by_hooks(module: Any, block: Any, batches: list, folder: Path) -> None:
    kept: list = []

    def keep(_: Any, __: Any, out: Any) -> None:
        kept.append(out[0] if isinstance(out, tuple) else out)
        raise Enough

    handle = block.register_forward_hook(keep)
    try:
        for i, (ids, mask) in enumerate(batches):
            with contextlib.suppress(Enough):
                module(input_ids=ids, attention_mask=mask, use_cache=False)
            torch.save(kept.pop()[mask.bool()], folder / f"{i}.pt")
    finally:
        handle.remove()


def measure(prompts: int, layers: int, rounds: int, shortest: int, longest: int) -> dict[str, Any]:
    shape = MODELS["smollm2"]
    module = shape.build(layers)
    lengths = torch.randint(shortest, longest + 1, (prompts,)).tolist()
    data = [torch.randint(0, shape.config["vocab_size"], (n,)) for n in lengths]
    batches, small, site = batched(data), batched(data, CACHED), f"{shape.blocks}.{layers // 2}"
    hooks, compiled = LanguageModel(module), LanguageModel(module)
    compiled.compile()
    with tempfile.TemporaryDirectory() as root:
        bench, count = Bench(shape, module, Path(root)), iter(range(10**6))

        def ours(model: LanguageModel) -> Any:
            return model.harvest(
                [ids.tolist() for ids in data],
                site,
                out=Path(root) / f"harvest-{next(count)}",
                progress=False,
            )

        given = {"cls": shape.cls.__name__, "config": {**shape.config, "num_hidden_layers": layers}}
        given |= {
            "weights": str(bench.weights),
            "blocks_path": shape.blocks,
            "norm_path": shape.norm,
            "generates": False,
        }
        peer = Peer(PEER, {**given, "batches": [list(b) for b in batches], "folder": root})
        peer.values()
        calls: dict[str, Callable] = {
            "ours": lambda: ours(compiled),
            "ours, hooks": lambda: ours(hooks),
            "raw hooks": torch.no_grad()(
                lambda: by_hooks(module, bench.parts.blocks[layers // 2], batches, Path(root))
            ),
            "raw hooks, small batches": torch.no_grad()(
                lambda: by_hooks(module, bench.parts.blocks[layers // 2], small, Path(root))
            ),
            "nnsight 0.8.1": peer.timed(1),
        }
        found, first = timed(calls["ours"])
        ours(hooks)
        largest = float((found[site][0:64] - ours(hooks)[site][0:64]).abs().max())
        seconds = interleaved(calls, rounds)
    tokens = sum(lengths)
    return {
        "workload": f"{prompts} prompts of {shortest} to {longest} tokens, {tokens} in all, the middle one of {layers} layers of SmolLM2's shape",
        "grad": "no_grad, parameters frozen",
        "first_s": first,
        "median_s": medians(seconds),
        "tokens_a_second": {who: tokens / s for who, s in medians(seconds).items()},
        "ratio": ratios(seconds),
        "largest_difference": largest,
    }


def main() -> None:
    args = arguments(__doc__, "harvest", prompts=256, layers=30, rounds=3, shortest=16, longest=64).parse_args()
    write(measure(args.prompts, args.layers, args.rounds, args.shortest, args.longest), args.out)


if __name__ == "__main__":
    main()
