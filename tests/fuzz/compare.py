"""A case, run on the hook engine and on the spliced graph: what each leaves, compared to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn

from nnsight_fx import NNsight, assert_max_compiles, assert_no_fallback
from nnsight_fx.engine.spliced import watch
from nnsight_fx.errors import MissedSiteError
from nnsight_fx.tracing.lazy import LazyObject, LazyTensor
from nnsight_fx.tracing.tree import tree_map

from .nets import Memory, Net
from .verbs import Given, Program

ROUNDS = (Given(0), Given(1), Given(2, 1, 5), Given(3, 1, 5))


@dataclass(frozen=True)
class Case:
    """A model, and programs that run on it one after the other."""

    net: Net
    programs: tuple[Program, ...]


@dataclass
class Figures:
    """What a session of fuzzing has done."""

    programs: int = 0
    ran: int = 0
    errors: Counter = field(default_factory=Counter)  # raised by both engines, by class
    refused: Counter = field(default_factory=Counter)  # raised by the spliced engine alone, which says so
    verbs: Counter = field(default_factory=Counter)  # programs that have it
    layers: Counter = field(default_factory=Counter)
    compiles: int = 0
    seconds: float = 0.0

    def add(self, other: Figures) -> None:
        for name, value in vars(other).items():
            own = getattr(self, name)
            own.update(value) if isinstance(own, Counter) else setattr(self, name, own + value)


def attempt(program: Program, model: NNsight, given: Given, memory: Memory | None) -> dict[str, Any]:
    """What a run of a program leaves."""
    out: dict[str, Any] = {"error": None}
    torch.manual_seed(given.seed)
    try:
        program.run(model, given, {} if memory is None else {"memory": memory}, out)
    except Exception as error:
        out["error"] = error
    out["kept"] = [_delivered(value) for value in out["kept"]]
    out["caches"] = [_entries(cache) for cache in out["caches"]] if out["error"] is None else []
    out["memory"] = memory and memory.kept
    out["state"] = {k: v.clone() for k, v in model._module.state_dict().items()}
    out["gradients"] = [p.grad for p in model._module.parameters()]
    out["rng"] = torch.get_rng_state()
    return out


def _delivered(value: Any) -> Any:
    """`value`, with a word for what never came."""
    return tree_map(lambda x: "nothing" if type(x) in (LazyTensor, LazyObject) else x, value)


def _entries(cache: Any) -> dict:
    """What a cache holds; of objects it keeps nothing."""
    return {
        key: tree_map(lambda x: "object" if isinstance(x, Memory) else x, (cache[key].output, cache[key].inputs))
        for key in cache
    }


def same(got: Any, want: Any, path: str) -> None:
    """Equal in structure, types and bits."""
    assert type(got) is type(want), f"{path}: {type(got)} is not {type(want)}"
    if isinstance(want, torch.Tensor):
        facts = [(tuple(t.shape), t.dtype, t.requires_grad, t.is_leaf) for t in (got, want)]
        assert facts[0] == facts[1], f"{path}: {facts[0]} is not {facts[1]}"
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{path}: {m}")
    elif isinstance(want, dict):
        assert list(got) == list(want), f"{path}: {list(got)} is not {list(want)}"
        for key in want:
            same(got[key], want[key], f"{path}[{key!r}]")
    elif isinstance(want, list | tuple):
        assert len(got) == len(want), f"{path}: {len(got)} values, not {len(want)}"
        for i, pair in enumerate(zip(got, want, strict=True)):
            same(*pair, f"{path}[{i}]")
    elif dataclasses.is_dataclass(want):
        same(vars(got), vars(want), path)
    else:
        assert got == want, f"{path}: {got} is not {want}"


def sharing(out: dict[str, Any]) -> list[int]:
    """Which of the tensors that a run leaves lie in one storage: for each, the first one that it shares with."""
    tensors = [t for t in _tensors([out["kept"], out["inputs"], out["memory"]]) if t.numel()]
    where = [t.untyped_storage().data_ptr() for t in tensors]
    return [where.index(w) for w in where]


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [t for part in parts for t in _tensors(part)]


def after(out: dict[str, Any], module: nn.Module) -> list:
    """Gradients taken of what was saved, when the trace is over."""
    saved = [t for t in _tensors(out["kept"]) if t.requires_grad and t.is_floating_point()]
    leaves = [p for p in module.parameters() if p.requires_grad]
    if not saved or not leaves:
        return []
    try:
        return list(torch.autograd.grad(sum(t.double().sum() for t in saved), leaves, allow_unused=True))
    except RuntimeError as error:
        return [type(error)]


def check(case: Case) -> Figures:
    """Run all programs of a case on both engines; an `AssertionError` where they differ."""
    modules = case.net.build(), case.net.build()
    hooks, spliced = NNsight(modules[0]), NNsight(modules[1])
    spliced.compile(backend="eager")
    figures, compiled = Figures(), watch.compiles
    for n, program in enumerate(case.programs):
        figures.programs += 1
        figures.verbs.update(set(program.verbs()))
        figures.layers.update(set(case.net.layers))
        outcomes = [_round(program, hooks, spliced, given, case.net, f"program {n}, {given}") for given in ROUNDS]
        figures.ran += any(o is None for o in outcomes)
        for error in {type(o).__name__ for o in outcomes if o is not None}:
            figures.errors[error] += 1
    x = ROUNDS[0].x(0, 2)
    memories = case.net.memory(), case.net.memory()
    plain = []
    for module, memory in zip(modules, memories, strict=True):
        torch.manual_seed(0)
        plain.append(module(x.clone()) if memory is None else module(x.clone(), memory))
    same(*plain, "the model itself, afterwards")
    figures.compiles = watch.compiles - compiled
    return figures


def _round(program: Program, hooks: NNsight, spliced: NNsight, given: Given, net: Net, what: str) -> Exception | None:
    want = attempt(program, hooks, given, net.memory())
    steady = given.seed in (1, 3) and want["error"] is None and program.steady and "branch" not in net.layers
    with assert_no_fallback(), assert_max_compiles(0) if steady else contextlib.nullcontext():
        got = attempt(program, spliced, given, net.memory())
    errors = got["error"], want["error"]
    if type(errors[0]) is not type(errors[1]):
        for error in errors:
            if error is not None:
                error.add_note(f"in {what}: one engine raises {errors[0]!r}, the other {errors[1]!r}")
                raise AssertionError(f"{what}: spliced {errors[0]!r}, hooks {errors[1]!r}") from error
    if errors[1] is None or isinstance(errors[1], MissedSiteError):
        for key in want.keys() - {"error"}:
            same(got[key], want[key], f"{what}: {key}")
        assert sharing(got) == sharing(want), f"{what}: other values share memory: {sharing(got)}, {sharing(want)}"
        same(after(got, spliced._module), after(want, hooks._module), f"{what}: gradients of what was saved")
    for model in (hooks, spliced):
        model._module.zero_grad()
    return errors[1]


__all__ = ["Case", "Figures", "check"]
