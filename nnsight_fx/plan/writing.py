"""A recording on its way into a file: what is data is written, what is not is refused with its line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import PlanError
from ..lines import Line, user_line
from . import tree
from .forms import EDIT_KINDS, PLAN_KINDS, Unnamed, argument, modes, shapes, structure
from .keys import TensorSlot, Value, leaves
from .operators import name_of_operator
from .plan import InterventionGraph, Op
from .printing import leaf_paths, short
from .verbs import (
    AtSite,
    Call,
    CallModule,
    Grad,
    Live,
    Observe,
    Reach,
    Read,
    ReadObject,
    RunBackward,
    Save,
    Skip,
    Visit,
    Write,
)


@dataclass
class Origin:
    """What a plan is saved with besides its operations."""

    parameters: dict[int, str]  # id of a parameter or buffer of the model -> its name
    device: torch.device | None  # the model's
    members: list[str]  # of each worker: "edit", "input", "whole" (an invoke without input), "cache"
    inputs: list[tuple[tuple, dict]]  # of each "input"
    caches: list  # the `tracing.tape.DeclaredCache`s
    alone: bool  # one direct input, no invokes
    together: bool  # all inputs given first, by `tracer.batch`
    fn: str | None
    pad_to: int | None
    sites: list[list | None]  # what each read found: shape and dtype, leaf by leaf
    slots: dict  # id of a saved value -> its key
    changed: set[int]  # ids of real tensors that the body changes
    waves: int
    generates: bool


class Writer:
    """The operations and constants of one recording."""

    def __init__(
        self,
        lines: list[Line],
        parameters: dict[int, str],
        device: torch.device | None,
        changed: set[int],
        prefix: str = "",
    ):
        self.lines, self.parameters, self.device = lines, parameters, device
        self.changed, self.prefix = changed, prefix
        self.tensors: dict[str, torch.Tensor] = {}
        self.numbers: dict[int, int] = {}  # operation -> its number in the file

    def refuse(self, n: int, why: object) -> PlanError:
        return PlanError(f"{self.lines[n]}: `{self.code(n)}` cannot be saved: {why}.")

    def code(self, n: int) -> str:
        raise NotImplementedError

    def function(self, n: int, op: Op, verb: Call) -> str:
        """The name of what a call calls."""
        name = name_of_operator(verb.fn.obj)
        if name is None:
            raise self.refuse(
                n,
                f"`{verb.fn!r}` is not one of torch's own operations (a custom autograd function, say), and a plan holds no code",
            )
        if verb.effect == "inplace" and any(isinstance(first, TensorSlot) for first in op.args.items[:1]):
            raise self.refuse(
                n,
                "it changes a tensor of yours in place, whose first value is gone. Work on a copy: `(x + 0).add_(...)`",
            )
        return name

    def operation(self, n: int, op: Op) -> dict:
        """What every operation has."""
        target = self.function(n, op, op.verb) if isinstance(op.verb, Call) else op.verb.subject
        made: dict = {"kind": op.verb.name, "line": short(self.lines[n])}
        if target is not None:
            made["target"] = list(target) if isinstance(target, tuple) else target
        if op.ambient is not None:
            made["ambient"] = modes(op.ambient)
        made["args"] = [self.named(n, argument, k, self._number) for k in op.args.items]
        if op.kwargs.names:
            values = [self.named(n, argument, k, self._number) for k in op.kwargs.items]
            made["kwargs"] = dict(zip(op.kwargs.names, values, strict=True))
        if op.when:
            made["when"] = [self.named(n, argument, k, self._number) for k in op.when]
        self.numbers[n] = len(self.numbers)
        return made

    def _number(self, n: int) -> int:
        if n not in self.numbers:
            raise Unnamed("it uses what a cache holds. Read the site itself")
        return self.numbers[n]

    def named(self, n: int, form: Callable, *args: object) -> Any:
        try:
            return form(*args)
        except Unnamed as e:
            raise self.refuse(n, e) from None

    def constant(self, slot: int, value: object, name: str, n: int) -> dict:
        """A lifted value, which operation `n` uses."""
        if not isinstance(value, torch.Tensor):
            return {"name": name, "number": value.hex() if isinstance(value, float) else value}
        made = {"name": name, "requires_grad": value.requires_grad}
        if id(value) in self.parameters:
            return made | {"parameter": self.parameters[id(value)]}
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided or value.is_meta:
            raise self.refuse(n, f"its {type(value).__name__} argument is no plain dense tensor")
        if id(value) in self.changed:
            raise self.refuse(n, "the body changes this tensor of yours in place, and its first value is gone")
        if not value.is_contiguous() and not any(s == 0 for s in value.stride()):
            made["stride"] = list(value.stride())
        key = f"{self.prefix}{slot}"
        self.tensors[key] = value.detach().cpu().contiguous().clone()
        return made | {"tensor": key, "device": "model" if value.device == self.device else str(value.device)}


class PlanWriter(Writer):
    """One plan: `Graph.save_plan`."""

    def __init__(self, graph: Any, names: dict):
        if graph.recording is None:
            raise PlanError("this graph was not recorded by a trace; save the one that it was loaded from")
        self.graph, self.recording = graph, graph.recording
        self.plan: InterventionGraph = graph.plan
        r = self.recording
        super().__init__(graph.lines, r.parameters, r.device, r.changed)
        self.names: dict[int, str] = {}  # by id of a saved value, lifted tensor or cache
        self.slot_names: dict[str, str] = {}  # by the name that the printed plan gives a constant
        known = {id(c) for c in graph.constants if isinstance(c, torch.Tensor)} | set(self.recording.slots)
        known |= {id(cache.view) for cache in self.recording.caches}
        printed = {f"constant_{slot}" for slot in range(len(graph.constants))}
        for name, value in names.items():
            chosen = [value] if isinstance(value, str) else value
            if isinstance(chosen, list | tuple) and printed.issuperset(chosen):
                self.slot_names.update(dict.fromkeys(chosen, name))
            elif found := {i: n for i, n in _parts(name, value).items() if i in known}:
                self.names.update(found)
            else:
                raise PlanError(
                    f"{user_line()}: `names` calls something `{name}` that is neither a saved value nor a lifted one of this plan. Give "
                    "the very object (what `.save()` returned, the tensor or module that the body used), or its name in `print(tracer.graph)`: "
                    + (", ".join(f'"{p}"' for p in sorted(printed)) or "there are no constants")
                    + "."
                )

    def code(self, n: int) -> str:
        return self.graph[n].code

    def document(self) -> dict:
        r = self.recording
        if r.generates:
            raise PlanError(
                "this trace is a generation, which runs the model many times; a plan is one forward. Save the plan of a trace, or "
                "make what it does an edit (`model.edit()`, `model.export_edits()`), which holds in every forward of a generation"
            )
        if r.waves > 1:
            raise PlanError(
                "this trace ran the model several times, because its body looked at a value; a plan is one forward"
            )
        caching = {i for i, role in enumerate(r.members) if role == "cache"}
        place = {i: at for at, i in enumerate(i for i in range(len(r.members)) if i not in caching)}
        ops = [
            self.operation(n, op) | {"invoke": place[op.invoke]}
            for n, op in enumerate(self.plan.ops)
            if op.invoke not in caching
        ]
        inputs = [self.input(i) for i in r.inputs]
        return {
            "alone": r.alone,
            "together": r.together,
            "fn": r.fn,
            "pad_to": r.pad_to,
            "members": [role for role in r.members if role != "cache"],
            "inputs": inputs if all(i is not False for i in inputs) else None,
            "constants": [self._constant(slot, value) for slot, value in enumerate(self.graph.constants)],
            "operations": ops,
            "caches": [self.cache(i, cache, place[cache.invoke]) for i, cache in enumerate(r.caches)],
            "saved": self.saved(caching),
        }

    def operation(self, n: int, op: Op) -> dict:
        verb = op.verb
        if isinstance(verb, Live):
            raise self.refuse(
                n, "it runs Python on real values, and a plan holds no code. Write it in torch operations"
            )
        if isinstance(verb, ReadObject | Observe | Reach) or (isinstance(verb, Read) and verb.live):
            raise self.refuse(n, "it reads an object, or a structure that only the run knows")
        if verb.name not in PLAN_KINDS:
            raise self.refuse(n, f"a file has no form for a `{verb.name}` yet")
        made = super().operation(n, op)
        if isinstance(verb, Read):
            made["found"] = self.recording.sites[n]
        elif isinstance(verb, Write) and verb.fits:
            made["tree"] = "same"
        elif isinstance(verb, Write | Skip | Visit):
            made["tree"] = self.named(n, structure, verb.spec)
        elif isinstance(verb, Grad):
            made["extra"] = verb.creating
        elif isinstance(verb, RunBackward):
            made["extra"] = verb.returns
        return made

    def _constant(self, slot: int, value: object) -> dict:
        name = self.slot_names.get(f"constant_{slot}", f"constant_{slot}")
        name = self.names.get(id(value), name) if isinstance(value, torch.Tensor) else name
        user = next((op.index for op in self.graph if slot in op.constants), 0)
        return self.constant(slot, value, name, user)

    def cache(self, i: int, cache: Any, invoke: int) -> dict:
        """What `tracer.cache` was told: loading declares it again."""
        name = self.names.get(id(cache.view), f"cache_{i}" if i else "cache")
        return {"name": name, "invoke": invoke, "line": short(cache.line), **cache.arguments}

    def saved(self, caching: set[int]) -> list[list]:
        """`[name, op, leaf]` of each saved value, in order."""
        keys: list[Value] = []
        for n, op, _ in self.plan.of_kind(Save):
            for key in op.args.items if op.invoke not in caching else ():
                if not isinstance(key, Value):
                    raise self.refuse(n, "it saves a tensor of yours, which no run makes")
                keys.append(key)
        given = {key: self.names[i] for i, key in self.recording.slots.items() if i in self.names}
        found: list[list] = []
        for i, key in enumerate(keys):
            name = given.get(key) or self._site_name(key) or f"saved_{i}"
            if any(name == other[0] for other in found):
                name = f"saved_{i}"
            found.append([name, self._number(key.op), key.leaf])
        return found

    def _site_name(self, key: Value) -> str | None:
        verb = self.plan.ops[key.op].verb
        if not isinstance(verb, Read):
            return None
        path, kind, call = verb.site
        where = ".".join(p for p in (path, kind) if p) + (f"@{call}" if call else "")
        return where + leaf_paths(self.plan.specs[key.op])[key.leaf]

    def input(self, given: object) -> Any:
        """The shapes of an input, or `False` when it holds objects."""
        bad = [x for x in tree.flatten(given)[0] if not isinstance(x, torch.Tensor | int | float | str | None)]
        return False if bad else shapes(given)


class EditWriter(Writer):
    """One edit: `model.export_edits`."""

    def __init__(self, draft: Any, parameters: dict[int, str], device: torch.device | None, prefix: str):
        super().__init__(draft.lines, parameters, device, set(draft.operands.changed), prefix)
        self.draft = draft

    def code(self, n: int) -> str:
        return self.draft.describe(Value(n, -1))

    def function(self, n: int, op: Op, verb: Call) -> str:
        attribute = verb.fn.obj in (getattr, setattr) and isinstance(op.first, Value)
        return verb.fn.obj.__name__ if attribute else super().function(n, op, verb)

    def document(self) -> dict:
        users = {
            key.slot: n
            for n, op in reversed(list(enumerate(self.draft.ops)))
            for key in leaves(op.args, op.kwargs)
            if isinstance(key, TensorSlot)
        }
        return {
            "operations": [self.operation(n, op) for n, op in enumerate(self.draft.ops)],
            "constants": [
                self.constant(slot, value, f"constant_{slot}", users.get(slot, 0))
                for slot, value in enumerate(self.draft.constants)
            ],
        }

    def operation(self, n: int, op: Op) -> dict:
        verb = op.verb
        if verb.name not in EDIT_KINDS:
            raise self.refuse(n, f"a file has no form for a `{verb.name}` yet")
        made = super().operation(n, op)
        if self.draft.turns[n] is not None:
            made["turn"] = list(self.draft.turns[n])
        if isinstance(verb, CallModule):
            made["hook"] = verb.instance is not None
        elif isinstance(verb, Read | Write):
            made["first"] = verb.first
        if isinstance(verb, AtSite) and f".{verb.site[0]}".count(".source.") > 1:
            raise self.refuse(n, "it looks into a function that an operation calls, which is known only in a trace")
        return made


def _parts(name: str, value: object) -> dict[int, str]:
    """The ids that a name is for: of an object, or of the parameters and buffers of a module, which get theirs behind it."""
    if not isinstance(value, torch.nn.Module):
        return {id(value): name}
    return {id(t): f"{name}.{n}" for n, t in (*value.named_parameters(), *value.named_buffers())}
