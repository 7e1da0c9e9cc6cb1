"""What a file holds, checked against the model that it is loaded for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..envoys.source import at, is_inside
from ..errors import NNsightFXError, PlanError, nearest
from ..lines import Line
from ..plan.forms import decode
from ..plan.names import effect_of
from ..plan.verbs import Call, CallModule, Read, Skip, Visit, Write

if TYPE_CHECKING:
    from ..envoys.envoy import Envoy


class Stored:
    """The operations and constants of one recording in a file.

    Raises:
        PlanError: an operation that this version does not have or that is not in `functions`, one that would change the
            model's own tensors, a module or parameter that this model does not have.
    """

    def __init__(
        self,
        path: str,
        data: dict,
        tensors: dict[str, torch.Tensor],
        model: Envoy,
        kinds: frozenset[str],
        functions: dict[str, Callable],
    ):
        self.path, self.model, self.functions = path, model, functions
        self.operations: list[dict] = data["operations"]
        if any("parameter" in c or c.get("device", "cpu") != "cpu" for c in data["constants"]):
            model.dispatch()  # the weights, and where they are
        held = dict(model._module.named_parameters(remove_duplicate=False))
        held |= dict(model._module.named_buffers(remove_duplicate=False))
        self.slots = [(c["name"], self._constant(c, tensors, held)) for c in data["constants"]]
        self.paths = set(dict(model._module.named_modules(remove_duplicate=False)))
        for n, op in enumerate(self.operations):
            self._check(n, op, kinds)

    def _constant(self, data: dict, tensors: dict[str, torch.Tensor], held: dict[str, torch.Tensor]) -> Any:
        if "number" in data:
            number = data["number"]
            return float.fromhex(number) if isinstance(number, str) else number
        if "parameter" in data:
            if data["parameter"] not in held:
                raise PlanError(
                    f"`{self.path}` uses the parameter `{data['parameter']}`, which this model does not have; "
                    + nearest(data["parameter"], held)
                )
            return held[data["parameter"]]
        own = self.model.device or torch.device("cpu")
        wanted = own if data["device"] == "model" else torch.device(data["device"])
        device = wanted if wanted.type in ("cpu", own.type) else own  # a file from another machine
        made = tensors[data["tensor"]].to(device)
        if "stride" in data:  # the layout is part of what a plan is compiled for, and of how sums round
            made = torch.empty_strided(made.shape, data["stride"], dtype=made.dtype, device=device).copy_(made)
        return made.requires_grad_(bool(data["requires_grad"]))

    def _check(self, n: int, op: dict, kinds: frozenset[str]) -> None:
        kind: str = op["kind"]
        target: Any = op.get("target")
        if kind not in kinds:
            raise PlanError(f"`{self.path}`: operation {n} is a `{kind}`, which this version does not have.")
        if kind in (Read.name, Write.name, Skip.name, Visit.name, CallModule.name):
            self.known_module(target if kind == CallModule.name else target[0], op["line"])

        def value(m: int, leaf: int) -> None:
            if not (0 <= m < n and leaf >= -1):
                raise IndexError(m)

        args = decode(list(op["args"]), value, self.constant)
        kwargs = op.get("kwargs", {})
        decode([*kwargs.values(), *op.get("when", ())], value, self.constant)
        if kind != Call.name:
            return
        if target not in self.functions:
            raise PlanError(
                f"`{self.path}`: operation {n} calls `{target}`, which is not among the torch operations that a plan may call."
            )
        first = op["args"][0] if op["args"] else None
        changes = target == "setattr" or effect_of(target.rpartition(".")[2], kwargs) == "inplace"
        if changes and any(isinstance(x, dict) and "c" in x for x in (first, kwargs.get("out"))):
            raise PlanError(f"`{self.path}`: operation {n} (`{target}`) changes a constant, which no plan may.")
        if target in ("getattr", "setattr"):
            of_value = isinstance(first, dict) and "v" in first
            if not (of_value and isinstance(args[1], str) and args[1].isidentifier() and args[1][0] != "_"):
                raise PlanError(f"`{self.path}`: operation {n} (`{target}`) is not about a field of a value.")

    def known_module(self, path: str, line: str) -> None:
        """Refuse a module, or an operation of one, that this model does not have."""
        if path in self.paths:
            return
        if is_inside(path):
            first = ".source.".join(f".{path}".split(".source.")[:2]).removeprefix(".")
            try:
                at(self.model, first)
            except AttributeError as e:
                raise PlanError(f"`{self.path}` does not fit this model: {line}: {e}") from e
        else:
            raise PlanError(
                f"`{self.path}`: {line} uses the module `{path}`, which this model does not have; {nearest(path, self.paths)}"
            )

    def constant(self, slot: int) -> Any:
        if slot < 0:
            raise IndexError(slot)
        return self.slots[slot][1]


def arguments(op: dict, value: Callable[[int, int], object], constant: Callable[[int], object]) -> tuple[list, dict]:
    """The arguments of an operation."""
    named = op.get("kwargs", {})
    kwargs = decode(list(named.values()), value, constant)
    return decode(list(op["args"]), value, constant), dict(zip(named, kwargs, strict=True))


def line_of(op: dict) -> Line:
    name, _, number = op["line"].rpartition(":")
    return Line(name, int(number))


@contextlib.contextmanager
def undamaged(path: str) -> Iterator[None]:
    """What a reader stumbles over in a file is told as that."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as e:
        if isinstance(e, NNsightFXError):
            raise
        raise PlanError(f"`{path}` is damaged: {type(e).__name__}: {e}") from e
