"""Dynamo: the objects that a model makes while it is traced, such as a cache, and what a block takes from a list of them.

Of such objects Dynamo guards nothing: what they hold is in its notes of side effects. Of a list of them, such as a cache's
layers, a block mostly takes one, by a number that it has on itself (`cache.layers[self.layer_idx]`), and another block another
one. A number of a module that nothing has looked at yet is lazy to Dynamo. So a list that is watched can tell what was taken by
it, and whether that is all that the number was good for.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch.nn as nn

from .identities import Translator, Unlike, Variable
from .probe import Name

if TYPE_CHECKING:
    from torch._guards import Source

    Key = int | Source  # a position, or where the number is by which something was taken

EACH = "each block that fills a cache is traced, also where it repeats another"
_LIST = Name("torch._dynamo.variables.ListVariable.getitem_const", EACH)
_LENGTH = Name("torch._dynamo.variables.ListVariable.sq_length", EACH)
_BUILTIN = Name("torch._dynamo.variables.BuiltinVariable", EACH)
_HANDLERS = Name("torch._dynamo.variables.BuiltinVariable.call_function_handler_cache", EACH)
_OBJECT = Name("torch._dynamo.variables.UserDefinedObjectVariable", EACH)
_CONSTANT = Name("torch._dynamo.variables.ConstantVariable", EACH)
_UNREAD = Name("torch._dynamo.variables.lazy.LazyConstantVariable", EACH)
_LAZY = Name("torch._dynamo.variables.lazy.LazyVariableTracker", EACH)
_NEW = Name("torch._dynamo.variables.base.AttributeMutationNew", EACH)
_NEW_LIST = Name("torch._dynamo.variables.base.ValueMutationNew", EACH)
_INSTALL = Name("torch._dynamo.guards.install_guard", EACH)
_MATCH = Name("torch._dynamo.guards.GuardBuilder.CONSTANT_MATCH", EACH)
_STORE = Name("torch._dynamo.side_effects.SideEffects.store_attr_mutations", EACH)
_HOW = Name("torch._dynamo.side_effects.SideEffects.attr_mutation_kinds", EACH)
_CACHED = Name("torch._dynamo.output_graph.OutputGraph.variable_tracker_cache", EACH)

_watches: weakref.WeakKeyDictionary[Variable, list[Tally]] = weakref.WeakKeyDictionary()


def is_object(value: Variable) -> bool:
    """Is it an object that the model has made while it was traced, of a class of its own?"""
    if type(value) is not _OBJECT() or type(value.mutation_type) is not _NEW() or value.source is not None:
        return False
    return getattr(value, "_base_vt", None) is None and not getattr(
        value.value, "__dict__", None
    )  # Dynamo notes what it holds


def is_list(value: Variable) -> bool:
    """Is it a list of such objects, and made there, too?"""
    if not _complete() or type(value) not in (_plain_list(), _shelf()):
        return False
    return type(value.mutation_type) is _NEW_LIST() and value.source is None and all(map(is_object, contents(value)))


def known(value: Variable) -> Variable:
    """A variable as it is, where Dynamo has looked at it."""
    return value.unwrap() if issubclass(type(value), _LAZY() or ()) else value


def is_module(value: Variable) -> bool:
    """Does it stand for a module of the model's?"""
    if issubclass(type(value), _LAZY() or ()) and not value.is_realized():
        return issubclass(value.peek_type(), nn.Module)
    return isinstance(vars(value).get("value"), nn.Module)


def contents(listed: Variable) -> list[Variable]:
    """What is in a list; no watch is told."""
    return vars(listed)["items"]


