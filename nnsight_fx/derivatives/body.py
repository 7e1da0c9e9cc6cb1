"""The body of a derivative: what it is a derivative of, checked at the user's line, and kept by one forward."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..batching.effects import moves
from ..engine.linear import Linear
from ..envoys.envoy import host_of
from ..errors import NestedTraceError, NotConnectedError, NotRecordableError, nearest
from ..lines import user_line
from ..passes.frozen import PARTS
from ..passes.linearize import changed
from ..plan import tree
from ..plan.keys import Value
from ..plan.verbs import Linearize
from ..sweep.job import given
from ..tracing import saving
from ..tracing.lazy import LazyTensor, key_of
from ..tracing.steps import nothing

if TYPE_CHECKING:
    from ..envoys.envoy import Envoy
    from ..tracing.contexts import Tracer


class Side(NamedTuple):
    """The targets or the sources: how each is named, its shape, dtype and device, and the structure that they stand in."""

    names: list[str]
    like: list[tuple[tuple, torch.dtype, torch.device]]
    spec: tree.Spec

    def of(self, values: list) -> object:
        """Values in their structure."""
        return tree.unflatten(values, self.spec)


class Kept(NamedTuple):
    """A derivative, and between what it is."""

    linear: Linear
    targets: Side
    sources: Side


def kept(model: Envoy, fn: Callable, inputs: object, freeze: Collection[str], options: dict) -> Kept:
    """Run the model once with the body `fn`, and keep the derivative of its targets by its sources."""
    line, host = user_line(), host_of(model)
    if saving.session() is not None or host.tracer is not None:
        raise NestedTraceError(
            f"{line}: a derivative takes a forward of its own. Ask for it outside of a trace or session."
        )
    if options.get("fn") == "generate":
        raise NotRecordableError(f"{line}: a derivative is of one forward, and a generation has many. Leave out `fn=`.")
    frozen = tuple(sorted({freeze} if isinstance(freeze, str) else set(freeze)))
    for name in frozen:
        if name not in PARTS:
            raise ValueError(f"{line}: `freeze` knows no part `{name}`; {nearest(str(name), PARTS)}")
    args, kwargs = given(model, inputs)
    sides: list[Side] = []
    try:
        with torch.inference_mode(False), torch.enable_grad():
            with model.trace(*args, **{**options, **kwargs}) as tracer:
                sides += _recorded(tracer, fn, frozen)
                _check(tracer, line)
            if not sides:
                raise NotRecordableError(
                    f"{line}: the body ended by `tracer.stop()`, before it returned its targets and sources. Leave it out: the forward ends "
                    "behind the last of them anyway."
                )
    except RuntimeError as error:
        if "a leaf Variable that requires grad" in str(error) or "a view of a leaf" in str(error):
            raise NotConnectedError(changed(line, "a source")) from error
        raise
    linear = tracer.waves[-1].run.linear
    assert linear is not None
    return Kept(linear, *sides)


def _recorded(tracer: Tracer, fn: Callable, frozen: tuple[str, ...]) -> tuple[Side, Side]:
    """Run the body, and record what is kept of it."""
    found = fn(tracer)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise NotRecordableError(
            f"{user_line()}: the body of a derivative returns two things, `(targets, sources)`, each a value or any structure of values; it "
            f"returned {_told(found)}."
        )
    tape, sides = tracer.tape, []
    for what, values in zip(("target", "source"), found, strict=True):
        leaves, spec = tree.flatten(values)
        if not leaves:
            raise NotRecordableError(f"{user_line()}: the body gives no {what}.")
        names = []
        for x in leaves:
            key = key_of(x) if isinstance(x, LazyTensor) else None
            if not isinstance(key, Value):
                raise NotRecordableError(
                    f"{user_line()}: a {what} is a recorded value, as `model.transformer.h[3].output` gives it; there is {_told(x)}."
                )
            fake = tape.operands.fake(x)
            names.append(tape.describe(key))
            if not fake.dtype.is_floating_point:
                raise NotRecordableError(
                    f"{tape.lines[key.op]}: the {what} `{names[-1]}` is {str(fake.dtype).removeprefix('torch.')}, and has no derivative. Give the first value "
                    "behind it that is of real numbers (the embeddings, for token ids)."
                )
        sides.append(Side(names, [_like(tape.operands.fake(x)) for x in leaves], spec))
    if tape.begun:
        raise NotRecordableError(
            f"{user_line()}: the body looks at a value (`if`, `.item()`), so the model has begun to run before it is known by what it is "
            "differentiated. Decide by `torch.where`, or look in a trace of its own before."
        )
    if any(op.effect == "gradient" for op in tape.ops):
        raise NotRecordableError(f"{user_line()}: the body of a derivative has no backward of its own.")
    targets, sources = (tuple(tree.flatten(values)[0]) for values in found)
    tape.add(Linearize(frozen), (targets, sources), result=nothing)
    return sides[0], sides[1]


def _like(fake: torch.Tensor) -> tuple:
    return tuple(fake.shape), fake.dtype, fake.device


def _check(tracer: Tracer, line: object) -> None:
    """What the forward does beside computing values would be a part of what it is a derivative of."""
    why = moves(tracer.host, tracer.waves[-1].signature, tracer.fn)
    if why is not None:
        raise NotRecordableError(
            f"{line}: {why}, so its derivative is of this one run. Put the model into `model.eval()`, or leave the draws out."
        )


def _told(value: object) -> str:
    return (
        f"a tensor of {tuple(value.shape)} that is none of the trace's"
        if isinstance(value, torch.Tensor)
        else f"{value!r}"
    )
