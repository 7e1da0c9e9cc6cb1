"""Layers of the newer kinds: containers with numbers, objects, loops that values decide, tables, and models around a model.

Each takes `(rows, length, WIDTH)` and gives the same, as those in `nets`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from transformers import DynamicCache
from transformers.utils import ModelOutput

WIDTH = 4


class Stage(nn.Module):
    """A layer: takes `(rows, length, WIDTH)`, gives the same."""

    caches = False


# -- what a module returns ---------------------------------------------------------------------------------------------


class Attr(str):
    """A step to an attribute; a plain string is an item's key."""

    def __repr__(self) -> str:
        return f"Attr({str(self)!r})"


class Named(NamedTuple):
    h: torch.Tensor
    n: float
    skip: torch.Tensor
    label: str = "named"


@dataclass
class Fields:
    h: torch.Tensor
    skip: torch.Tensor
    n: float
    note: str | None = None


@dataclass
class Output(ModelOutput):
    h: torch.Tensor | None = None
    skip: torch.Tensor | None = None
    n: float | None = None
    memory: Any = None


class Items(dict):
    """With an attribute beside its items."""

    def __init__(self, *args: Any, label: str = "mine", **items: Any):
        super().__init__(*args, **items)
        self.label = label


class State:
    """An object with tensors in it."""

    def __init__(self, h: torch.Tensor, skip: torch.Tensor, n: float):
        self.h, self.skip, self.n, self.parts = h, skip, n, {"both": [h, skip], "label": "state"}


class Slots:
    __slots__ = ("h", "n", "skip")

    def __init__(self, h: torch.Tensor, skip: torch.Tensor, n: float):
        self.h, self.skip, self.n = h, skip, n


def _nested(h: torch.Tensor, skip: torch.Tensor, n: float) -> dict:
    return {"a": (h, n), "b": [Named(skip, n, h), {"more": n * 2, "none": None}], "label": "x"}


def _cache(h: torch.Tensor, skip: torch.Tensor, n: float) -> DynamicCache:
    cache = DynamicCache()
    cache.update(h[:, None], skip[:, None], 0)
    return cache


class Pack(NamedTuple):
    make: Callable
    parts: Callable  # (h, skip, n) out of it


PACKINGS = {
    "tuple": Pack(lambda h, skip, n: (h, n, "a", None, skip), lambda o: (o[0], o[4], o[1])),
    "list": Pack(lambda h, skip, n: [n, h, skip], lambda o: (o[1], o[2], o[0])),
    "dict": Pack(
        lambda h, skip, n: {"h": h, "n": n, "note": None, "skip": skip}, lambda o: (o["h"], o["skip"], o["n"])
    ),
    "named": Pack(lambda h, skip, n: Named(h, n, skip), lambda o: (o.h, o.skip, o.n)),
    "fields": Pack(Fields, lambda o: (o.h, o.skip, o.n)),
    "nested": Pack(_nested, lambda o: (o["a"][0], o["b"][0].h, o["a"][1])),
    "output": Pack(lambda h, skip, n: Output(h=h, skip=skip, n=n), lambda o: (o.h, o["skip"], o.n)),
    "items": Pack(lambda h, skip, n: Items(h=h, skip=skip, n=n), lambda o: (o["h"], o["skip"], o["n"])),
    "state": Pack(State, lambda o: (o.h, o.parts["both"][1], o.n)),
    "slots": Pack(Slots, lambda o: (o.h, o.skip, o.n)),
    "state in a dict": Pack(
        lambda h, skip, n: {"state": State(h, skip, n), "n": n},
        lambda o: (o["state"].h, o["state"].skip, o["n"]),
    ),
    "cache": Pack(_cache, lambda o: (o.layers[0].keys[:, 0], o.layers[0].values[:, 0], o.get_seq_length())),
}
OBJECTS = ("output", "items", "state", "slots", "state in a dict", "cache")
NUMBERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "fixed": lambda h: 3,
    "length": lambda h: h.shape[1],
    "counted": lambda h: int((h > 0).sum()) % 3 + 1,
    "measured": lambda h: h.mean().item(),
    "item": lambda h: (h > 0).sum().item(),
    "flag": lambda h: bool(h.sum() > 0),
}


