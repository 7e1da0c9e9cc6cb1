"""A sweep on disk: results as they come, and a manifest that a paper can cite.

```
runs/ioi/manifest.json          what was run: versions, hardware, hashes of weights, inputs and program, the grid
runs/ioi/000000.safetensors     the first cells' results, stacked; which cells they are is in the header
runs/ioi/000064.safetensors     ...
```

A file is there whole or not at all, so a killed sweep goes on where it was and ends with the same result.
"""

from __future__ import annotations

import datetime
import hashlib
import inspect
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes

from .. import atomic
from ..bug_report import versions
from ..errors import StoreError
from ..tracing import tree
from ..tracing.lazy import user_line

VERSION = 1
_SAME = {
    "weights": "another model, or the same with other weights",
    "inputs": "another input",
    "program": "another body",
    "over": "another grid",
    "version": "another version of nnsight_fx",
}


def manifest(model: Any, fn: Any, inputs: Any, over: Mapping[str, Sequence]) -> dict[str, Any]:
    """What a sweep is: the same for two sweeps means the same results."""
    return {
        "format": "nnsight_fx.sweep",
        "version": VERSION,
        "model": type(model._module).__name__,
        "weights": hashed(dict(model._module.state_dict())),
        "inputs": hashed(inputs),
        "program": hashed(fn),
        "over": {name: [label(v) for v in values] for name, values in over.items()},
        "seed": torch.initial_seed(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


class Store:
    """One folder. Raises `StoreError` where it holds another sweep."""

    def __init__(self, folder: Any, described: dict[str, Any]):
        self.folder, self.path = Path(folder), Path(folder) / "manifest.json"
        if not self.path.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise StoreError(
                    f"{user_line()}: `{folder}` is not empty and no sweep: it has no manifest.json. Give another folder."
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic.write(self.path, json.dumps(described, indent=1).encode())
        self.manifest = json.loads(self.path.read_text())
        for key, what in _SAME.items():
            if self.manifest.get(key) != json.loads(json.dumps(described[key])):
                raise StoreError(
                    f"{user_line()}: the store `{folder}` is of {what}: its `{key}` is {_short(self.manifest.get(key))}, here it is "
                    f"{_short(described[key])}. Give this sweep a folder of its own."
                )

    def put(self, cells: list[int], results: dict[str, torch.Tensor]) -> None:
        """Keep the results of some cells, by their index in the grid: tensors with one row a cell."""
        atomic.write(self.folder / f"{cells[0]:06d}.safetensors", to_bytes(results, {"cells": json.dumps(cells)}))

    def load(self) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """What is there."""
        for path in sorted(self.folder.glob("[0-9]*.safetensors")):
            with safe_open(path, framework="pt") as file:
                cells = json.loads((file.metadata() or {})["cells"])
                yield cells, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def label(value: Any) -> Any:
    """A grid value as a coordinate: numbers and text as they are, anything else by its text."""
    return value if isinstance(value, int | float | str | bool) else str(value)


def hashed(value: Any) -> str:
    """A digest of tensors, containers, functions (their text and what they refer to), and plain values."""
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, value, set())
    return digest.hexdigest()


def _feed(digest: Any, value: Any, seen: set[int]) -> None:
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"tensor {tuple(plain.shape)} {plain.dtype}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    elif isinstance(value, types.FunctionType):
        if id(value) in seen:
            return
        seen.add(id(value))
        digest.update(_text(value).encode())
        cells = [c.cell_contents for c in value.__closure__ or () if not _empty(c)]
        used = [value.__globals__.get(name) for name in _names(value.__code__)]
        for held in (*cells, *(value.__defaults__ or ()), *used):
            if isinstance(held, torch.Tensor | types.FunctionType | int | float | str | list | tuple | dict):
                _feed(digest, held, seen)
    elif (parts := tree.children(value)) is not None or isinstance(value, dict):
        items = value.items() if isinstance(value, Mapping) else enumerate(parts[2] if parts else ())
        digest.update(f"{type(value).__qualname__} ".encode())
        for key, item in items:
            digest.update(f"{key!r}:".encode())
            _feed(digest, item, seen)
    else:
        digest.update(
            repr(value).encode()
            if isinstance(value, int | float | str | bytes | type(None))
            else type(value).__qualname__.encode()
        )


def _text(function: types.FunctionType) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return repr((function.__code__.co_code, function.__code__.co_names))


def _names(code: types.CodeType) -> list[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return [*code.co_names, *(name for c in inner for name in _names(c))]


def _empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:
        return True


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."
