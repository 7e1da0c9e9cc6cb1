"""The marker: the seam at which interventions enter, in captured code and in code that runs live.

While Dynamo traces, a hooked module passes each tensor of its inputs and outputs through `site`, an identity that
becomes a graph node. Where nothing captures, the same hook asks the active run what to do: that is the hook engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from types import FunctionType
from typing import Any, Protocol

import torch
import torch.fx as fx
import torch.nn as nn
from torch import Tensor
from torch.compiler import is_compiling
from transformers.utils.generic import ModelOutput

from ..compat.frames import compiled_from, seen_by_dynamo
from ..compat.modules import GLOBAL
from ..plan import tree
from ..plan.encode import Keep
from .operations import Operations

active = threading.local()  # .run: the run that this thread's markers belong to; .capture: what Dynamo traces for


class Passing(Protocol):
    """What the markers ask of a run."""

    owner: Markers

    def pass_site(self, path: str, kind: str, value: Any) -> Any: ...

    def skip(self, path: str, forward: Callable, args: tuple, kwargs: dict) -> Any: ...


WHOLE = 2  # the marker of a tensor that is the value itself: the last, and the only one


def site(x: torch.Tensor, path: str, kind: str, leaf: int, left: int) -> torch.Tensor:
    """Tensor leaf `leaf` of a site; how many tensors of the value are left, with this one. A graph node; identity.

    Where nobody has counted them `left` is 0, -1, -2, ...; of a tensor that is the value itself it is True. In the graph of a
    segment `close` has made it `last`: False, True, or `WHOLE`.
    """
    capture = getattr(active, "capture", None)
    return x if capture is None else capture.fake_site(x, path, kind, leaf, left)


def anchor() -> torch.Tensor:
    """What a marker passes where a site has no tensor. A graph node."""
    capture = getattr(active, "capture", None)
    return torch.empty(0) if capture is None else capture.fake_anchor()


def supply(path: str, kind: str, call: int, leaf: int) -> torch.Tensor:
    """A tensor that the plan puts where the model had none of this kind. A graph node."""
    return active.capture.fake_supply(path, kind, call, leaf)


def taken(path: str, kind: str, call: int) -> bool:
    """Has the plan replaced this site, or skipped this call, when the model comes by? Not where it waits for a later site.

    A constant to Dynamo (`Capture` says so, since saying it imports Dynamo)."""
    return active.capture.taken((path, kind, call))


class Replacement:
    """The capture half of a plan at one site: the tree that the model's Python gets to see."""

    def __init__(self, spec: tree.Spec, leaves: list):
        self.spec, self.leaves = spec, leaves  # a leaf: SUPPLIED, Keep(i), or the object itself


class Supplied:
    """A leaf that the spliced graph computes."""


SUPPLIED = Supplied()


# -- what Dynamo traces: plain recursion over the container types of `tracing.tree` --------------------------------


PLAIN = (bool, int, float, str)  # leaves that need no look inside
CONSTANT = (
    type(None),
    *PLAIN,
    complex,
    bytes,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    FunctionType,
)


def _children(value: Any) -> Any:
    """What a container has in it; None of a leaf."""
    if isinstance(value, ModelOutput) or type(value) is dict or type(value) is OrderedDict:
        return list(value.values())
    if type(value) is tuple or type(value) is list:
        return value
    # Types are asked nothing before here: torch 2.11's Dynamo refuses `hasattr` of those it has not seen in a variable.
    if isinstance(value, CONSTANT):
        return None
    if isinstance(value, tuple):
        return list(value) if hasattr(value, "_fields") or hasattr(value, "n_sequence_fields") else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, f.name) for f in dataclasses.fields(value)]
    return None


def _mark(value: Any, path: str, kind: str, leaf: int, left: int) -> tuple[Any, int, int]:
    """A value that is no tensor, with each tensor in it passed through `site`; the next leaf index; the tensors left.

    Leaves are looked at where they are found: a call is dear in Dynamo."""
    children = value if type(value) is tuple else _children(value)
    if children is None:
        return value, leaf + 1, left
    fresh, before = [], left
    for child in children:
        if isinstance(child, Tensor):
            child, leaf, left = site(child, path, kind, leaf, left), leaf + 1, left - 1
        elif child is None or isinstance(child, PLAIN):
            leaf = leaf + 1
        else:
            child, leaf, left = _mark(child, path, kind, leaf, left)
        fresh.append(child)
    if left == before:
        return value, leaf, left
    return tuple(fresh) if type(value) is tuple else _with(value, fresh), leaf, left