class Giver(nn.Module):
    def __init__(self, pack: str, number: str):
        super().__init__()
        self.pack, self.number, self.fc = pack, number, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.fc(x)
        return PACKINGS[self.pack].make(h, x * 2, NUMBERS[self.number](h))


class Taker(nn.Module):
    def __init__(self, pack: str):
        super().__init__()
        self.pack, self.act = pack, nn.Tanh()

    def forward(self, got):
        h, skip, n = PACKINGS[self.pack].parts(got)
        return self.act(h) * n + skip


class Giving(Stage):
    """`give` returns a container, `take` gets it."""

    def __init__(self, pack: str, number: str):
        super().__init__()
        self.give, self.take = Giver(pack, number), Taker(pack)

    def forward(self, x):
        return self.take(self.give(x))


# -- loops that values decide --------------------------------------------------------------------------------------------


class While(Stage):
    """Calls `fc` until its input is small."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(WIDTH, WIDTH), nn.Identity()

    def forward(self, x):
        h, n = x, 0
        while h.norm() > 2.0 and n < 6:
            h, n = self.fc(h) * 0.7, n + 1
        return self.out(x + h)


class Turns(Stage):
    """Calls `fc` as often as a number says that values give."""

    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(WIDTH, WIDTH), nn.Tanh()

    def forward(self, x):
        for _ in range(int((x > 0).sum()) % 4):
            x = self.act(self.fc(x))
        return x


class Early(Stage):
    """Ends when values say that it is enough, and says how often it went."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.done = nn.Identity()

    def forward(self, x):
        n = 0
        for step in self.steps:
            x, n = step(x), n + 1
            if x.mean() > 0:
                break
        return self.done((x, n))[0] * n


class Chosen(Stage):
    """One of its parts, by a value."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        return self.parts[int(x.sum() > 0)](x)


# -- sizes -----------------------------------------------------------------------------------------------------------------


class Table(Stage):
    """Adds a row of a table for each position, and a number for each row."""

    def __init__(self):
        super().__init__()
        self.table, self.act = nn.Parameter(torch.randn(16, WIDTH)), nn.Tanh()

    def forward(self, x):
        rows = torch.arange(x.shape[0], dtype=x.dtype).view(-1, 1, 1)
        return self.act(x + self.table[: x.shape[1]]) + 0.1 * rows


class Causal(Stage):
    def __init__(self):
        super().__init__()
        self.qkv, self.probs = nn.Linear(WIDTH, 3 * WIDTH), nn.Softmax(-1)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = torch.full((x.shape[1], x.shape[1]), -1e9, dtype=x.dtype).triu(1)
        return x + self.probs(q @ k.transpose(1, 2) + mask) @ v


class Long(Stage):
    """Another way where the input is long."""

    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(WIDTH, WIDTH), nn.Tanh()

    def forward(self, x):
        return self.act(self.fc(x)) if x.shape[1] > 5 else self.act(x) / x.shape[0]


# -- a cache of transformers' ----------------------------------------------------------------------------------------------


class Keys(Stage):
    """Attends to what a `DynamicCache` holds, if it is given one."""

    caches = True

    def __init__(self):
        super().__init__()
        self.kv, self.probs = nn.Linear(WIDTH, 2 * WIDTH), nn.Softmax(-1)

    def forward(self, x, memory=None):
        k, v = self.kv(x).chunk(2, -1)
        if memory is not None:
            k, v = (t[:, 0] for t in memory.update(k[:, None], v[:, None], 0))
        return x + self.probs(x @ k.transpose(1, 2)) @ v


# -- models around a model -------------------------------------------------------------------------------------------------


class Shell(nn.Module):
    """Hands everything on."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x, **kwargs):
        return self.inner(x, **kwargs)


