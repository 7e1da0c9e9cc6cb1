"""A program on one engine against the same by hand: what is wrapped, run, and compared.

A `Case` is a program `(m, x, out)` on a wrapped model, and its reference on the raw module. `check` runs both twice, on
inputs of their own, so that what was baked in the first time shows the second, and compares what they leave to the bit
(to rounding where a compiler rewrites the graph): the results, the input, the model's buffers, the gradients of its
parameters, and the state of the random generator.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight, assert_max_compiles, assert_no_fallback

from .programs import run

ENGINES = ("hooks", "eager", "aot_eager")
EXACT = (
    "hooks",
    "eager",
    "symbolic",
)  # `symbolic`: graphs as they are, captured by running the model's Python on fakes


def wrap(module: nn.Module, engine: str, kind: type[NNsight] = NNsight, **options: Any) -> Any:
    model = kind(module)
    if engine == "symbolic":
        model.compile(backend="eager", capture="symbolic", **options)
    elif engine != "hooks":
        model.compile(backend=engine, **options)
    return model


def same(got: Any, want: Any, exact: bool, path: str = "out") -> None:
    """Equal in structure, types and values, and every tensor a plain one."""
    assert type(got) is type(want), f"{path}: {type(got)} is not {type(want)}"
    if isinstance(want, torch.Tensor):
        assert (got.shape, got.dtype, got.requires_grad) == (want.shape, want.dtype, want.requires_grad), path
        # In float32 a program on BERT is itself 2e-5 from float64: a norm of a row that is all but constant.
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 4e-5}
        torch.testing.assert_close(got, want, **tolerance, msg=lambda m: f"{path}: {m}")
    elif isinstance(want, dict):
        assert got.keys() == want.keys(), f"{path}: {list(got)} are not {list(want)}"
        for key in want:
            same(got[key], want[key], exact, f"{path}[{key!r}]")
    elif isinstance(want, list | tuple):
        assert len(got) == len(want), path
        for i, each in enumerate(zip(got, want, strict=True)):
            same(*each, exact, f"{path}[{i}]")
    elif dataclasses.is_dataclass(want):
        same(vars(got), vars(want), exact, path)
    elif isinstance(want, float) and not exact:
        assert math.isclose(got, want, rel_tol=1e-4, abs_tol=1e-5), path
    else:
        assert got == want, path


def data(*shape: int) -> Callable[[int], torch.Tensor]:
    """Normal inputs of a shape, one for each seed."""
    return lambda seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(rows: int = 2, length: int = 6) -> Callable[[int], torch.Tensor]:
    """Token ids, one tensor for each seed."""
    return lambda seed: torch.randint(1, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    number: int
    run: Callable
    by_hand: Callable
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any] = data(3, 7, 16)
    trains: bool = False  # the parameters require grad
    falls_back: str | None = None  # a piece of the reason that `explain()` gives
    refused: bool = False  # by a compiler, which says so, and the graph runs as it is
    breaks: bool = False  # Dynamo cuts the graph
    again: int = 0  # compiles of the second run, with another input
    fused: bool = False  # Inductor too
    rounds: bool = False  # the reference computes the same in another batch
    draws: bool = False  # from the random stream, which a compiler does not keep
    kind: type[NNsight] = NNsight
    slow: tuple[str, ...] = ()  # the engines on which it takes seconds

    @property
    def name(self) -> str:
        return f"case{self.number:02}-{self.run.__name__}"


def each(cases: list[Case]) -> list[Any]:
    """`(case, engine)` of a table, as parameters."""
    made = []
    for case in cases:
        for engine in (*ENGINES, "inductor"):
            if (engine == "inductor" and not case.fused) or (engine not in EXACT and case.draws):
                continue
            marks = [pytest.mark.slow] if engine in (*case.slow, "inductor") else []
            marks += [pytest.mark.inductor] if engine == "inductor" else []
            made.append(pytest.param(case, engine, id=f"{case.name}-{engine}", marks=marks))
    return made


def built(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.make().requires_grad_(case.trains)


def outcome(program: Callable, model: Any, module: nn.Module, x: Any) -> dict[str, Any]:
    """What a program leaves behind."""
    out: dict[str, Any] = {}
    torch.manual_seed(7)
    program(model, x, out)
    left = {
        "x": x,
        "buffers": {k: v.clone() for k, v in module.named_buffers()},
        "grads": {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None},
        "next draw": torch.rand(()),
    }
    return out | left


def check(case: Case, engine: str) -> None:
    """Run a case on an engine and by hand, twice."""
    module, plain = built(case), built(case)
    options = {} if engine == "hooks" else {"fullgraph": not case.breaks and case.falls_back is None}
    model = wrap(module, engine, case.kind, **options)
    why = "could not compile" if case.refused and engine not in EXACT else case.falls_back
    whole = engine == "hooks" or why is None
    for seed in range(2):
        want = outcome(case.by_hand, plain, plain, case.inputs(seed))
        with assert_no_fallback() if whole else contextlib.nullcontext():
            with assert_max_compiles(case.again if seed else 99):
                got = outcome(case.run, model, module, case.inputs(seed))
        same(got, want, engine in EXACT and not case.rounds)
    if not whole:
        assert why in str(model.explain())
    assert not any("nnsight" in repr((m._forward_hooks, m._forward_pre_hooks)) for m in module.modules())


__all__ = ["ENGINES", "EXACT", "Case", "check", "data", "each", "ids", "run", "same", "wrap"]
