"""A case, run on the hook engine and on the spliced graph: what each leaves, compared to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nnsight_fx import NNsight, assert_max_compiles
from nnsight_fx.engine.captured.watch import watch
from nnsight_fx.errors import MissedSiteError, PlanMismatchError
from nnsight_fx.plan.tree import tree_map
from nnsight_fx.tracing.lazy import LazyTensor
from nnsight_fx.tracing.objects import LazyObject

from .kinds import KINDS, Slots, State
from .nets import PACKS, Memory, Net
from .verbs import Given, Program

ROUNDS = (Given(0), Given(1), Given(2, 1, 5), Given(3, 1, 5))
# A batch that is another one each time: 1, 3 and 5 rows of 4, 6 and 9 tokens, each twice.
SIZES = (Given(0, 0, 4), Given(1, 2, 6), Given(2, 4, 9), Given(3, 0, 4), Given(4, 4, 9), Given(5, 2, 6))


HELD = (Memory, State, DynamicCache, DynamicLayer)  # objects that are compared by what they hold


@dataclass(frozen=True)
class Case:
    """A model, and programs that run on it one after the other."""

    net: Net
    programs: tuple[Program, ...]
    rounds: tuple[Given, ...] = ROUNDS


@dataclass
class Figures:
    """What a session of fuzzing has done."""

    programs: int = 0
    ran: int = 0  # programs of which a run goes through
    agreed: int = 0  # programs of which a run raises, the same on both engines
    refused: int = 0  # programs that the spliced engine alone refuses
    rounded: int = 0  # programs with a backward whose values agree but for the last bits
    failed: int = 0
    compiles: int = 0
    fallbacks: int = 0
    seconds: float = 0.0
    errors: Counter = field(default_factory=Counter)  # on which the engines agree: programs by class
    verbs: Counter = field(default_factory=Counter)  # programs by what is in them
    layers: Counter = field(default_factory=Counter)

    def add(self, other: Figures) -> None:
        for name, value in vars(other).items():
            own = getattr(self, name)
            own.update(value) if isinstance(own, Counter) else setattr(self, name, own + value)


def attempt(program: Program, model: NNsight, given: Given, net: Net) -> dict[str, Any]:
    """What a run of a program leaves."""
    memory = net.memory()
    out: dict[str, Any] = {"error": None, "takes": ["memory"] * (net.root == "keeping")}
    torch.manual_seed(given.seed)
    try:
        program.run(model, given, net.entry | ({} if memory is None else {"memory": memory}), out)
    except Exception as error:
        out["error"] = error
    out["kept"] = [_delivered(value) for value in out["kept"]]
    out["caches"] = [_entries(cache) for cache in out["caches"]] if out["error"] is None else []
    out["memory"] = _held(memory)
    out["state"] = {k: v.clone() for k, v in model._module.state_dict().items()}
    out["gradients"] = [p.grad for p in model._module.parameters()]
    out["rng"] = torch.get_rng_state()
    return out


def _held(memory: Any) -> list[torch.Tensor]:
    """The tensors in a cache."""
    if memory is None or isinstance(memory, Memory):
        return memory.kept if memory else []
    return [t for layer in memory.layers for t in (layer.keys, layer.values)]


def _delivered(value: Any) -> Any:
    """`value`, with a word for what never came."""
    return tree_map(lambda x: "nothing" if isinstance(x, LazyTensor | LazyObject) else x, value)


def _entries(cache: Any) -> dict:
    """What a cache holds; of objects it keeps nothing."""
    return {
        key: tree_map(
            lambda x: "object" if isinstance(x, (LazyObject, Slots, *HELD)) else x,
            (cache[key].output, cache[key].inputs),
        )
        for key in cache
    }


BITS = {"rtol": 0, "atol": 0}


def same(got: Any, want: Any, path: str, bits: dict[str, float] = BITS) -> None:
    """Equal in structure, types and bits; with `bits={}`, but for the last ones."""
    assert type(got) is type(want), f"{path}: {type(got)} is not {type(want)}"
    if isinstance(want, torch.Tensor):
        facts = [(tuple(t.shape), t.dtype, t.requires_grad, t.is_leaf) for t in (got, want)]
        assert facts[0] == facts[1], f"{path}: {facts[0]} is not {facts[1]}"
        torch.testing.assert_close(got, want, **bits, equal_nan=True, msg=lambda m: f"{path}: {m}")
    elif isinstance(want, dict):
        assert list(got) == list(want), f"{path}: {list(got)} is not {list(want)}"
        for key in want:
            same(got[key], want[key], f"{path}[{key!r}]", bits)
        if type(want) is not dict:
            same(vars(got), vars(want), f"{path}, beside its items", bits)
    elif isinstance(want, list | tuple):
        assert len(got) == len(want), f"{path}: {len(got)} values, not {len(want)}"
        for i, pair in enumerate(zip(got, want, strict=True)):
            same(*pair, f"{path}[{i}]", bits)
    elif isinstance(want, Slots):
        same([got.h, got.n, got.skip], [want.h, want.n, want.skip], path, bits)
    elif dataclasses.is_dataclass(want) or isinstance(want, HELD):
        same(vars(got), vars(want), path, bits)
    elif isinstance(want, LazyObject | LazyTensor):
        raise AssertionError(f"{path}: what was recorded has come out")
    else:
        assert not isinstance(got, torch.SymInt | torch.SymFloat | torch.SymBool), f"{path}: {got} is no number"
        assert got == want or got != got and want != want, f"{path}: {got} is not {want}"


def sharing(out: dict[str, Any]) -> list[int]:
    """Which of the tensors that a run leaves lie in one storage: for each, the first one that it shares with."""
    tensors = [t for t in _tensors([out["kept"], out["inputs"], out["memory"]]) if t.numel()]
    where = [t.untyped_storage().data_ptr() for t in tensors]
    return [where.index(w) for w in where]


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Slots):
        value = [value.h, value.skip]
    if (dataclasses.is_dataclass(value) and not isinstance(value, dict)) or isinstance(value, HELD):
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


def as_it_is(gm: fx.GraphModule, inputs: list) -> fx.GraphModule:
    """A compiler of the user's, which gets numbers as tensors."""
    return gm


