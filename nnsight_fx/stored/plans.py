"""Saved plans, loaded: `plan = load_plan(path, model); values = plan(input)`.

A loaded plan runs by being recorded again, each operation through the tape of an open trace. So it is checked as a body
is, runs on every engine, and shares what is compiled with the trace that made it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn

import torch

from ..engine.request import Compile
from ..envoys.envoy import host_of
from ..errors import PlanError, nearest
from ..lines import user_line
from ..plan import files
from ..plan.forms import PLAN_KINDS, decode, dtype_of
from ..plan.graph import Graph
from ..plan.operators import table
from ..tracing.contexts import Tracer
from .file import Stored, line_of, undamaged
from .replay import Edit, Replay

if TYPE_CHECKING:
    from ..envoys.envoy import Envoy


def save_plan(tracer: Tracer, path: str | os.PathLike, names: dict[str, object] | None = None) -> None:
    """`tracer.graph.save_plan(path, names)`."""
    tracer.graph.save_plan(path, names)


def load_plan(path: str | os.PathLike, model: Envoy) -> Plan:
    """A plan that `save_plan` wrote, for `model`.

    ```python
    plan = nnsight_fx.load_plan("steer.safetensors", model)
    values = plan("The Eiffel Tower is in", constants={"steering": other_vector})
    values["logits"]
    ```

    Of an edited model, the edits are part of the plan; load it for the model without them.

    Raises:
        PlanError: the file is no plan, is of another version, names an operation that is not torch's, or does not fit
            this model: a module that it does not have, another shape or dtype at a site.
    """
    document, tensors = files.read(path, files.PLAN)
    return Plan(os.fspath(path), document, tensors, model)


class Plan:
    """A loaded plan. `constants` are the lifted values by name, `saved` the names of what it returns: values, and caches."""

    def __init__(self, path: str, document: dict, tensors: dict[str, torch.Tensor], model: Envoy):
        self.path, self.document, self.model = path, document, model
        with undamaged(path):
            self._stored = Stored(path, document, tensors, model, PLAN_KINDS, table())
            caches = [(c["name"], c["line"], c["modules"], dtype_of(c["dtype"])) for c in document["caches"]]
            self.saved = (*(name for name, _, _ in document["saved"]), *(name for name, *_ in caches))
            self._edits = document["members"].count("edit")
        for _, line, modules, _ in caches:
            for module in modules or ():
                self._stored.known_module(module.removeprefix("model").lstrip("."), line)
        if self._edits and host_of(model).edits:
            raise PlanError(
                f"`{path}` holds the edits that its model had, and this model has edits of its own. Load it for the model without "
                "them: the one that `edit()` was called on, or after `clear_edits()`."
            )
        self.graph: Graph | None = self._fit()

    @property
    def constants(self) -> dict:
        """The lifted values by name; `plan(..., constants={name: other})` runs with others."""
        return dict(self._stored.slots)

    def __repr__(self) -> str:
        return f"Plan({self.path!r})" if self.graph is None else self.graph.code

    def _fit(self) -> Graph | None:
        """Record the plan on the input it was made for, running nothing: what does not fit the model is refused here."""
        if self.document["inputs"] is None:
            return None
        given: list = [decode(i, _no, _no) for i in self.document["inputs"]]
        if self.document["alone"]:
            args, kwargs = given[0]
        else:
            args, kwargs = tuple(_Input(*g) for g in given), {}
        return self._record(args, kwargs, {}, scan=True, compile=False)[1]

    # -- running -------------------------------------------------------------------------------------------------

    def __call__(
        self,
        *inputs: object,
        constants: dict[str, object] | None = None,
        compile: Compile = None,
        **kwargs: object,
    ) -> dict[str, object]:
        """Run the model on an input with these interventions, and return the saved values by name, in order; caches come last.

        A plan with one input takes what `model.trace` takes; one with invokes takes one positional argument for each
        that had an input (a tuple is that invoke's several arguments). `constants` replaces lifted values: tensors by
        tensors of equal shape and dtype, numbers by numbers; it never recompiles.

        Raises:
            PlanError: a constant or an input that does not fit.
        """
        return self._record(inputs, kwargs, constants or {}, scan=False, compile=compile)[0]

    def _with(self, given: dict) -> list[object]:
        known = self.constants
        for name, value in given.items():
            if name not in known:
                raise PlanError(f"{user_line()}: this plan has no constant `{name}`; {nearest(name, known)}")
            old = known[name]
            if isinstance(old, torch.Tensor) != isinstance(value, torch.Tensor) or (
                isinstance(old, torch.Tensor) and (old.shape, old.dtype) != (value.shape, value.dtype)
            ):
                raise PlanError(
                    f"{user_line()}: the constant `{name}` is {_facts(old)}, and was given {_facts(value)}."
                )
            if type(old) is int and type(value) is not int:
                raise PlanError(
                    f"{user_line()}: the constant `{name}` is a position (an int), and was given {value!r}."
                )
        return [
            given.get(name, old) if isinstance(old, torch.Tensor) else type(old)(given.get(name, old))
            for name, old in self._stored.slots
        ]

    def _record(
        self, inputs: tuple, kwargs: dict, constants: dict, *, scan: bool, compile: object
    ) -> tuple[dict[str, object], Graph]:
        document, replay = self.document, Replay(self._stored, self._with(constants), strict=scan)
        options = {"fn": document["fn"], "pad_to": document["pad_to"]}
        options |= {} if scan else {"compile": compile}
        direct, wanted = document["alone"], document["members"].count("input")
        if not direct and (len(inputs) != wanted or kwargs):
            raise PlanError(
                f"{user_line()}: this plan takes {wanted} inputs, one for each invoke; it was given {len(inputs)}."
            )
        model = self.model
        if self._edits:
            model = model._copy()
            host_of(model).edits = [Edit(replay, self._numbers(i)) for i in range(self._edits)]
        open_trace = model.scan if scan else model.trace
        caches: dict = {}
        with open_trace(*(inputs if direct else ()), **(kwargs if direct else {}), **options) as tracer:
            if direct:
                caches |= self._caches(tracer, self._edits)
                replay.operations(tracer.tape, self._numbers(self._edits))
            else:
                self._invokes(tracer, replay, inputs, caches)
        values = {name: replay.values[n][leaf] for name, n, leaf in document["saved"]}
        names = {slot: name for slot, (name, _) in enumerate(self._stored.slots)}
        graph = tracer.graph
        graph.names = names if len(graph.constants) == len(names) else {}
        graph.recording = None
        return values | {c["name"]: caches[c["name"]] for c in document["caches"]}, graph

    def _numbers(self, member: int) -> list[int]:
        """The operations of one member."""
        return [n for n, op in enumerate(self.document["operations"]) if op["invoke"] == member]

    def _caches(self, tracer: Tracer, member: int) -> dict[str, object]:
        """Declare the caches of an invoke that has just been opened."""
        made = {}
        for c in self.document["caches"]:
            if c["invoke"] == member:
                names = ("modules", "device", "detach", "include_output", "include_inputs")
                mark = len(tracer.tape.lines)
                made[c["name"]] = tracer.cache(**{n: c[n] for n in names}, dtype=dtype_of(c["dtype"]))
                tracer.tape.lines[mark:] = [line_of(c)] * (len(tracer.tape.lines) - mark)
        return made

    def _invokes(self, tracer: Tracer, replay: Replay, inputs: tuple, caches: dict[str, object]) -> None:
        """Open the invokes in order, each around its operations."""
        roles, given = self.document["members"][self._edits :], iter(map(_Input.of, inputs))
        prepared = iter(
            tracer.batch(*(i.args[0] if i.args else next(iter(i.kwargs.values())) for i in given))
            if self.document["together"]
            else ()
        )
        invokers = []
        for role in roles:
            if role == "input" and self.document["together"]:
                invokers.append(next(prepared))
            else:
                one = next(given) if role == "input" else _Input((), {})
                invokers.append(tracer.invoke(*one.args, **one.kwargs))
        at = -1
        for invoke, numbers in [*_runs(self.document["operations"], self._edits), (len(invokers), [])]:
            for new in range(at + 1, min(invoke + 1, len(invokers))):
                with invokers[new]:
                    caches |= self._caches(tracer, new + self._edits)
                    replay.operations(tracer.tape, numbers if new == invoke else ())
            if invoke <= at:
                with invokers[invoke]:
                    replay.operations(tracer.tape, numbers)
            at = max(at, invoke)


class _Input:
    """The arguments of one invoke."""

    def __init__(self, args: tuple, kwargs: dict):
        self.args, self.kwargs = args, kwargs

    @classmethod
    def of(cls, value: object) -> _Input:
        return value if isinstance(value, cls) else cls(value if isinstance(value, tuple) else (value,), {})


def _runs(operations: list[dict], edits: int) -> list[tuple[int, list[int]]]:
    """The stretches of operations of one invoke each; edits have been there before."""
    found: list[tuple[int, list[int]]] = []
    for n, op in enumerate(operations):
        invoke = op["invoke"] - edits
        if invoke < 0:
            continue
        if not found or found[-1][0] != invoke:
            found.append((invoke, []))
        found[-1][1].append(n)
    return found


def _facts(value: object) -> str:
    return (
        f"a {list(value.shape)} tensor of {value.dtype}" if isinstance(value, torch.Tensor) else f"the number {value!r}"
    )


def _no(*_: object) -> NoReturn:
    raise ValueError("an input holds no values")
