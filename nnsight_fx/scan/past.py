"""Caches among the inputs of a forward: what of them a scan depends on, and lengths that grow from step to step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..compat.fakes import FakeTensorMode
from ..compat.modes import TorchFunction
from ..compat.symbols import DimDynamic, StatelessSymbolicContext, constant_source
from ..compat.transformers import cache_among
from ..plan.tree import PLAIN

LENGTH = 23  # stands for the cache's length in a scan: shows up as a symbol, never as a number


class Past:
    """A cache that grows by concatenation, of `length` tokens, which `queries` more follow."""

    def __init__(self, cache: Any, length: int, queries: int, mask: torch.Tensor | None):
        self.cache, self.length, self.queries, self.mask = cache, length, queries, mask
        self.inside = {id(t) for layer in cache.layers for t in (layer.keys, layer.values)}

    def dim(self, x: torch.Tensor) -> tuple[int, int] | None:
        """The dim of a tensor that grows, and what it is beyond the length."""
        if x is self.mask:
            return x.dim() - 1, self.queries
        return (x.dim() - 2, 0) if id(x) in self.inside else None

    def shape(self, x: torch.Tensor) -> tuple:
        found, shape = self.dim(x), x.shape
        return (*shape[: found[0]], "past", *shape[found[0] + 1 :]) if found is not None else tuple(shape)

    def faker(self, fakes: FakeTensorMode, signature: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """A fake of an input; the dim that grows is a symbol, which `signature.past` then knows."""

        def make(x: torch.Tensor) -> torch.Tensor:
            found = self.dim(x)
            if found is None:
                return fakes.from_tensor(x, static_shapes=True)
            (dim, more), shape = found, list(x.shape)
            shape[dim] = LENGTH + more
            example = torch.empty(shape, dtype=x.dtype, device=x.device)
            kinds = [DimDynamic.DUCK if i == dim else DimDynamic.STATIC for i in range(x.dim())]
            source = constant_source(f"past_{more}")
            fake = fakes.from_tensor(example, symbolic_context=StatelessSymbolicContext(kinds), source=source)
            size: Any = fake.shape[dim]
            signature.past[size.node.expr] = more
            return fake

        return make


def is_cache(x: object) -> bool:
    return hasattr(x, "get_seq_length") and isinstance(getattr(x, "layers", None), list)


def growing(batch: Any) -> Past | None:
    """The cache of a forward, if its tensors are as long as what it holds, and the mask, if any, covers it."""
    cache = cache_among(batch.kwargs)
    tokens = next((x for n in ("input_ids", "inputs_embeds") if (x := batch.kwargs.get(n)) is not None), None)
    mask = batch.kwargs.get("attention_mask")
    if not is_cache(cache) or tokens is None or not cache.layers:
        return None
    keys = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    if not all(isinstance(t, torch.Tensor) for t in keys):
        return None
    shapes = [t.shape for t in keys]  # type: ignore[union-attr]
    length, queries = shapes[0][-2] if len(shapes[0]) == 4 else 0, tokens.shape[1]
    known = all([len(shape) == 4 and shape[2] == length for shape in shapes])
    if (
        not known
        or getattr(cache, "is_compileable", False) is not False
        or length < 2
        or (mask is not None and not _covers(mask, length + queries))
    ):
        return None
    return Past(cache, length, queries, mask)


def _covers(mask: object, length: int) -> bool:
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[-1] == length


def state(x: object, past: Past | None = None) -> object:
    """What a scan depends on of an input that is no tensor; of a cache the shapes and numbers in it."""
    if isinstance(x, torch.Tensor):
        return (past.shape(x) if past else tuple(x.shape), x.dtype, x.device)
    if isinstance(x, PLAIN):
        return type(x), x
    if isinstance(x, list | tuple):
        return type(x), tuple(state(v, past) for v in x)
    if isinstance(x, dict):
        return type(x), tuple((k, state(v, past)) for k, v in x.items())
    if is_cache(x) or type(x).__module__.startswith("transformers.cache_utils"):
        return type(x), tuple((k, state(v, past)) for k, v in vars(x).items())
    return type(x), id(x)


def held_tensors(x: object) -> list[torch.Tensor]:
    """The tensors in an input: itself, or those that a cache holds."""
    if isinstance(x, torch.Tensor):
        return [x]
    found: dict[int, torch.Tensor] = {}
    if not isinstance(x, PLAIN):
        copied(x, lambda t: found.setdefault(id(t), t))
    return list(found.values())


class _Copies(TorchFunctionMode):
    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.make = make

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func is not torch.Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        x, memo = args
        return memo.setdefault(id(x), self.make(x))


def copied(x: object, make: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A deep copy of an object in which `make` gives the tensors."""
    with TorchFunction(), _Copies(make):
        return copy.deepcopy(x)
