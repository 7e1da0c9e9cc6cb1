"""Plans as files: JSON in the header of a safetensors file that holds the lifted tensors. No pickle, no code.

| JSON | stands for |
| --- | --- |
| `{"v": [op, leaf]}` | a value |
| `{"c": slot}` | a lifted tensor or number |
| `null`, `true`, `3`, `"text"`, `[...]` | themselves |
| `{"float": hex}`, `{"dtype": name}`, `{"device": name}`, `{"layout": name}`, `{"format": name}`, `{"ellipsis": 0}` | literals |
| `{"t": [...]}`, `{"d": [[key, value], ...]}`, `{"k": [start, stop, step]}` | tuples, dicts, slices |
| `{"keep": leaf}` | in a written tree: what was there |
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from transformers import modeling_outputs
from transformers.utils.generic import ModelOutput

from ..errors import PlanError
from . import tree
from .ambient import Ambient
from .encode import Keep, Key
from .lazy import user_line
from .operators import name_of_operator
from .plan import APPLY, BACKWARD, CALL, GRAD, OBJECT, OBSERVE, READ, SAVE, SKIP, SYNC, VISIT, WRITE, Op
from .printing import leaf_paths, short

FORMAT = "nnsight_fx.plan"
VERSION = 1  # of the file and of the dialect in it

_LITERALS: dict[str, dict[str, Any]] = {
    "dtype": {str(x): x for x in vars(torch).values() if isinstance(x, torch.dtype)},
    "layout": {str(x): x for x in vars(torch).values() if isinstance(x, torch.layout)},
    "format": {str(x): x for x in vars(torch).values() if isinstance(x, torch.memory_format)},
    "ellipsis": {"...": ...},
}
_LITERAL_OF = {value: {tag: name} for tag, names in _LITERALS.items() for name, value in names.items()}
_CONTAINERS: dict[str, type] = {"tuple": tuple, "list": list, "dict": dict, "OrderedDict": OrderedDict} | {
    name: cls for name, cls in vars(modeling_outputs).items() if isinstance(cls, type) and issubclass(cls, ModelOutput)
}


@dataclass
class Recording:
    """What a plan is saved with besides its operations."""

    parameters: dict[int, str]  # id of a parameter or buffer of the model -> its name
    inputs: list[tuple[tuple, dict] | None]  # of each invoke; `None` for one without
    alone: bool  # one direct input, no invokes
    together: bool  # all inputs given first, by `tracer.batch`
    fn: str | None
    pad_to: int | None
    sites: list[list | None]  # what each read found: shape and dtype, leaf by leaf
    slots: dict[int, Any]  # id of a saved value -> its key
    changed: set[int]  # ids of real tensors that the body changes
    waves: int


def save(graph: Any, path: Any, names: dict[str, Any]) -> None:
    """`Graph.save_plan`."""
    writer = Writer(graph, names)
    data = to_bytes(writer.tensors, {"format": FORMAT, "plan": json.dumps(writer.document())})
    folder = os.path.dirname(os.path.abspath(os.fspath(path)))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".plan-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class Writer:
    """One plan on its way into a file."""

    def __init__(self, graph: Any, names: dict[str, Any]):
        self.graph, self.plan, self.recording = graph, graph.plan, graph.recording
        self.tensors: dict[str, torch.Tensor] = {}
        if self.recording is None:
            raise PlanError("this graph was not recorded by a trace; save the one that it was loaded from")
        self.names: dict[int, str] = {}  # by id of a saved value or lifted tensor
        self.slot_names: dict[str, str] = {}  # by the name that the printed plan gives a constant
        known = {id(c) for c in graph.constants if isinstance(c, torch.Tensor)} | set(self.recording.slots)
        printed = {f"constant_{slot}" for slot in range(len(graph.constants))}
        for name, value in names.items():
            chosen = [value] if isinstance(value, str) else value
            if isinstance(chosen, list | tuple) and printed.issuperset(chosen):
                self.slot_names.update(dict.fromkeys(chosen, name))
            elif isinstance(value, torch.Tensor) and id(value) in known:
                self.names[id(value)] = name
            else:
                raise PlanError(
                    f"{user_line()}: `names` calls something `{name}` that is neither a saved value nor a lifted one of this plan. Give "
                    "the very object (what `.save()` returned, the tensor that the body used), or its name in `print(tracer.graph)`: "
                    + (", ".join(f'"{p}"' for p in sorted(printed)) or "there are no constants")
                    + "."
                )

    def refuse(self, n: int, why: str) -> PlanError:
        line = self.graph.lines[n]
        return PlanError(f"{line}: `{self.graph[n].code}` cannot be saved: {why}.")

    def document(self) -> dict:
        r = self.recording
        if r.waves > 1:
            raise PlanError(
                "this trace ran the model several times, because its body looked at a value; a plan is one forward"
            )
        ops = [self.operation(n, op) for n, op in enumerate(self.plan.ops)]
        inputs = [None if i is None else self.input(i) for i in r.inputs]
        return {
            "version": VERSION,
            "torch": torch.__version__,
            "alone": r.alone,
            "together": r.together,
            "fn": r.fn,
            "pad_to": r.pad_to,
            "invokes": [i is not None for i in r.inputs],
            "inputs": inputs if all(i is not False for i in inputs) else None,
            "constants": [self.constant(slot, value) for slot, value in enumerate(self.graph.constants)],
            "operations": ops,
            "saved": self.saved(),
        }

    def operation(self, n: int, op: Op) -> dict:
        if op.kind in (APPLY, SYNC):
            raise self.refuse(
                n, "it runs Python on real values, and a plan holds no code. Write it in torch operations"
            )
        if op.kind in (OBSERVE, VISIT):
            why = {OBSERVE: "a cache", VISIT: "a call with `hook=True`"}[op.kind]
            raise self.refuse(n, f"it belongs to {why}, which a plan cannot hold yet. Save the values themselves")
        if op.kind == OBJECT or (op.kind == READ and op.extra is None):
            raise self.refuse(n, "it reads an object, or a structure that only the run knows")
        target: Any = op.target
        if op.kind == CALL:
            target = name_of_operator(op.target.obj)
            if target is None:
                raise self.refuse(
                    n,
                    f"`{op.target!r}` is not one of torch's own operations (a custom autograd function, say), and a plan holds no code",
                )
            first = op.args[2][0] if op.args[2] else None
            if op.effect == "inplace" and first is not None and first[0] == "c":
                raise self.refuse(
                    n,
                    "it changes a tensor of yours in place, whose first value is gone. Work on a copy: `(x + 0).add_(...)`",
                )
        made: dict = {"kind": op.kind, "invoke": op.invoke, "line": short(self.graph.lines[n])}
        if target is not None:
            made["target"] = list(target) if isinstance(target, tuple) else target
        if op.ambient is not None:
            grad, inference, autocast = op.ambient
            made["ambient"] = [grad, inference, [[d, on, str(dtype)] for d, on, dtype in autocast]]
        if op.kind == READ:
            made["found"] = self.recording.sites[n]
        elif op.kind in (WRITE, SKIP):
            fits = op.kind == WRITE and op.extra[2]
            made["tree"] = "same" if fits else self.spec(n, op.extra[0])
        elif op.kind in (GRAD, BACKWARD):
            made["extra"] = bool(op.extra)
        made["args"] = [self.value(n, k) for k in op.args[2]]
        if op.kwargs[1]:
            made["kwargs"] = {k: self.value(n, v) for k, v in zip(op.kwargs[1], op.kwargs[2], strict=True)}
        return made

    def value(self, n: int, key: Key) -> Any:
        tag = key[0]
        if tag == "v":
            return {"v": [key[1], key[2]]}
        if tag in ("c", "n"):
            return {"c": key[1]}
        if tag == "l":
            return literal(key)
        if tag == "t":
            items = [self.value(n, k) for k in key[2]]
            return items if key[1] is list else {"t": items}
        if tag == "d" and all(isinstance(k, str | int) for k in key[1]):
            return {"d": [[k, self.value(n, v)] for k, v in zip(key[1], key[2], strict=True)]}
        if tag == "k":
            return {"k": [self.value(n, k) for k in key[1:]]}
        if tag == "s":
            raise self.refuse(
                n, "it depends on a size that was not known yet. Give the prompts first (`tracer.batch`), or `pad_to=`"
            )
        what = repr(key[1]) if tag == "o" else key[2].__name__ if tag == "x" else repr(key)
        raise self.refuse(n, f"its argument {what} is an object, and a plan holds tensors and plain values only")

    def spec(self, n: int, spec: tree.Spec) -> Any:
        if spec is None:
            return None
        kind, cls, keys, children = spec
        if _CONTAINERS.get(cls.__name__) is not cls:
            raise self.refuse(
                n, f"it writes a {cls.__name__}, a class that a file cannot name. Write a tuple, list or dict"
            )
        return [kind, cls.__name__, list(keys), [self.spec(n, child) for child in children]]

    def constant(self, slot: int, value: Any) -> dict:
        name = self.slot_names.get(f"constant_{slot}", f"constant_{slot}")
        name = self.names.get(id(value), name) if isinstance(value, torch.Tensor) else name
        if not isinstance(value, torch.Tensor):
            return {"name": name, "number": value.hex() if isinstance(value, float) else value}
        made = {"name": name, "requires_grad": value.requires_grad}
        if id(value) in self.recording.parameters:
            return made | {"parameter": self.recording.parameters[id(value)]}
        n = next((op.index for op in self.graph if slot in op.constants), 0)
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided or value.is_meta:
            raise self.refuse(n, f"its {type(value).__name__} argument is no plain dense tensor")
        if id(value) in self.recording.changed:
            raise self.refuse(n, "the body changes this tensor of yours in place, and its first value is gone")
        self.tensors[str(slot)] = value.detach().cpu().contiguous().clone()
        return made | {"tensor": str(slot), "device": str(value.device)}

    def saved(self) -> list[list]:
        """`[name, op, leaf]` of each saved value, in order."""
        keys = [k for op in self.plan.ops if op.kind == SAVE for k in op.args[2]]
        given = {key: self.names[i] for i, key in self.recording.slots.items() if i in self.names}
        found: list[list] = []
        for i, key in enumerate(keys):
            name = given.get(key) or self._site_name(key) or f"saved_{i}"
            if any(name == other[0] for other in found):
                name = f"saved_{i}"
            found.append([name, key[1], key[2]])
        return found

    def _site_name(self, key: Key) -> str | None:
        op = self.plan.ops[key[1]]
        if op.kind != READ:
            return None
        path, kind, call = op.target
        where = ".".join(p for p in (path, kind) if p) + (f"@{call}" if call else "")
        return where + leaf_paths(self.plan.specs[key[1]])[key[2]]

    def input(self, given: Any) -> Any:
        """The shapes of an input, or `False` when it holds objects."""
        bad = [x for x in tree.flatten(given)[0] if not isinstance(x, torch.Tensor | int | float | str | None)]
        return False if bad else _shapes(given)


def _shapes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"tensor": [list(value.shape), str(value.dtype)]}
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, tuple):
        return {"t": [_shapes(v) for v in value]}
    if isinstance(value, list):
        return [_shapes(v) for v in value]
    if isinstance(value, dict):
        return {"d": [[k, _shapes(v)] for k, v in value.items()]}
    return value


def literal(key: Key) -> Any:
    _, cls, value = key
    if cls is float:
        return {"float": value}
    if cls is torch.device:
        return {"device": str(value)}
    if cls is Keep:
        return {"keep": value.index}
    return value if cls in (int, bool, str, type(None)) else _LITERAL_OF[value]


# -- reading -------------------------------------------------------------------------------------------------------


def load(path: Any) -> tuple[dict, dict[str, torch.Tensor]]:
    """The document and the tensors of a file."""
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise PlanError(f"`{path}` is not a saved plan: its header does not say `{FORMAT}`.")
            document = json.loads(metadata["plan"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (clone: aligned)
    except (SafetensorError, ValueError, KeyError) as e:
        if isinstance(e, PlanError):
            raise
        raise PlanError(f"`{path}` is not a saved plan, or is damaged: {e}") from e
    if not isinstance(document, dict) or document.get("version") != VERSION:
        version = document.get("version") if isinstance(document, dict) else None
        raise PlanError(
            f"`{path}` holds a plan of version {version!r}, and this nnsight_fx reads version {VERSION}. "
            "Save the plan again, from the trace that made it, with this version."
        )
    return document, tensors


def decode(data: Any, value: Callable[[int, int], Any], constant: Callable[[int], Any]) -> Any:
    """An argument from its JSON. Unknown forms are a `PlanError`; no name is ever looked up in a module."""

    def walk(x: Any) -> Any:
        if x is None or isinstance(x, bool | int | str):
            return x
        if isinstance(x, list):
            return [walk(i) for i in x]
        if not isinstance(x, dict) or len(x) != 1:
            raise PlanError(f"damaged plan: {x!r} is no argument")
        ((tag, inner),) = x.items()
        try:
            return forms[tag](inner) if tag in forms else _LITERALS[tag][inner]
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as e:
            raise PlanError(f"damaged plan: {x!r} is no argument") from e

    forms: dict[str, Callable[[Any], Any]] = {
        "v": lambda x: value(*x),
        "c": constant,
        "float": float.fromhex,
        "device": torch.device,
        "keep": Keep,
        "t": lambda x: tuple(walk(i) for i in x),
        "d": lambda x: {k: walk(v) for k, v in x},
        "k": lambda x: slice(*map(walk, x)),
        "tensor": lambda x: torch.ones(x[0], dtype=_LITERALS["dtype"][x[1]]),
    }
    return walk(data)


def spec_of(data: Any) -> tree.Spec:
    if data is None:
        return None
    try:
        kind, name, keys, children = data
        return (kind, _CONTAINERS[name], tuple(keys), tuple(spec_of(child) for child in children))
    except (KeyError, TypeError, ValueError) as e:
        raise PlanError(f"damaged plan: {data!r} is no structure") from e


def ambient_of(data: Any) -> Ambient | None:
    if data is None:
        return None
    try:
        grad, inference, autocast = data
        modes = tuple((str(d), bool(on), _LITERALS["dtype"][t]) for d, on, t in autocast)
        return Ambient(bool(grad), bool(inference), modes)
    except (KeyError, TypeError, ValueError) as e:
        raise PlanError(f"damaged plan: {data!r} are no modes") from e