def _with(value: Any, fresh: list) -> Any:
    """A container with other children: a list, dict or dataclass itself, since its owner holds it; else a new one."""
    if isinstance(value, ModelOutput):
        return type(value)(**dict(zip(value.keys(), fresh, strict=True)))
    if isinstance(value, tuple):
        named = hasattr(value, "_fields") and not hasattr(value, "n_sequence_fields")
        return type(value)(*fresh) if named else type(value)(fresh)
    if type(value) is list:
        value[:] = fresh
    elif type(value) is dict or type(value) is OrderedDict:
        value.update(zip(list(value), fresh, strict=True))
    else:
        for f, child in zip(dataclasses.fields(value), fresh, strict=True):
            if child is not None and not isinstance(child, PLAIN):
                setattr(value, f.name, child)
    return value


def mark(value: Any, path: str, kind: str, counted: bool = False) -> Any:
    """`value` with markers, while Dynamo traces: one at least, also where it has no tensor. Its tensors are counted for a
    capture half, which wants to know of the last one when it comes by; else `close` does it."""
    if isinstance(value, Tensor):
        return site(value, path, kind, 0, True)
    left = sum([isinstance(x, Tensor) for x in _leaves(value)]) if counted else 0
    value, _, now = _mark(value, path, kind, 0, left)
    if now == left:
        site(anchor(), path, kind, 0, 1)
    return value


def close(graph: fx.Graph) -> None:
    """Say of each marker of a graph that has arrived whether it is the last of its value.

    ```
    site(a, "l", "input", 0, 0)           site(a, "l", "input", 0, False)
    site(b, "l", "input", 2, -1)    ->    site(b, "l", "input", 2, True)
    site(c, "m", "input", 0, 1)           site(c, "m", "input", 0, True)
    site(d, "m", "output", 0, True)       site(d, "m", "output", 0, WHOLE)
    ```
    """
    begins = True  # does the marker behind this one begin a value
    for node in reversed(graph.find_nodes(op="call_function", target=site)):
        left: Any = node.args[4]
        node.args = (*node.args[:4], WHOLE if left is True else left == 1 if left > 0 else begins)
        begins = left >= 0


def _leaves(value: Any) -> list:
    if not isinstance(value, Tensor):
        kids = _children(value)
        if kids is not None:
            found = []
            for child in kids:
                found.extend(_leaves(child))
            return found
    return [value]


def _build(spec: tree.Spec, leaves: list, at: int) -> tuple[Any, int]:
    if spec is None:
        return leaves[at], at + 1
    kind, cls, keys, specs = spec
    values = []
    for s in specs:
        value, at = _build(s, leaves, at)
        values.append(value)
    if kind == "tuple":
        return tuple(values), at
    if kind == "list":
        return values, at
    if kind == "namedtuple":
        return cls(*values), at
    if kind == "structseq":
        return cls(values), at
    if kind == "dict" and (cls is dict or cls is OrderedDict):
        return cls(zip(keys, values, strict=True)), at
    return cls(**dict(zip(keys, values, strict=True))), at


def _alike(value: Any, spec: tree.Spec) -> bool:
    """Has `value` the structure of `spec`?"""
    kids = None if isinstance(value, Tensor) else _children(value)
    if kids is None:
        return spec is None
    if spec is None or spec[1] is not type(value) or len(spec[3]) != len(kids):
        return False
    if spec[0] == "dict" and list(spec[2]) != list(value):
        return False
    return all([_alike(child, of) for child, of in zip(kids, spec[3], strict=True)])


