"""The operations inside modules, on the model itself: rewritten `forward`s, put in place for the length of a run.

An operation has sites as a module has, under the path `<module path>.source.<name>`; what it calls has operations of its
own, under `<that path>.source.<name>`. All paths that end in `.source` are *frames*.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from . import source

if TYPE_CHECKING:
    from ..plan.plan import InterventionGraph
    from .markers import Markers


def frame(path: str) -> str:
    """The frame of a module or of what an operation calls."""
    return f"{path}.source" if path else "source"


def owner(frame: str) -> str:
    """The module or operation whose frame it is."""
    return frame.removesuffix("source").removesuffix(".")


def frames_of(paths: Iterable[str], modules: Container[str]) -> frozenset[str]:
    """The frames in which the operations among `paths` are."""
    found = set()
    for path in paths:
        while path not in modules and (within := path.rpartition(".")[0]).split(".")[-1] == "source":
            found.add(within)
            path = owner(within)
    return frozenset(found)


def alike(frames: Iterable[str], root: nn.Module, called: Mapping[str, object]) -> frozenset[str]:
    """The same frames of other modules of a class: who looks into one layer's attention looks into the next one's, too.

    Inside an operation only where those call the same function: `called` has what each called.
    """
    named, found = dict(root.named_modules()), set()
    for frame in frames:
        path = f".{frame}.".split(".source.")[0].removeprefix(".")
        module = named.get(path)
        if module is None or not path or "forward" in vars(module):
            continue
        rest = frame.removeprefix(path)
        function = _function(called.get(owner(frame)))
        for other, same in named.items():
            if type(same) is not type(module) or "forward" in vars(same):
                continue
            inside = rest != ".source"
            if not inside or (function is not None and _function(called.get(owner(other + rest))) is function):
                found.add(other + rest)
    return frozenset(found)


def _function(called: object) -> object:
    return getattr(called, "__func__", called)


class Operations:
    """The rewritten functions of one wrapped model, made once; those of a run are in `bodies` and `inner`."""

    def __init__(self, markers: Markers):
        self.markers = markers
        self.modules = {path: module for module, path in markers.paths.items()}
        self.known: dict[str, tuple[FunctionType, bool]] = {}  # operation -> the function it calls, and is it a method
        self.made: dict[
            str, tuple[FunctionType, FunctionType, bool]
        ] = {}  # frame -> function, rewritten, is it a method
        self.touched: weakref.WeakKeyDictionary[object, frozenset[str]] = weakref.WeakKeyDictionary()  # by plan
        self.bodies: dict[str, Callable] = {}
        self.inner: dict[str, tuple[FunctionType, FunctionType, bool]] = {}

    def frames(self, plan: InterventionGraph) -> frozenset[str]:
        """The frames that a plan touches."""
        if plan not in self.touched:
            self.touched[plan] = frames_of((path for path, _ in plan.watched), self.modules)
        return self.touched[plan]

    def use(self, frames: Iterable[str]) -> Iterator[tuple[nn.Module, Callable]]:
        """Have these frames observed; gives the modules and the `forward` they shall have."""
        for name in sorted(frames):
            path = owner(name)
            if path not in self.modules:
                self.inner[path] = self.rewritten(name, *self.known[path])
            elif path not in self.bodies:
                module = self.modules[path]
                made = self.rewritten(name, *source.plain(self.markers.forward_of(module)))
                self.bodies[path] = MethodType(made[1], module) if made[2] else made[1]
                yield module, self.bodies[path]

    def rewritten(self, name: str, function: FunctionType, method: bool) -> tuple[FunctionType, FunctionType, bool]:
        found = self.made.get(name)
        if found is None or found[0] is not function:
            found = self.made[name] = (function, source.instrumented(function, self.op(name)), method)
        return found

    def op(self, name: str) -> Callable:
        def op(name: str, fn: Callable, /, *args: object, **kwargs: object) -> object:
            path = prefix + name
            if torch.compiler.is_compiling():
                return self.traced(path, fn, args, kwargs)
            run = self.markers.running()
            if run is None:
                return args[0] if fn is None else fn(*args, **kwargs)
            return run.operation(path, self.target(path, fn), args, kwargs)

        prefix = name + "."
        return op

    def target(self, path: str, fn: Any) -> Any:
        """What an operation calls: as written, or the rewritten function where the plan looks into it."""
        if fn is None:
            return identity
        if path not in self.inner:
            return fn
        function, made, method = self.inner[path]
        if method:
            return MethodType(made, fn.__self__) if getattr(fn, "__func__", None) is function else fn
        return made if fn is function else fn

    def traced(self, path: str, fn: object, args: tuple, kwargs: dict) -> Any:
        """An operation while Dynamo traces."""
        args, kwargs = self.markers.traced((args, kwargs), path, "input")
        skipped, out = self.markers.skip_traced(path)
        if not skipped:
            out = args[0] if fn is None else self.target(path, fn)(*args, **kwargs)
        return self.markers.traced(out, path, "output")


def identity(value: object) -> object:
    """What an assignment calls."""
    return value
