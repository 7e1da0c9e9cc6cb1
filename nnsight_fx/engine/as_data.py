"""A wave's recording as data: what `tracer.graph` shows, and what a file of a plan is written from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..plan.graph import Graph
from ..plan.writing import Origin
from ..tracing.invoke import Invoker

if TYPE_CHECKING:
    from .wave import ForwardWave


def as_data(wave: ForwardWave) -> Graph:
    """The recording so far, as data."""
    tape, tracer, module = wave.tape, wave.tracer, wave.host.module
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    recording = Origin(
        parameters={id(tensor): name for name, tensor in tensors},
        device=wave.host.device,
        members=[wave.role(i) for i in range(len(wave.members))],
        inputs=[(b.args, b.kwargs) for b in wave.batches],
        caches=tape.caches,
        alone=wave.alone,
        together=any(m.prepared for m in wave.members if isinstance(m, Invoker)),
        fn=tracer.fn,
        pad_to=tracer.pad_to,
        sites=tape.found(),
        slots={i: key for i, key in tape.kept.items() if i not in tape.delivered or tape.delivered[i]() is not None},
        changed=set(tape.operands.changed),
        waves=len(tracer.waves),
        generates=tracer.generation is not None,
    )
    constants = [tape.operands.negative.get(slot, value) for slot, value in enumerate(tape.constants)]
    return Graph(tape.plan(wave.groups()), tape.lines, constants, recording=recording)