def _filled(value: Any, spec: tree.Spec, leaves: list, at: int) -> tuple[Any, int]:
    """`value` with other leaves: lists, dicts and dataclasses in place, since their owner holds them (`tree.replace`)."""
    if spec is None:
        return leaves[at], at + 1
    if isinstance(value, tuple | ModelOutput):
        items = []
        for child, of in zip(_children(value), spec[3], strict=True):
            item, at = _filled(child, of, leaves, at)
            items.append(item)
        return _build((*spec[:3], [None] * len(items)), items, 0)[0], at
    if spec[0] == "list":
        for i in range(len(value)):
            value[i], at = _filled(value[i], spec[3][i], leaves, at)
        return value, at
    for key, of in zip(spec[2], spec[3], strict=True):
        if spec[0] == "dict":
            value[key], at = _filled(value[key], of, leaves, at)
        else:
            new, at = _filled(getattr(value, key), of, leaves, at)
            setattr(value, key, new)
    return value, at


def _replaced(value: Any, path: str, kind: str, call: int, half: Replacement) -> Any:
    """The capture half, as Dynamo traces it."""
    old = _leaves(value)
    new = []
    for i in range(len(half.leaves)):
        leaf = half.leaves[i]
        if isinstance(leaf, Keep):
            leaf = SUPPLIED if isinstance(old[leaf.index], torch.Tensor) else old[leaf.index]
        new.append(supply(path, kind, call, i) if leaf is SUPPLIED else leaf)
    return (_filled(value, half.spec, new, 0) if _alike(value, half.spec) else _build(half.spec, new, 0))[0]


class Holding:
    """Keeps objects while their ids are compared: part of a key, and equal to any other."""

    def __init__(self, objects: list):
        self.objects = objects

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Holding)


