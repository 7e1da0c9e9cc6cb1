"""Every workload on every engine and peer, in turn, in one run: times, ratios, and how far the values are apart.

    python -m bench.suite [--models smollm2 gpt2] [--workloads steer ...] [--rounds 5] [--runs 2] [--layers 30] [--out FILE]

`bench/workloads.py` says what each workload is and `bench/peers.py` who runs it. Parameters are frozen everywhere; `no_grad`, but
for the gradients. A round has everybody's mean of `--runs`, in turn; a ratio is over the pairs of the rounds. First calls have Inductor's caches as they were.
The first model has all shapes of a workload, the others its first.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from .measure import Told, arguments, interleaved, medians, ratios, timed, write
from .models import MODELS
from .peers import THEIRS, Bench
from .tables import ALL_LOGITS
from .workloads import WORKLOADS, Shape, Workload


def row(bench: Bench, workload: Workload, shape: Shape, rounds: int, runs: int, peers: bool = True) -> dict[str, Any]:
    """One workload at one shape."""
    torch.compiler.reset()
    ids = bench.model.ids(*shape)
    vector = torch.randn(bench.model.width, device=bench.model.device, dtype=bench.model.dtype)
    calls, first, values = bench.calls(workload, ids, vector), {}, {}
    for who, call in calls.items():
        values[who], first[who] = timed(call)
        timed(call, 2)
    timers: dict[str, Any] = dict(calls)
    for who in THEIRS if peers else ():
        if (peer := bench.peer(who, workload, ids, vector)) is not None:
            values[who], first[who] = timed(peer.values)
            timers[who] = peer.timed(runs)
    for call in calls.values():
        call()  # transformers hooks all blocks for good when first asked for hidden states: who came before captures anew
    seconds = interleaved(timers, rounds, runs)
    others = {who: s for who, s in seconds.items() if not who.startswith("ours, ") or who == ALL_LOGITS}
    want = values["raw hooks"]
    return {
        "model": bench.model.name,
        "layers": len(bench.parts.blocks),
        "workload": workload.name,
        "what": workload.what,
        "tokens": list(shape),
        "grad": "parameters frozen; " + ("grad" if workload.grad else "no_grad"),
        "median_s": medians(seconds),
        "first_call_s": {who: s for who, s in first.items() if not isinstance(timers[who], Told)},
        "ratio": ratios(seconds),
        "ratio_all_logits": ratios(others, ALL_LOGITS) if ALL_LOGITS in others else {},
        "largest_difference": {
            who: max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(got, want, strict=True))
            for who, got in values.items()
            if who not in ("eager", "raw hooks") and not who.startswith("torch.compile")
        },
    }


def main() -> None:
    parser = arguments(__doc__, "suite", rounds=5, runs=2)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["smollm2", "gpt2"])
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--layers", type=int, nargs="+", help="other numbers of layers, for the cost against layers")
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            for layers in args.layers or [MODELS[name].layers]:
                bench = Bench(MODELS[name], MODELS[name].build(layers), Path(folder))
                full = name == args.models[0] and not args.layers
                for workload in (WORKLOADS[w] for w in args.workloads):
                    for shape in workload.shapes if full else workload.shapes[:1]:
                        rows.append(row(bench, workload, shape, args.rounds, args.runs, not args.no_peers))
                        print(rows[-1], flush=True)
    write({"rows": rows}, args.out)


if __name__ == "__main__":
    main()
