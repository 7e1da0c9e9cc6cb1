"""Gradients in a body: `t.grad` read and written, `loss.backward()`, `torch.autograd.grad`.

A gradient belongs to the backward that follows it in the text (`with loss.backward():` follows its block), as in nnsight.
What is done with it is recorded where it is written, and runs while the backward does.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..errors import NotRecordableError
from ..lines import user_line
from ..plan import tree
from ..plan.keys import Value
from ..plan.verbs import Grad, RunBackward, SetGrad
from .lazy import LazyTensor, key_of
from .steps import nothing

if TYPE_CHECKING:
    from .tape import Tape

LATE = 10**9  # gradients come after every site of the forward


class Gradients:
    """The gradients of one recording."""

    def __init__(self, tape: Tape):
        self.tape = tape
        self.asked: dict[object, object] = {}  # key of a value -> its gradient in the next backward, as it is now
        self.creating = False  # does the open backward make a graph of its own
        self.backwards = 0

    def get(self, value: torch.Tensor) -> Any:
        """`value.grad`, in the backward that follows."""
        tape = self.tape
        key = tape.operands.key_of(value)
        if key not in self.asked:
            fake = tape.operands.fake(value)
            if not fake.requires_grad:
                raise NotRecordableError(
                    f"{user_line()}: `{tape.describe(key)}` does not require grad, so it has no gradient: the parameters are frozen, or "
                    "grad is off. Make it require grad in the body (`value.requires_grad_()`) before it is used."
                )
            self.asked[key] = tape.add(
                Grad(self.creating),
                (value,),
                result=lambda: torch.empty(
                    fake.shape, dtype=fake.dtype, device=fake.device, requires_grad=self.creating
                ),
            )
        return self.asked[key]

    def set(self, value: LazyTensor, new: object) -> None:
        """`value.grad = new`: what flows on in the backward that follows."""
        gradient = self.get(value)
        shape = tuple(self.tape.operands.fake(new).shape) if isinstance(new, torch.Tensor) else None
        if shape != tuple(value.shape):
            raise RuntimeError(
                f"{user_line()}: the gradient of `{self.tape.describe(key_of(value))}` has shape {tuple(value.shape)}; it was set to "
                + (
                    f"a tensor of shape {shape}."
                    if shape is not None
                    else f"{new!r}. Set it to a tensor (`torch.zeros_like(h)`)."
                )
            )
        self.tape.add(SetGrad(), (gradient, new), result=nothing)
        self.asked[key_of(value)] = new

    def of_parameter(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """`.grad` of a real tensor: nobody's business here, unless a recorded backward is to fill it."""
        if self.backwards and parameter.requires_grad and parameter.is_leaf:
            raise NotRecordableError(
                f"{user_line()}: the backward of this body fills `.grad` of parameters when the model runs. Read it after the "
                "trace, or take it in the body by `torch.autograd.grad(loss, [parameter])`."
            )
        return parameter.grad

    def backward(
        self,
        loss: torch.Tensor,
        gradient: torch.Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> Backward:
        """`loss.backward(...)`."""
        given = [inputs] if isinstance(inputs, torch.Tensor) else None if inputs is None else list(inputs)
        if any(isinstance(x, LazyTensor) for x in given or ()):
            raise NotRecordableError(
                f"{user_line()}: `backward(inputs=...)` takes parameters and other real tensors; for recorded values use "
                "`torch.autograd.grad(loss, values)`."
            )
        return Backward(
            self, loss, gradient, bool(retain_graph or (retain_graph is None and create_graph)), create_graph, given
        )

    def record(
        self, loss: torch.Tensor, gradient: object, retain: bool, create: bool, inputs: object, only: bool
    ) -> None:
        fake = self.tape.operands.fake(loss)
        if not fake.requires_grad:
            raise RuntimeError(
                f"{user_line()}: this loss does not require grad and has no grad_fn: the parameters are frozen, or grad is off. Make "
                "an activation require grad in the body (`module.output.requires_grad_()`)."
            )
        if gradient is None and fake.numel() != 1:
            raise RuntimeError(
                f"{user_line()}: grad can be implicitly created only for scalar outputs; this one has shape {tuple(fake.shape)}. "
                "Sum it, or give `backward(gradient=...)`."
            )
        self.tape.add(
            RunBackward(returns=only),
            (loss, gradient),
            {"retain_graph": retain, "create_graph": create, "inputs": inputs},
            result=nothing,
        )
        key = self.tape.operands.key_of(loss)
        at = self.tape.accesses.order.get(key.op) if isinstance(key, Value) else None
        if at is not None:  # from here on these gradients are as late as the loss
            self.tape.accesses.order.update({v: at for v, o in self.tape.accesses.order.items() if o[0] == LATE})
        self.asked = {}
        self.backwards += 1

    def grad(
        self,
        outputs: object,
        inputs: object,
        grad_outputs: object = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        only_inputs: bool = True,
        allow_unused: bool | None = None,
        is_grads_batched: bool = False,
        materialize_grads: bool = False,
    ) -> tuple:
        """`torch.autograd.grad`: gradients of these inputs alone, none is accumulated."""
        outs, into = tree.flatten(grad_outputs)[0] if grad_outputs is not None else [None], tree.flatten(inputs)[0]
        losses = tree.flatten(outputs)[0]
        if len(losses) != 1 or len(outs) != 1 or is_grads_batched:
            raise NotRecordableError(
                f"{user_line()}: in a body `torch.autograd.grad` takes one output, and no batched gradients; sum the outputs first."
            )
        kept, self.asked, self.creating = (self.asked, self.creating), {}, create_graph
        try:
            found = tuple(self.get(x) for x in into)
            self.record(
                losses[0],
                outs[0],
                bool(retain_graph or (retain_graph is None and create_graph)),
                create_graph,
                None,
                True,
            )
        finally:
            self.asked, self.creating = kept
        return found


class Backward:
    """A recorded backward. `with loss.backward(): ...` makes the block's gradients its own."""

    def __init__(
        self, gradients: Gradients, loss: torch.Tensor, gradient: object, retain: bool, create: bool, inputs: object
    ):
        self.gradients, self.creates = gradients, create
        self.asked = dict(gradients.asked)
        self.record = partial(gradients.record, loss, gradient, retain, create, inputs, False)
        self.record()
        self.at = len(gradients.tape.ops)

    def __enter__(self) -> Backward:
        tape = self.gradients.tape
        if len(tape.ops) != self.at:
            raise NotRecordableError(
                f"{user_line()}: this backward has been recorded already; write `with loss.backward():` in one line."
            )
        tape.undo()
        self.gradients.backwards -= 1
        self.gradients.asked, self.gradients.creating = self.asked, self.creates
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.gradients.creating = False
        if error is None:
            self.record()
