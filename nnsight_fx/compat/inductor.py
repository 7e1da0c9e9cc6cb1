"""Inductor: the kernels that it builds, and what it and AOTAutograd are set to while they compile."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .probe import Name

_FOLDER = Name(
    "torch._inductor.codecache.cache_dir", "built C++ kernels are not saved, another process builds them again"
)
_KERNELS = Name(
    "torch._inductor.codecache.CppCodeCache", "built C++ kernels are not saved, another process builds them again"
)
_PLACE = Name(
    "torch._inductor.codecache.get_path", "built C++ kernels are not saved, another process builds them again"
)
_CACHE = Name(
    "torch._inductor.codecache.CppCodeCache.cache", "built C++ kernels are not saved, another process builds them again"
)
_COUNTERS = Name("torch._dynamo.utils.counters", "graphs of which no CUDA graph is recorded are not counted")
_ARTIFACT = Name("torch._logging.getArtifactLogger", "why there is no CUDA graph is not told")
_LOWERING = Name("torch._inductor.lowering.register_lowering", "products of few rows are MKL's own")
_HANDLER = Name("torch._inductor.lowering.fallback_handler", "products of few rows are MKL's own")
_MARKED = Name(
    "torch._inductor.config.unsafe_marked_cacheable_functions",
    "graphs with functions of ours are traced in each process",
)
_CONFIG = Name("torch._inductor.config.patch", "what draws random numbers is not compiled")
_JOINT = Name(
    "torch._functorch.config.patch", "what draws random numbers is not compiled where values are differentiable"
)
_PASS = Name("torch._inductor.custom_graph_pass.CustomGraphPass", "products of few rows are MKL's own")
_PURE: list[Callable] = []  # functions of ours that may stand in a graph on disk


def kernel_folder() -> Path:
    """Where Inductor keeps what it builds."""
    folder = _FOLDER()
    return Path(folder() if folder is not None else os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir()))


def kernels() -> dict[str, Path]:
    """The libraries of C++ kernels that this process has built or loaded, by their names in Inductor's folder."""
    built, place = _KERNELS(), _PLACE()
    found: dict[str, Path] = {}
    if built is None or place is None or _FOLDER() is None:
        return found
    families = [built]
    for family in families:
        families += family.__subclasses__()
        for key in _CACHE.of(family, ()):
            file = Path(place(key, "main.so")[2])
            if file.exists():
                found[file.relative_to(kernel_folder()).as_posix()] = file
    return found


def skipped_graphs() -> int:
    """Of how many graphs Inductor has recorded no CUDA graph."""
    counters = _COUNTERS()
    return 0 if counters is None else counters["inductor"]["cudagraph_skips"]


def graphs_log() -> logging.Logger:
    """Where Inductor says why it records no CUDA graph."""
    artifact, source = _ARTIFACT(), "torch._inductor.cudagraph_utils"
    return logging.getLogger(source) if artifact is None else artifact(source, "cudagraphs")


def lowering(operator: object, calls: object) -> bool:
    """Have Inductor call `calls` for `operator`, with no Python between; was that possible?"""
    register, fallback = _LOWERING(), _HANDLER()
    if register is None or fallback is None:
        return False

    def lowered(*args: object) -> object:
        return fallback(calls, add_to_fallback_set=False)(*args, "none", [], "")

    register(operator, type_promotion_kind=None)(lowered)
    return True


def pure(function: Callable) -> Callable:
    """Say of a function of ours that stands in graphs that it computes by its arguments alone: Inductor keeps such graphs on
    disk, and finds them again as long as its source is the same."""
    _PURE.append(function)
    return function


@functools.cache
def _marked() -> dict[str, str]:
    """The names of those functions, each with a digest of its source."""
    found = {}
    for function in _PURE:
        with contextlib.suppress(OSError):  # installed without its source
            source = inspect.getsource(function).encode()
            found[f"{function.__module__}.{function.__qualname__}"] = hashlib.sha256(source).hexdigest()
    return found


def keeps_draws() -> bool:
    """Can `keeping_draws` do what it says?"""
    return _CONFIG() is not None and _JOINT() is not None


@contextlib.contextmanager
def keeping_draws() -> Iterator[None]:
    """While a compiler works, by whatever backend: each random draw is made, and is made once. Left out, it would shift every
    later one.

    torch takes a draw that nobody uses for dead code, unless Inductor is to draw as eager code does. Where it makes a graph
    with a backward, it first joins what is computed twice, and takes `randn_like(h)` and `randn_like(h)` for that (its
    `compile_utils.rand_ops` lacks `randn_like` and `randint_like`, torch 2.13).
    """
    with contextlib.ExitStack() as settings:
        known: dict[str, str] | None = _MARKED()
        kept = {} if known is None else {"unsafe_marked_cacheable_functions": {**known, **_marked()}}
        for patch, setting in ((_CONFIG(), {"fallback_random": True, **kept}), (_JOINT(), {"cse": False})):
            if patch is not None:
                settings.enter_context(patch(**setting))
        yield


def graph_pass() -> type:
    """The class that Inductor's passes on a graph have; without one there are no passes of ours."""
    return _PASS() or object