def check(case: Case) -> Figures:
    """Run all programs of a case on both engines; an `AssertionError` where they differ."""
    modules = case.net.build(), case.net.build()
    hooks, spliced = NNsight(modules[0]), NNsight(modules[1])
    spliced.compile(backend=as_it_is if case.net.lifted else "eager", dynamic=case.net.dynamic)
    figures, compiled, fell_back = Figures(), watch.compiles, watch.fell
    for n, program in enumerate(case.programs):
        figures.programs += 1
        figures.verbs.update(set(program.verbs()))
        figures.layers.update(set(case.net.layers))
        outcomes: list[Any] = []
        rounded = False
        for i, given in enumerate(case.rounds):
            again = repeats(program, case.rounds, i)
            error, last = _round(program, hooks, spliced, given, case.net, again, f"program {n}, {given}")
            outcomes.append(error)
            rounded |= last
            if isinstance(error, PlanMismatchError):
                break
        figures.rounded += rounded
        if isinstance(outcomes[-1], PlanMismatchError):  # the engines' states have parted
            figures.refused += 1
            break
        errors = {type(o).__name__ for o in outcomes if o is not None}
        figures.ran += any(o is None for o in outcomes)
        figures.agreed += bool(errors)
        figures.errors.update(errors)
    else:
        _afterwards(case.net, modules)
    figures.compiles, figures.fallbacks = watch.compiles - compiled, watch.fell - fell_back
    return figures


def _afterwards(net: Net, modules: tuple[nn.Module, nn.Module]) -> None:
    """Nothing stays behind: the models themselves give what they gave."""
    x, plain = ROUNDS[0].x(0, 2), []
    for module in modules:
        torch.manual_seed(0)
        plain.append(net.run(module, x))
    same(*plain, "the model itself, afterwards")


