"""How many traces fit a forward."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


def chunks(items: list[T], size: int) -> Iterator[list[T]]:
    """`items` in pieces of up to `size`, as equal as can be."""
    pieces = -(-len(items) // size)
    start = 0
    for i in range(pieces):
        stop = start + (len(items) - start) // (pieces - i)
        yield items[start:stop]
        start = stop


def out_of_memory(error: BaseException) -> bool:
    """Did an allocation fail?"""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def free(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            found: dict = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
