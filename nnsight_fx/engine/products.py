"""Matrix products of few rows on CPUs where oneDNN does them faster than MKL, by which torch does all of float32."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch._inductor.custom_graph_pass import CustomGraphPass

ROWS = 64  # up to which reading the weight is what a product costs, or much of it
LARGE = 2**19  # elements of a weight from which oneDNN is ahead: 2 MiB
TURNED = 2**18  # the same in a backward, whose weight lies the other way round

_library = torch.library.Library("nnsight_fx", "DEF")
_library.define("few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


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
    """What Inductor does to a graph at last: products of few rows with a large weight are oneDNN's.

    ```
    t = permute(w, [1, 0])
    y = addmm(b, x, t)            ->     y = few_rows(x, w, b)
    g = mm(d, w)                         t = permute(w, [1, 0]);  g = few_rows(d, t, None)
    ```

    Sums may be rounded differently. Does not fire for other types than float32, for more than `ROWS` rows or a weight of fewer
    than `LARGE` elements (`TURNED` in a backward).
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
        return "nnsight_fx.few_rows", ROWS, LARGE, TURNED


def _replace(graph: fx.Graph, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
    rows, value = x.meta["val"].shape[0], weight.meta["val"]
    rows = rows if isinstance(rows, int) else rows.node.hint
    if rows is None or rows > ROWS or value.dtype != torch.float32 or value.device.type != "cpu":
        return
    large = LARGE if weight.target in (torch.ops.aten.permute.default, torch.ops.aten.t.default) else TURNED
    if any(not isinstance(n, int) for n in value.shape) or value.numel() < large:
        return
    with graph.inserting_before(node):
        turned = graph.call_function(torch.ops.aten.permute.default, (weight, [1, 0]))
        turned.meta["val"] = torch.ops.aten.permute.default(value, [1, 0])
        node.target, node.args = few_rows, (x, turned, bias)
