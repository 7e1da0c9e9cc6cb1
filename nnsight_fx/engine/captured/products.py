"""Matrix products of few rows on CPUs where MKL, by which torch does all of float32, is slow with a large weight."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import cast

import torch
import torch.fx as fx

from ...compat import inductor
from ...compat.graphs import make_fx

# Up to how many rows, and from how many elements of a weight, it pays (`bench/products.py`).
IN_BLOCKS = 64, 2**16
BY_ONEDNN = 32, 2**18
# Rows of the weight that can be one product in `few_rows`: heads are as wide, so that views of the result stay simple.
BLOCK = 128, 64, 32

_library = torch.library.Library("nnsight_fx", "DEF")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_by_onednn = torch.ops.nnsight_fx.linear.default  # any layout of the weight; Inductor's own wants a constant


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_library.impl("linear", _linear, "CPU")
torch.library.register_fake("nnsight_fx::linear", _shape, lib=_library)


_lowered = torch.backends.mkldnn.is_available() and inductor.lowering(
    _by_onednn, torch.ops.mkldnn._linear_pointwise.default
)


def few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`, by MKL for many blocks of a weight at once, which it does not copy first; by oneDNN where there are none."""
    rows, inner = weight.shape
    block = _block_of(weight)
    if block is None:
        return _by_onednn(x, weight, bias)
    blocks = weight.view(-1, block, inner).permute(0, 2, 1)
    y = torch.bmm(x.expand(len(blocks), -1, -1), blocks).permute(1, 0, 2).reshape(-1, rows)
    return y if bias is None else y + bias


def _block_of(weight: torch.Tensor) -> int | None:
    return _block(len(weight), torch.get_num_threads()) if weight.is_contiguous() else None


@functools.cache
def _block(rows: int, threads: int) -> int | None:
    """Into blocks of how many rows a weight divides such that no thread is without one, and none has much more than others."""
    fit = [n for n in BLOCK if rows % n == 0 and rows // n >= threads]
    return min(fit, key=lambda n: -(rows // n // -threads) * n, default=None)


@functools.cache
def worthwhile() -> bool:
    """Is torch's float32 product MKL's on an AMD CPU, where MKL does not do its best?"""
    here = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and _vendor() == "AuthenticAMD"
    return bool(here and _lowered and inductor.graph_pass() is not object)


def _vendor() -> str:
    """The CPU's maker as it says itself; empty where nothing says so."""
    told = Path("/proc/cpuinfo")
    if not told.exists():
        return next((v for v in ("AuthenticAMD", "GenuineIntel") if v in platform.processor()), "")
    with told.open() as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def chosen(options: dict) -> dict:
    """Inductor's options, with the pass below where it pays; what the user has put in its place (`None`, say) stays."""
    return {"post_grad_custom_post_pass": FewRows(), **options} if worthwhile() else options


class FewRows(inductor.graph_pass()):  # type: ignore[misc]
    """What Inductor does to a graph at last: products of few rows with a large weight are `few_rows`'s.

    ```
    t = permute(w, [1, 0])                w' = permute(view(w, [b, n, k]), [0, 2, 1])
    y = addmm(b, x, t)            ->      y = view(permute(bmm(expand(x, [b, -1, -1]), w'), [1, 0, 2]), [-1, b * n]) + b
    g = mm(d, w)                          g = linear(d, permute(w, [1, 0]), None)        # oneDNN's
    ```

    Sums may be rounded differently. Does not fire for other types than float32, nor for more rows or smaller weights than
    `IN_BLOCKS` and `BY_ONEDNN` say.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.target is torch.ops.aten.mm.default:
                x, weight = node.args
                _replace(graph, node, x, weight, None)
            elif node.target is torch.ops.aten.addmm.default and not node.kwargs:
                bias, x, weight = node.args
                if bias.meta["val"].dim() == 1:
                    _replace(graph, node, x, weight, bias)

    def uuid(self) -> tuple:
        return "nnsight_fx.few_rows", IN_BLOCKS, BY_ONEDNN, torch.get_num_threads()


def _replace(graph: fx.Graph, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
    rows, value = x.meta["val"].shape[0], weight.meta["val"]
    rows = rows if isinstance(rows, int) else rows.node.hint
    if rows is None or value.dtype != torch.float32 or value.device.type != "cpu":
        return
    if any(not isinstance(n, int) for n in value.shape):
        return
    most, least = BY_ONEDNN if _block_of(value.permute(1, 0)) is None else IN_BLOCKS
    if rows > most or value.numel() < least:
        return
    given = [n for n in (x, weight, bias) if n is not None]
    traced = make_fx(lambda x, weight, *bias: few_rows(x, weight.permute(1, 0), *bias))(*(n.meta["val"] for n in given))
    with graph.inserting_before(node):
        inputs = traced.graph.find_nodes(op="placeholder")
        y = graph.graph_copy(traced.graph, dict(zip(inputs, given, strict=True)))
    node.replace_all_uses_with(cast(fx.Node, y))
    graph.erase_node(node)