class Markers:
    """The hooks of one wrapped model, ready to be put on its modules for the length of a run."""

    def __init__(self, root: nn.Module):
        self.paths: dict[nn.Module, str] = {m: name for name, m in root.named_modules()}
        self.states = [m.__dict__ for m in self.paths]
        self.hooks = {m: self._hooks(path) for m, path in self.paths.items()}
        self.calls_of: dict[tuple[nn.Module, bool], partial] = {}
        self.half: dict[tuple[str, str, int], Replacement] | None = None  # the capture half of the active run
        self.stop_at: tuple[str, str, int] | None = None
        self.skippers: dict[nn.Module, Callable] = {}
        self.originals: dict[nn.Module, Callable] = {}
        self.skip_live: dict[nn.Module, Callable] = {}
        self.operations = Operations(self)
        self.calls: dict[tuple[str, str], list[None]] = {}  # counted by Dynamo itself, for modules in the capture half

    def _hooks(self, path: str) -> tuple[Callable, Callable]:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            if is_compiling():
                return self.traced((args, kwargs), path, "input")
            run = getattr(active, "run", None)
            if run is None or run.owner is not self:
                return None
            old = (args, kwargs)
            new = run.pass_site(path, "input", old)
            return None if new is old else new

        def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if is_compiling():
                return self.traced(output, path, "output")
            run = getattr(active, "run", None)
            if run is None or run.owner is not self:
                return None
            new = run.pass_site(path, "output", output)
            return None if new is output else new

        return before, after

    def short(self, module: nn.Module) -> Callable | None:
        """What calls a module of which the capture half says nothing, and which has no hooks but ours and, behind them, those
        that transformers collects outputs with."""
        path, collectors, counted = self.paths[module], tuple(module._forward_hooks.values()), self.half is not None
        if any((path, kind) in self.calls for kind in ("input", "output", "skip")):
            return None
        if collectors and (
            module._forward_pre_hooks
            or module._forward_hooks_with_kwargs
            or module._forward_hooks_always_called
            or not all(map(_librarys, collectors))
        ):
            return None
        made = self.calls_of.get((module, counted))
        if made is None or made.args[2:-1] != (collectors,) * bool(collectors):
            call = partial(among, path, counted, collectors) if collectors else partial(between, path, counted)
            made = self.calls_of[module, counted] = partial(call, module)
        return made

    def traced(self, value: Any, path: str, kind: str) -> Any:
        """A site while Dynamo traces: the graph half is left to splicing, the capture half is applied now."""
        value = mark(value, path, kind, self.half is not None)
        if self.half is None or (path, kind) not in self.calls:
            return value
        call = _next(self.calls[(path, kind)])
        if (path, kind, call) in self.half and taken(path, kind, call):
            value = _replaced(value, path, kind, call, self.half[(path, kind, call)])
        if self.stop_at == (path, kind, call):
            raise Stop
        return value

    def skip_traced(self, path: str) -> tuple[bool, Any]:
        """While Dynamo traces: is this call skipped, and its output then."""
        if self.half is None or (path, "skip") not in self.calls:
            return False, None
        call = _next(self.calls[(path, "skip")])
        if (path, "skip", call) not in self.half or not taken(path, "skip", call):
            return False, None
        half = self.half[(path, "skip", call)]
        return True, _build(half.spec, _supplied(path, call, half), 0)[0]

    def running(self) -> Any:
        """The run that this model's markers belong to now, if there is one."""
        run = getattr(active, "run", None)
        return run if run is not None and run.owner is self else None

    def forward_of(self, module: nn.Module) -> Callable:
        """A module's own `forward`, also where a skip stands in for it."""
        now = module.forward
        ours = (self.skippers.get(module), self.operations.bodies.get(self.paths[module]))
        return self.originals[module] if any(now is f for f in ours if f is not None) else now

    def own(self) -> tuple:
        """What the user, or a library, has put on the modules: hooks, and functions in place of `forward`. A function is its
        code, as it is to Dynamo, which guards what is in its closure."""
        found: list = [getattr(f, "__code__", f) for hooks in GLOBAL for f in hooks.values()]
        for state in self.states:
            before, after = state["_forward_pre_hooks"], state["_forward_hooks"]
            if before or after or "forward" in state or "_compiled_call_impl" in state:
                functions = (*before.values(), *after.values(), state.get("forward"), state.get("_compiled_call_impl"))
                found += (before, after, *(getattr(f, "__code__", f) for f in functions))
                found += (getattr(f, "__self__", None) for f in functions)
        return tuple(map(id, found)), Holding(found)

    def hooked(self) -> bool:
        """Are there hooks of the user's on any module?"""
        tables = [(state["_forward_pre_hooks"], state["_forward_hooks"]) for state in self.states]
        return any(key != KEY and not _librarys(hook) for pair in tables for t in pair for key, hook in t.items())

    def skipper(self, module: nn.Module, skip: Callable) -> Callable:
        """The `forward` that a skipped module has for the length of a run; one function a module, as Dynamo guards on it."""
        self.skip_live[module] = skip
        if module not in self.skippers:
            path, original = self.paths[module], module.forward
            self.originals[module] = original

            def forward(*args: Any, **kwargs: Any) -> Any:
                body = self.operations.bodies.get(path, original)
                if is_compiling():
                    skipped, out = self.skip_traced(path)
                    return out if skipped else body(*args, **kwargs)
                return self.skip_live[module](body, args, kwargs)

            self.skippers[module] = forward
        return self.skippers[module]

    @contextlib.contextmanager
    def installed(
        self, modules: list[nn.Module], skips: dict[str, Callable], frames: Collection[str] = ()
    ) -> Iterator[None]:
        """The hooks on `modules` and `forward` replaced where a plan skips or looks inside, for the length of a block; nothing
        stays."""
        undo: list[Callable[[], None]] = []
        outer, self.skip_live = self.skip_live, {}  # each knows its run
        try:
            self.operations.bodies, self.operations.inner = {}, {}
            for module, name, own in uncompiled(self.paths):
                undo += [override(module, own, name), *filter(None, [seen_by_dynamo(module)])]
            for module, body in list(self.operations.use(frames)):
                if self.paths[module] not in skips:  # else what replaces it calls this body
                    self.originals[module] = module.forward
                    undo.append(override(module, body))
            short = not any(GLOBAL)
            for module in modules:
                call = self.short(module) if short else None
                put(module, *self.hooks[module])
                if call is not None:
                    undo.append(override(module, call, "_compiled_call_impl"))
                if skips and self.paths[module] in skips:
                    undo.append(override(module, self.skipper(module, skips[self.paths[module]])))
            yield
        finally:
            for restore in reversed(undo):
                restore()
            for module in modules:
                take(module)
            self.operations.bodies, self.operations.inner = {}, {}
            self.skip_live = outer


def _next(calls: list[None]) -> int:
    """Which call this is. The length of a list: of a number Dynamo would make a symbol."""
    calls.append(None)
    return len(calls) - 1