# What other metadata, or rows of another forward, become further on in a batch of any size.
AMONG_INVOKES = (
    "an earlier write changed the metadata of what follows",
    "no scan could tell where the trace stops the model",
)
# Fakes of a batch norm have strides of their own (pytorch#192668).
NUMBERS = "or at a site that no scan could tell"  # a number in a container, behind a branch: the run's, not the scan's
FAKE_STRIDES = "on fake tensors, what the backward needs was changed in place"
# What a body changed in place behind its backward keeps a graph of the forward that has no backward any more.
GRAPH_ON_INPUT = "an input was changed in place, and requires grad since"
# With what is written before a sync point the model may fail, and behind it the body may take that back.
TAKEN_BACK = "Dynamo could not trace the model with what was written"


INSIDES = ("torch._subclasses", "torch._dynamo", "torch.fx", "torch._inductor", "torch.utils")  # no errors of a user's


def repeats(program: Program, rounds: tuple[Given, ...], i: int) -> bool:
    """Has a batch of these sizes run before? A second forward with other rows is captured anew, for any number of them, which
    the first one then takes."""
    sizes = [(given.more_rows, given.length) for given in rounds]
    return sizes[i] in sizes[:i] and (program.alone or i > len(set(sizes)))


def _round(
    program: Program, hooks: NNsight, spliced: NNsight, given: Given, net: Net, again: bool, what: str
) -> tuple[Exception | None, bool]:
    """One run on both engines; the error on which they agree, if any, or the refusal of the spliced one; were values rounded
    otherwise?"""
    want = attempt(program, hooks, given, net)
    fine, unsure, verbs = want["error"] is None, net.breaks, set(program.verbs())
    told = unsure and {"cache", "Backward"} & verbs  # behind a graph break hooks do these, and say so
    before = watch.fell
    steady = again and fine and not unsure and program.steady
    try:
        with assert_max_compiles(0) if steady else contextlib.nullcontext():
            got = attempt(program, spliced, given, net)
    except AssertionError as error:
        error.add_note(f"in {what}")
        raise
    expected = (
        GRAPH_ON_INPUT,
        *((TAKEN_BACK,) if {"Apply", "If", "Item"} & verbs else ()),
        *(() if program.alone else AMONG_INVOKES),
        *((FAKE_STRIDES,) if "norm" in net.layers else ()),
        *((NUMBERS,) if net.holds_objects or (unsure and {*PACKS, *KINDS} & set(net.layers)) else ()),
    )
    fell = [why for why in watch.since(before) if not any(reason in why for reason in expected)]
    assert told or not fine or not fell, f"{what}: {fell}"
    for out, model in ((got, spliced), (want, hooks)):
        out["later"] = after(out, model._module)
        model._module.zero_grad()
    if not fine:  # what a failed forward has moved is nobody's promise
        spliced._module.load_state_dict(hooks._module.state_dict())
    if isinstance(got["error"], PlanMismatchError) and not isinstance(want["error"], PlanMismatchError):
        return got["error"], False
    if type(got["error"]) is not type(want["error"]):
        raise AssertionError(f"{what}: spliced {got['error']!r}, hooks {want['error']!r}") from (
            got["error"] or want["error"]
        )
    for out in (got, want):
        error = out["error"]
        assert not type(error).__module__.startswith(INSIDES), f"{what}: torch's own insides: {error!r}"
    if not fine and not isinstance(want["error"], MissedSiteError):
        return want["error"], False
    assert sharing(got) == sharing(want), f"{what}: other values share memory: {sharing(got)}, {sharing(want)}"
    results = [{**out, "error": None} for out in (got, want)]
    try:
        same(*results, what)
    except AssertionError:
        if "Backward" not in program.verbs():
            same(*({k: v for k, v in out.items() if k != "later"} for out in results), what)
        # autograd adds up gradients in place and in the order of its graph, a graph does not: where kernels go by strides
        same(*results, what, bits={})
        return want["error"], True
    return want["error"], False


__all__ = ["Case", "Figures", "check"]