class Holdings:
    """What the objects that a model has made hold at one moment."""

    def __init__(self, tx: Translator):
        self.of: dict[Variable, dict[str, Variable]] = {}
        self.how: dict[Variable, dict[str, object]] = {}
        effects = tx.output.side_effects
        store, how = _STORE.of(effects), _HOW.of(effects)
        if store is None or how is None:
            raise Unlike("Dynamo does not tell what objects hold")
        for each, attributes in store.items():
            if each.source is None:
                self.of[each], self.how[each] = dict(attributes), dict(how.get(each, {}))
        self.objects = set(map(id, effects.id_to_variable.values()))

    def changed(self, later: Holdings) -> Iterator[tuple[Variable, str, object, Variable]]:
        """What objects that were there before hold later: the object, the name, how it was set, the value."""
        for each, attributes in later.of.items():
            if each not in self.of and id(each) not in self.objects:
                continue  # made since
            before, how = self.of.get(each, {}), self.how.get(each, {})
            for name, value in attributes.items():
                kind = later.how[each].get(name)
                if before.get(name) is not value or how.get(name) is not kind:
                    yield each, name, kind, value


class Tally:
    """Notes what is taken from lists, until it is closed."""

    def __init__(self, lists: list[Variable]):
        self.taken: dict[tuple[Variable, Key], None] = {}
        self.whole = False  # has anything else been done with one of them?
        self.lists = lists
        for listed in lists:
            _watches.setdefault(listed, []).append(self)
            listed.__class__ = _shelf()

    def close(self) -> None:
        for listed in self.lists:
            others = _watches[listed]
            others.remove(self)
            if not others:
                del _watches[listed]
                listed.__class__ = _plain_list()
        self.lists = []


def take(listed: Variable, key: Key, position: int) -> Variable:
    """What is at a position of a list, and the watches know. `Unlike` if nothing is."""
    if not _there(listed, position):
        raise Unlike(f"nothing at {position}")
    for watch in _watches.get(listed, ()):
        watch.taken[listed, key] = None
    return contents(listed)[position]


def _there(listed: Variable, position: int) -> bool:
    return -len(contents(listed)) <= position < len(contents(listed))


def guard(source: Source) -> Variable:
    """The guard on a number by which something is taken."""
    return source.make_guard(_MATCH())


def looked_at(tx: Translator, source: Source) -> bool:
    """Has anything looked at the number at a place, but for a list that is watched?"""
    cached = _CACHED.of(tx.output)
    return cached is None or source in cached


@functools.cache
def _complete() -> bool:
    """Has this torch all that it takes?"""
    names = (_LIST, _LENGTH, _BUILTIN, _HANDLERS, _OBJECT, _CONSTANT, _UNREAD, _NEW, _NEW_LIST, _INSTALL, _MATCH)
    return all(name() is not None for name in names)


@functools.cache
def _plain_list() -> type:
    from torch._dynamo.variables import ListVariable

    return ListVariable


@functools.cache
def _shelf() -> type:
    base: type = _plain_list()

    class Shelf(base):
        """A list that is watched. It is one only for so long: an object's class is set to this one, and back."""

        def __new__(cls, *args: Variable, **kwargs: Variable) -> Variable:
            return base(*args, **kwargs)

        @property
        def items(self) -> list[Variable]:
            for watch in _watches.get(self, ()):
                watch.whole = True
            return vars(self)["items"]

        @items.setter
        def items(self, items: list[Variable]) -> None:
            self.items[:] = items

        def clone(self, **kwargs: Variable) -> Variable:
            return base(**(vars(self) | {"items": self.items} | kwargs))

        def sq_length(self, tx: Translator) -> Variable:
            return _CONSTANT().create(len(contents(self)))

        def getitem_const(self, tx: Translator, arg: Variable) -> Variable:
            fixed = type(arg) is _CONSTANT() and type(arg.value) is int and _there(self, arg.value)
            return take(self, arg.value, arg.value) if fixed else super().getitem_const(tx, arg)

    _HANDLERS()[operator.getitem, Shelf, _UNREAD()] = _by_number
    return Shelf


def _by_number(tx: Translator, args: list[Variable], kwargs: dict[str, Variable]) -> Variable:
    """An item of a list that is watched, by a number that nothing has looked at: Dynamo would look at it first."""
    listed, index = args
    if index.is_realized() or index.peek_type() is not int or not _there(listed, index.peek_value()):
        return _BUILTIN()(operator.getitem).call_function(tx, [listed, index.realize()], kwargs)
    _INSTALL()(guard(index.source))
    return take(listed, index.source, index.peek_value())
