"""The derivative of a captured forward: one graph, which `torch.func.vmap` makes one of many cotangents, compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ... import compat
from ...errors import NotRecordableError
from ...lines import user_line
from ...passes.linearize import Derivative
from ..linear import Linear, Tensors, padded
from .builder import Builder

BUILT = 16  # compiled derivatives kept a forward: one for each number of cotangents and sizes of the input


class ByGraph(Linear):
    """The derivative of one run of a compiled forward."""

    def __init__(self, of: Derivative, inputs: list, outputs: list, builder: Builder, report: list[str]):
        held = {"input": inputs, "output": outputs}
        kept = [held[where][i].item() if number else held[where][i] for where, i, number in of.kept]
        super().__init__(outputs[of.own : of.own + of.targets])
        self.of, self.kept, self.builder, self.report = of, kept, builder, report

    def pull(self, cotangents: Tensors) -> Tensors:
        return self._run("pull", cotangents)

    def push(self, tangents: Tensors) -> Tensors:
        try:
            return self._run("push", tangents)
        except RuntimeError as error:
            if "no autograd formula" not in str(error) and "is not implemented" not in str(error):
                raise
            raise NotRecordableError(
                f"{user_line()}: tangents go forward by the derivative of the backward, and the model's has an operation that has none: {error}. Take "
                "`compile=False`, or rows of the identity back by `pull`."
            ) from error

    def _run(self, way: str, given: Tensors) -> Tensors:
        """Many at once, by the graph of the fewest that are enough."""
        n = len(given[0])
        sizes = tuple((tuple(x.shape), x.stride()) if isinstance(x, torch.Tensor) else x for x in self.kept)
        known = sorted(rows for w, s, rows in self.of.built if (w, s) == (way, sizes) and n <= rows <= 2 * n)
        rows = known[0] if known else n
        key = (way, sizes, rows)
        given = [padded(x, rows).contiguous() for x in given]
        tensors = [x for x in self.kept if isinstance(x, torch.Tensor)]
        if key not in self.of.built:
            if len(self.of.built) >= BUILT:
                self.of.built.pop(next(iter(self.of.built)))
            self.of.built[key] = self._build(way, tensors, given)
        with torch.no_grad():
            found = self.of.built[key](*tensors, *given)
        return [x[:n] for x in found]

    def _build(self, way: str, tensors: Tensors, given: Tensors) -> Callable:
        """The graph of one cotangent as a graph of as many as are given."""
        mode = compat.fakes.FakeTensorMode(allow_non_fake_inputs=True)
        context, compiles = compat.graphs.new_context(mode)
        fakes: Tensors = [mode.from_tensor(x.detach()) for x in (*tensors, *given)]
        of, kept = self.of.graph, self.kept

        def whole(held: Tensors) -> list:
            rest = iter(held)
            return [next(rest) if isinstance(x, torch.Tensor) else x for x in kept]

        def single(*args: torch.Tensor) -> Tensors:
            return of(*whole(list(args[: len(tensors)])), *args[len(tensors) :])

        with mode, torch.no_grad(), compat.modes.quiet_vmap():
            one = single if way == "pull" else self._transposed(single, fakes[: len(tensors)])
            many = torch.func.vmap(one, in_dims=(*[None] * len(tensors), *[0] * len(given)))
            traced = compat.graphs.make_fx(lambda *args: list(many(*args)))(*fakes)
        traced.graph.eliminate_dead_code()
        traced.recompile()
        with compiles, torch.no_grad():
            return self.builder.build(traced, lambda: fakes, self.report)

    def _transposed(self, pull: Callable[..., Tensors], held: Tensors) -> Callable[..., Tensors]:
        """The backward is linear in its cotangents, so its own derivative by them is the transpose."""
        values = [torch.empty_like(x, device=x.device) for x in self.values]
        table = compat.graphs.written_out(self.of.graph.graph)
        plain = compat.graphs.make_fx(pull, table)(*held, *values)
        like = [torch.empty_like(x) for x in plain(*held, *values)]

        def push(*args: torch.Tensor) -> list:
            zeros = [torch.zeros_like(x, requires_grad=True) for x in values]
            with torch.enable_grad():
                found = plain(*args[: len(held)], *zeros)
                moved = [n for n, x in enumerate(found) if x.requires_grad]
                tangents = args[len(held) :]
                back = [found[n] for n in moved], zeros, [tangents[n] for n in moved]
                return list(torch.autograd.grad(*back, allow_unused=True, materialize_grads=True))

        return compat.graphs.make_fx(push)(*held, *like)
