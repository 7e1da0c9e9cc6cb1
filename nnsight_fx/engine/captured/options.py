"""The options of a capture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import cuda_graphs

EXACT = ("eager", "aot_eager")  # backends whose numbers are the model's, to the bit


@dataclass(frozen=True)
class Options:
    """`model.compile`'s arguments: those of `nn.Module.compile`, and who captures the graphs, `dynamo` or `symbolic`."""

    backend: str | Callable = "inductor"
    mode: str | None = None
    dynamic: bool | None = None
    fullgraph: bool = False
    options: tuple = ()
    capture: str = "dynamo"
    regional: bool | None = None  # are equal blocks compiled once; `None`: by Inductor's default mode they are
    passes: tuple | None = None  # a pipeline with the user's own; `None`: the library's
    disable: frozenset = frozenset()  # passes that are left out

    @property
    def replays(self) -> bool:
        """Are CUDA graphs recorded, whose next replay writes over what this one gave?"""
        return cuda_graphs.recorded(self.backend, self.mode, dict(self.options))

    @property
    def by_regions(self) -> bool:
        """Are equal blocks compiled once?"""
        if self.regional is not None:
            return self.regional
        return self.backend == "inductor" and self.mode in (None, "default")

    @property
    def backend_name(self) -> str:
        """The backend, for a message."""
        return self.backend if isinstance(self.backend, str) else getattr(self.backend, "__name__", "backend")
