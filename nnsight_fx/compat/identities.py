"""Dynamo: which objects of a module are known elsewhere in a trace, and which are one object.

`a is b` is a constant to Dynamo. It guards that two places hold one object where they do, unless one is behind a global name; that
they hold two objects it guards nowhere. So what was traced for one module holds for another where the same places hold the same.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from .guards import TABLE
from .probe import Name

if TYPE_CHECKING:
    from torch._guards import Guard, Source

    Under = Callable[[Source], bool]  # is it a place in the module?

Translator = Variable = Any  # Dynamo's: of their subclasses' attributes the base classes know little
_TRACED = Name(
    "torch._dynamo.output_graph.SubgraphTracer.traced_sources",
    "each block of a model is traced, also where it repeats another",
)
_CONSTANT = (type(None), bool, int, float, complex, str, bytes, tuple)  # equal ones may be one object
_ONE = (  # are what they are, not what they hold
    type,
    types.ModuleType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.GetSetDescriptorType,
    torch.dtype,
)
_ABSENT = object()

_aliases: weakref.WeakKeyDictionary[object, tuple[int, list[tuple[Source, Source]]]] = weakref.WeakKeyDictionary()


class Unlike(Exception):
    """What was traced does not hold there. Never reaches the user."""


def named(source: Source) -> str:
    try:
        return source.name
    except NotImplementedError:  # of what Dynamo made itself
        return type(source).__name__


def _traced(tx: Translator) -> Variable:
    found = _TRACED.of(tx.output.current_tracer)
    if found is None:
        raise Unlike("Dynamo does not tell what the model reads")
    return found


class Looking:
    """Looks at places of a model, as it was before the trace."""

    def __init__(self, tx: Translator):
        self.scopes = {"G": tx.output.root_tx.f_globals, "L": tx.output.root_tx.f_locals}, {}
        self.seen: dict[Source, object] = {}

    def at(self, source: Source) -> Variable:
        """`Unlike` where nothing is, and for what cannot be looked at."""
        try:
            return source.get_value(*self.scopes, self.seen)
        except Exception as error:
            raise Unlike(f"no {named(source)}") from error

    def __call__(self, source: Source) -> object:
        """`_ABSENT` then."""
        try:
            return self.at(source)
        except Unlike:
            return _ABSENT


def _known_as(tx: Translator, value: object) -> Source | None:
    """The place from which Dynamo has an object."""
    variable = tx.output.side_effects.id_to_variable.get(id(value))
    return None if variable is None else variable.source


def _aliased(tx: Translator) -> list[tuple[Source, Source]]:
    """The places that Dynamo has looked at, and found an object there that it had from elsewhere; with that other place."""
    traced = _traced(tx)
    done, found = _aliases.get(tx.output.tracing_context, (0, []))
    look = Looking(tx)
    for source in islice(traced, done, None):
        value = look(source)
        place = None if value is _ABSENT else _known_as(tx, value)
        if (
            place is not None
            and named(place) != named(source)
            and not any(TABLE.search(named(x)) for x in (source, place))
        ):
            found.append((source, place))
    _aliases[tx.output.tracing_context] = len(traced), found
    return found


def _outside(tx: Translator, module: Source, under: Under) -> list[tuple[Source, Source]]:
    """The places in a module at which objects of elsewhere are; `Unlike` if what is elsewhere gets at the module or its own."""
    above, place = {module}, module
    while (place := getattr(place, "base", None)) is not None:
        above.add(place)
    outside = []
    for source, known in _aliased(tx):
        if source in above or known in above or (under(known) and not under(source)):
            raise Unlike(f"{named(source)} is {named(known)}")
        if under(source) and not under(known):
            outside.append((source, known))
    return outside


class Identities:
    """The objects that were seen in a module while it was traced."""

    def __init__(self, tx: Translator, module: Source, under: Under, guards: Iterable[Guard]):
        for guard in guards:
            if "CONTAINS" in guard.create_fn_name() and type(_key(guard)) not in _CONSTANT:
                raise Unlike(f"is {_key(guard)!r} in {guard.name}")
        self.outside, look = _outside(tx, module, under), Looking(tx)
        sources = dict.fromkeys([module, *_traced(tx), *(guard.originating_source for guard in guards)])
        places = [place for place in sources if under(place) and not TABLE.search(named(place))]
        self.seen = [(place, value) for place in places if (value := look(place)) is not _ABSENT]

    def check(self, tx: Translator, module: Source, under: Under, reroot: Callable[[Source], Source]) -> None:
        """`Unlike` if another module does not hold the same at the same places, or if what it holds is known elsewhere."""
        _outside(tx, module, under)
        look, forth, back = Looking(tx), {}, {}
        held = []  # so that no other object gets their ids
        for place, old in self.seen:
            other = reroot(place)
            new = look.at(other)
            held.append(new)
            if type(new) is not type(old) or (new is not old and isinstance(old, _ONE)):
                raise Unlike(f"another object at {named(other)}")
            if isinstance(old, _CONSTANT):
                continue
            if forth.setdefault(id(old), id(new)) != id(new) or back.setdefault(id(new), id(old)) != id(old):
                raise Unlike(f"{named(other)} is also elsewhere in it")
            known = None if new is old else _known_as(tx, new)
            if known is not None and not under(known):
                raise Unlike(f"{named(other)} is {named(known)}")
        for place, known in self.outside:
            if look(reroot(place)) is not look(known):
                raise Unlike(f"{named(reroot(place))} is not {named(known)}")


def _key(guard: Guard) -> object:
    partial: Variable = guard.create_fn
    return next(iter((*getattr(partial, "keywords", {}).values(), *getattr(partial, "args", ()))), None)
