"""Does each row of a batch run as it would alone? Followed operation by operation, while a forward runs.

For each tensor `Rows` knows the dimension that holds the batch, as its leading factor: `(rows, tokens, width)` and
`(rows * tokens, width)` both hold it in dimension 0. An operation that could let one row see another, or its own number,
raises `Mixed`. The table errs to that side: what it does not know mixes rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..compat.modes import TorchDispatchMode
from .effects import draws
from .row_rules import FILLS, RULES, AtenCall, pointwise, tensors

KEEPS_NUMBERS = {"view", "unsqueeze", "expand", "permute", "transpose", "t", "clone", "_to_copy", "detach", "alias"}
KEEPS_NUMBERS |= {"index"}  # which chooses by them


class Count(int):
    """How many truths there are in a batch, of which the sum is asked for."""


class Mixed(Exception):
    """Rows of a batch may depend on one another. Never reaches the user."""


class Rows(TorchDispatchMode):
    """Follow `rows` rows from `inputs`, which hold them in dimension 0. `sizes` are those that mean something else.

    `lasting` are inputs of which what holds for this forward holds for the next ones, too: the masks of a generation. `numbered`: an
    `arange` as long as there are rows is taken for their numbers; where it may be positions it is not, and a choice by it mixes rows.
    """

    def __init__(
        self,
        rows: int,
        inputs: list[torch.Tensor],
        sizes: Collection[int] = (),
        lasting: Collection[torch.Tensor] = (),
        numbered: bool = True,
    ):
        super().__init__()
        self.numbered = numbered
        self.lasting: Any = WeakIdKeyDictionary({x: True for x in lasting})  # those, and what is made of them alone
        self.rows, self.unlike = rows, rows not in sizes
        self.dims: Any = WeakIdKeyDictionary()
        # a truth that holds for the batch when it holds for each row (`all`), or does not (`any`)
        self.decided: Any = WeakIdKeyDictionary()
        self.numbers: Any = WeakIdKeyDictionary()  # tensors that hold the number of each row
        self.decides = False  # has Python asked for such a truth: another input may go another way
        self.paused = False
        for x in inputs:
            self.dims[x] = 0

    def dim(self, x: object) -> int | None:
        """The dimension that holds the rows."""
        return self.dims.get(x) if isinstance(x, torch.Tensor) else None

    def holds(self, x: Any) -> bool:
        """Is dimension 0 the rows, and nothing else?"""
        return self.dim(x) == 0 and x.shape[0] == self.rows

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        if self.paused or func.namespace == "prim":
            return func(*args, **kwargs)
        call = AtenCall(self, func, args, kwargs)
        if draws(func, args, kwargs):
            raise Mixed(f"`{func}` draws random numbers")
        if call.batched and func._schema.name.split("::")[1] in ("_local_scalar_dense", "item", "is_nonzero"):
            return self._decide(call)
        out = func(*args, **kwargs)
        if self.lasting and call.batched and all(x in self.lasting for x in call.batched):
            self.lasting.update((x, True) for x in tensors(out))
        for x, dim in zip(tensors(out), self._follow(call, out), strict=True):
            if dim is None:
                continue
            if dim >= x.dim() or x.shape[dim] % self.rows:
                raise Mixed(f"`{func}` does something else with the rows than it is known for")
            self.dims[x] = dim
        return out

    def _decide(self, call: AtenCall) -> Any:
        """Python looks at a number. All rows agree on an `all` that is true, and on an `any` that is false."""
        value = call.func(*call.args, **call.kwargs)
        if self.decided.get(call.args[0]) is not bool(value):
            raise Mixed("the model's Python looks at values of the batch")
        self.decides = self.decides or call.args[0] not in self.lasting
        return value

    def _follow(self, call: AtenCall, out: object) -> list[int | None]:
        found = tensors(out)
        if call.writes_shared():
            raise Mixed(f"`{call.func}` writes rows into what all of them share")
        if not call.batched or call.name in FILLS:  # of `x.new_ones(sizes)` nothing is in it but the sizes
            return [self._made(call, x) for x in found]
        truth = self._truth(call)
        if truth is not None:
            self.decided[found[0]], self.dims[found[0]] = truth, 0
            return [None]  # noted already: it has no dimension that could hold the rows
        if any(x in self.decided for x in call.batched):
            raise Mixed("a truth about the whole batch is computed with")
        numbered = any(x in self.numbers for x in call.batched)
        if numbered and call.name not in KEEPS_NUMBERS:
            raise Mixed(f"`{call.func}` computes with the number of a row")
        rule = RULES.get(call.name)
        if rule is None and torch.Tag.pointwise in call.func.tags:
            rule = pointwise
        if rule is None:
            raise Mixed(f"`{call.func}` is not known to keep rows apart")
        dim = rule(call, found)
        if dim is None:
            raise Mixed(f"`{call.func}` mixes rows")
        if numbered and call.name != "index":
            self.numbers.update((x, True) for x in found)
        return list(dim) if isinstance(dim, tuple) else [dim] * len(found)

    def _truth(self, call: AtenCall) -> bool | Count | None:
        """What is said of all rows at once: `all`, `any`, and `sum() == numel()`, by which transformers writes `all`."""
        if call.given.get("dim") is not None or call.given.get("keepdim"):
            return None
        if call.name in ("all", "any"):
            return call.name == "all"
        if call.name == "sum" and call.first.dtype == torch.bool:  # type: ignore[union-attr]
            return Count(call.first.numel())  # type: ignore[union-attr]
        count = self.decided.get(call.first)
        return True if call.name == "eq" and type(count) is Count and call.given.get("other") == count else None

    def _made(self, call: AtenCall, x: torch.Tensor) -> int | None:
        """What is made without the rows may still have their number in its shape, each row then the same."""
        if not self.unlike:
            return None
        if (
            self.numbered
            and call.name == "arange"
            and x.shape == (self.rows,)
            and not call.given.get("start")
            and call.given.get("step", 1) == 1
        ):
            self.numbers[x] = True
            return 0
        if call.name in FILLS and x.dim() and x.shape[0] == self.rows:
            return 0
        if call.name in ("expand", "repeat") and call.tensors:
            old = call.tensors[0]
            for d in range(x.dim()):
                was = d - (x.dim() - old.dim())
                if x.shape[d] == self.rows and (was < 0 or old.shape[was] == 1):
                    return d
        return None
