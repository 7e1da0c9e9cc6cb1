"""Programs as data: frozen verbs, and the machine that does them. The same text runs on every engine.

Values are numbered by age: 1 is the latest. Numbers and tensors of the body come from the run (`Given`), so that a program
runs again with others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from nnsight_fx import save

from .kinds import WIDTH, Attr
from .nets import Place, packed


@dataclass(frozen=True)
class Given:
    """What is another one in each run: the input's sizes and values, and the numbers and tensors of the body."""

    seed: int
    more_rows: int = 0
    length: int = 3

    def x(self, invoke: int, rows: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(10 * self.seed + invoke)
        return torch.randn(rows + self.more_rows, self.length, WIDTH, generator=draw)

    def sized(self, rows: int) -> Sizes:
        """Constants that have the batch's own sizes."""
        draw, rows = torch.Generator().manual_seed(self.seed + 200), rows + self.more_rows
        return Sizes(
            torch.randn(rows, 1, WIDTH, generator=draw),
            torch.randn(1, self.length, WIDTH, generator=draw),
            torch.randn(rows, self.length, WIDTH, generator=draw),
            torch.rand(rows, generator=draw) > 0.4,
            torch.rand(rows, self.length, generator=draw) > 0.4,
            torch.randperm(rows, generator=draw),
            torch.randint(-1, self.length, (rows,), generator=draw),
            torch.randint(0, self.length, (rows, 1, 1), generator=draw),
            torch.randn(5, WIDTH, generator=draw),
            torch.randint(0, 5, (rows, self.length), generator=draw),
        )

    def constants(self) -> list[Constants]:
        """Drawn before the trace, in which a draw would be recorded."""
        draw = torch.Generator().manual_seed(self.seed + 100)
        numbers = [round(n, 3) for n in torch.randn(3, generator=draw).tolist()]
        positions = torch.randint(-2, 2, (3,), generator=draw).tolist()
        vectors = torch.randn(3, 64, generator=draw).unbind()
        return [Constants(*each) for each in zip(numbers, positions, vectors, strict=True)]


class Sizes(NamedTuple):
    """Constants of `rows` rows and `length` tokens."""

    rows: torch.Tensor
    tokens: torch.Tensor
    grid: torch.Tensor
    row_mask: torch.Tensor
    grid_mask: torch.Tensor
    order: torch.Tensor
    positions: torch.Tensor
    columns: torch.Tensor
    table: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True)
class Constants:
    """The `slot`-th of each kind."""

    number: float
    position: int
    vector: torch.Tensor

    def like(self, a: torch.Tensor) -> torch.Tensor:
        """A real tensor as long as the last dimension."""
        return self.vector[: a.shape[-1]] if a.dim() else self.vector[0]


class Machine:
    """One run of a program's bodies: the values so far, and what is kept."""

    def __init__(self, model: Any, tracer: Any, constants: list[Constants], detaches: bool):
        self.model, self.tracer, self.constants, self.detaches = model, tracer, constants, detaches
        self.values: list[torch.Tensor] = []
        self.kept: list[Any] = []
        self.before: list[Any] = []  # what an earlier trace of the program has kept
        self.sized: Any = None

    def do(self, ops: tuple) -> None:
        for op in ops:
            if self.values or not hasattr(op, "a"):
                op.do(self)

    def value(self, age: int) -> torch.Tensor:
        return self.values[-1 - (age - 1) % len(self.values)]

    def push(self, value: torch.Tensor) -> None:
        self.values.append(value)

    @contextlib.contextmanager
    def at(self, place: Place) -> Any:
        """The envoy of a site, at the call that is meant."""
        envoy = self.model.get(place.path)
        if place.call:
            with self.tracer.iter[place.call]:
                yield envoy
        else:
            yield envoy

    def keep(self, value: torch.Tensor) -> None:
        self.kept.append(save(value.detach() if self.detaches else value))


