"""The scan: a forward on fake tensors that tells every site's shape, dtype and structure before the model runs.

It runs on a structural copy, so that nothing of the real model moves: no buffer, no counter, no random draw, no hook.
"""

from __future__ import annotations

import contextvars
import copy
import functools
from collections.abc import Callable, Collection, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
import torch.nn as nn

from ..capture import operations, source, streams
from ..capture.hook_tables import override, put, take
from ..compat.fakes import FakeCopyMode, FakeTensorMode, with_attributes
from ..compat.frames import compiled_from
from ..compat.modes import TorchDispatchMode
from ..compat.modules import library_of
from ..plan import tree
from ..plan.interleave import Firing, Stopped, TensorInterleaver
from ..plan.skips import gather
from ..plan.tree import PLAIN
from ..plan.verbs import Site, place_of_site
from ..tracing.steps import Missing, Opaque, SiteMeta


def callee(module: nn.Module, fn: str | None) -> Callable:
    """What a trace calls: the model, a method of it (`"encode"`), a part (`"layers.3"`), or a method of a part."""
    return functools.reduce(getattr, fn.split("."), module) if fn else module  # type: ignore[return-value]


def skeleton(module: nn.Module, fakes: FakeTensorMode) -> nn.Module:
    """A copy of a module's structure on fake tensors, without the user's hooks."""
    with FakeCopyMode(fakes), torch.no_grad():
        try:
            made = copy.deepcopy(module)
        except TypeError:
            made = copy.deepcopy(module, dict(_uncopyable(module)))
        _from_meta(made)
    copies = dict(zip(module.modules(), made.modules(), strict=True))
    for m in made.modules():
        m._compiled_call_impl = None
        own = compiled_from(m.__dict__.get("forward"))
        if own is not None:
            m.__dict__["forward"] = MethodType(own.__func__, copies[own.__self__]) if _part(own, copies) else own
        for table in ("_forward_hooks", "_forward_pre_hooks"):
            hooks = getattr(m, table)
            for key in list(hooks):
                if library_of(hooks[key]) not in (
                    "transformers",
                    "accelerate",
                ):  # theirs are part of what the model computes
                    del hooks[key]
                    for flags in (
                        "_forward_hooks_with_kwargs",
                        "_forward_pre_hooks_with_kwargs",
                        "_forward_hooks_always_called",
                    ):
                        getattr(m, flags).pop(key, None)
    return made


def _part(function: object, copies: dict[nn.Module, nn.Module]) -> bool:
    """Is it a method of a module that was copied?"""
    owner = getattr(function, "__self__", None)
    return isinstance(owner, nn.Module) and owner in copies


def _uncopyable(module: nn.Module) -> Iterator[tuple[int, object]]:
    """Attributes of which there is no copy (operators, locks, clients): the copy holds the same."""
    for m in module.modules():
        for name, value in vars(m).items():
            if name not in nn.Module().__dict__:
                try:
                    copy.deepcopy(value)
                except TypeError:
                    yield id(value), value


def _from_meta(module: nn.Module) -> None:
    """What is not loaded yet as if it were on the CPU, where the inputs are."""
    moved: dict[int, torch.Tensor] = {}
    for m in module.modules():
        tables: list = [m._parameters, m._buffers]
        for table in tables:
            for name, t in table.items():
                if t is not None and t.device.type == "meta":
                    if id(t) not in moved:
                        made = torch.empty_like(t, device="cpu")
                        moved[id(t)] = nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made
                    table[name] = moved[id(t)]


