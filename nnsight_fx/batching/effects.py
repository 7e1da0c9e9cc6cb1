"""What a model's forward does beside computing values: seen in a forward on fakes, once a signature."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from ..compat.modes import TorchDispatchMode
from ..compat.tensors import memory
from ..plan import tree
from ..plan.tree import PLAIN
from ..scan.scan import callee, scan


class Effect(NamedTuple):
    """What a forward does, in words: was it seen to draw numbers or to change a tensor of the model's, and whatever counts as that."""

    seen: str | None
    why: str | None


_known: weakref.WeakKeyDictionary[object, Effect] = weakref.WeakKeyDictionary()


def effects(host: object, signature: object, fn: str | None) -> str | None:
    """In words, what the forward does to the model, its input or the random state; `None` when that is nothing.

    Python's own state is compared by the attributes of the modules. What no fake forward gets through counts as doing
    something.
    """
    return _effect(host, signature, fn).why


def moves(host: object, signature: object, fn: str | None) -> str | None:
    """In words, the random draws and changes of the model's tensors that were seen; what is not known, and plain attributes, count as none."""
    return _effect(host, signature, fn).seen


def _effect(host: object, signature: object, fn: str | None) -> Effect:
    if signature not in _known:
        _known[signature] = _look(host, signature, fn)
    return _known[signature]


def _look(host: Any, signature: Any, fn: str | None) -> Effect:
    if signature.scan.ended is not None:
        return Effect(None, "the model cannot be scanned, so what its forward does is not known")
    scanner = host.scanner
    copied = scanner.skeleton()
    args, kwargs = signature.inputs()
    tensors = [*copied.parameters(), *copied.buffers(), *tree.flatten((args, kwargs))[0]]
    watch = Effects([x for x in tensors if isinstance(x, torch.Tensor)])
    before = dict(_attributes(copied))

    def call(module: nn.Module) -> Any:
        with watch:
            return callee(module, fn)(*args, **kwargs)

    scanner.shapes.guessing = True
    try:
        ended = scan(copied, call, scanner.fakes).ended
    finally:
        scanner.shapes.guessing = False
    if watch.found is None and ended is not None:
        return Effect(None, "the model cannot be scanned, so what its forward does is not known")
    after = dict(_attributes(copied))
    moved = [name for name in before.keys() | after.keys() if not _same(before.get(name), after.get(name))]
    return Effect(watch.found, watch.found or (f"the model sets `{min(moved)}`" if moved else None))


class Effects(TorchDispatchMode):
    """Notes random draws, and in-place changes of `tensors`."""

    def __init__(self, tensors: list[torch.Tensor]):
        super().__init__()
        self.storages = {memory(x) for x in tensors if x.layout is torch.strided}
        self.found: str | None = None

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        if self.found is None:
            self.found = self._effect(func, args, kwargs)
        return func(*args, **kwargs)

    def _effect(self, func: Callable, args: tuple, kwargs: dict) -> str | None:
        if draws(func, args, kwargs):
            return f"the model draws random numbers (`{func}`)"
        given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
        if "batch_norm" in func._schema.name and (given.get("training") or given.get("train")):
            return "the model moves running statistics"
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tree.flatten(given.get(argument.name))[0]:
                    if isinstance(x, torch.Tensor) and memory(x) in self.storages:
                        return f"the model changes a buffer, a parameter or its input in place (`{func}`)"
        return None


def draws(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Does an operation take from the random state?"""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
    names = {a.name: a.default_value for a in func._schema.arguments}
    for name in ("dropout_p", "p", "dropout"):
        if name in names and isinstance(given.get(name, names[name]), (int, float)):
            return given.get(name, names[name]) > 0
    return True


def _attributes(root: nn.Module) -> Iterator[tuple[str, object]]:
    """What each module holds beside its hooks: plain values, the length of containers, the identity of the rest."""
    for path, module in root.named_modules():
        tables = {k: v for k, v in vars(module).items() if k in ("_buffers", "_parameters", "_modules")}
        for name, value in [*vars(module).items(), *(item for t in tables.values() for item in t.items())]:
            if name.endswith("_hooks") or "_hooks_" in name or name in tables:
                continue
            size = len(value) if isinstance(value, list | dict | set) else None
            yield ".".join(p for p in (path, name) if p), (value, size)


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None or a[1] != b[1]:
        return False
    return a[0] is b[0] or (type(a[0]) is type(b[0]) and isinstance(a[0], PLAIN) and a[0] == b[0])
