"""Where the rows of a batch are after one operation: a table by its name, `None` where rows could meet."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ..plan import tree

Dims: TypeAlias = int | tuple | None  # where the rows are in the result, or in each of several

FILLS = {"zeros", "ones", "full", "empty", "scalar_tensor", "new_zeros", "new_ones", "new_full", "new_empty"}
SAME = {
    *("clone", "detach", "alias", "_to_copy", "to", "contiguous", "lift_fresh", "zeros_like", "ones_like", "full_like"),
    *("empty_like", "fill_", "zero_", "fill", "lift_fresh_copy", "_conj", "view_as_real", "rsub", "masked_fill"),
}
ALONG = {  # keep the shape; work along `dim`
    *("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "cumsum", "cumprod", "sort", "argsort"),
    *("topk", "logcumsumexp", "flip", "roll", "glu", "index_select"),
}
REDUCES = {
    *("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod", "any", "all", "argmax", "argmin"),
    *("max", "min", "logsumexp", "linalg_vector_norm", "norm", "median", "count_nonzero"),
}
IMAGES = {
    *(
        "convolution",
        "max_pool2d_with_indices",
        "avg_pool2d",
        "_adaptive_avg_pool2d",
        "adaptive_avg_pool2d",
        "max_pool2d",
    ),
    *(
        "native_group_norm",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "mkldnn_convolution",
        "avg_pool1d",
        "pixel_shuffle",
    ),
    *(
        "_native_batch_norm_legit_no_training",
        "cudnn_batch_norm",
        "native_batch_norm",
        "conv2d",
        "conv1d",
        "avg_pool3d",
    ),
}


def tensors(value: object) -> list[torch.Tensor]:
    """The tensors in arguments or a result."""
    return [x for x in tree.flatten([value])[0] if isinstance(x, torch.Tensor)]


class AtenCall:
    """One operation with what is known of its arguments."""

    def __init__(self, rows: Any, func: Callable, args: tuple, kwargs: dict):
        self.known, self.func, self.args, self.kwargs = rows, func, args, kwargs
        self.name = func._schema.name.split("::")[1]
        schema = func._schema.arguments
        self.given = {a.name: a.default_value for a in schema} | dict(zip([a.name for a in schema], args, strict=False))
        self.given |= kwargs
        if self.name.endswith("_") and self.name not in SAME:
            self.name = self.name.rstrip("_")
        self.tensors = tensors([args, kwargs])
        self.batched = [x for x in self.tensors if rows.dim(x) is not None]
        self.first = self.tensors[0] if self.tensors else None
        self.d = rows.dim(self.first) if self.batched else None

    def writes_shared(self) -> bool:
        """Is something without rows changed in place with rows?"""
        for argument in self.func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tensors(self.given.get(argument.name)):
                    if self.known.dim(x) is None and self.batched:
                        return True
        return False

    def only_first(self) -> bool:
        return self.d is not None and len(self.batched) == 1

    def axis(self, value: int, size: int | None = None) -> int:
        n = self.first.dim() if size is None else size  # type: ignore[union-attr]
        return value + n if value < 0 else value


# -- the rules: the dimension of the results, or None where rows meet ---------------------------------------------------


def pointwise(call: AtenCall, found: list) -> tuple | None:
    at = {call.known.dim(x) - x.dim() for x in call.batched}  # counted from the right, as broadcasting does
    if len(at) != 1:
        return None
    (at,) = at
    for x in call.tensors:
        if call.known.dim(x) is None and x.dim() >= -at and x.shape[at] != 1:
            return None
    return tuple(at + x.dim() for x in found)


def _same(call: AtenCall, found: list) -> Dims:
    return call.d if len(call.tensors) == 1 else pointwise(call, found)


def _along(call: AtenCall, found: list) -> Dims:
    dims = call.given.get("dim", call.given.get("dims", -1))
    dims = [-1] if dims is None else dims if isinstance(dims, list | tuple) else [dims]
    if not dims:  # of all of it, flattened
        return None
    return call.d if call.only_first() and call.d not in [call.axis(d) for d in dims] else None


def _reduces(call: AtenCall, found: list) -> Dims:
    dims = call.given.get("dim")
    if dims is None or dims == [] or not call.only_first() or call.d is None:
        return None
    gone = {call.axis(d) for d in (dims if isinstance(dims, list | tuple) else [dims])}
    if call.d in gone:
        return None
    return call.d if call.given.get("keepdim") else call.d - sum(d < call.d for d in gone)


def _view(call: AtenCall, found: list) -> int | None:
    before, after = call.first.shape, found[0].shape  # type: ignore[union-attr]
    ahead = math.prod(before[: call.d])
    for e in range(len(after)):
        if math.prod(after[:e]) == ahead and after[e] % call.known.rows == 0:
            return e
    return None


def _expand(call: AtenCall, found: list) -> Dims:
    return call.d + found[0].dim() - call.first.dim()  # type: ignore[union-attr, operator]


def _repeat(call: AtenCall, found: list) -> Dims:
    d = _expand(call, found)
    return d if call.given["repeats"][d] == 1 else None


def _permute(call: AtenCall, found: list) -> int:
    return next(i for i, d in enumerate(call.given["dims"]) if call.axis(d) == call.d)


def _transpose(call: AtenCall, found: list) -> Dims:
    if call.name == "t":
        return 1 - call.d if call.first.dim() == 2 else call.d  # type: ignore[union-attr, operator]
    a, b = call.axis(call.given["dim0"]), call.axis(call.given["dim1"])
    return {a: b, b: a}.get(call.d, call.d)  # type: ignore[arg-type]


def _unsqueeze(call: AtenCall, found: list) -> Dims:
    at = call.axis(call.given["dim"], call.first.dim() + 1)  # type: ignore[union-attr]
    return call.d + (at <= call.d)  # type: ignore[operator]


def _squeeze(call: AtenCall, found: list) -> Dims:
    dims = call.given.get("dim")
    shape = call.first.shape  # type: ignore[union-attr]
    dims = range(len(shape)) if dims is None else dims if isinstance(dims, list | tuple) else [dims]
    gone = {call.axis(d) for d in dims if shape[d] == 1}
    return None if call.d in gone else call.d - sum(d < call.d for d in gone)  # type: ignore[operator]


def _select(call: AtenCall, found: list) -> Dims:
    at = call.axis(call.given["dim"])
    return None if at == call.d or not call.only_first() else call.d - (at < call.d)  # type: ignore[operator]


def _slice(call: AtenCall, found: list) -> Dims:
    whole = found[0].shape == call.first.shape  # type: ignore[union-attr]
    return call.d if call.only_first() and (whole or call.axis(call.given.get("dim", 0)) != call.d) else None


def _split(call: AtenCall, found: list) -> Dims:
    at = call.axis(call.given.get("dim", 0))
    if at == call.d:
        return None
    return call.d - (call.name == "unbind" and at < call.d)  # type: ignore[operator]


def _cat(call: AtenCall, found: list) -> Dims:
    full = [x for x in call.tensors if x.numel()]  # the first keys of a cache stand behind an empty tensor
    dims = {call.known.dim(x) for x in full}
    if len(dims) != 1 or None in dims:
        return None
    (d,) = dims
    if call.name == "cat" and len(full) == 1:
        return d
    at = call.axis(call.given.get("dim", 0), found[0].dim())
    return d + (at <= d) if call.name == "stack" else d if at != d else None  # type: ignore[operator]


def _mm(call: AtenCall, found: list) -> int | None:
    *bias, a, b = call.tensors
    if any(call.known.dim(x) is not None or (x.dim() > 1 and x.shape[0] != 1) for x in bias):
        return None
    da, db = call.known.dim(a), call.known.dim(b)
    return 0 if (da, db) == (0, None) else 1 if (da, db) == (None, 1) and not bias else None


def _bmm(call: AtenCall, found: list) -> int | None:
    return 0 if {call.known.dim(x) for x in call.tensors} == {0} else None


def _linear(call: AtenCall, found: list) -> Dims:
    return call.d if call.only_first() and call.d < call.first.dim() - 1 else None  # type: ignore[union-attr, operator]


def _layer_norm(call: AtenCall, found: list) -> Dims:
    kept = call.first.dim() - len(call.given["normalized_shape"])  # type: ignore[union-attr]
    return call.d if call.only_first() and call.d < kept else None  # type: ignore[operator]


def _embedding(call: AtenCall, found: list) -> Dims:
    indices = call.given["indices"]
    return call.known.dim(indices) if len(call.batched) == 1 and call.batched[0] is indices else None


def _index(call: AtenCall, found: list) -> Dims:
    """`x[i, j]`: the rows of `x` stay, or are chosen by their own numbers, or those of `i` and `j` choose from what all share."""
    x, indices = call.given["self"], call.given["indices"]
    used = [at for at, i in enumerate(indices) if i is not None]
    d, known = call.known.dim(x), call.known
    places = {at - indices[i].dim() for i in used if (at := known.dim(indices[i])) is not None}
    if not places:
        return d if d is not None and d < used[0] else None
    place = places.pop()
    others = [indices[i] for i in used if known.dim(indices[i]) is None]
    if places or any(i.dim() >= -place and i.shape[place] != 1 for i in others):
        return None
    own = [i for i in used if indices[i] in known.numbers]
    if own != ([] if d is None else [d]):
        return None
    contiguous = used == list(range(used[0], used[-1] + 1))
    return (used[0] if contiguous else 0) + max(indices[i].dim() for i in used) + place


def _gather(call: AtenCall, found: list) -> Dims:
    dims = {call.known.dim(x) for x in call.tensors}
    return call.d if dims == {call.d} and call.axis(call.given["dim"]) != call.d else None


def _places(call: AtenCall, found: list) -> Dims:
    """`x.index_copy(dim, i, y)`: the rows of both stay where the places are not among them."""
    d, index = call.d, call.given["index"]
    apart = d is not None and d == call.known.dim(call.given["source"]) and call.known.dim(index) is None
    return d if apart and call.axis(call.given["dim"]) != d else None


def _pad(call: AtenCall, found: list) -> Dims:
    touched = [call.first.dim() - 1 - i // 2 for i, n in enumerate(call.given["pad"]) if n]  # type: ignore[union-attr]
    return call.d if call.d not in touched else None


def _triangle(call: AtenCall, found: list) -> Dims:
    return call.d if call.d < call.first.dim() - 2 else None  # type: ignore[union-attr, operator]


def _attention(call: AtenCall, found: list) -> tuple[int | None, ...] | None:
    q, k, v, *rest = call.tensors
    if {call.known.dim(x) for x in (q, k, v)} != {0}:
        return None
    for mask in rest:
        if call.known.dim(mask) is None and mask.dim() == q.dim() and mask.shape[0] != 1:
            return None
        if call.known.dim(mask) not in (None, 0):
            return None
    return tuple(0 if x.dim() > 1 and x.shape[0] % call.known.rows == 0 else None for x in found)


def _image(call: AtenCall, found: list) -> tuple[int | None, ...] | None:
    if not call.only_first() or call.d != 0 or call.given.get("training") or call.given.get("transposed"):
        return None
    return tuple(0 if x.dim() and x.shape[0] == call.known.rows else None for x in found)


def _table() -> dict[str, Callable]:
    table: dict[str, Callable] = dict.fromkeys(SAME, _same) | dict.fromkeys(ALONG, _along)
    table |= dict.fromkeys(REDUCES, _reduces) | dict.fromkeys(IMAGES, _image)
    table |= dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _view)
    table |= dict.fromkeys(("transpose", "t", "swapaxes"), _transpose)
    table |= dict.fromkeys(("slice", "narrow"), _slice)
    table |= dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "tensor_split"), _split)
    table |= dict.fromkeys(("cat", "stack"), _cat) | dict.fromkeys(("mm", "addmm"), _mm)
    table |= dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), _layer_norm)
    table |= dict.fromkeys(("index", "_unsafe_index"), _index) | dict.fromkeys(("tril", "triu"), _triangle)
    attention = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention", "math")
    table |= {f"_scaled_dot_product_{name}": _attention for name in attention}
    return table | {
        "_scaled_dot_product_attention_math": _attention,
        "scaled_dot_product_attention": _attention,
        "expand": _expand,
        "repeat": _repeat,
        "permute": _permute,
        "unsqueeze": _unsqueeze,
        "squeeze": _squeeze,
        "select": _select,
        "bmm": _bmm,
        "linear": _linear,
        "embedding": _embedding,
        "gather": _gather,
        "index_copy": _places,
        "constant_pad_nd": _pad,
    }


RULES = _table()
