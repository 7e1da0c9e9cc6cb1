"""Small models as data: a net is a tuple of layer names, and builds the same module every time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from transformers import DynamicCache

from .kinds import BREAKS, KINDS, OBJECTS, PACKINGS, ROOTS, WIDTH, Attr, Keeping, Stage, parts


class Linear(Stage):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.fc(x)


class Residual(Stage):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, 6), nn.GELU(), nn.Linear(6, WIDTH)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


class Parallel(Stage):
    """Both halves see the same input, and the first one is used behind the second."""

    def __init__(self):
        super().__init__()
        self.attn, self.fc = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        attn, fc = self.attn(x), self.fc(x)
        return x + attn + fc


class InPlace(Stage):
    """`act` changes what `fc` returned, which is used again."""

    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.fc(x)
        return self.act(y) + 2 * y


class Views(Stage):
    """`view` returns a view of what `fc` gave."""

    def __init__(self):
        super().__init__()
        self.fc, self.view = nn.Linear(WIDTH, WIDTH), nn.Identity()

    def forward(self, x):
        whole = self.fc(x)
        half = self.view(whole.chunk(2, -1)[0])
        return whole + half.sum(-1, keepdim=True)


class Alias(Stage):
    """`same` returns its argument, and both names of it are used."""

    def __init__(self):
        super().__init__()
        self.same, self.act = nn.Identity(), nn.Tanh()

    def forward(self, x):
        y = x * 2
        return self.act(self.same(y)) + y


class Scribble(Stage):
    """Changes a view of its own input in place."""

    def __init__(self):
        super().__init__()
        self.act = nn.Sigmoid()

    def forward(self, x):
        x[:, 0] *= 0.5
        return self.act(x)


class Double(Stage):
    """The same submodule, twice."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.fc(torch.relu(self.fc(x)))


class Attention(Stage):
    def __init__(self):
        super().__init__()
        self.qkv, self.probs, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Softmax(-1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(self.probs(q @ k.transpose(1, 2)) @ v)


@dataclass
class Record:
    h: torch.Tensor
    skip: torch.Tensor
    step: int


PACKS = {
    "tuple": lambda h, skip: (h, skip, 3),
    "list": lambda h, skip: [h, skip, 3],
    "dict": lambda h, skip: {"h": h, "skip": skip, "step": 3},
    "record": lambda h, skip: Record(h, skip, 3),
}


class Part(nn.Module):
    def __init__(self, pack: str):
        super().__init__()
        self.pack, self.fc = pack, nn.Linear(WIDTH, WIDTH)

    def forward(self, *, x, scale):
        return PACKS[self.pack](self.fc(x) * scale, x)


class Packed(Stage):
    """`part` takes keywords only and returns two tensors and a number in a container."""

    def __init__(self, pack: str):
        super().__init__()
        self.part = Part(pack)

    def forward(self, x):
        got = self.part(x=x, scale=0.5)
        h, skip, step = (
            got.values() if isinstance(got, dict) else vars(got).values() if isinstance(got, Record) else got
        )
        return h + skip * step


class Dropout(Stage):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.4)

    def forward(self, x):
        return self.drop(x)


class Norm(Stage):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return self.bn(x.transpose(1, 2)).transpose(1, 2)


class Counter(Stage):
    """Moves a buffer of its own in every forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(WIDTH))
        self.act = nn.Tanh()

    def forward(self, x):
        self.total += x.detach().mean((0, 1))
        return self.act(x) + self.total


class Branch(Stage):
    """What follows depends on the values: a graph break."""

    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(WIDTH, WIDTH), nn.Tanh()

    def forward(self, x):
        if x.sum() > 0:
            return self.fc(x) * 2
        return self.act(x) - 1


class Memory:
    """A cache as a user gives one: it keeps what each layer has seen."""

    def __init__(self):
        self.kept: list[torch.Tensor] = []

    def update(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append(x)
        return torch.stack(self.kept).sum(0)


class Caching(Stage):
    caches = True

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, memory=None):
        y = self.fc(x)
        return y if memory is None else x + memory.update(y)


LAYERS = {
    "linear": Linear,
    "residual": Residual,
    "parallel": Parallel,
    "inplace": InPlace,
    "views": Views,
    "alias": Alias,
    "scribble": Scribble,
    "double": Double,
    "attention": Attention,
    "tuple": lambda: Packed("tuple"),
    "list": lambda: Packed("list"),
    "dict": lambda: Packed("dict"),
    "record": lambda: Packed("record"),
    "dropout": Dropout,
    "norm": Norm,
    "counter": Counter,
    "branch": Branch,
    "caching": Caching,
}
AGAIN = "again"  # the layer before it, called once more


class Model(nn.Module):
    def __init__(self, layers: tuple[str, ...]):
        super().__init__()
        self.layers = nn.ModuleList((LAYERS | KINDS)[name]() for name in layers if name != AGAIN)
        self.order, at = [], -1
        for name in layers:
            at += name != AGAIN
            self.order.append(at)

    def forward(self, x, memory=None):
        for i in self.order:
            layer = self.layers[i]
            x = layer(x, memory=memory) if layer.caches else layer(x)
        return x


class Optimized(nn.Module):
    """Where `torch.compile` has its modules, without it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self._orig_mod = inner

    def forward(self, x, memory=None):
        return self._orig_mod(x) if memory is None else self._orig_mod(x, memory=memory)


