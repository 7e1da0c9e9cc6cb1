"""Arguments of recorded operations as JSON, and back. No name is ever looked up in a module.

| JSON | stands for |
| --- | --- |
| `{"v": [op, leaf]}` | a value |
| `{"c": slot}` | a lifted tensor or number |
| `null`, `true`, `3`, `"text"`, `[...]` | themselves |
| `{"float": hex}`, `{"dtype": name}`, `{"device": name}`, `{"layout": name}`, `{"format": name}`, `{"ellipsis": 0}` | literals |
| `{"t": [...]}`, `{"d": [[key, value], ...]}`, `{"k": [start, stop, step]}` | tuples, dicts, slices |
| `{"x": [structure, [...]]}` | another container, of a class that a file can name |
| `{"keep": leaf}` | in a written tree: what was there |
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from transformers import modeling_outputs
from transformers.utils.generic import ModelOutput

from ..errors import PlanError
from . import tree
from .ambient import Ambient
from .keys import Container, Items, Keep, Key, Named, NumberSlot, Plain, SizeExpr, Span, TensorSlot, Value
from .verbs import Barrier, Call, CallModule, Grad, Read, RunBackward, Save, SetGrad, Skip, StopRun, Visit, Write

# The operations that a file has a form for; any other is refused when a plan or an edit is saved, and when it is loaded.
EDIT_KINDS = frozenset({verb.name for verb in (Read, Write, Skip, Call, CallModule, StopRun, Barrier)})
PLAN_KINDS = EDIT_KINDS | {verb.name for verb in (Visit, Save, Grad, SetGrad, RunBackward)}

_LITERALS: dict[str, dict] = {
    "dtype": {str(x): x for x in vars(torch).values() if isinstance(x, torch.dtype)},
    "layout": {str(x): x for x in vars(torch).values() if isinstance(x, torch.layout)},
    "format": {str(x): x for x in vars(torch).values() if isinstance(x, torch.memory_format)},
    "ellipsis": {"...": ...},
}
_LITERAL_OF = {value: {tag: name} for tag, names in _LITERALS.items() for name, value in names.items()}
_CONTAINERS: dict[str, type] = {"tuple": tuple, "list": list, "dict": dict, "OrderedDict": OrderedDict} | {
    name: cls for name, cls in vars(modeling_outputs).items() if isinstance(cls, type) and issubclass(cls, ModelOutput)
}


class Unnamed(ValueError):
    """Something that a file cannot name; says what."""


# -- writing -------------------------------------------------------------------------------------------------------


def argument(key: Key, operation: Callable[[int], int] = lambda n: n) -> Any:
    """The JSON of an argument; `operation` gives the number that an operation has in the file.

    Raises:
        Unnamed: it holds an object, or a size that is not known.
    """

    def walk(key: Key) -> Any:
        if isinstance(key, Value):
            return {"v": [operation(key.op), key.leaf]}
        if isinstance(key, TensorSlot | NumberSlot):
            return {"c": key.slot}
        if isinstance(key, Plain):
            return _literal(key)
        if isinstance(key, Items):
            items = [walk(k) for k in key.items]
            return items if key.cls is list else {"t": items}
        if isinstance(key, Named) and all(isinstance(k, str | int) for k in key.names):
            return {"d": [[k, walk(v)] for k, v in zip(key.names, key.items, strict=True)]}
        if isinstance(key, Span):
            return {"k": [walk(k) for k in key]}
        if isinstance(key, Container) and _CONTAINERS.get(key.cls.__name__) is key.cls:
            return {"x": [[key.kind, key.cls.__name__, list(key.names)], [walk(k) for k in key.items]]}
        if isinstance(key, SizeExpr):
            raise Unnamed(
                "it depends on a size that was not known yet. Give the prompts first (`tracer.batch`), or `pad_to=`"
            )
        what = key.cls.__name__ if isinstance(key, Container) else repr(key)
        raise Unnamed(f"its argument {what} is an object, and a plan holds tensors and plain values only")

    return walk(key)


def _literal(key: Plain) -> object:
    if key.cls is float:
        return {"float": key.held}
    if key.cls is torch.device:
        return {"device": str(key.value)}
    if key.cls is Keep:
        return {"keep": key.value.index}
    return key.value if key.cls in (int, bool, str, type(None)) else _LITERAL_OF[key.value]


def structure(spec: tree.Spec) -> list | None:
    """The JSON of a tree's structure.

    Raises:
        Unnamed: it has a class that a file cannot name.
    """
    if spec is None:
        return None
    kind, cls, keys, children = spec
    if _CONTAINERS.get(cls.__name__) is not cls:
        raise Unnamed(f"it holds a {cls.__name__}, a class that a file cannot name. Use a tuple, list or dict")
    return [kind, cls.__name__, list(keys), [structure(child) for child in children]]


def modes(ambient: tuple) -> list:
    """The JSON of the modes that an operation was recorded under."""
    grad, inference, autocast = ambient
    return [grad, inference, [[device, on, str(dtype)] for device, on, dtype in autocast]]


def shapes(value: object) -> object:
    """The JSON of an input: of tensors the shapes and dtypes only."""
    if isinstance(value, torch.Tensor):
        return {"tensor": [list(value.shape), str(value.dtype)]}
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, tuple):
        return {"t": [shapes(v) for v in value]}
    if isinstance(value, list):
        return [shapes(v) for v in value]
    if isinstance(value, dict):
        return {"d": [[k, shapes(v)] for k, v in value.items()]}
    return value


# -- reading -------------------------------------------------------------------------------------------------------


def decode(data: object, value: Callable[[int, int], Any], constant: Callable[[int], Any]) -> Any:
    """An argument from its JSON. Unknown forms are a `PlanError`."""

    def walk(x: object) -> Any:
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

    def container(structure: list, items: list) -> Any:
        kind, name, keys = structure
        return tree.construct(kind, _CONTAINERS[name], tuple(keys), [walk(i) for i in items])

    forms: dict[str, Callable[[Any], Any]] = {
        "v": lambda x: value(*x),
        "c": constant,
        "float": float.fromhex,
        "device": torch.device,
        "keep": Keep,
        "t": lambda x: tuple(walk(i) for i in x),
        "d": lambda x: {k: walk(v) for k, v in x},
        "k": lambda x: slice(*map(walk, x)),
        "x": lambda x: container(*x),
        "tensor": lambda x: torch.ones(x[0], dtype=_LITERALS["dtype"][x[1]]),
    }
    return walk(data)


def spec_of(data: Any) -> tree.Spec:
    if data is None:
        return None
    try:
        kind, name, keys, children = data
        return tree.Branch(kind, _CONTAINERS[name], tuple(keys), tuple(spec_of(child) for child in children))
    except (KeyError, TypeError, ValueError) as e:
        raise PlanError(f"damaged plan: {data!r} is no structure") from e


def ambient_of(data: Any) -> Ambient | None:
    if data is None:
        return None
    try:
        grad, inference, autocast = data
        found = tuple((str(d), bool(on), _LITERALS["dtype"][t]) for d, on, t in autocast)
        return Ambient(bool(grad), bool(inference), found)
    except (KeyError, TypeError, ValueError) as e:
        raise PlanError(f"damaged plan: {data!r} are no modes") from e


def dtype_of(name: str | None) -> torch.dtype | None:
    return None if name is None else _LITERALS["dtype"][name]
