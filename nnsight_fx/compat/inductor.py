"""Inductor: the kernels that it builds."""

from __future__ import annotations

from pathlib import Path


def kernel_folder() -> Path:
    """Where Inductor keeps what it builds."""
    from torch._inductor.codecache import cache_dir

    return Path(cache_dir())


def kernels() -> dict[str, Path]:
    """The libraries of C++ kernels that this process has built or loaded, by their names in Inductor's folder."""
    from torch._inductor.codecache import CppCodeCache, get_path

    families, found = [CppCodeCache], {}
    for family in families:
        families += family.__subclasses__()
        for key in family.cache:
            file = Path(get_path(key, "main.so")[2])
            if file.exists():
                found[file.relative_to(kernel_folder()).as_posix()] = file
    return found
