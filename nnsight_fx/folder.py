"""A folder of results with a manifest: `manifest.json` says what it is of, and nothing else gets in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import atomic
from .errors import StoreError
from .lines import user_line


class Folder:
    """`path`, made if it is not there, for what `described` tells; `manifest` is what stands in it.

    Where there is a manifest already, the entries that `same` names must be equal; `same` tells what another value means.

    Raises:
        StoreError: the folder is of something else, or has files and no manifest.
    """

    def __init__(self, path: Any, described: dict, same: Mapping[str, str]):
        self.path = Path(path)
        self.file = self.path / "manifest.json"
        kind = described["format"].rpartition(".")[2]
        if not self.file.exists():
            if self.path.exists() and any(p for p in self.path.iterdir() if not p.name.startswith(".nnsight_fx-")):
                raise StoreError(
                    f"{user_line()}: `{path}` is not empty and no {kind}: it has no manifest.json. Give another folder."
                )
            self.path.mkdir(parents=True, exist_ok=True)
            self.manifest = described
            self.write()
        self.manifest: dict = read(self.path)
        for key, what in {"format": "something else than a " + kind, **same}.items():
            if self.manifest.get(key) != json.loads(json.dumps(described[key])):
                raise StoreError(
                    f"{user_line()}: the folder `{path}` is of {what}: its `{key}` is {_short(self.manifest.get(key))}, here it is "
                    f"{_short(described[key])}. Give this {kind} a folder of its own."
                )
        for left in self.path.glob(".nnsight_fx-*"):  # of a run that was killed in the middle of a file
            left.unlink(missing_ok=True)

    def write(self, **more: object) -> None:
        """Write the manifest, with `more` in it."""
        self.manifest = {**self.manifest, **more}
        atomic.write(self.file, json.dumps(self.manifest, indent=1).encode())


def read(path: str | os.PathLike) -> dict:
    """The manifest of a folder."""
    file = Path(path) / "manifest.json"
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise StoreError(f"{user_line()}: there is no `{file}`: `{path}` holds no results of nnsight_fx.") from error
    except json.JSONDecodeError as error:
        raise StoreError(f"{user_line()}: `{file}` is damaged: {error}. Take a copy of it, or begin anew.") from error


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."
