"""The hooks of one wrapped model: where interventions enter, in captured code and in code that runs live.

While Dynamo traces, a hook passes each tensor of a module's inputs and outputs through a marker (`marker.py`). Where nothing
captures, the same hook asks the active run what to do: that is the hook engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, Protocol

import torch.nn as nn
from torch.compiler import is_compiling

from ..compat.frames import seen_by_dynamo
from ..compat.modules import GLOBAL, comes_and_goes
from .hook_tables import KEY, TABLES, override, put, take, uncompiled
from .marker import active, taken
from .marking import Replacement, mark, replaced, skipped_output
from .operations import Operations
from .repeats import blocks


class Passing(Protocol):
    """What the markers ask of a run."""

    owner: Markers

    def pass_site(self, path: str, kind: str, value: object) -> object: ...

    def skip(self, path: str, forward: Callable, args: tuple, kwargs: dict) -> object: ...


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
        self.blocks = blocks(root)
        self.calls_of: dict[tuple[nn.Module, bool], partial] = {}
        self.half: dict[tuple[str, str, int], Replacement] | None = None  # the capture half of the active run
        self.stop_at: tuple[str, str, int] | None = None
        self.skippers: dict[nn.Module, Callable] = {}
        self.originals: dict[nn.Module, Callable] = {}
        self.skip_live: dict[nn.Module, Callable] = {}
        self.operations = Operations(self)
        self.calls: dict[tuple[str, str], list[None]] = {}  # counted by Dynamo itself, for modules in the capture half

    def _hooks(self, path: str) -> tuple[Callable, Callable]:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> object:
            if is_compiling():
                return self.traced((args, kwargs), path, "input")
            run = getattr(active, "run", None)
            if run is None or run.owner is not self:
                return None
            old = (args, kwargs)
            new = run.pass_site(path, "input", old)
            return None if new is old else new

        def after(module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
            if is_compiling():
                return self.traced(output, path, "output")
            run = getattr(active, "run", None)
            if run is None or run.owner is not self:
                return None
            new = run.pass_site(path, "output", output)
            return None if new is output else new

        return before, after

    def short(self, module: nn.Module) -> Callable | None:
        """What calls a module in place of torch's `_call_impl`; `None` where that has to.

        It has to where the capture half says something of the module, and where it has hooks other than ours and, behind
        them, those by which transformers collects outputs."""
        path, collectors, counted = self.paths[module], tuple(module._forward_hooks.values()), self.half is not None
        if any((path, kind) in self.calls for kind in ("input", "output", "skip")):
            return None
        if collectors and (
            module._forward_pre_hooks
            or module._forward_hooks_with_kwargs
            or module._forward_hooks_always_called
            or not all(map(comes_and_goes, collectors))
        ):
            return None
        made = self.calls_of.get((module, counted))
        if made is None or made.args[2:-1] != (collectors,) * bool(collectors):
            plain = block if module in self.blocks else between
            call = partial(among, path, counted, collectors) if collectors else partial(plain, path, counted)
            made = self.calls_of[module, counted] = partial(call, module)
        return made

    def traced(self, value: object, path: str, kind: str) -> Any:
        """A site while Dynamo traces: the graph half is left to splicing, the capture half is applied now."""
        value = mark(value, path, kind, self.half is not None)
        if self.half is None or (path, kind) not in self.calls:
            return value
        call = _next(self.calls[(path, kind)])
        if (path, kind, call) in self.half and taken(path, kind, call):
            value = replaced(value, path, kind, call, self.half[(path, kind, call)])
        if self.stop_at == (path, kind, call):
            raise Stop
        return value

    def skip_traced(self, path: str) -> tuple[bool, object]:
        """While Dynamo traces: is this call skipped, and its output then."""
        if self.half is None or (path, "skip") not in self.calls:
            return False, None
        call = _next(self.calls[(path, "skip")])
        if (path, "skip", call) not in self.half or not taken(path, "skip", call):
            return False, None
        return True, skipped_output(path, call, self.half[(path, "skip", call)])

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
        return any(key != KEY and not comes_and_goes(hook) for pair in tables for t in pair for key, hook in t.items())

    def skipper(self, module: nn.Module, skip: Callable) -> Callable:
        """The `forward` that a skipped module has for the length of a run; one function a module, as Dynamo guards on it."""
        self.skip_live[module] = skip
        if module not in self.skippers:
            path, original = self.paths[module], module.forward
            self.originals[module] = original

            def forward(*args: object, **kwargs: object) -> object:
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


class Stop(Exception):
    """Ends a forward that Dynamo traces; the captured function catches it."""


def between(path: str, counted: bool, module: nn.Module, /, *args: object, **kwargs: object) -> object:
    """A module's `forward` between its two sites. `__call__` calls it for the length of a run.

    `counted` says whether the tensors of a value are counted, for a capture half."""
    return among(path, counted, (), module, *args, **kwargs)


def block(path: str, counted: bool, module: nn.Module, /, *args: object, **kwargs: object) -> object:
    """`between`, of a module that may repeat another: `variables.block`."""
    return among(path, counted, (), module, *args, **kwargs)


def among(
    path: str, counted: bool, collectors: tuple[Callable, ...], module: nn.Module, /, *args: object, **kwargs: object
) -> object:
    """The same, and behind ours run the hooks by which transformers collects outputs.

    Without it Dynamo would read torch's own code for hooks, which is three times as long, and guard on what each hook holds.
    Dynamo does not trace this function except for dicts, dataclasses and late hooks: `variables.among` does the same on Dynamo's
    own variables."""
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
