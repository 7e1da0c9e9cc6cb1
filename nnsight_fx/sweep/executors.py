"""Where the chunks of a sweep run.

| `executor=` | is |
| --- | --- |
| nothing | `Serial()`: here, one after the other |
| `"devices"` | `Devices()`: a process for each GPU of the machine; `Devices(["cpu", "cpu"])` |
| `"ray"` | `Ray()`: actors of a Ray cluster, a local one where none is given |

All give the same results where they have the same number of threads: a chunk holds the same cells wherever it runs. A worker
that dies costs its chunk's time; the store is written here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from ..errors import nearest
from ..lines import user_line
from .job import Done, SweepJob
from .processes import Devices
from .rays import Ray


class Executor(Protocol):
    """Runs a job's chunks: `job(chunk)` is what one gives. They may come in any order."""

    def run(self, job: SweepJob, chunks: Sequence[list[int]]) -> Iterator[tuple[list[int], Done]]: ...


class Serial:
    """Here, one after the other."""

    def run(self, job: SweepJob, chunks: Sequence[list[int]]) -> Iterator[tuple[list[int], Done]]:
        for chunk in chunks:
            yield chunk, job(chunk)


NAMES: dict = {"serial": Serial, "devices": Devices, "ray": Ray}


def chosen(executor: str | Executor | None) -> Executor:
    """The object that `executor=` stands for."""
    if executor is None:
        return Serial()
    if isinstance(executor, str):
        if executor not in NAMES:
            raise ValueError(f"{user_line()}: there is no executor `{executor}`; {nearest(executor, NAMES)}")
        return NAMES[executor]()
    if not hasattr(executor, "run"):
        raise TypeError(f"{user_line()}: an executor has `run(job, chunks)`; a {type(executor).__name__} has not.")
    return executor
