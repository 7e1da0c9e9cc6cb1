"""`model.generator`: what `generate` returns, and what it gives to its streamer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import OutsideTraceError, own_error
from ..lines import user_line
from .generation import streamed

if TYPE_CHECKING:
    from ..envoys.envoy import Envoy


class GenerationValue:
    """Something of a generation that has an `.output` and is no module."""

    def __init__(self, root: Envoy, name: str):
        self._root, self._name = root, name

    def _tracer(self) -> Any:
        if self._root.tracer is None:
            raise OutsideTraceError(
                f"{user_line()}: cannot access `{self._name}.output` outside of a trace: there is one while "
                "`with model.generate(...):` is open."
            )
        return self._root.tracer


class Generator(GenerationValue):
    """`model.generator.output` is `tracer.result`; `model.generator.streamer.output` the tokens, step by step."""

    @own_error
    def output(self) -> Any:
        """What `generate` returns: token ids of shape (rows, prompt + new tokens), unless it was asked for more."""
        return self._tracer().result

    @property
    def streamer(self) -> Streamed:
        """What a streamer is given: the prompt, then the new tokens of each step."""
        return Streamed(self._root, "model.generator.streamer")


class Streamed(GenerationValue):
    """The tokens behind a step, int64 of shape (rows,) on the CPU. Not with beams, which stream nothing."""

    @own_error
    def output(self) -> Any:
        """The tokens that the open step has made; occurrence 0, where no site of a step is touched before it, is the prompt."""
        return streamed(self._tracer())
