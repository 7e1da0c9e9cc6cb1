"""Values on their way from a GPU into the computer's memory, without anybody waiting for each."""

from __future__ import annotations

import torch

from ..plan.verbs import Observation


class Offload:
    """The copies that a run has begun. Each is made by the GPU in its own stream's order, behind what made the value and in front of
    what may change it, into page-locked memory; nobody looks at one before `wait`."""

    def __init__(self):
        self.streams: set[torch.cuda.Stream] = set()

    def begin(self, x: torch.Tensor, how: Observation) -> torch.Tensor:
        """A copy of `x` in memory, which will be there."""
        copied = torch.empty(x.shape, dtype=how.to.get("dtype") or x.dtype, pin_memory=True)
        copied.copy_(x.detach(), non_blocking=True)
        self.streams.add(torch.cuda.current_stream(x.device))
        return copied

    def wait(self) -> None:
        """Until all that was begun is there."""
        for stream in self.streams:
            stream.synchronize()
        self.streams.clear()
