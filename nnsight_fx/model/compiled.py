"""What compilers made, in a folder: another process, or machine of the kind, compiles nothing anew."""

from __future__ import annotations

import hashlib
import io
import platform
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from .. import atomic, compat
from ..errors import StoreError
from ..folder import Folder, read
from ..lines import user_line

FORMAT = "nnsight_fx.model.compiled"
SAME = {"torch": "another torch", "machine": "another kind of machine"}


def _described() -> dict:
    cuda = torch.cuda.is_available()
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def _native() -> str:
    """What C++ kernels are built for: a CPU with all that it can do, a C library, a Python."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    cpu = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    cpu = cpu or [platform.processor(), platform.node()]
    return hashlib.sha256(repr((cpu, platform.libc_ver(), sys.version)).encode()).hexdigest()


def _packed(files: dict[str, Path]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as into:
        for name, file in files.items():
            into.write(file, name)
    return made.getvalue()


def _unpack(file: Path, folder: Path) -> None:
    with zipfile.ZipFile(file) as packed:
        for name in packed.namelist():
            to = folder / name
            if not to.exists() and to.resolve().is_relative_to(folder.resolve()):
                to.parent.mkdir(parents=True, exist_ok=True)
                atomic.write(to, packed.read(name))


def save(path: object) -> None:
    """`model.save_compiled`."""
    made = torch.compiler.save_cache_artifacts()
    if made is None:
        raise StoreError(
            f"{user_line()}: nothing was compiled in this process yet, so there is nothing to save. Run the traces first, on "
            "`model.compile()`."
        )
    folder = Folder(path, _described(), SAME)
    atomic.write(folder.path / "artifacts", made[0])
    atomic.write(
        folder.path / "kernels.zip", _packed(compat.inductor.kernels())
    )  # of which the artifacts have the source only
    folder.write(native=_native())


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
    kernels = Path(path) / "kernels.zip"
    if manifest.get("native") == _native() and kernels.exists():
        try:
            _unpack(kernels, compat.inductor.kernel_folder())
        except zipfile.BadZipFile as error:
            raise StoreError(f"{user_line()}: `{kernels}` is damaged. Compile anew.") from error


__all__ = ["load", "save"]
