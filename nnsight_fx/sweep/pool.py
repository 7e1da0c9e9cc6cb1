"""Chunks on several workers, whatever these are: who is idle gets the next, and what a lost one had is done again."""

from __future__ import annotations

import collections
import contextlib
import pickle
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..engine.clock import doing
from ..errors import WorkerLostError
from ..lines import user_line
from .job import Done, SweepJob
from .packing import pack, unpack

TRIES = 3


class Lost(Exception):
    """A worker is gone. Never reaches the user."""


class Worker:
    """In a process of its own: a job, and the chunks of it that come."""

    def __init__(self, packed: bytes, artifacts: bytes | None, threads: int, device: str | None):
        torch.set_num_threads(threads)
        if device is not None and device.startswith("cuda"):
            torch.cuda.set_device(device)
        if artifacts is not None:
            torch.compiler.load_cache_artifacts(artifacts)
        self.job: SweepJob = unpack(packed, device)

    def work(self, chunk: list[int], wanted: bool) -> tuple[Done, bytes | None]:
        """A chunk's results, and what was compiled for it where that is `wanted`."""
        done = self.job(chunk)
        done = done._replace(failed=tuple(map(portable, done.failed)))
        made = torch.compiler.save_cache_artifacts() if wanted else None
        return done, None if made is None else made[0]


class Pool:
    """Up to `size` workers. A subclass starts them, hands them a chunk, and waits for the first that has done one."""

    size: int

    def run(self, job: SweepJob, chunks: Sequence[list[int]]) -> Iterator[tuple[list[int], Done]]:
        """Each chunk's results, as they come. Where the model is compiled, one worker begins; the others get what it compiled."""
        todo, lost = collections.deque(chunks), collections.Counter()
        artifacts, first = None, _compiles(job)
        told = contextlib.ExitStack()
        if first:
            told.enter_context(doing("one worker compiles, the others wait"))
        self.open(pack(job))
        free, idle, busy = list(range(self.size)), [], {}
        try:
            while todo or busy:
                while todo and len(busy) < (1 if first else self.size):
                    slot, worker = idle.pop() if idle else (free[-1], self.start(free.pop(), artifacts))
                    chunk = todo.popleft()
                    busy[self.submit(worker, chunk, first)] = slot, worker, chunk
                ticket = self.wait(list(busy))
                slot, worker, chunk = busy.pop(ticket)
                try:
                    done, made = self.result(ticket)
                except Lost as error:
                    free.append(slot)
                    todo.appendleft(chunk)
                    lost[chunk[0]] += 1
                    if lost[chunk[0]] == TRIES:
                        raise WorkerLostError(
                            f"{user_line()}: {TRIES} worker(s) died on the same {len(chunk)} cells, from {job.named(chunk[0])} on: {error}. "
                            "Is it memory? Give a smaller `chunk=`, or run these cells here, without `executor=`."
                        ) from error
                    continue
                idle.append((slot, worker))
                told.close()
                artifacts, first = made if first else artifacts, False
                yield chunk, done
        finally:
            told.close()
            self.close()

    def open(self, packed: bytes) -> None:
        """Before the first worker: what each of them gets."""
        raise NotImplementedError

    def start(self, slot: int, artifacts: bytes | None) -> Any:
        raise NotImplementedError

    def submit(self, worker: object, chunk: list[int], wanted: bool) -> object:
        """Begin; a ticket for the result."""
        raise NotImplementedError

    def wait(self, tickets: list) -> object:
        """A ticket whose worker has done, or is lost."""
        raise NotImplementedError

    def result(self, ticket: object) -> tuple[Done, bytes | None]:
        """What `Worker.work` returned, or raised; `Lost` where it is gone."""
        raise NotImplementedError

    def close(self) -> None:
        """End all workers."""
        raise NotImplementedError


def _compiles(job: SweepJob) -> bool:
    capture = job.capture
    return not job.on_hooks and capture is not None and capture.options.backend not in ("eager", "aot_eager")


def portable(error: Exception) -> Exception:
    """An error that another process can have: with where it was raised, and itself if it can be pickled."""
    error.add_note("nnsight_fx: in a worker\n" + "".join(traceback.format_tb(error.__traceback__)[-3:]))
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
