"""`Activations`: a harvest as an array on disk."""

from __future__ import annotations

import bisect
import collections
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils.data import Dataset

from .. import names
from ..errors import StoreError
from ..folder import read
from ..lines import user_line

WHERE = ("prompt", "position", "token")  # columns that say where a row is from
OPEN = 64  # shards that stay mapped


class Activations(Dataset):
    """What `model.harvest` wrote: rows, mapped from disk, in the order of the data set.

    ```python
    found = Activations("runs/h6")
    found[0]                       # {"transformer.h.6": (d,), "prompt": 0, "position": 0, "token": 464}, as tensors
    acts = found["transformer.h.6"]                            # one column: items are tensors
    acts[10:20], acts[[3, 1, 4]], len(acts)
    for batch in acts.batches(4096, seed=0): ...               # shuffled over all rows, the same for one seed
    DataLoader(acts, batch_size=4096, num_workers=4)           # a `torch.utils.data.Dataset`
    ```

    `columns` are the sites, then "prompt" (the number in the data set) and, where rows are tokens, "position" and "token".
    A harvest that is not complete shows the shards that are there.

    Raises:
        StoreError: `path` holds no harvest.
    """

    def __init__(self, path: Any, only: str | None = None):
        self.path, self.only, self.manifest = Path(path), only, read(path)
        if self.manifest.get("format") != "nnsight_fx.harvest":
            raise StoreError(
                f"{user_line()}: `{path}` holds a {self.manifest.get('format')}, not activations of `harvest`."
            )
        self.columns = tuple(
            sorted(self.manifest.get("columns", {}), key=lambda n: WHERE.index(n) if n in WHERE else -1)
        )
        self.sites = tuple(name for name in self.columns if name not in WHERE)
        if only is not None:
            found = [only] if only in self.columns else names.matches(only, self.columns)
            if len(found) != 1:
                raise KeyError(f"{user_line()}: {names.refused(only, self.columns, found, 'column')}")
            self.only = found[0]
        self.starts = [0, *itertools.accumulate(shard["rows"] for shard in self.manifest["shards"])]
        self._mapped: collections.OrderedDict[int, dict[str, torch.Tensor]] = collections.OrderedDict()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: object) -> Any:
        """A row, rows (a slice, indices, a mask), or by name a column."""
        if isinstance(index, str):
            return Activations(self.path, index)
        if isinstance(index, slice):
            span = range(len(self))[index]
            return self._rows(torch.arange(span.start, span.stop, span.step) if span else torch.arange(0))
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"{user_line()}: row {index} of {len(self)}")
            found = self._rows(torch.tensor([index % len(self)]))
            return found[0] if self.only else {name: rows[0] for name, rows in found.items()}
        wanted = torch.as_tensor(index)
        wanted = wanted.nonzero()[:, 0] if wanted.dtype == torch.bool else wanted
        if wanted.numel() and not (-len(self) <= int(wanted.min()) and int(wanted.max()) < len(self)):
            raise IndexError(f"{user_line()}: rows {int(wanted.min())} to {int(wanted.max())} of {len(self)}")
        return self._rows(wanted % max(1, len(self)))

    def __getitems__(self, indices: Sequence[int]) -> list:
        """What a `DataLoader` asks for: one item for each index."""
        found = self[list(indices)]
        return list(found) if self.only else [{n: rows[i] for n, rows in found.items()} for i in range(len(indices))]

    def batches(self, size: int, *, seed: int | None = None, drop_last: bool = False) -> Iterator:
        """Rows, `size` at a time: in order, or with a `seed` in one random order of all rows (8 bytes a row are held for it)."""
        order = None
        if seed is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            if stop - start < size and drop_last:
                return
            yield self._rows(torch.arange(start, stop) if order is None else order[start:stop])

    def __iter__(self) -> Iterator[object]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        facts = self.manifest.get("columns", {})
        shown = [f"{n}: {(len(self), *facts[n]['shape'])} {facts[n]['dtype']}" for n in self._names()]
        return f"Activations({'; '.join(shown)}{'' if self.manifest['complete'] else '; not complete'})"

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_mapped": collections.OrderedDict()}  # each process maps the files itself

    def _names(self) -> tuple[str, ...]:
        return (self.only,) if self.only else self.columns

    def _rows(self, wanted: torch.Tensor) -> Any:
        """Rows by number, copied from the shards that hold them."""
        shards = torch.bucketize(wanted, torch.tensor(self.starts[1:]), right=True)
        found = {name: self._empty(name, len(wanted)) for name in self._names()}
        for shard in shards.unique().tolist():
            here = (shards == shard).nonzero()[:, 0]
            inside = wanted[here] - self.starts[shard]
            for name, rows in found.items():
                rows[here] = self._shard(shard)[name][inside]
        return found[self.only] if self.only else found

    def _empty(self, name: str, rows: int) -> torch.Tensor:
        facts = self.manifest["columns"][name]
        return torch.empty(rows, *facts["shape"], dtype=getattr(torch, facts["dtype"]))

    def _shard(self, number: int) -> dict[str, torch.Tensor]:
        if number not in self._mapped:
            file = self.path / self.manifest["shards"][number]["file"]
            with safe_open(file, framework="pt") as opened:
                self._mapped[number] = {name: opened.get_tensor(name) for name in self.columns}
            if len(self._mapped) > OPEN:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(number)
        return self._mapped[number]

    def prompt(self, number: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """The rows of one prompt."""
        firsts = [shard["prompts"][0] for shard in self.manifest["shards"]]
        shard = bisect.bisect_right(firsts, number) - 1
        if shard < 0 or number >= self.manifest["shards"][shard]["prompts"][1]:
            raise IndexError(f"{user_line()}: there is no prompt {number} here")
        inside = (self._shard(shard)["prompt"] == number).nonzero()[:, 0]
        return self._rows(inside + self.starts[shard])