def _supplied(path: str, call: int, half: Replacement) -> list:
    """The leaves of a skipped module's output, while Dynamo traces."""
    new = []
    for i in range(len(half.leaves)):
        leaf = half.leaves[i]
        new.append(supply(path, "skip", call, i) if leaf is SUPPLIED else leaf)
    return new


class Stop(Exception):
    """Ends a forward that Dynamo traces; the captured function catches it."""


TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def between(path: str, counted: bool, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """A module's `forward` between its two sites: what `__call__` calls for the length of a run. Are the tensors of a value
    `counted`, for a capture half?"""
    return among(path, counted, (), module, *args, **kwargs)


def among(
    path: str, counted: bool, collectors: tuple[Callable, ...], module: nn.Module, /, *args: Any, **kwargs: Any
) -> Any:
    """The same, with the hooks behind ours that transformers collects outputs with.

    On torch's way through hooks Dynamo reads three times the instructions, and guards on what each of them holds. This it does
    not read either, but for what is rare: `variables.among` does the same on its own variables."""
    if sum([len(getattr(module, table)) for table in TABLES]) != 2 + len(collectors):  # hooked while the model runs
        return module._call_impl(*args, **kwargs)
    if is_compiling():
        args, kwargs = mark((args, kwargs), path, "input", counted)
        out = mark(module.forward(*args, **kwargs), path, "output", counted)
    else:
        before, after = module._forward_pre_hooks[KEY], module._forward_hooks[KEY]
        args, kwargs = before(module, args, kwargs) or (args, kwargs)
        out = module.forward(*args, **kwargs)
        changed = after(module, args, kwargs, out)
        out = out if changed is None else changed
    for collect in collectors:
        changed = collect(module, args, out)
        out = out if changed is None else changed
    return out


KEY = -1  # the key of our hooks in every table, which torch counts from 0: Dynamo guards on it, so it never changes


def put(module: nn.Module, before: Callable, after: Callable) -> None:
    """Hook one module: inputs before every other hook; outputs after the user's, before transformers' own collectors."""
    if module._forward_pre_hooks or module._forward_hooks:
        _insert(module._forward_pre_hooks, before, lambda hook: True)
        _insert(module._forward_hooks, after, _librarys)
    else:
        module._forward_pre_hooks[KEY] = before
        module._forward_hooks[KEY] = after
    module._forward_pre_hooks_with_kwargs[KEY] = True
    module._forward_hooks_with_kwargs[KEY] = True


def _librarys(hook: Any) -> bool:
    """Is it one of those that transformers collects outputs with?"""
    return (getattr(hook, "__module__", "") or "").startswith("transformers.")


def take(module: nn.Module) -> None:
    """Take the hooks off again."""
    module._forward_pre_hooks.pop(KEY, None)
    module._forward_hooks.pop(KEY, None)
    module._forward_pre_hooks_with_kwargs.pop(KEY, None)
    module._forward_hooks_with_kwargs.pop(KEY, None)


def _insert(table: dict, hook: Callable, comes_after: Callable[[Any], bool]) -> None:
    """Insert `hook` in front of those that come after it. By taking them out and in again: Dynamo guards on the order of
    insertion, which `move_to_end` leaves as it is."""
    later = [(key, other) for key, other in table.items() if comes_after(other)] if table else []
    for key, _ in later:
        del table[key]
    table[KEY] = hook
    table.update(later)


def uncompiled(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Callable | None]]:
    """`(module, attribute, what the user compiled)` for each module that he did: compiled code passes no markers."""
    found: list[tuple[nn.Module, str, Callable | None]] = []
    for m in modules:
        if m.__dict__.get("_compiled_call_impl") is not None:  # `module.compile()`
            found.append((m, "_compiled_call_impl", None))
        if "forward" in m.__dict__:  # `torch.compile(module)`, `module.forward = torch.compile(module.forward)`
            own = compiled_from(m.__dict__["forward"])
            if own is not None:
                found.append((m, "forward", own))
    return found


def override(module: nn.Module, function: Callable | None, name: str = "forward") -> Callable[[], None]:
    """Replace an instance's `forward`, or another method; the undo puts back exactly what was there."""
    had = name in module.__dict__
    old = module.__dict__.get(name)
    module.__dict__[name] = function

    def restore() -> None:
        if had:
            module.__dict__[name] = old
        else:
            module.__dict__.pop(name, None)

    return restore
