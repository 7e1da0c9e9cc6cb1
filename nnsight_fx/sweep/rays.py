"""Workers on a Ray cluster."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import MissingExtraError
from ..lines import user_line
from .job import Done
from .pool import Lost, Pool, Worker


class Ray(Pool):
    """Actors of Ray, `workers` of them, each with `cpus` (and as many of torch's threads) and `gpus`.

    Where Ray is not initialised, `address` says to which cluster to connect; `None` starts a local one, and ends it afterwards.
    Without `workers` there are as many as the cluster has room for. The model and the body are put into Ray's store once.
    A cluster's nodes need this version of nnsight_fx, and the modules that a body is imported from.
    """

    def __init__(
        self, workers: int | None = None, *, cpus: int = 1, gpus: float | None = None, address: str | None = None
    ):
        try:
            self.ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise MissingExtraError(
                f"{user_line()}: `executor=\"ray\"` needs Ray: pip install 'nnsight-fx[ray]'."
            ) from error
        self.workers, self.cpus, self.gpus, self.address = workers, cpus, gpus, address
        self.alive: list = []

    def open(self, packed: bytes) -> None:
        ray = self.ray
        self.started = not ray.is_initialized()
        if self.started:
            local = {"num_cpus": None if self.workers is None else self.workers * self.cpus, "include_dashboard": False}
            ray.init(address=self.address, log_to_driver=False, **({} if self.address else local))
        there = ray.cluster_resources()
        gpus = self.gpus if self.gpus is not None else float(there.get("GPU", 0) > 0)
        room = [there.get("CPU", 1) // self.cpus, *([there.get("GPU", 0) // gpus] if gpus else [])]
        self.size = self.workers or max(1, int(min(room)))
        self.actor = ray.remote(Worker).options(num_cpus=self.cpus, num_gpus=gpus, max_restarts=0)
        self.device = "cuda:0" if gpus else "cpu"
        self.packed = ray.put(packed)

    def start(self, slot: int, artifacts: bytes | None) -> Any:
        actor = self.actor.remote(self.packed, artifacts, self.cpus, self.device)
        self.alive.append(actor)
        return actor

    def submit(self, worker: Any, chunk: list[int], wanted: bool) -> object:
        return worker.work.remote(chunk, wanted)

    def wait(self, tickets: list) -> object:
        return self.ray.wait(tickets, num_returns=1)[0][0]

    def result(self, ticket: object) -> tuple[Done, bytes | None]:
        errors = self.ray.exceptions
        try:
            return self.ray.get(ticket)
        except errors.RayTaskError as error:
            raise error.cause from error
        except (errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError) as error:
            raise Lost(str(error).partition("\n")[0]) from error

    def close(self) -> None:
        for actor in self.alive:
            self.ray.kill(actor)
        self.alive.clear()
        if self.started:
            self.ray.shutdown()