def fit(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """`b` where it has `a`'s shape, else its mean."""
    return b if tuple(b.shape) == tuple(a.shape) else b.mean()


def step_into(value: Any, step: Any) -> Any:
    if isinstance(step, Attr) or (dataclasses.is_dataclass(value) and not isinstance(value, dict)):
        return getattr(value, step)
    return value[step]


def read(envoy: Any, place: Place) -> Any:
    return functools.reduce(step_into, place.steps, getattr(envoy, place.kind))


def replaced(whole: Any, steps: tuple, value: Any) -> Any:
    """`whole` with `value` in it: itself where it can be changed."""
    if not steps:
        return value
    step, *rest = steps
    value = replaced(step_into(whole, step), tuple(rest), value) if rest else value
    if isinstance(whole, tuple):
        at = whole._fields.index(step) if isinstance(step, Attr) else step  # type: ignore[attr-defined]
        parts = (*whole[:at], value, *whole[at + 1 :])
        return type(whole)(*parts) if hasattr(whole, "_fields") else parts
    if isinstance(step, Attr) or (dataclasses.is_dataclass(whole) and not isinstance(whole, dict)):
        setattr(whole, step, value)
    else:
        whole[step] = value
    return whole


def write(envoy: Any, place: Place, value: Any) -> None:
    whole = getattr(envoy, place.kind) if place.steps else None
    new = replaced(whole, place.steps, value)
    if new is not whole:
        setattr(envoy, place.kind, new)


def _along(a: torch.Tensor) -> int:
    """A dimension to index: the second, if there is one."""
    return min(1, a.dim() - 1)


PURE = {
    "add": lambda a, b, c: a + b,
    "mul": lambda a, b, c: a * b,
    "scale": lambda a, b, c: a * c.number,
    "shift": lambda a, b, c: c.number - a,
    "divide": lambda a, b, c: a / (c.number + 3),
    "steer": lambda a, b, c: a + c.like(a),
    "lerp": lambda a, b, c: torch.lerp(a, b.to(a.dtype), 0.3),
    "where": lambda a, b, c: torch.where(a > b, a, b * 2),
    "mask": lambda a, b, c: a.masked_fill(a > 0, c.number),
    "tanh": lambda a, b, c: a.tanh(),
    "clamp": lambda a, b, c: a.clamp(min=-0.5),
    "flip": lambda a, b, c: a.flip(-1),
    "center": lambda a, b, c: a - a.mean(-1, keepdim=True),
    "sorted": lambda a, b, c: a.sort(-1).values,
    "top": lambda a, b, c: torch.zeros_like(a).scatter(-1, a.topk(1, -1).indices, 1.0),
    "gather": lambda a, b, c: a.gather(-1, a.argsort(-1)),
    "picks": lambda a, b, c: a[:, [0, -1]] if a.dim() > 1 else a[[0]],
    "cat": lambda a, b, c: torch.cat([a, a * b]),
    "norm": lambda a, b, c: F.layer_norm(a, a.shape[-1:]),
    "outer": lambda a, b, c: torch.einsum("...i,j->...ij", a, c.like(a)),
    "clone": lambda a, b, c: a.clone(),
    "double": lambda a, b, c: a.double(),
    "bfloat16": lambda a, b, c: a.bfloat16(),
    "noise": lambda a, b, c: a + torch.randn_like(a),
    "rand": lambda a, b, c: a * torch.rand(a.shape[-1]),
    "dropout": lambda a, b, c: F.dropout(a, 0.5),
    "no_grad": lambda a, b, c: _no_grad(a, c),
}

VIEWS = {
    "select": lambda a, c: a.select(_along(a), c.position),
    "last": lambda a, c: a[..., c.position],
    "row": lambda a, c: a[0],
    "tail": lambda a, c: a[..., 1:],
    "half": lambda a, c: a.chunk(2, -1)[0],
    "parts": lambda a, c: a.unbind(-1)[0],
    "swap": lambda a, c: a.transpose(0, -1),
    "flat": lambda a, c: a.view(-1),
    "reshape": lambda a, c: a.reshape(-1),
    "expand": lambda a, c: a[:1].expand(2, *a.shape[1:]),
    "same": lambda a, c: a.view_as(a),
    "detach": lambda a, c: a.detach(),
    "narrow": lambda a, c: a.narrow(_along(a), 0, 1),
    "diagonal": lambda a, c: a.diagonal(0, 0, -1) if a.dim() > 1 else a[:1],
}

IN_PLACE = {
    "add_": lambda a, b, c: a.add_(c.number),
    "mul_": lambda a, b, c: a.mul_(c.number),
    "iadd": lambda a, b, c: a.__iadd__(b),
    "zero_": lambda a, b, c: a.zero_(),
    "relu_": lambda a, b, c: torch.relu_(a),
    "clamp_": lambda a, b, c: a.clamp_(max=0.5),
    "copy_": lambda a, b, c: a.copy_(b),
    "set": lambda a, b, c: a.__setitem__((..., c.position), c.number),
    "set row": lambda a, b, c: a.__setitem__(0, b.mean()),
    "set tail": lambda a, b, c: a.__setitem__((..., slice(1, None)), c.like(a)[1:]),
    "set mask": lambda a, b, c: a.__setitem__(a > 0, c.number),
    "masked_fill_": lambda a, b, c: a.masked_fill_(a < 0, c.number),
    "index_add_": lambda a, b, c: a.index_add_(0, torch.tensor([0]), a[:1] * 2),
    "lerp_": lambda a, b, c: a.lerp_(b, 0.5),
    "uniform_": lambda a, b, c: a.uniform_(),
    "out": lambda a, b, c: torch.mul(a, 2, out=a),
}


def _no_grad(a: torch.Tensor, c: Constants) -> torch.Tensor:
    with torch.no_grad():
        return a * c.number


@dataclass(frozen=True)
class Read:
    place: Place

    def do(self, m: Machine) -> None:
        with m.at(self.place) as envoy:
            m.push(read(envoy, self.place))


@dataclass(frozen=True)
class Write:
    """`fits`: of the site's own shape and dtype; else as it is."""

    place: Place
    a: int
    fits: bool = True

    def do(self, m: Machine) -> None:
        value = m.value(self.a)
        with m.at(self.place) as envoy:
            if self.fits:
                old = read(envoy, self.place)
                if tuple(value.shape) != tuple(old.shape) or value.dtype != old.dtype:
                    value = (old + value.mean()).to(old.dtype)
            write(envoy, self.place, value)


@dataclass(frozen=True)
class Augment:
    """`module.output[:, p] += n`, and `module.output += v`."""

    place: Place
    slot: int
    whole: bool

    def do(self, m: Machine) -> None:
        c = m.constants[self.slot]
        with m.at(self.place) as envoy:
            if self.place.leaf is not None:
                read(envoy, self.place).__iadd__(c.number)
            elif self.whole and self.place.kind == "output":
                envoy.output += c.vector[: envoy.output.shape[-1]]
            elif self.place.kind == "output":
                envoy.output[:, c.position] += c.number
            else:
                envoy.input[:, c.position] += c.number


@dataclass(frozen=True)
class Pure:
    fn: str
    a: int
    b: int = 1
    slot: int = 0

    def do(self, m: Machine) -> None:
        a = m.value(self.a)
        m.push(PURE[self.fn](a, fit(m.value(self.b), a), m.constants[self.slot]))


@dataclass(frozen=True)
class View:
    fn: str
    a: int
    slot: int = 0

    def do(self, m: Machine) -> None:
        a = m.value(self.a)
        if a.dim():
            m.push(VIEWS[self.fn](a, m.constants[self.slot]))


@dataclass(frozen=True)
class InPlace:
    fn: str
    a: int
    b: int = 1
    slot: int = 0

    def do(self, m: Machine) -> None:
        a = m.value(self.a)
        if a.dim():
            IN_PLACE[self.fn](a, fit(m.value(self.b), a).to(a.dtype), m.constants[self.slot])


@dataclass(frozen=True)
class Save:
    a: int

    def do(self, m: Machine) -> None:
        m.keep(m.value(self.a))


@dataclass(frozen=True)
class SaveWhole:
    """A site's container, as it is when the trace is over."""

    place: Place

    def do(self, m: Machine) -> None:
        if not m.detaches:
            with m.at(self.place) as envoy:
                m.kept.append(save(getattr(envoy, self.place.kind)))


@dataclass(frozen=True)
class Result:
    def do(self, m: Machine) -> None:
        m.keep(m.tracer.result)


@dataclass(frozen=True)
class Skip:
    """With `a` where it fits, else with what the module got, in the structure that it gives (`pack`)."""

    place: Place
    a: int
    pack: Any = None

    def do(self, m: Machine) -> None:
        with m.at(self.place) as envoy:
            own = envoy.input
            value = fit(m.value(self.a), own).to(own.dtype) + 0 * own
            envoy.skip(value if self.pack is None else packed(self.pack, value, own))


@dataclass(frozen=True)
class Stop:
    def do(self, m: Machine) -> None:
        m.tracer.stop()


@dataclass(frozen=True)
class If:
    """Python looks at a value."""

    a: int
    slot: int
    then: tuple = ()
    orelse: tuple = ()

    def do(self, m: Machine) -> None:
        m.do(self.then if m.value(self.a).sum() > m.constants[self.slot].number else self.orelse)


@dataclass(frozen=True)
class Item:
    """A Python number from one value goes into another."""

    a: int
    b: int

    def do(self, m: Machine) -> None:
        m.push(m.value(self.b) * m.value(self.a).mean().item())


@dataclass(frozen=True)
class Apply:
    a: int

    def do(self, m: Machine) -> None:
        m.push(m.tracer.apply(lambda a: a * 2 if a.sum() > 0 else a.flip(0), m.value(self.a)))


@dataclass(frozen=True)
class Call:
    """A module of the model on a value."""

    path: str
    a: int

    def do(self, m: Machine) -> None:
        m.push(m.model.get(self.path)(m.value(self.a)))


@dataclass(frozen=True)
class Barrier:
    def do(self, m: Machine) -> None:
        m.tracer.barrier(1)()


@dataclass(frozen=True)
class Grad:
    """Read the gradient of a value; with `slot`, replace it."""

    a: int
    slot: int | None = None

    def do(self, m: Machine) -> None:
        value = m.value(self.a)
        if not value.requires_grad:
            return
        gradient = value.grad
        m.kept.append(gradient.clone().save())
        if self.slot is not None:
            value.grad = gradient * m.constants[self.slot].number


@dataclass(frozen=True)
class Backward:
    a: int
    around: tuple = ()  # in `with loss.backward():`
    retain: bool = False

    def do(self, m: Machine) -> None:
        loss = m.value(self.a).float().pow(2).sum()
        if not loss.requires_grad:
            return
        if self.around:
            with loss.backward(retain_graph=self.retain):
                m.do(self.around)
        else:
            loss.backward(retain_graph=self.retain)


@dataclass(frozen=True)
class Body:
    """One invoke; without rows, over the whole batch. `fresh`: it uses no value of those before."""

    ops: tuple
    rows: int = 2
    cache: bool = False
    fresh: bool = False


@dataclass(frozen=True)
class Program:
    bodies: tuple[Body, ...]
    alone: bool = True  # the one input is the trace's own
    together: bool = False  # `tracer.batch`: all inputs are given first
    then: Body | None = None  # in a trace of its own, behind the first

    def verbs(self) -> list[str]:
        """The names of all verbs in it."""
        bodies = (*self.bodies, *((self.then,) if self.then else ()))
        found = [name for body in bodies for op in body.ops for name in _verbs(op)]
        found += ["invokes"] * (len(self.bodies) > 1) + ["cache"] * any(b.cache for b in self.bodies)
        found += ["value of another invoke"] * any(not b.fresh for b in self.bodies[1:])
        found += ["a second trace"] * (self.then is not None)
        return found + ["together"] * self.together + ["whole batch"] * any(not b.rows for b in self.bodies)

    @property
    def steady(self) -> bool:
        """Is its plan the same in each run? Python that looks at values may take another way, and where a view of a lifted
        position goes past a sync point, what comes behind is compiled for where it lies."""
        verbs = set(self.verbs())
        looks = {"If", "Apply", "Look", "IfNumber", "WriteNumber", "Loop"}  # a number of the model's is another plan
        looks |= {"Sized chosen rows", "Sized chosen tokens"}  # as many as the mask says
        return not looks & verbs and not ("Item" in verbs and {"View", "Augment", "InPlace"} & verbs)

    def run(self, model: Any, given: Given, kwargs: dict, out: dict) -> None:
        """Trace the model with it; `out` gets what it leaves."""
        detaches = "Backward" in self.verbs()
        inputs = [given.x(i, body.rows) if body.rows else None for i, body in enumerate(self.bodies)]
        out["inputs"], out["kept"], out["caches"] = inputs, [], []
        args, constants = (inputs[0],) if self.alone else (), given.constants()
        entry = {k: v for k, v in kwargs.items() if k == "fn"}
        sized = [given.sized(body.rows) for body in self.bodies]
        with model.trace(*args, **(kwargs if self.alone else entry)) as tracer:
            m = Machine(model, tracer, constants, detaches)
            out["kept"] = m.kept
            opened = tracer.batch(*(x for x in inputs if x is not None)) if self.together else None
            for body, x, sizes in zip(self.bodies, inputs, sized, strict=True):
                invoke = contextlib.nullcontext()
                if not self.alone:
                    invoke = opened.pop(0) if opened else tracer.invoke() if x is None else tracer.invoke(x)
                with invoke:
                    if body.cache:
                        out["caches"].append(tracer.cache(include_inputs=True))
                    m.values, m.sized = [] if body.fresh else m.values, sizes
                    m.do(body.ops)
        if self.then is not None:
            x, kept = given.x(9, self.then.rows), [*m.kept]
            memory = next((v[0] for v in kept if isinstance(v, list) and v and hasattr(v[0], "update")), None)
            memory = None if isinstance(memory, dict) or "memory" not in out["takes"] else memory
            inputs.append(x)
            sizes = given.sized(self.then.rows)
            with model.trace(x, **entry, **({} if memory is None else {"memory": memory})) as tracer:
                m = Machine(model, tracer, constants, detaches)
                m.before, m.sized, m.kept = kept, sizes, out["kept"]
                m.do(self.then.ops)


def _verbs(op: Any) -> list[str]:
    inner = [*getattr(op, "then", ()), *getattr(op, "orelse", ()), *getattr(op, "around", ())]
    place = getattr(op, "place", None)
    named = [type(op).__name__, *(["later call"] if place is not None and place.call else [])]
    named += ["in a container"] if place is not None and place.leaf is not None else []
    named += ["does not fit"] if isinstance(op, Write) and not op.fits else []
    named += [f"{type(op).__name__} {op.fn}"] if hasattr(op, "fn") else []
    return [*named, *(name for each in inner for name in _verbs(each))]
