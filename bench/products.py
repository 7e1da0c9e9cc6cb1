"""Products of few rows with a weight: MKL's, oneDNN's and those of `engine/products`, forward and back.

    python -m bench.products [--rounds 9] [--runs 30] [--out bench/results/products.json]

Float32. Each call takes another of so many weights that they do not stay in the caches, as a model's do not. Seconds are the median
over rounds in which all have their turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from nnsight_fx.engine.products import few_rows, worthwhile

from .measure import arguments, interleaved, setting, write

WEIGHTS = ((576, 576), (1536, 576), (576, 1536), (768, 768), (3072, 768), (2048, 2048), (49152, 576))  # (out, in)
ROWS = (1, 2, 14, 64)
APART = 256 * 2**20  # bytes of weights a shape


def calls(rows: int, out: int, inner: int, back: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """One product by each, of `x @ w.T`, or `g @ w` in a backward."""
    some = [torch.randn(out, inner) for _ in range(max(2, APART // (4 * out * inner)))]
    x = torch.randn(rows, out if back else inner)
    turned = (lambda w: w.t()) if back else (lambda w: w)

    def over(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[], torch.Tensor]:
        weights = itertools.cycle(some)
        return lambda: product(x, turned(next(weights)))

    return {
        "MKL": over(lambda x, w: torch.mm(x, w.t())),
        "oneDNN": over(lambda x, w: torch.ops.mkldnn._linear_pointwise.default(x, w, None, "none", [], "")),
        "few_rows": over(lambda x, w: few_rows(x, w, None)),
    }


def main() -> None:
    args = arguments(__doc__, "products", rounds=9, runs=30).parse_args()
    measured: list[dict[str, Any]] = []
    with torch.no_grad():
        for (out, inner), back, rows in itertools.product(WEIGHTS, (False, True), ROWS):
            us = {who: s * 1e6 for who, s in interleaved(calls(rows, out, inner, back), args.rounds, args.runs).items()}
            ratio = {who: us["few_rows"] / us[who] for who in ("MKL", "oneDNN")}
            measured.append({"weight": [out, inner], "backward": back, "rows": rows, "us": us, "ratio": ratio})
    write({**setting(), "used_here": worthwhile(), "products": measured}, args.out)


if __name__ == "__main__":
    main()
