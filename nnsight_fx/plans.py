"""Saved plans, loaded: `plan = load_plan(path, model); values = plan(input)`.

A loaded plan runs by being recorded again, each operation through the tape of an open trace. So it is checked as a body
is, runs on every engine, and shares what is compiled with the trace that made it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .errors import NNsightFXError, PlanError, nearest
from .tracing import tree
from .tracing.ambient import under
from .tracing.contexts import Tracer
from .tracing.graph import Graph
from .tracing.lazy import Line, user_line
from .tracing.operators import table
from .tracing.plan import BACKWARD, BARRIER, CALL, GRAD, MODULE, READ, SAVE, SET_GRAD, SKIP, STOP, WRITE, Site
from .tracing.plan_io import ambient_of, decode, load, spec_of
from .tracing.tape import SiteMeta, Tape

_KINDS = {READ, WRITE, SKIP, CALL, MODULE, SAVE, STOP, BARRIER, GRAD, SET_GRAD, BACKWARD}


def save_plan(tracer: Tracer, path: str | os.PathLike, names: dict[str, Any] | None = None) -> None:
    """`tracer.graph.save_plan(path, names)`."""
    tracer.graph.save_plan(path, names)


def load_plan(path: str | os.PathLike, model: Any) -> Plan:
    """A plan that `save_plan` wrote, for `model`.

    ```python
    plan = nnsight_fx.load_plan("steer.safetensors", model)
    values = plan("The Eiffel Tower is in", constants={"steering": other_vector})
    values["logits"]
    ```

    Raises:
        PlanError: the file is no plan, is of another version, names an operation that is not torch's, or does not fit
            this model: a module that it does not have, another shape or dtype at a site.
    """
    document, tensors = load(path)
    return Plan(os.fspath(path), document, tensors, model)


class Plan:
    """A loaded plan. `constants` are the lifted values by name, `saved` the names of what it returns."""

    def __init__(self, path: str, document: dict, tensors: dict[str, torch.Tensor], model: Any):
        self.path, self.document, self.model = path, document, model
        try:
            self._slots = [(c["name"], self._constant(c, tensors)) for c in document["constants"]]
            self.saved = tuple(name for name, _, _ in document["saved"])
            self._check()
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            if isinstance(e, NNsightFXError):
                raise
            raise PlanError(f"`{path}` is damaged: {type(e).__name__}: {e}") from e
        self.graph: Graph | None = self._fit()

    @property
    def constants(self) -> dict[str, Any]:
        """The lifted values by name; `plan(..., constants={name: other})` runs with others."""
        return dict(self._slots)

    def __repr__(self) -> str:
        return f"Plan({self.path!r})" if self.graph is None else self.graph.code

    # -- checks --------------------------------------------------------------------------------------------------

    def _constant(self, data: dict, tensors: dict[str, torch.Tensor]) -> Any:
        if "number" in data:
            number = data["number"]
            return float.fromhex(number) if isinstance(number, str) else number
        if "parameter" in data:
            held = dict(self.model._module.named_parameters()) | dict(self.model._module.named_buffers())
            if data["parameter"] not in held:
                raise PlanError(
                    f"`{self.path}` uses the parameter `{data['parameter']}`, which this model does not have; "
                    + nearest(data["parameter"], held)
                )
            return held[data["parameter"]]
        wanted, own = torch.device(data["device"]), self.model.device
        device = own if wanted.type != "cpu" and own is not None else wanted  # a plan from another machine's GPU
        return tensors[data["tensor"]].to(device).requires_grad_(bool(data["requires_grad"]))

    def _check(self) -> None:
        """Everything that can be said without the model's shapes."""
        paths = set(dict(self.model._module.named_modules(remove_duplicate=False)))
        for n, op in enumerate(self.document["operations"]):
            kind, target = op["kind"], op.get("target")
            if kind not in _KINDS:
                raise PlanError(f"`{self.path}`: operation {n} is a `{kind}`, which this version does not have.")
            if kind == CALL and target not in table():
                raise PlanError(
                    f"`{self.path}`: operation {n} calls `{target}`, which is not among the torch operations that a plan may call."
                )
            path = target[0] if kind in (READ, WRITE, SKIP) else target if kind == MODULE else ""
            if path not in paths:
                raise PlanError(
                    f"`{self.path}`: {op['line']} uses the module `{path}`, which this model does not have; {nearest(path, paths)}"
                )
            decode(list(op["args"]), self._known(n), self._slot)
            decode(list(op.get("kwargs", {}).values()), self._known(n), self._slot)

    def _known(self, n: int) -> Callable[[int, int], None]:
        def value(m: int, leaf: int) -> None:
            if not (0 <= m < n and leaf >= 0):
                raise IndexError(m)

        return value

    def _slot(self, slot: int) -> Any:
        if slot < 0:
            raise IndexError(slot)
        return self._slots[slot][1]

    def _fit(self) -> Graph | None:
        """Record the plan on the input it was made for, running nothing: what does not fit the model is refused here."""
        inputs = self.document["inputs"]
        if inputs is None:
            return None
        given: list[Any] = [None if i is None else decode(i, _no, _no) for i in inputs]
        if self.document["alone"]:
            args, kwargs = given[0]
        elif self.document["together"]:
            args, kwargs = tuple(a[0] if a else next(iter(k.values())) for a, k in given), {}
        else:
            args, kwargs = tuple(_Input(*g) for g in given if g is not None), {}
        return self._record(args, kwargs, {}, scan=True, compile=False)[1]

    # -- running -------------------------------------------------------------------------------------------------

    def __call__(
        self, *inputs: Any, constants: dict[str, Any] | None = None, compile: bool | dict | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Run the model on an input with these interventions, and return the saved values by name, in order.

        A plan with one input takes what `model.trace` takes; one with invokes takes one positional argument for each
        that had an input (a tuple is that invoke's several arguments). `constants` replaces lifted values: tensors by
        tensors of equal shape and dtype, numbers by numbers; it never recompiles.

        Raises:
            PlanError: a constant or an input that does not fit.
        """
        return self._record(inputs, kwargs, constants or {}, scan=False, compile=compile)[0]

    def _with(self, given: dict[str, Any]) -> list[Any]:
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
            for name, old in self._slots
        ]

    def _record(
        self, inputs: tuple, kwargs: dict, constants: dict, *, scan: bool, compile: Any
    ) -> tuple[dict[str, Any], Graph]:
        document, held = self.document, self._with(constants)
        options = {"fn": document["fn"], "pad_to": document["pad_to"]}
        options |= {} if scan else {"compile": compile}
        open_trace = self.model.scan if scan else self.model.trace
        wanted = sum(document["invokes"])
        if not document["alone"] and (len(inputs) != wanted or kwargs):
            raise PlanError(
                f"{user_line()}: this plan takes {wanted} inputs, one for each invoke; it was given {len(inputs)}."
            )
        direct = document["alone"]
        with open_trace(*(inputs if direct else ()), **(kwargs if direct else {}), **options) as tracer:
            replay = Replay(self, tracer, held, strict=scan)
            if direct:
                replay.operations(range(len(document["operations"])))
            else:
                self._invokes(tracer, replay, inputs)
        values = {name: replay.values[n][leaf] for name, n, leaf in document["saved"]}
        names = {slot: name for slot, (name, _) in enumerate(self._slots)}
        graph = tracer.graph
        graph.names = names if len(graph.constants) == len(self._slots) else {}
        graph.recording = None
        if len(graph.plan.ops) == len(document["operations"]):
            graph.lines = [_line(op["line"]) for op in document["operations"]]
        return values, graph

    def _invokes(self, tracer: Any, replay: Replay, inputs: tuple) -> None:
        """Open the invokes in order, each around its operations."""
        given = iter(inputs)
        if self.document["together"]:
            invokers = tracer.batch(*inputs)
        else:
            invokers = [
                tracer.invoke(*_Input.of(next(given)).args) if has else tracer.invoke()
                for has in self.document["invokes"]
            ]
            given = iter(inputs)
            for invoker, has in zip(invokers, self.document["invokes"], strict=True):
                invoker.kwargs = _Input.of(next(given)).kwargs if has else {}
        at = -1
        for invoke, numbers in _runs([op["invoke"] for op in self.document["operations"]]):
            for other in invokers[at + 1 : invoke]:
                with other:
                    pass
            at = max(at, invoke)
            with invokers[invoke]:
                replay.operations(numbers)
        for other in invokers[at + 1 :]:
            with other:
                pass


class _Input:
    """The arguments of one invoke."""

    def __init__(self, args: tuple, kwargs: dict):
        self.args, self.kwargs = args, kwargs

    @classmethod
    def of(cls, value: Any) -> _Input:
        return value if isinstance(value, cls) else cls(value if isinstance(value, tuple) else (value,), {})


class Replay:
    """The operations of a plan, recorded on the tape of an open trace."""

    def __init__(self, plan: Plan, tracer: Any, constants: list, *, strict: bool):
        self.plan, self.tracer, self.constants, self.strict = plan, tracer, constants, strict
        self.values: list[list[Any]] = [[] for _ in plan.document["operations"]]

    def operations(self, numbers: Iterable[int]) -> None:
        for n in numbers:
            op = self.plan.document["operations"][n]
            try:
                with under(ambient_of(op.get("ambient"))):
                    self.values[n] = tree.flatten(self._operation(op))[0]
            except PlanError:
                raise
            except Exception as e:
                if self.strict:
                    raise PlanError(
                        f"`{self.plan.path}` does not fit this model: {op['line']} ({op['kind']}): {e}"
                    ) from e
                e.add_note(f"nnsight_fx: in the plan `{self.plan.path}`, recorded at {op['line']}")
                raise

    def _operation(self, op: dict) -> Any:
        tape: Tape = self.tracer.tape
        kind: str = op["kind"]
        target: Any = op.get("target")
        args = decode(list(op["args"]), lambda n, leaf: self.values[n][leaf], self.constants.__getitem__)
        named = op.get("kwargs", {})
        kwargs = dict(
            zip(
                named,
                decode(list(named.values()), lambda n, leaf: self.values[n][leaf], self.constants.__getitem__),
                strict=True,
            )
        )
        if kind == CALL:
            return tape.call(table()[target], tuple(args), kwargs)
        if kind == READ:
            return self._read(tape, (*target,), op)
        if kind == WRITE:
            meta = tape.meta(tuple(target))
            same = op["tree"] == "same" and isinstance(meta, SiteMeta)
            spec = meta.spec if same and isinstance(meta, SiteMeta) else spec_of(op["tree"])
            if tree.leaf_count(spec) != len(args[0]):
                raise PlanError(
                    f"`{self.plan.path}` does not fit this model: {op['line']} writes {len(args[0])} values to "
                    f"`{'.'.join(target[:2])}`, which has {tree.leaf_count(spec)}."
                )
            return tape.write(tuple(target), tree.unflatten(list(args[0]), spec))
        if kind == SKIP:
            return tape.skip(target[0], target[2], tree.unflatten(list(args[0]), spec_of(op["tree"])))
        if kind == MODULE:
            return tape.module(target, tuple(args), kwargs)
        if kind == SAVE:
            return args[0].save()
        if kind == GRAD:
            tape.gradients.asked.pop(tape.encode(args[0]), None)
            tape.gradients.creating = op["extra"]
            return tape.gradients.get(args[0])
        if kind == SET_GRAD:
            return tape.add(SET_GRAD, None, tuple(args), {}, effect="gradient", result=lambda: None)
        if kind == BACKWARD:
            loss, gradient = args
            options = (kwargs["retain_graph"], kwargs["create_graph"], kwargs["inputs"])
            return tape.gradients.record(loss, gradient, *options, op["extra"])
        return tape.stop() if kind == STOP else tape.barrier()

    def _read(self, tape: Tape, site: Site, op: dict) -> Any:
        value = tape.read(site, whole=False)
        leaves: list[Any] = tree.flatten(value)[0]
        found: Any = op["found"]
        name = ".".join(p for p in site[:2] if p)
        if found is not None and len(found) != len(leaves):
            raise PlanError(
                f"`{self.plan.path}` does not fit this model: `{name}` has {len(leaves)} values, and had {len(found)} when "
                f"{op['line']} was recorded."
            )
        before: list[Any] = found or []
        for leaf, was in zip(leaves, before, strict=False):
            if was is None or not isinstance(leaf, torch.Tensor):
                continue
            shape, dtype = was
            now = [n if isinstance(n, int) else None for n in leaf.shape]
            sizes = self.strict and any(None not in (a, b) and a != b for a, b in zip(shape, now, strict=False))
            if len(shape) != len(now) or str(leaf.dtype) != dtype or sizes:
                raise PlanError(
                    f"`{self.plan.path}` does not fit this model: `{name}` is {now} of {leaf.dtype}, and was {shape} of {dtype} "
                    f"when {op['line']} was recorded."
                )
        return value


def _runs(invokes: list[int]) -> list[tuple[int, list[int]]]:
    found: list[tuple[int, list[int]]] = []
    for n, invoke in enumerate(invokes):
        if not found or found[-1][0] != invoke:
            found.append((invoke, []))
        found[-1][1].append(n)
    return found


def _line(text: str) -> Line:
    name, _, number = text.rpartition(":")
    return Line(name, int(number))


def _facts(value: Any) -> str:
    return (
        f"a {list(value.shape)} tensor of {value.dtype}" if isinstance(value, torch.Tensor) else f"the number {value!r}"
    )


def _no(*_: Any) -> Any:
    raise ValueError("an input holds no values")
