"""What an operation does: one frozen class a verb. A new verb is a class here, and its case in the `Interleaver`.

`Call` is any function of torch's; the others are the dialect. Their arguments, and the modes that they run under, are the
operation's (`plan.Op`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from . import tree
from .keys import Identity

if TYPE_CHECKING:
    from collections.abc import Mapping

Site = tuple[str, str, int]  # module path, "input" | "output" | "result", call index
Batched = tuple[bool | None, ...]  # leaf by leaf: does dimension 0 hold the rows of all invokes; `None`: its size tells
EVERY = -1  # the call index of an observation of every call


class Observation(NamedTuple):
    """What an observation does to each tensor leaf: methods by name, with their keywords."""

    steps: tuple[tuple[str, tuple], ...]

    @property
    def to(self) -> Mapping[str, Any]:
        """Where values are moved, and what they are cast to."""
        return dict(dict(self.steps).get("to", ()))

    def leaves_gpu(self, x: torch.Tensor) -> bool:
        """Is a value taken from a GPU into memory, where it can arrive while the model goes on?"""
        device, plain = self.to.get("device"), "detach" in dict(self.steps) or not x.requires_grad
        to_memory = isinstance(device, torch.device) and device.type == "cpu"
        return x.is_cuda and to_memory and plain and x.layout is torch.strided


class Verb:
    """What all verbs have."""

    __slots__ = ()
    name: ClassVar[str]  # as `tracer.graph` and files say it
    # "" is pure; "inplace" changes something, "random" draws numbers, "gradient" waits for a backward
    effect: str = ""  # each recorded line asks for it: a plain attribute

    @property
    def subject(self) -> Site | str | Identity | None:
        """What it is done to, or with: a site, the path of a module, a function."""
        return None


class Changes(Verb):
    """A verb that changes something, or ends it: its place among the others counts."""

    __slots__ = ()

    effect = "inplace"


@dataclass(frozen=True, slots=True)
class AtSite(Verb):
    """A verb that takes effect at a site of its own."""

    site: Site

    @property
    def subject(self) -> Site:
        return self.site


@dataclass(frozen=True, slots=True)
class Read(AtSite):
    """The value of a site. Without `batched` only the run knows its structure, and what is in it."""

    batched: Batched | None = None
    expected: tuple | None = None  # where the scan guessed: what the run must find, leaf by leaf
    first: bool = False  # of an edit: the first argument alone
    name = "read"

    @property
    def live(self) -> bool:
        """Does only the run know its structure?"""
        return self.batched is None


@dataclass(frozen=True, slots=True)
class Write(AtSite, Changes):
    """A site gets another value: a tree of structure `spec`."""

    spec: tree.Spec = None
    batched: Batched | None = None
    fits: bool = False  # can the model's Python not notice it?
    first: bool = False  # of an edit: the first argument alone
    name = "write"


@dataclass(frozen=True, slots=True)
class Skip(AtSite, Changes):
    """A call does not run; its output, the site, is a tree of structure `spec`."""

    spec: tree.Spec = None
    batched: Batched | None = None
    name = "skip"

    @property
    def entrance(self) -> Site:
        """The site at which it takes effect: the input of the call."""
        return (self.site[0], "input", self.site[2])


@dataclass(frozen=True, slots=True)
class ReadObject(AtSite):
    """The object at a leaf of a site (a KV cache)."""

    leaf: int
    name = "object"


@dataclass(frozen=True, slots=True)
class Observe(AtSite):
    """A site as everybody leaves it; with the call index `EVERY` a list of all calls."""

    batched: Batched | None
    how: Observation
    name = "observe"


@dataclass(frozen=True, slots=True)
class Reach(AtSite):
    """Does the run come by a site? Data decides how often its module is called."""

    name = "reach"


@dataclass(frozen=True, slots=True)
class Visit(Changes):
    """A module that the body calls passes a site."""

    site: Site
    spec: tree.Spec
    name = "visit"

    @property
    def subject(self) -> Site:
        return self.site


@dataclass(frozen=True, slots=True)
class Call(Verb):
    """A function of torch's."""

    fn: Identity
    effect: str = ""
    name = "call"

    @property
    def subject(self) -> Identity:
        return self.fn


@dataclass(frozen=True, slots=True)
class CallModule(Verb):
    """A module of the model, called on values. Of an edit `instance` is one that is called in sight (`hook=True`)."""

    path: str
    instance: Identity | None = None
    name = "module"

    effect = "random"

    @property
    def subject(self) -> str:
        return self.path


class Live(Changes):
    """A verb that needs real values and Python: nothing compiled can hold it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Apply(Live):
    """A function of the user's, on real values."""

    fn: Identity
    name = "apply"

    @property
    def subject(self) -> Identity:
        return self.fn

    @property
    def retains(self) -> bool:
        """Is it `value.retain_grad()`?"""
        return self.fn.obj is torch.Tensor.retain_grad


@dataclass(frozen=True, slots=True)
class Sync(Live):
    """The body looks at a value."""

    name = "sync"


@dataclass(frozen=True, slots=True)
class Save(Verb):
    """Values leave the run."""

    name = "save"


@dataclass(frozen=True, slots=True)
class StopRun(Changes):
    """The model ends here: `tracer.stop()`."""

    name = "stop"


@dataclass(frozen=True, slots=True)
class Linearize(Changes):
    """The forward ends here, and its derivative is kept: from some values, the sources, to others, the targets.

    `freeze` names the parts of the model that are constants in it.
    """

    freeze: tuple[str, ...] = ()
    name = "linearize"


@dataclass(frozen=True, slots=True)
class Barrier(Changes):
    """Invokes wait for one another here."""

    name = "barrier"


class OfGradients(Verb):
    """A verb on gradients: they belong to the backward that follows."""

    __slots__ = ()

    effect = "gradient"


@dataclass(frozen=True, slots=True)
class Grad(OfGradients):
    """The gradient of a value."""

    creating: bool = False  # does its backward make a graph of its own?
    name = "grad"


@dataclass(frozen=True, slots=True)
class SetGrad(OfGradients):
    """A gradient gets another value."""

    name = "set_grad"


@dataclass(frozen=True, slots=True)
class RunBackward(OfGradients):
    """A backward of the body."""

    returns: bool = False  # `torch.autograd.grad`: nothing is accumulated
    name = "backward"


def place_of_site(site: Site) -> str:
    """A site without its call: `layers.3.output`."""
    return ".".join(p for p in site[:2] if p)


def name_of_site(site: Site) -> str:
    """A site as it is written in an error: `layers.3.output (call 1)`."""
    path, kind, call = site
    return ".".join(p for p in (path, kind) if p) + (f" (call {call})" if call else "")
