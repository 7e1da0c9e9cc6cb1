"""What a result was made from: digests of weights, inputs and programs, versions and hardware, for a manifest that can be cited."""

from __future__ import annotations

import datetime
import functools
import hashlib
import inspect
import os
import sys
import types
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn as nn

from ..envoys.envoy import Observed, host_of
from ..plan import tree
from .bug_report import versions

if TYPE_CHECKING:
    from ..envoys.envoy import Envoy


PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, slice, range)


def of_model(model: Envoy) -> dict[str, object]:
    """Which model: its class, and digests of its structure (modules, configuration, edits) and of its weights."""
    model.dispatch()
    module = model._module
    config = getattr(module, "config", None)
    told = config.to_dict() if hasattr(config, "to_dict") else {}  # type: ignore[union-attr]
    told = {k: v for k, v in told.items() if k not in ("_name_or_path", "transformers_version")}
    structure = (str(module), repr(sorted(told.items(), key=lambda kv: kv[0])), [m.training for m in module.modules()])
    return {
        "model": type(module).__name__,
        "structure": hashed(structure, [[repr(e.ops), e.constants] for e in host_of(model).edits]),
        "weights": hashed([*module.named_parameters(), *module.named_buffers()]),
    }


def environment(model: Envoy, compile: object) -> dict[str, object]:
    """The engine, versions, hardware, and when."""
    capture, _ = host_of(model).captured_by(compile)
    return {
        "engine": "hooks" if capture is None else str(capture.options),
        "versions": versions(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def hardware() -> dict[str, object]:
    """The processor, its cores, memory in bytes, and the GPUs."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()


def hashed(*values: object) -> str:
    """A digest of tensors, containers, functions (their text and what they refer to), modules, objects and plain values.

    Objects of installed libraries count by their class alone; a wrapped model and its envoys by their paths.
    """
    feed = _Feed()
    for value in values:
        feed.add(value)
    return feed.digest.hexdigest()


class _Feed:
    def __init__(self):
        self.digest = hashlib.blake2b(digest_size=16)
        self.seen: dict[int, tuple[int, object]] = {}

    def text(self, text: str) -> None:
        self.digest.update(f"{len(text)}:{text}".encode())

    def add(self, value: object) -> None:
        if isinstance(value, PLAIN):
            return self.text(repr(value))
        if id(value) in self.seen:
            return self.text(f"again {self.seen[id(value)][0]}")
        self.seen[id(value)] = len(self.seen), value  # which keeps it, and its id, for as long
        if isinstance(value, torch.Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray):
            self._tensor(torch.from_numpy(np.ascontiguousarray(value)))
        elif isinstance(value, Observed):
            self.text(str(value.path))
        elif isinstance(value, nn.Module):
            self.text(str(value))
            self._items([*value.named_parameters(), *value.named_buffers()])
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._items([value.__func__, value.__self__])
        elif isinstance(value, functools.partial):
            self._items([value.func, *value.args, value.keywords])
        elif isinstance(value, Mapping):
            self.text(type(value).__qualname__)
            self._items([part for item in value.items() for part in item])
        elif isinstance(value, set | frozenset):
            self.text(repr(sorted(map(repr, value))))
        elif (parts := tree.children(value)) is not None:
            self.text(f"{type(value).__qualname__} {parts[1]!r}")
            self._items(parts[2])
        elif isinstance(value, types.ModuleType | types.BuiltinFunctionType | type) or _installed(type(value)):
            self.text(str(getattr(value, "__qualname__", getattr(value, "__name__", type(value).__qualname__))))
        else:
            self.text(type(value).__qualname__)
            self._items([f for f in vars(type(value)).values() if isinstance(f, types.FunctionType)])
            self._items([part for item in getattr(value, "__dict__", {}).items() for part in item])

    def _items(self, values: Iterable) -> None:
        for value in values:
            self.add(value)

    def _tensor(self, value: torch.Tensor) -> None:
        plain = value.detach().cpu().contiguous()
        self.text(f"{tuple(plain.shape)} {plain.dtype}")
        if plain.numel():
            self.digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)

    def _function(self, value: types.FunctionType) -> None:
        self.text(_text(value))
        if _installed(value):
            return
        self._items(c.cell_contents for c in value.__closure__ or () if not _empty(c))
        self._items([value.__defaults__, value.__kwdefaults__])
        if _library(value) != "nnsight_fx":
            self._items(value.__globals__[n] for n in _names(value.__code__) if n in value.__globals__)


def _library(what: object) -> str:
    return (getattr(what, "__module__", None) or "").partition(".")[0]


def _installed(what: object) -> bool:
    """Is a class or function of a library? What state it has is nobody's program; ours, and torch's objects, are."""
    name = _library(what)
    if name in ("nnsight_fx", "__main__") or (name == "torch" and isinstance(what, type)):
        return False
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return name in sys.stdlib_module_names or "site-packages" in file


def _text(function: types.FunctionType) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return _code(function.__code__)


def _code(code: types.CodeType) -> str:
    consts = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return repr((code.co_code, code.co_names, consts))


def _names(code: types.CodeType) -> list[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return [*code.co_names, *(name for c in inner for name in _names(c))]


def _empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:
        return True
