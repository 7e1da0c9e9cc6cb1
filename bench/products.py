"""Products of few rows with a weight, as Inductor does them: MKL's, oneDNN's and those of `engine/products`, forward and back.

    python -m bench.products [--rounds 9] [--runs 30] [--out bench/results/products.json]

Float32. Each call takes another of so many weights that they do not stay in the caches, as a model's do not. In a round
all have their turn, the call of a compiled function included.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from nnsight_fx.engine.captured.products import FewRows, worthwhile

from .measure import arguments, interleaved, medians, ratios, write

WEIGHTS = (
    (192, 576),
    (576, 576),
    (1536, 576),
    (576, 1536),
    (768, 768),
    (3072, 768),
    (2048, 2048),
    (49152, 576),
)  # (out, in)
ROWS = (1, 2, 14, 64)
APART = 256 * 2**20  # bytes of weights a shape


def calls(rows: int, out: int, inner: int, back: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """One product by each, of `x @ w.T`, or `g @ w` in a backward."""
    torch.compiler.reset()
    some = [torch.randn(out, inner) for _ in range(max(2, APART // (4 * out * inner)))]
    x = torch.randn(rows, out if back else inner)

    def over(
        product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], **options: Any
    ) -> Callable[[], torch.Tensor]:
        weights = itertools.cycle(some)
        compiled = torch.compile(product, dynamic=False, options=options)
        return lambda: compiled(x, next(weights))

    def plain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, w if back else w.t())

    def onednn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.ops.nnsight_fx.linear(x, w.t() if back else w, None)

    found = {"MKL": over(plain), "oneDNN": over(onednn), "ours": over(plain, post_grad_custom_post_pass=FewRows())}
    for call in found.values():
        call()
    return found


def main() -> None:
    parser = arguments(__doc__, "products", rounds=9, runs=30)
    parser.add_argument("--weights", type=int, default=len(WEIGHTS), help="the first so many of them")
    args = parser.parse_args()
    measured: list[dict[str, Any]] = []
    with torch.no_grad():
        for (out, inner), back, rows in itertools.product(WEIGHTS[: args.weights], (False, True), ROWS):
            seconds = interleaved(calls(rows, out, inner, back), args.rounds, args.runs)
            found = {"us": medians(seconds, 1e6), "ratio": ratios(seconds)}
            measured.append({"weight": [out, inner], "backward": back, "rows": rows, **found})
    write({"used_here": worthwhile(), "products": measured}, args.out)


if __name__ == "__main__":
    main()
