"""Looking for a private name where it is used, and saying what is done without it.

A `Name` is declared beside its user: `ALIAS = Name("torch._C._is_alias_of", "storages are compared")`. `ALIAS()` is the thing
itself, or `None` on a torch that lacks it. `missing()` lists what was looked for and is not there.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import torch

from ..errors import UnsupportedTorchError

NAMES: list[Name] = []
_ABSENT = object()


class Name:
    """A private name that there is a way around."""

    __slots__ = "lacking", "path", "thing", "without"

    def __init__(self, path: str, without: str):
        self.path, self.without = path, without
        self.lacking = False  # is it known to be missing? A module that nobody has loaded is not loaded to find out
        NAMES.append(self)

    def __call__(self) -> Any:
        """The thing itself, or `None`. Looking for it imports its module."""
        try:
            return self.thing
        except AttributeError:
            self.thing = found = _look(self.path)
            self.lacking = found is None
            return found

    def of(self, owner: object, default: object = None) -> Any:
        """The attribute of this name of an object, for what only an object has."""
        value = _attribute(owner, self.path.rpartition(".")[2])
        self.lacking |= value is _ABSENT
        return default if value is _ABSENT else value

    def fails(self) -> None:
        """It is there, and works in another way than we know."""
        self.lacking = True


def _attribute(owner: object, name: str) -> Any:
    return getattr(owner, name, _ABSENT)


def _look(path: str) -> Any:
    parts = path.split(".")
    for n in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:n])
        try:
            module = sys.modules.get(name) or importlib.import_module(name)
            return functools.reduce(getattr, parts[n:], module)
        except ImportError:
            continue
        except AttributeError:
            return None
    return None


def needed(path: str) -> Any:
    """A name that there is no way around."""
    found = _look(path)
    if found is None:
        raise UnsupportedTorchError(
            f"nnsight_fx uses `{path}`, which torch {torch.__version__} does not have, and there is no other way to do what it does. "
            "The versions that nnsight_fx was tested with are in its docs/torch.md: install one of them (`pip install 'torch<2.16'`), or "
            "an nnsight_fx that knows this torch."
        )
    return found


def missing() -> list[str]:
    """What this torch lacks, and what is done instead: a line each."""
    return list(dict.fromkeys(f"`{n.path}` is missing: {n.without}" for n in NAMES if n.lacking))