class Renamed(nn.Module):
    """The same modules under other names, too, and a head of its own."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.body, self.head = inner, nn.Linear(WIDTH, WIDTH)
        self.blocks = inner.layers

    def forward(self, x, memory=None):
        return self.head(self.body(x, memory=memory))


class Looping(nn.Module):
    """With a `generate` of its own: what the model gives is what it gets next."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(WIDTH, WIDTH)

    def forward(self, x, memory=None):
        return self.head(self.inner(x, memory=memory))

    def generate(self, x, memory=None, streamer=None, disable_compile=None):
        outs = []
        for _ in range(3):
            x = self(x, memory=memory).tanh()
            outs.append(x[:, -1:])
        return torch.cat(outs, 1)


class Keeping(nn.Module):
    """Makes the cache if it is given none, and returns it in a `ModelOutput`."""

    def __init__(self, inner: nn.Module, make: Callable[[], Any]):
        super().__init__()
        self.inner, self.make = inner, make

    def forward(self, x, memory=None):
        memory = self.make() if memory is None else memory
        return Output(h=self.inner(x, memory=memory), n=x.shape[1], memory=memory)


def _peft(inner: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    linear = [path for path, m in inner.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        return Shell(inner)
    config = LoraConfig(r=2, target_modules=linear, init_lora_weights=False)
    return get_peft_model(inner, config)  # type: ignore[arg-type]


ROOTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "shell": Shell,
    "shells": lambda inner: Shell(Shell(inner)),
    "compiled": lambda inner: torch.compile(inner, backend="eager"),  # type: ignore[dict-item, return-value]
    "compiled shell": lambda inner: torch.compile(Shell(inner), backend="eager"),  # type: ignore[dict-item, return-value]
    "peft": _peft,
    "renamed": Renamed,
    "looping": Looping,
}

CONTAINED = {
    f"{pack}, {number}": functools.partial(Giving, pack, number)
    for pack in PACKINGS
    for number in NUMBERS
    if pack != "cache" or number == "fixed"
}
LOOPS: dict[str, Callable[[], Stage]] = {"while": While, "turns": Turns, "early": Early, "chosen": Chosen}
SIZED: dict[str, Callable[[], Stage]] = {"table": Table, "causal": Causal, "long": Long}
KEPT: dict[str, Callable[[], Stage]] = {"keys": Keys}
KINDS: dict[str, Callable[[], Stage]] = {**CONTAINED, **LOOPS, **SIZED, **KEPT}
# What follows depends on the values: a graph break.
BREAKS = {
    "branch",
    *LOOPS,
    *(name for name in CONTAINED if name.split(", ")[1] in ("counted", "measured", "item", "flag")),
}


def parts(value: Any, steps: tuple = ()) -> list[tuple[tuple, Any]]:
    """The ways to all that is in a site's value: tensors, numbers, containers and objects."""
    if isinstance(value, torch.Tensor | str | int | float | type(None)):
        return [(steps, value)]
    if isinstance(value, dict):
        inner = list(value.items())
        inner += [(Attr("label"), value.label)] if isinstance(value, Items) else []
    elif isinstance(value, Named):
        inner = [(Attr(name), getattr(value, name)) for name in value._fields]
    elif isinstance(value, list | tuple):
        inner = list(enumerate(value))
    elif dataclasses.is_dataclass(value) or isinstance(value, State):
        inner = [(Attr(name), each) for name, each in vars(value).items()]
    elif isinstance(value, Slots):
        inner = [(Attr(name), getattr(value, name)) for name in value.__slots__]
    elif isinstance(value, DynamicCache) and value.layers:
        return [
            (steps, value),
            *(
                ((*steps, Attr("layers"), 0, Attr(name)), getattr(value.layers[0], name, None))
                for name in ("keys", "values")
            ),
        ]
    else:
        inner = []
    return [(steps, value), *(found for step, each in inner for found in parts(each, (*steps, step)))]