class Place(NamedTuple):
    """A site that a forward passes; `leaf` leads to one part of a container: an item's key, or a tuple of steps."""

    path: str
    kind: str
    call: int = 0
    leaf: Any = None

    @property
    def steps(self) -> tuple:
        return () if self.leaf is None else self.leaf if isinstance(self.leaf, tuple) else (self.leaf,)


@dataclass(frozen=True)
class Net:
    layers: tuple[str, ...]
    train: bool = False
    grad: bool = False  # do parameters require grad
    dynamic: bool | None = None  # as `model.compile` has it
    lifted: bool = False  # are numbers of the bodies inputs of the graphs, as any compiler but `eager` gets them
    root: str = ""  # what is around the model

    @property
    def holds_objects(self) -> bool:
        """Is there an object at a site? Hooks do what looks at it, and say so."""
        return self.root == "keeping" or any(name.split(", ")[0] in OBJECTS for name in self.layers)

    @property
    def breaks(self) -> bool:
        """Does what follows depend on values somewhere?"""
        return bool(BREAKS & set(self.layers))

    @property
    def entry(self) -> dict[str, str]:
        """What of the model a trace runs."""
        return {"fn": "generate"} if self.root == "looping" else {}

    def build(self, plain: bool = False) -> nn.Module:
        """`plain`: with the same modules, but none that `torch.compile` made."""
        torch.manual_seed(len(self.layers))
        module: nn.Module = Model(self.layers)
        if self.root == "keeping":
            module = Keeping(module, self.cache)
        elif plain and self.root.startswith("compiled"):
            module = Optimized(ROOTS["shell"](module) if self.root.endswith("shell") else module)
        elif self.root:
            module = ROOTS[self.root](module)
        return module.requires_grad_(self.grad).train(self.train)

    def cache(self) -> Any:
        return Memory() if "caching" in self.layers else DynamicCache()

    def memory(self) -> Any:
        """The cache that the user gives, if any."""
        return self.cache() if {"caching", "keys"} & set(self.layers) and self.root != "keeping" else None

    def pack(self, path: str) -> str | None:
        """The container that a module gives."""
        name = path.rpartition(".")[2]
        if name not in ("part", "give"):
            return None
        return self.layers_by_number[int(path.split(".")[-2])]

    @property
    def layers_by_number(self) -> list[str]:
        return [name for name in self.layers if name != AGAIN]

    def run(self, module: nn.Module, x: torch.Tensor) -> Any:
        """The model by itself."""
        memory = self.memory()
        fn = module.generate if self.entry else module
        return fn(x.clone()) if memory is None else fn(x.clone(), memory=memory)  # type: ignore[operator]

    def all_parts(self, x: torch.Tensor) -> list[tuple[Place, Any]]:
        """All that is at all sites, in the order in which a forward passes them, by plain hooks."""
        module, found, counts = self.build(plain=True), [], {}

        def passed(path: str, kind: str, value: Any) -> None:
            call = counts[(path, kind)] = counts.get((path, kind), -1) + 1
            found.extend((Place(path, kind, call, _leaf(steps)), each) for steps, each in parts(value))

        branches = [path for path, m in module.named_modules() if isinstance(m, Branch)]  # not every forward goes there
        for path, m in module.named_modules(remove_duplicate=self.root != "renamed"):
            if isinstance(m, nn.ModuleList) or any(path.startswith(f"{b}.") for b in branches):
                continue
            m.register_forward_pre_hook(
                lambda m, args, kw, p=path: passed(p, "input", [*args, *kw.values()][0]), with_kwargs=True
            )
            m.register_forward_hook(lambda m, args, out, p=path: passed(p, "output", out))
        with torch.no_grad(), torch.random.fork_rng():
            self.run(module, x)
        return found

    def places(self, x: torch.Tensor) -> list[Place]:
        """All tensors at all sites."""
        return [place for place, value in self.all_parts(x) if isinstance(value, torch.Tensor)]


def _leaf(steps: tuple) -> Any:
    if not steps:
        return None
    return steps[0] if len(steps) == 1 and not isinstance(steps[0], Attr) else steps


def packed(name: str, value: torch.Tensor, own: torch.Tensor) -> Any:
    """The container that a layer's module gives, with `value` in it."""
    if name in PACKS:
        return PACKS[name](value, own)
    pack, number = name.split(", ")
    return PACKINGS[pack].make(value, own, {"fixed": 3, "flag": True, "measured": 0.5}.get(number, 2))
