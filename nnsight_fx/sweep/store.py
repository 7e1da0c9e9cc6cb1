"""A sweep on disk: results as they come, and a manifest that a paper can cite.

```
runs/ioi/manifest.json          what was run: versions, hardware, seed, digests of weights, inputs, program and plans, the grid
runs/ioi/000000.safetensors     a chunk's results, stacked; which cells they are is in the header
runs/ioi/000064.safetensors     ...
```

A file is there whole or not at all, and the chunks are the same whenever the sweep goes on: a killed one ends with the same
result, to the bit.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes

from .. import atomic
from ..envoys.envoy import Observed, path_of
from ..errors import StoreError
from ..folder import Folder
from ..lines import user_line
from ..names import shown
from ..report.provenance import environment, hashed, of_model

if TYPE_CHECKING:
    from ..envoys.envoy import Envoy


VERSION = 2
LONG = 48  # characters of a coordinate
SAME = {
    "version": "another version of nnsight_fx",
    "structure": "another model",
    "weights": "another model, or the same with other weights",
    "inputs": "another input",
    "program": "another body",
    "over": "another grid",
    "options": "other options",
}


def manifest(model: Envoy, fn: object, inputs: list, over: Mapping[str, Sequence], options: dict) -> dict:
    """What a sweep is: the same for two sweeps means the same results."""
    rest = {k: v for k, v in options.items() if k != "compile"}
    return {
        "format": "nnsight_fx.sweep",
        "version": VERSION,
        **of_model(model),
        "inputs": hashed(inputs),
        "program": hashed(fn),
        "over": {name: [label(v) for v in values] for name, values in over.items()},
        "options": hashed(rest),
        **environment(model, options.get("compile")),
    }


class Store:
    """One folder. Raises `StoreError` where it holds another sweep."""

    def __init__(self, path: object, described: dict):
        self.folder = Folder(path, described, SAME)

    @property
    def manifest(self) -> dict:
        return self.folder.manifest

    def adopt(self, name: str, given: object) -> Any:
        """What the sweep in the folder was begun with goes on; another is refused."""
        kept = self.manifest[name]
        if given is not None and given != kept:
            raise StoreError(
                f"{user_line()}: the sweep in `{self.folder.path}` was begun with `{name}={kept}`, and its cells' results depend on it. "
                f"Leave `{name}={given}` out to go on, or give this sweep a folder of its own."
            )
        return kept

    def put(self, cells: list[int], results: dict[str, torch.Tensor], plans: list[str]) -> None:
        """Keep the results of some cells, by their index in the grid: tensors with one row a cell."""
        header = json.dumps({"cells": cells, "plans": plans})  # one entry: safetensors writes several in any order
        atomic.write(self.folder.path / f"{cells[0]:06d}.safetensors", to_bytes(results, {"sweep": header}))

    def load(self) -> Iterator[tuple[list[int], dict[str, torch.Tensor], list[str]]]:
        """What is there."""
        for path in sorted(self.folder.path.glob("[0-9]*.safetensors")):
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["sweep"])
                yield header["cells"], {name: file.get_tensor(name) for name in file.keys()}, header["plans"]  # noqa: SIM118

    def finish(self, plans: list[str]) -> None:
        """All cells are there; `plans` are theirs, in order."""
        if "plans" not in self.manifest:
            self.folder.write(plans=hashed(plans))


def label(value: object) -> Any:
    """A grid value as a coordinate: numbers and text as they are, a module by its path, anything else by its text."""
    if isinstance(value, Observed):
        return shown(path_of(value))
    if isinstance(value, tuple | list):
        return f"({', '.join(str(label(item)) for item in value)})"
    return value if isinstance(value, int | float | str | bool) else str(value)


def coordinates(values: Sequence) -> list:
    """The coordinates of an axis: what has no short text that is its own by its kind and its number."""
    found = [label(value) for value in values]
    seen = collections.Counter(map(str, found))
    plain = [isinstance(value, int | float | str | bool | Observed) for value in values]
    return [
        text if plain[n] or (short(text) and seen[text] == 1) else f"{type(values[n]).__name__} {n}"
        for n, text in enumerate(found)
    ]


def short(text: str) -> bool:
    """Can it stand in a line with others?"""
    return len(text) <= LONG and "\n" not in text
