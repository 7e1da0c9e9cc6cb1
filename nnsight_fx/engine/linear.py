"""The derivative of a forward that has run: cotangents back through it, tangents forward, many at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..compat.modes import quiet_vmap
from ..lines import Line
from ..passes.frozen import Frozen
from ..passes.linearize import Begun, begin, check
from ..plan.interleave import TensorInterleaver
from ..plan.keys import Value
from ..plan.plan import InterventionGraph, Op
from ..plan.verbs import Linearize

if TYPE_CHECKING:
    import torch.nn as nn

Tensors = list[torch.Tensor]


class Linear:
    """The derivative at one input. `values` are the targets as they were."""

    def __init__(self, targets: Tensors):
        self.values = [x.detach() for x in targets]

    def pull(self, cotangents: Tensors) -> Tensors:
        """`(n, *target)` for each target to `(n, *source)` for each source."""
        raise NotImplementedError

    def push(self, tangents: Tensors) -> Tensors:
        """`(n, *source)` for each source to `(n, *target)` for each target: the transpose of `pull`."""
        raise NotImplementedError


class ByAutograd(Linear):
    """On hooks: autograd's own graph, through which `torch.func.vmap` takes many cotangents at once."""

    one_by_one: str | None = None  # why not at once, where the model's backward has something that no `vmap` takes

    def __init__(self, targets: Tensors, sources: Tensors):
        super().__init__(targets)
        self.targets, self.sources = targets, sources

    def pull(self, cotangents: Tensors) -> Tensors:
        chosen = [n for n, x in enumerate(self.targets) if x.requires_grad]
        return self._many([self.targets[n] for n in chosen], self.sources, [cotangents[n] for n in chosen])

    def push(self, tangents: Tensors) -> Tensors:
        """The backward is linear in its cotangents, so its own derivative by them is the transpose."""
        chosen = [n for n, x in enumerate(self.targets) if x.requires_grad]
        zeros = [torch.zeros_like(self.values[n], requires_grad=True) for n in chosen]
        with torch.enable_grad():
            outputs = [self.targets[n] for n in chosen]
            back = torch.autograd.grad(outputs, self.sources, zeros, create_graph=True, allow_unused=True)
        moved = [n for n, x in enumerate(back) if x is not None and x.requires_grad]
        found = self._many([back[n] for n in moved], zeros, [tangents[n] for n in moved])
        rows, out = tangents[0].shape[0], dict(zip(chosen, found, strict=True))
        return [out[n] if n in out else x.new_zeros(rows, *x.shape) for n, x in enumerate(self.values)]

    def _many(self, outputs: Tensors, inputs: Tensors, given: Tensors) -> Tensors:
        def grad(weights: Tensors, batched: bool) -> Tensors:
            found = torch.autograd.grad(
                outputs, inputs, weights, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
            lead = (len(given[0]),) if batched else ()
            return [x.new_zeros(*lead, *x.shape) if g is None else g for x, g in zip(inputs, found, strict=True)]

        if self.one_by_one is None:
            try:
                with quiet_vmap():
                    return grad(given, True)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                if "allocate memory" in str(error):
                    raise
                why = error
            grad([g[0] for g in given], False)  # its own error, if it is no matter of `vmap`
            self.one_by_one = f"{type(why).__name__}: {str(why).strip().splitlines()[0]}"
        rows = [grad([g[n] for g in given], False) for n in range(len(given[0]))]
        return [torch.stack(each) for each in zip(*rows, strict=True)]


class Followed:
    """Autograd follows a forward on hooks from its sources on."""

    def __init__(self, plan: InterventionGraph, root: nn.Module):
        self.plan, self.root, self.begun = plan, root, Begun()
        verb = next(verb for _, _, verb in plan.of_kind(Linearize))
        self.frozen = Frozen(verb.freeze) if verb.freeze else None

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Around the model: no parameter has a gradient, and attention is written out, as in a graph (`passes.linearize`)."""
        trained = [p for p in self.root.parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        try:
            with sdpa_kernel([SDPBackend.MATH]), self.frozen or contextlib.nullcontext():
                yield
        finally:
            for p in trained:
                p.requires_grad_()

    def end(self, lines: list, targets: Tensors, sources: Tensors) -> ByAutograd:
        check(self.plan, lines, targets, sources, self.frozen, self.begun)
        return ByAutograd(targets, sources)


class Differentiating(TensorInterleaver):
    """Values are tensors, and of a plan that asks for it the derivative is kept."""

    linear: Linear | None = None
    following: Followed | None = None
    lines: list[Line]

    def follow(self, root: nn.Module) -> contextlib.AbstractContextManager:
        """Around a model that runs on hooks."""
        if self.plan.linear is None:
            return contextlib.nullcontext()
        self.following = Followed(self.plan, root)
        return self.following.around()

    def source(self, value: Value) -> None:
        assert self.following is not None
        begin(self.following.begun, value, self.env[value])

    def linearize(self, n: int, op: Op, verb: Linearize) -> None:
        assert self.following is not None
        (targets, sources), _ = self.arguments(op)
        self.linear = self.following.end(self.lines, list(targets), list(sources))
        self.stopping = True


def padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Cotangents, with zeros up to a number of rows."""
    return x if len(x) == rows else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])
