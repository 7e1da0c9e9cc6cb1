"""What a recording is made of: the tree of steps that all recordings of one signature share, and what is known of sites."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from ..lines import Line
from ..plan import tree
from ..plan.encode import Lifted
from ..plan.keys import Recorded
from ..plan.plan import InterventionGraph, Op
from ..plan.verbs import Batched, Call, Read, Save, Site
from .lazy import LazyTensor

if TYPE_CHECKING:
    from .tape import Tape


class Missing(NamedTuple):
    """Why the metadata of a site is not known before the run: its reads are sync points."""

    reason: str
    certain: bool = False  # is it known that the run does not pass it


ARGUMENT = 2  # how deep an argument lies in the value of an input, `(args, kwargs)`


class SiteMeta(NamedTuple):
    """What is known of a site before the run: the tree, with a fake for each tensor leaf."""

    spec: tree.Spec
    leaves: tuple  # fakes; anything else as it is (an `Opaque` where it holds data)
    batched: Batched  # leaf by leaf: does dimension 0 hold the batch; `None`: where its size says so
    order: float  # its place among all sites of a run; the sites inside a module are between two whole numbers
    unsure: bool = False  # did the scan guess, so that a read must look whether it was right
    like: object = None  # the scan's value, where its containers have more to them than their leaves
    same: tuple[int, ...] = ()  # leaf by leaf, the first that is the same tensor; empty where no two are one
    sizes: tuple = ()  # what this recording alone knows of its sizes: two of a kind may differ in them

    def guesses_numbers(self, kind: str) -> bool:
        """Is a Python number among the leaves that data decides, so that only the run has it? A flag that is an argument of a
        module (`use_cache`) is a setting; one that it returns, or is given in a container, may be what a module has found."""
        return self.unsure and any(
            isinstance(x, (int, float, complex, torch.SymInt))
            and not (kind == "input" and depth == ARGUMENT and isinstance(x, bool))
            for x, depth in zip(self.leaves, tree.depths(self.spec), strict=True)
        )

    @property
    def opaque(self) -> bool:
        return any(type(x) is Opaque for x in self.leaves)


ANY = object()  # stands, in what a read expects, for a leaf that is not compared


class Opaque:
    """A leaf that is an object with data of its own (a KV cache): read by a sync point."""

    def __init__(self, cls: type):
        self.type = cls


def nothing() -> None:
    """What an operation gives that gives no value."""


class DeclaredCache(NamedTuple):
    """A `tracer.cache(...)`: what the user got, in which invoke, and what he asked for."""

    view: Any
    invoke: int
    line: Line
    arguments: dict


class Sites(Protocol):
    """Where the metadata of sites comes from (the scan)."""

    @property
    def fixed(self) -> bool:
        """Does a line find the same in every recording, behind the same lines?"""
        ...

    def symbol(self, expr: object) -> object: ...

    def lookup(self, tape: Tape, site: Site) -> SiteMeta | Missing: ...

    def module(self, path: str) -> Callable: ...

    def real(self, path: str) -> Any: ...

    def odd(self, path: str) -> str | None: ...

    def called(self, path: str) -> Any: ...


class Beaten(NamedTuple):
    """A line that another recording has made behind the same lines."""

    step: Step
    op: Op
    meta: SiteMeta | None = None  # of the site that it reads
    numbers: tuple[Lifted, ...] = ()  # that it lifts


class Step:
    """One operation after others: its fake results, and the steps that followed it so far."""

    __slots__ = (
        *("beaten", "children", "leaves", "like", "needs", "op", "parent", "plans", "rebound", "root", "size", "spec"),
    )

    def __init__(self, parent: Step | None = None, op: Op | None = None):
        self.parent, self.op = parent, op
        self.root: Step = self if parent is None else parent.root
        self.size = 0  # of a root: how many steps follow it
        self.root.size += 1
        self.children: dict[Op | tuple[Op, tuple], Step] = {}
        self.beaten: dict[tuple, Beaten] = {}  # children by what the user wrote: found again with no operation made
        self.plans: dict[tuple, InterventionGraph] = {}
        self.needs = op.needs if op is not None else frozenset()
        self.spec: tree.Spec = None
        self.like: object = None  # what its containers are like
        self.leaves: list = []  # FakeTensor: a new value; Key: an argument itself; else a literal
        self.rebound: list[tuple[Recorded, torch.Tensor]] = []  # what an in-place operation made of its argument

    @property
    def changed(self) -> Step:
        """The latest step, up to this, that can change what the model passes on: no read, no save and no mere computation."""
        step = self
        while step.op is not None and not step.op.effect and isinstance(step.op.verb, Read | Save | Call):
            assert step.parent is not None
            step = step.parent
        return step


class Living:
    """The recorded values by key, while somebody holds them: a `WeakValueDictionary` without its cost for each value."""

    def __init__(self) -> None:
        self.refs: dict[Recorded, weakref.ref[LazyTensor]] = {}

    def __setitem__(self, key: Recorded, value: LazyTensor) -> None:
        self.refs[key] = weakref.ref(value)

    def get(self, key: Recorded) -> LazyTensor | None:
        found = self.refs.get(key)
        return None if found is None else found()

    def __iter__(self) -> Iterator[Recorded]:
        return iter([key for key, ref in self.refs.items() if ref() is not None])

    def values(self) -> list[LazyTensor]:
        return [x for x in [ref() for ref in self.refs.values()] if x is not None]


class Invoke:
    """What one invoke has read and written so far."""

    def __init__(self, index: int):
        self.index = index
        self.values: dict[Site, Any] = {}
        self.metas: dict[Site, SiteMeta] = {}
        self.containers: dict[Site, tuple[object, list, tree.Spec]] = {}
        self.order: float = -1  # the latest site touched, in model order
        self.latest: Site | None = None
        self.late: dict[int, Site] = {}  # storages of sites that were asked for behind a later one
