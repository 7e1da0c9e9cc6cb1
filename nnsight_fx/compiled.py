"""What compilers made, in a folder: another process, or machine of the kind, compiles nothing anew."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from . import atomic
from .errors import StoreError
from .folder import Folder, read
from .tracing.lazy import user_line

FORMAT = "nnsight_fx.compiled"
SAME = {"torch": "another torch", "machine": "another kind of machine"}


def _described() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def save(path: Any) -> None:
    """`model.save_compiled`."""
    made = torch.compiler.save_cache_artifacts()
    if made is None:
        raise StoreError(
            f"{user_line()}: nothing was compiled in this process yet, so there is nothing to save. Run the traces first, on "
            "`model.compile()`."
        )
    folder = Folder(path, _described(), SAME)
    atomic.write(folder.path / "artifacts", made[0])


def load(path: Any) -> None:
    """`model.load_compiled`."""
    manifest = read(path)
    file = Path(path) / "artifacts"
    if manifest.get("format") != FORMAT or not file.exists():
        raise StoreError(f"{user_line()}: `{path}` holds nothing that `save_compiled` wrote.")
    here = _described()
    for key, what in SAME.items():
        if manifest.get(key) != here[key]:
            raise StoreError(
                f"{user_line()}: `{path}` was compiled by {what}: {manifest.get(key)}, here it is {here[key]}. Compile anew."
            )
    if torch.compiler.load_cache_artifacts(file.read_bytes()) is None:
        raise StoreError(f"{user_line()}: `{file}` is damaged. Compile anew.")


__all__ = ["load", "save"]
