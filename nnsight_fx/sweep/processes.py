"""Workers on one machine, one process for each device."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection, Pipe, wait

import torch

from ..lines import user_line
from .job import Done
from .pool import Lost, Pool, Worker, portable


class Devices(Pool):
    """`devices=["cuda:0", "cuda:1"]`, all GPUs by default; a device that is named twice has two workers.

    Each is a process of its own, which has a copy of the model. On the CPU each has `threads` of torch's threads: an equal
    share of this process's by default. (Another number of threads can change the last bits of a sum.)

    Raises:
        ValueError: there is no GPU, and no `devices`.
    """

    def __init__(self, devices: list[str | torch.device] | None = None, threads: int | None = None):
        found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        self.devices = [str(d) for d in (found if devices is None else devices)]
        self.size = len(self.devices)
        if not self.size:
            raise ValueError(
                f"{user_line()}: no GPU is here. Name the devices: `executor=nnsight_fx.sweep.executors.Devices(['cpu', 'cpu'])`."
            )
        self.threads = threads or max(1, torch.get_num_threads() // self.size)
        self.alive: dict[Connection, subprocess.Popen] = {}

    def open(self, packed: bytes) -> None:
        self.file = tempfile.NamedTemporaryFile(prefix="nnsight_fx-job-")  # noqa: SIM115  (closed in `close`)
        self.file.write(packed)
        self.file.flush()

    def start(self, slot: int, artifacts: bytes | None) -> Connection:
        ours, theirs = Pipe()
        command = [sys.executable, "-c", f"from {__name__} import main; main({theirs.fileno()})"]
        paths = os.pathsep.join(p for p in sys.path if p)
        with theirs:
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": paths})
        self.alive[ours] = process
        _send(ours, (self.file.name, artifacts, self.threads, self.devices[slot]))
        return ours

    def submit(self, worker: Connection, chunk: list[int], wanted: bool) -> Connection:
        _send(worker, (chunk, wanted))
        return worker

    def wait(self, tickets: list[Connection]) -> object:
        return wait(tickets)[0]

    def result(self, ticket: Connection) -> tuple[Done, bytes | None]:
        try:
            ok, what = pickle.loads(ticket.recv_bytes())
        except (EOFError, ConnectionError) as error:
            ticket.close()
            raise Lost(f"process {self.alive[ticket].pid} ended with {self.alive.pop(ticket).wait()}") from error
        if not ok:
            raise what
        return what

    def close(self) -> None:
        for connection, process in self.alive.items():
            connection.close()
            process.terminate()
        for process in self.alive.values():
            process.wait()
        self.alive.clear()
        self.file.close()


def _send(connection: Connection, what: object) -> None:
    with contextlib.suppress(ConnectionError):  # it is gone: `result` finds that out
        connection.send_bytes(pickle.dumps(what))  # plain bytes: `send` would share the memory of tensors


def main(fd: int) -> None:
    """What a worker's process does: chunks, until nobody sends any."""
    connection = Connection(fd)
    try:
        name, artifacts, threads, device = pickle.loads(connection.recv_bytes())
        worker = None
        while True:
            chunk, wanted = pickle.loads(connection.recv_bytes())
            try:
                if worker is None:
                    with open(name, "rb") as file:
                        worker = Worker(file.read(), artifacts, threads, device)
                answer = True, worker.work(chunk, wanted)
            except Exception as error:
                answer = False, portable(error)
            _send(connection, answer)
    except (EOFError, ConnectionError):
        pass
