"""Matrix products of few rows on CPUs where MKL, by which torch does all of float32, is slow with a large weight."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch._inductor.custom_graph_pass import CustomGraphPass

ROWS = 64  # up to which reading the weight is what a product costs, or much of it
LARGE = 2**18  # elements of a weight from which this pays: 1 MiB
BLOCK = range(128, 31, -1)  # rows of the weight that can be one product in `_few_rows`, the most first

_library = torch.library.Library("nnsight_fx", "DEF")
_library.define("few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear`, by MKL for many blocks of a weight at once, which it does not copy first; by oneDNN where there are none."""
    block = _block(len(weight), torch.get_num_threads()) if weight.is_contiguous() else None
    if block is None:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    blocks = weight.view(-1, block, weight.shape[1]).transpose(1, 2)
    y = torch.bmm(x.expand(len(blocks), *x.shape), blocks).transpose(0, 1).reshape(len(x), len(weight))
    return y if bias is None else y.add_(bias)


@functools.cache
def _block(rows: int, threads: int) -> int | None:
    """Into blocks of how many rows a weight divides such that no thread is without one."""
    return next((n for n in BLOCK if rows % n == 0 and rows // n >= threads), None)


def _shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_library.impl("few_rows", _few_rows, "CPU")
torch.library.register_fake("nnsight_fx::few_rows", _shape, lib=_library)
few_rows = torch.ops.nnsight_fx.few_rows.default


@functools.cache
def worthwhile() -> bool:
    """Is torch's float32 product MKL's on an AMD CPU, where MKL does not do its best?"""
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and _vendor() == "AuthenticAMD"


def _vendor() -> str:
    """The CPU's maker as it says itself; empty where nothing says so."""
    told = Path("/proc/cpuinfo")
    if not told.exists():
        return next((v for v in ("AuthenticAMD", "GenuineIntel") if v in platform.processor()), "")
    with told.open() as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def chosen(options: dict[str, Any]) -> dict[str, Any]:
    """Inductor's options, with the pass below where it pays; what the user has put in its place (`None`, say) stays."""
    return {"post_grad_custom_post_pass": FewRows(), **options} if worthwhile() else options


class FewRows(CustomGraphPass):
    """What Inductor does to a graph at last: products of few rows with a large weight are `few_rows`.

    ```
    t = permute(w, [1, 0])
    y = addmm(b, x, t)            ->     y = few_rows(x, w, b)
    g = mm(d, w)                         t = permute(w, [1, 0]);  g = few_rows(d, t, None)
    ```

    Sums may be rounded differently. Does not fire for other types than float32, for more than `ROWS` rows or a weight of fewer
    than `LARGE` elements.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.target is torch.ops.aten.mm.default:
                x, weight = node.args
                _replace(graph, node, x, weight, None)
            elif node.target is torch.ops.aten.addmm.default and not node.kwargs:
                bias, x, weight = node.args
                if bias.meta["val"].dim() == 1:
                    _replace(graph, node, x, weight, bias)

    def uuid(self) -> Any:
        return "nnsight_fx.few_rows", ROWS, LARGE


def _replace(graph: fx.Graph, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
    rows, value = x.meta["val"].shape[0], weight.meta["val"]
    rows = rows if isinstance(rows, int) else rows.node.hint
    if rows is None or rows > ROWS or value.dtype != torch.float32 or value.device.type != "cpu":
        return
    if any(not isinstance(n, int) for n in value.shape) or value.numel() < LARGE:
        return
    with graph.inserting_before(node):
        turned = graph.call_function(torch.ops.aten.permute.default, (weight, [1, 0]))
        turned.meta["val"] = torch.ops.aten.permute.default(value, [1, 0])
        node.target, node.args = few_rows, (x, turned, bias)
