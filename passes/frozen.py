"""Parts of a model that are constants in its derivative: attention patterns, norms' denominators, gates.

One function mode for both engines: it is on while the model runs on hooks, and while `linearize` walks through a captured
graph. So what is frozen cannot differ between them. It goes by what flows where, not by names of modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

PARTS = {  # what each part is, as an error names it
    "attention": "a softmax whose result multiplies values (`matmul`, `bmm`, `einsum`), or `scaled_dot_product_attention`",
    "norms": "`layer_norm`, `rms_norm`, or a mean of squares, a variance or a norm that values are divided by",
    "gates": "the activation of one projection times another projection of the same shape, or `glu`",
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


KEEPS = _names(
    "dropout to type type_as float half bfloat16 double contiguous clone view reshape expand expand_as squeeze unsqueeze "
    "transpose permute swapaxes flatten unflatten nan_to_num masked_fill getitem slice narrow"
)
PRODUCTS = _names("matmul rmatmul bmm baddbmm mm addmm einsum linear conv1d grouped_mm")
MIXES = _names("matmul rmatmul bmm baddbmm mm einsum")
PIECES = _names("chunk split tensor_split unbind getitem narrow select")
SUMS = _names("mean var")
ROOTS = _names("sqrt rsqrt pow")
WIDTHS = _names("std norm vector_norm")
ARITHMETIC = _names(
    "add radd iadd sub rsub isub mul rmul imul div truediv rtruediv pow square clamp clamp_min clamp_max maximum minimum"
)
ACTIVATIONS = _names(
    "silu gelu relu relu6 leaky_relu elu celu selu mish sigmoid tanh softplus hardswish hardsigmoid hardtanh logsigmoid "
    "softsign prelu"
)


@dataclass(frozen=True)
class Mark:
    """What a tensor is on the way to being."""

    pattern: bool = False  # the weights of an attention
    squares: bool = False  # a statistic, of which a root is a denominator
    width: bool = False  # a denominator
    origin: object = None  # the projection of which it is a function, element by element
    active: bool = False  # has an activation been at it


PLAIN = Mark()


class Frozen(TorchFunctionMode):
    """While it is on, the named parts of whatever is computed are cut off from autograd. `found` counts them."""

    def __init__(self, names: tuple[str, ...]):
        super().__init__()
        self.names, self.found = frozenset(names), Counter[str]()
        self.marks: MutableMapping[torch.Tensor, Mark] = WeakTensorKeyDictionary()

    def missing(self) -> str | None:
        """A part that was asked for and did not come by."""
        return next((name for name in sorted(self.names) if not self.found[name]), None)

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        whole = WHOLE.get(name)
        if whole is not None and whole[0] in self.names:
            self.found[whole[0]] += 1
            return whole[1](func, *args, **kwargs)
        tensors = list(_tensors((args, kwargs)))
        given = [self.marks.get(x, PLAIN) for x in tensors]
        if not any(mark is not PLAIN for mark in given) and name not in STARTS:
            return func(*args, **kwargs)
        cut = self._cut(name, tensors, given)
        if cut is not None:
            if cut is tensors[0] and _in_place(func):  # what it was is constant, and it is the product from here on
                return cut.copy_(cut.detach().clone() * tensors[1])
            args, kwargs = _without(cut, (args, kwargs))
        out = func(*args, **kwargs)
        if cut is None:
            self._mark(name, args, kwargs, given, out)
        return self._rooted(name, args, given, out)

    def _cut(self, name: str, tensors: list, given: list[Mark]) -> torch.Tensor | None:
        """The argument of a call that is a constant, if one is."""
        if "attention" in self.names and name in MIXES:
            return self._freezes("attention", next((x for x, m in zip(tensors, given, strict=True) if m.pattern), None))
        if len(tensors) < 2:
            return None
        if "norms" in self.names and name in ("div", "truediv") and given[1].width:
            return self._freezes("norms", tensors[1])
        if "gates" in self.names and name in ("mul", "rmul", "imul") and tensors[0].shape == tensors[1].shape:
            a, b = given[:2]
            if None not in (a.origin, b.origin) and a.origin is not b.origin and a.active is not b.active:
                return self._freezes("gates", tensors[0] if a.active else tensors[1])
        return None

    def _freezes(self, name: str, x: torch.Tensor | None) -> torch.Tensor | None:
        self.found[name] += x is not None
        return x

    def _rooted(self, name: str, args: tuple, given: list[Mark], out: object) -> object:
        """The root of a statistic is a constant."""
        if "norms" not in self.names or name not in ROOTS or not given or not given[0].squares:
            return out
        if name == "pow" and not (len(args) > 1 and args[1] in (0.5, -0.5)):
            return out
        self.found["norms"] += 1
        return out.detach() if isinstance(out, torch.Tensor) else out

    def _mark(self, name: str, args: tuple, kwargs: dict, given: list[Mark], out: object) -> None:
        outs = [out] if isinstance(out, torch.Tensor) else [x for x in _tensors(out)]
        first = given[0] if given else PLAIN
        for x in outs:
            mark = PLAIN
            if name == "softmax":
                mark = Mark(pattern=True)
            elif name in PRODUCTS:
                mark = Mark(origin=object())
            elif name in SUMS:
                mark = Mark(squares=True)
            elif name in WIDTHS:
                mark = Mark(width=True)
            elif name in PIECES and first.origin is not None and not first.active:
                mark = Mark(origin=object())
            elif name in KEEPS:
                mark = first
            elif name in ACTIVATIONS:
                mark = Mark(origin=first.origin, active=first.origin is not None)
            elif name in ARITHMETIC:
                mark = _combined(name, given)
            if mark != PLAIN:
                self.marks[x] = mark
            else:
                self.marks.pop(x, None)


def _in_place(func: Callable) -> bool:
    name = func.__name__
    return name == "__imul__" or (name.endswith("_") and not name.endswith("__"))


STARTS = PRODUCTS | SUMS | WIDTHS | {"softmax"}


def _combined(name: str, given: list[Mark]) -> Mark:
    """What arithmetic makes of its arguments: of numbers and of values of one origin it makes the same once more."""
    origins = {id(m.origin): m.origin for m in given}
    origin = next(iter(origins.values())) if len(origins) == 1 else None
    active = origin is not None and (name in ("pow", "square") or any(m.active for m in given))
    made = replace(PLAIN, origin=origin, active=active) if origin is not None else PLAIN
    if len(given) == 1 or name in ("clamp", "maximum", "add"):
        made = replace(made, squares=given[0].squares, width=given[0].width)
    return made


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _without(x: torch.Tensor, value: object) -> Any:
    """Arguments with one of them detached."""
    if value is x:
        return x.detach()
    if isinstance(value, dict):
        return {k: _without(x, v) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_without(x, v) for v in value)
    return value


Tensor = torch.Tensor
Function = Callable[..., torch.Tensor]


# -- functions that are all of a part -------------------------------------------------------------------------------------


def _attention(func: Function, query: Tensor, key: Tensor, *args: object, **kwargs: object) -> Tensor:
    """The pattern is of queries and keys; the rest is linear in the values."""
    return func(query.detach(), key.detach(), *args, **kwargs)


def _exact(x: torch.Tensor) -> torch.Tensor:
    """As the fused kernels compute: half precision in single."""
    return x.float() if x.dtype in (torch.half, torch.bfloat16) else x


def _scaled(
    x: torch.Tensor, scale: torch.Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    out = x * scale.detach()
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias).to(dtype)


def _layer_norm(
    func: Function,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    wide = _exact(x)
    centred = wide - wide.mean(dims, keepdim=True)
    return _scaled(centred, torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps), weight, bias, x.dtype)


def _rms_norm(
    func: Function,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    wide = _exact(x)
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    return _scaled(wide, torch.rsqrt(wide.square().mean(dims, keepdim=True) + eps), weight, None, x.dtype)


def _normalize(
    func: Function, x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    if out is not None:  # which autograd refuses, too
        return func(x, p, dim, eps, out=out)
    return x / x.detach().norm(p, dim, keepdim=True).clamp_min(eps)


def _glu(func: Function, x: Tensor, dim: int = -1) -> Tensor:
    a, b = x.chunk(2, dim)
    return a * F.sigmoid(b).detach()


WHOLE: dict[str, tuple[str, Callable]] = {
    "scaled_dot_product_attention": ("attention", _attention),
    "layer_norm": ("norms", _layer_norm),
    "rms_norm": ("norms", _rms_norm),
    "normalize": ("norms", _normalize),
    "glu": ("gates", _glu),
}