class Scan:
    """What one fake forward saw."""

    def __init__(self):
        self.sites: dict[Site, SiteMeta] = {}
        self.counts: dict[tuple[str, str], int] = {}  # how often each site was passed
        self.ended: BaseException | None = None  # why it could not go on
        self.stop_site: Site | None = None
        self.deciders: set[str] = set()  # the modules whose Python looks at values, which the scan guesses
        self.called: dict = {}  # what each operation inside a module called first
        self.attributes: str | None = None  # which the model put on a tensor that passes a site, the first of them

    def decided(self, path: str | None) -> bool:
        """Do values decide how often a module is called? `None`: any module."""
        if path is None:
            return bool(self.deciders)
        return path != "" and any(path.startswith(f"{d}." if d else "") for d in self.deciders)

    def lookup(self, site: Site) -> SiteMeta | Missing:
        if site in self.sites:
            return self.sites[site]
        if self.ended is not None:
            return Missing(f"the scan ended before it: {type(self.ended).__name__}: {self.ended}")
        guessed = bool(self.sites) and next(reversed(self.sites.values())).unsure
        return Missing("never called", certain=not guessed)


def scan(
    copied: nn.Module,
    call: Callable[[nn.Module], object],
    fakes: FakeTensorMode,
    *,
    plan: TensorInterleaver | None = None,
    batched: Callable[[torch.Tensor], bool] = lambda t: False,
    unsure: Callable[[], bool] = lambda: False,
    frames: Collection[str] = (),
    inside: list[str] | None = None,
    real: Callable[[nn.Module], object] = lambda m: None,
) -> Scan:
    """Run `call(copied)` on fakes and note every site; with `plan`, its interventions take effect on the way.

    `inside` is kept as the list of the modules that are running. The operations in `frames` have sites too. `real` gives the module that one of the copy stands for.
    """
    found = Scan()
    running = [] if inside is None else inside
    counts, clock = found.counts, Clock()

    def known(x: object) -> object:
        if isinstance(x, (torch.Tensor, FunctionType, BuiltinFunctionType, *PLAIN)):
            return x
        module = real(x) if isinstance(x, nn.Module) else None
        return Opaque(type(x)) if module is None else module

    def skipped(path: str) -> dict[int, tuple] | None:
        if plan is None or plan.calling:
            return None
        return plan.skipped.get((path, "output", counts[(path, "input")] - 1))

    def note(path: str, kind: str, value: object, depth: int = 0) -> Any:
        if plan is not None and plan.calling:
            return value
        n = counts.get((path, kind), 0)
        counts[(path, kind)] = n + 1
        if depth == 0 and kind == "input":
            running.append(path)
        elif depth == 0 and kind == "output" and path in running:
            del running[running.index(path) :]
        site = (path, kind, n)
        leaves, spec = tree.flatten(value)
        if plan is not None:
            value, leaves, spec = _fire(plan, site, value, leaves, spec)
        described = tuple(known(x) for x in leaves)
        rows = tuple(isinstance(x, torch.Tensor) and x.dim() > 0 and batched(x) for x in leaves)
        like = value if tree.holds(spec, tree.LIKE) else None
        if found.attributes is None:
            name = with_attributes(leaves)
            found.attributes = f"`{name}` on `{place_of_site(site)}`" if name else None
        found.sites[site] = SiteMeta(spec, described, rows, clock.tick(depth), unsure(), like, _same(leaves))
        if plan is not None and plan.stopping:
            found.stop_site = site
            raise Stopped
        return value

    def observer(frame: str, depth: int) -> Callable:
        def op(name: str, fn: Callable, /, *args: object, **kwargs: object) -> Any:
            path = f"{frame}.{name}"
            args, kwargs = note(path, "input", (args, kwargs), depth)
            found.called.setdefault(path, fn)
            parts = skipped(path)
            if parts is not None:
                leaves, spec = gather(parts, plan.plan.groups)  # type: ignore[union-attr]
                out = tree.unflatten(leaves, spec)
            elif fn is None:
                out = args[0]
            else:
                if operations.frame(path) in frames:
                    fn = rewritten(operations.frame(path), fn, depth + 1)
                out = fn(*args, **kwargs)
            return note(path, "output", out, depth)

        return op

    def rewritten(frame: str, called: Any, depth: int) -> Callable:
        function, method = source.plain(called)
        made = source.instrumented(function, observer(frame, depth))
        return MethodType(made, called.__self__) if method else made

    undo = []
    for path, module in copied.named_modules():
        if operations.frame(path) in frames:
            undo.append(override(module, rewritten(operations.frame(path), module.forward, 1)))
    for path, module in copied.named_modules():

        def before(m: nn.Module, args: tuple, kwargs: dict, path: str = path) -> Any:
            return note(path, "input", (args, kwargs))

        def after(m: nn.Module, args: tuple, kwargs: dict, out: object, path: str = path) -> object:
            return note(path, "output", out)

        put(module, before, after)
        if plan is not None and path in plan.plan.skips:

            def forward(*args: object, path: str = path, original: Callable = module.forward, **kwargs: object) -> Any:
                parts = skipped(path)
                if parts is None:
                    return original(*args, **kwargs)
                leaves, spec = gather(parts, plan.plan.groups)
                return tree.unflatten(leaves, spec)

            undo.append(override(module, forward))
    try:
        with streams.untouched(), fakes, Mended():
            if plan is not None:
                plan.work(None)
            note("", "result", contextvars.copy_context().run(call, copied))  # what it sets stays in the scan
    except Stopped:
        pass
    except Exception as e:
        found.ended = e
    finally:
        for restore in reversed(undo):
            restore()
        for module in copied.modules():
            take(module)
    return found


