"""Equal blocks are traced once: what Dynamo made of a model's second block is put into the graph again for the third.

A block is a module in a list of modules of its class. It repeats another where the two are alike, module by module, and where
all holds for it that Dynamo found of the other one (`compat/repeats.py`). Else it is traced, as the first one is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import torch.fx as fx
import torch.nn as nn

from .. import compat
from ..compat.repeats import Translator, Variable
from .hook_tables import TABLES
from .marker import is_marker, marker_of

ENTRY = "nnsight_fx_entry_"  # how the name of the code begins that captures a whole model
TRIED = 4  # stretches of one class that are kept: some models have blocks of a few kinds
CALL = "_compiled_call_impl"  # where our call of a module is
_PLAIN = (type(None), bool, int, float, str, tuple)


class Stretches:
    """The stretches of one trace, by the class of their block."""

    def __init__(self) -> None:
        self.of: dict[type, list[tuple[nn.Module, compat.repeats.Stretch]]] = {}
        self.repeated = 0


_traces: weakref.WeakKeyDictionary[object, Stretches] = weakref.WeakKeyDictionary()


def repeats_of(context: object) -> int:
    """How many blocks of a trace repeat another one; of its context (`compat.graphs.tracing_context`)."""
    found = _traces.get(context)
    return 0 if found is None else found.repeated


def blocks(root: nn.Module) -> set[nn.Module]:
    """The modules of a model that may repeat one another."""
    found: set[nn.Module] = set()
    for parent in root.modules():
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            kinds = [type(child) for child in parent]
            found.update(child for child in parent if kinds.count(type(child)) > 2 and any(child.children()))
    return found


def repeated(tx: Translator, module: Variable, given: tuple[list, dict], trace: Callable[[], Variable]) -> Variable:
    """A block's result: from a stretch that holds for it, or by `trace`, which then is a stretch for others."""
    found = compat.repeats.module_of(module)
    if found is None or not compat.repeats.known() or not compat.repeats.name_of(tx).startswith(ENTRY):
        return trace()
    block, source = found
    stretches = _traces.setdefault(tx.output.tracing_context, Stretches())
    kept = stretches.of.setdefault(type(block), [])
    for other, stretch in reversed(kept):
        paths = _alike(other, block)
        if paths is None:
            continue
        try:
            out = stretch.again(tx, source, given, partial(_retold, paths))
        except compat.repeats.Unlike:
            continue
        stretches.repeated += 1
        return out
    try:
        begun = compat.repeats.Beginning(tx, source, given)
    except compat.repeats.Unlike:
        return trace()
    try:
        out = trace()
        try:
            stretch = begun.ended(tx, out)
        except compat.repeats.Unlike:
            return out
    finally:
        begun.close()
    kept.append((block, stretch))
    del kept[:-TRIED]
    return out


def _retold(paths: dict[str, str], node: fx.Node) -> tuple:
    """The arguments of a node, of another block: its markers name other sites."""
    if not is_marker(node):
        return node.args
    marker = marker_of(node)
    if marker.path not in paths:
        raise compat.repeats.Unlike(f"{marker.path} is called in it")
    return marker.value, paths[marker.path], *node.args[2:]


def _alike(one: nn.Module, other: nn.Module) -> dict[str, str] | None:
    """The paths of one block's modules, each with that of the module that is alike in the other; `None` if they differ."""
    paths: dict[str, str] = {}
    mine, its = list(one.named_modules(remove_duplicate=False)), list(other.named_modules(remove_duplicate=False))
    if len(mine) != len(its):
        return None
    for (name, a), (named, b) in zip(mine, its, strict=True):
        if name != named or type(a) is not type(b) or a.training != b.training or not _same_tensors(a, b):
            return None
        if a.__dict__.keys() != b.__dict__.keys():  # that there is none Dynamo does not guard everywhere
            return None
        path, new = _path(a), _path(b)
        if path is None or new is None or paths.setdefault(path, new) != new:
            return None
        if type(a).__module__.startswith("torch.nn.") and _plain(a) != _plain(b):  # of these Dynamo guards less
            return None
    return paths


def _path(module: nn.Module) -> str | None:
    """The path by which our call of a module marks its sites; `None` if something else is on the module."""
    call = module.__dict__.get(CALL)
    if not isinstance(call, partial) or len(call.args) != 3 or call.args[1]:  # path, counted, module
        return None
    hooked = sum(len(getattr(module, table)) for table in TABLES) != 2
    return None if hooked or "forward" in module.__dict__ else call.args[0]


def _same_tensors(a: nn.Module, b: nn.Module) -> bool:
    return all(
        getattr(a, table).keys() == getattr(b, table).keys()
        and all(
            compat.given.described(x) == compat.given.described(getattr(b, table)[name])
            for name, x in getattr(a, table).items()
        )
        for table in ("_parameters", "_buffers")
    )


def _plain(module: nn.Module) -> dict[str, object]:
    return {name: x for name, x in module.__dict__.items() if isinstance(x, _PLAIN)}
