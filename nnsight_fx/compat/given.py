"""Dynamo: what a block gets when it is called, told such that two blocks that get alike can be told from two that do not."""

from __future__ import annotations

import torch
import torch.fx as fx

from . import shelves
from .identities import Unlike, Variable
from .probe import Name
from .shelves import Holdings
from .tensors import tree_map_only

Call = tuple[list[Variable], dict[str, Variable]]  # the arguments

EACH = "each block of a model is traced, also where it repeats another"
_FAKE = Name("torch._subclasses.fake_tensor.FakeTensor", EACH)
_VARIABLES = [
    Name(f"torch._dynamo.variables.{name}", EACH)
    for name in ("TensorVariable", "SymNodeVariable", "ConstantVariable", "TupleVariable")
]
NAMES = [_FAKE, *_VARIABLES]


def fake() -> Variable:
    """The class of Dynamo's fake tensors."""
    return _FAKE()


def classes() -> list[type]:
    """Dynamo's classes for a tensor, a number known at run time, a constant and a tuple."""
    return [name() for name in _VARIABLES]


def value_of(node: fx.Node) -> Variable:
    """The fake value of a node."""
    return node.meta.get("example_value")


def only_fakes(node: fx.Node) -> None:
    """`Unlike` for tensors inside of `torch.func`, and for subclasses."""
    found: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, found.append, value_of(node))
    if any(type(x) is not fake() for x in found):
        raise Unlike(f"{node} is no plain tensor")


def _number(x: object) -> object:
    """A size as something to compare: no symbol gets a guard by it."""
    return x.node.expr if isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool) else x


def described(x: object) -> object:
    """A fake tensor as Dynamo tells it from others."""
    if not isinstance(x, torch.Tensor):
        return None
    strided = x.layout is torch.strided
    where = (*map(_number, x.stride()), _number(x.storage_offset())) if strided else ()
    bits = (x.requires_grad, x.is_conj(), x.is_neg(), x.is_inference())
    return type(x), tuple(map(_number, x.shape)), where, x.dtype, x.device, x.layout, bits


class Arguments:
    """What a call gets: the arguments and what the objects among them held when it began, and the nodes of all tensors.

    The objects that the model has made are numbered as they are met. So where two calls are told alike, what one of them finds,
    also by `a is b`, is what the other one does, with the objects of the same numbers."""

    def __init__(self, call: Call, held: Holdings):
        self.held = held
        self.nodes: list[fx.Node] = []
        self.kinds: dict[fx.Node, object] = {}
        self.of: dict[fx.Node, Variable] = {}
        self.objects: list[Variable] = []
        self.numbers: dict[Variable, int] = {}
        self.kept: list[Variable] = []  # so that no other object gets their ids
        args, kwargs = call
        self.told = [self.tell(x) for x in args], [(name, self.tell(x)) for name, x in kwargs.items()]

    @property
    def lists(self) -> list[Variable]:
        return [x for x in self.objects if shelves.is_list(x)]

    def follow(self) -> None:
        """Have `unchanged` know the tensors, too, of what may be taken from the lists."""
        tensor = classes()[0]
        for each in {x for listed in self.lists for x in shelves.contents(listed)}:
            held = [x.as_proxy().node for x in self.held.of.get(each, {}).values() if type(x) is tensor]
            self.kinds |= {node: described(value_of(node)) for node in held}

    def number(self, value: Variable) -> int:
        """Of an object. `Unlike` if it is not among those."""
        if value not in self.numbers:
            raise Unlike(f"an object that is {type(value).__name__}")
        return self.numbers[value]

    def tell(self, value: Variable) -> object:
        """A value as something to compare."""
        tensor, number, constant, several = classes()
        value = shelves.known(value)
        if value in self.held.of and (type(value) is tensor or type(value) is number):
            raise Unlike("a tensor with attributes of the model's")
        if type(value) is several:
            return tuple(self.tell(item) for item in value.items)
        if type(value) is constant:
            return type(value.value), value.value, repr(value.value)
        if getattr(value, "source", None) is not None:  # an object that the model had before: the very same
            if shelves.is_module(value):  # by which a block may get at any other
                raise Unlike("an argument that is a module")
            if type(value) is tensor or type(value) is number:
                self._note(value)
            self.kept.append(value)
            return id(value)
        if type(value) is tensor:
            node = self._note(value)
            return self.nodes.index(node), value.class_type, described(value_of(node))
        if type(value) is number:
            node = self._note(value)
            return self.nodes.index(node), _number(value.sym_num)
        return self._object(value)

    def _object(self, value: Variable) -> object:
        known = self.numbers.get(value)
        if known is not None:
            return "object", known
        listed = shelves.is_list(value)
        if not listed and not shelves.is_object(value):
            raise Unlike(f"an argument that is {type(value).__name__}")
        self.numbers[value] = len(self.objects)
        self.objects.append(value)
        if listed:  # what is in it is told when it is taken
            return "list", len(shelves.contents(value))
        attributes, how = self.held.of.get(value, {}), self.held.how.get(value, {})
        return value.value_type, [(name, how.get(name), self.tell(x)) for name, x in attributes.items()]

    def _note(self, value: Variable) -> fx.Node:
        node = value.as_proxy().node
        if node not in self.of:
            only_fakes(node)
            self.nodes.append(node)
            self.of[node] = value
            self.kinds.setdefault(node, described(value_of(node)))
        return node

    def unchanged(self) -> bool:
        """Are the tensors still of the kind that they were of? Operations in place change shapes, too."""
        return all(kind == described(value_of(node)) for node, kind in self.kinds.items())