def _same(leaves: list) -> tuple[int, ...]:
    """For each leaf the first that is the same tensor, where two are: attention's query, key and value."""
    first: dict[int, int] = {}
    same = tuple(first.setdefault(id(x) if isinstance(x, torch.Tensor) else -i, i) for i, x in enumerate(leaves))
    return same if any(i != j for i, j in enumerate(same)) else ()


class Mended(TorchDispatchMode):
    """Where fakes say nothing, or what is not so.

    The shape of `torch._grouped_mm` (experts) in every dtype: torch 2.13's own takes bfloat16 only, its kernels float32 too. A
    quantised tensor is a fake float32 one there: the scan ends in front of it. Attention's fast path gives no weights, if none
    are asked for; its fake gives a tensor.
    """

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func._schema.name.startswith("aten::quantize_per"):
            raise NotImplementedError("there are no fakes of quantised tensors")
        if func is torch.ops.aten._grouped_mm.default and args[0].dim() == 2 and args[1].dim() == 3:
            return args[0].new_empty((args[0].shape[0], args[1].shape[2]))
        out = func(*args, **kwargs or {})
        if func is torch.ops.aten._native_multi_head_attention.default:
            return out if _given(func, args, kwargs, "need_weights") else (out[0], None)
        return out


def _given(func: Callable, args: tuple, kwargs: dict | None, name: str) -> object:
    """An argument of a call of an operator."""
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
    return named.get(name, next(a.default_value for a in func._schema.arguments if a.name == name))


class Clock:
    """Places in a run: a whole number for each site of a module, and fractions for what happens inside it before the next.

    So a scan that looks inside more modules gives every site the place it had: between two sites of modules only one
    module's own frame runs.
    """

    STEPS = 2**12  # more operations than that between two sites of modules share a place

    def __init__(self):
        self.hands = [-1]

    def tick(self, depth: int) -> float:
        self.hands[depth + 1 :] = []
        self.hands += [0] * (depth + 1 - len(self.hands))
        self.hands[depth] += 1
        if depth == 0:
            return self.hands[0]
        return self.hands[0] + sum(min(k, self.STEPS - 1) / self.STEPS**i for i, k in enumerate(self.hands) if i)


def _fire(
    plan: TensorInterleaver, site: Site, value: object, leaves: list, spec: tree.Spec
) -> tuple[object, list, tree.Spec]:
    old = list(leaves)
    firing = Firing(site, leaves, spec)
    plan.fire(firing)
    new_spec = plan.restructured.pop(site, spec)
    if new_spec != spec:
        value = tree.unflatten(leaves, new_spec, value)
    elif any(a is not b for a, b in zip(old, leaves, strict=True)):
        value = tree.replace(value, old, leaves)
    return value, leaves, new_spec
