"""Objects in values that were read (a KV cache): what stands for them while a body is recorded."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from types import BuiltinMethodType, MethodType
from typing import TYPE_CHECKING, Any

import torch

from ..errors import OutOfOrderError, UnsavedValueError
from ..lines import user_line
from ..plan import tree
from ..plan.keys import Identity, Keep, Key, Value
from ..plan.verbs import Apply, AtSite, Observe, Read, ReadObject, Save, Site, Visit
from .lazy import LazyTensor
from .steps import nothing

if TYPE_CHECKING:
    from .tape import Tape


class LazyObject:
    """An object in a container that was read (a KV cache). In the body a look at it is a sync point, and what it gives can be saved.

    After the trace a saved one has the class of the real object and shares its attributes. Where Python allows no such change
    of class (slots, a subclass of `dict`), it passes everything on to the real object.
    """

    @staticmethod
    def __new__(cls, tape: Tape, key: Value | None, kind: type) -> LazyObject:
        return object.__new__(_stand_in(kind))

    def __init__(self, tape: Tape, key: Value | None, kind: type):
        self.__dict__.update(_tape=tape, _key=key, _class=kind, _line=user_line())

    def _look(self) -> Any:
        if "_real" not in self.__dict__:
            real = self._tape.objects.look(self)
            if real is self:  # its trace has run by now
                return self
            self.__dict__["_real"] = real
        return self.__dict__["_real"]

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return self.__dict__["_class"]

    def __getattr__(self, name: str) -> Any:
        known = self.__dict__
        if name == "save" and "_tape" in known and not hasattr(known["_class"], name):
            return functools.partial(known["_tape"].objects.save, self)
        if name.startswith("__") and "_real" not in known:
            raise AttributeError(name)
        return _passed_on(self, getattr, name)

    def __setattr__(self, name: str, value: object) -> None:
        _passed_on(self, setattr, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._look(), name)

    def __dir__(self) -> list[str]:
        return dir(self._look())

    def __bool__(self) -> bool:
        return bool(self._look())

    def __copy__(self) -> object:
        return copy.copy(self._look())

    def __deepcopy__(self, memo: dict) -> object:
        return copy.deepcopy(self._look(), memo)

    def __reduce_ex__(self, protocol: object) -> Any:
        return self._look().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        if "_real" in self.__dict__:
            return repr(self._look())
        return f"LazyObject({self._class.__name__} of {self._tape.describe(self._key)}, made at {self._line})"


_CLASS = object.__dict__["__class__"]
_OWN = {*vars(LazyObject), *("__new__", "__init__", "__init_subclass__", "__getattribute__", "__slots__", "__del__")}


@functools.lru_cache(256)
def _stand_in(kind: type) -> type:
    """The class of what stands for an object of class `kind`: it has the same special methods, which Python looks up on the class."""

    def method(name: str) -> Callable:
        if name == "__iter__":
            return lambda self: iter([_passed_on(self, lambda _, x: x, x) for x in self._look()])
        return lambda self, *args, **kwargs: _passed_on(self, getattr(kind, name), *args, **kwargs)

    def special(name: str) -> bool:
        inherited = getattr(object, name, None)
        return (
            name.startswith("__") and name not in _OWN and callable(found := getattr(kind, name)) and found != inherited
        )

    return type("LazyObject", (LazyObject,), {name: method(name) for name in dir(kind) if special(name)})


def _passed_on(lazy: LazyObject, do: Any, *args: object, **kwargs: object) -> object:
    """What is done to an object is done to the real one, with real values; while its body runs, what it gives is recorded."""
    tape = lazy.__dict__.get("_tape")
    real = lazy._look()
    if tape is None or not tape.open or tape.busy:
        return do(real, *args, **kwargs)
    return tape.objects.given(do(real, *tape.syncs.real_args(args), **tape.syncs.real_args(kwargs)))


def become(lazy: LazyObject, real: object) -> None:
    """After the trace: what stood for an object is that object, of its class and with its very attributes."""
    state = lazy.__dict__
    state["_real"], state["_class"] = real, type(real)
    for name in ("_tape", "_key", "_line"):
        state.pop(name, None)
    if hasattr(type(real), "__del__") or not hasattr(real, "__dict__"):
        return
    try:
        _CLASS.__set__(lazy, type(real))
    except TypeError:  # another layout
        return
    object.__setattr__(lazy, "__dict__", real.__dict__)


def _has_parts(value: Any) -> bool:
    """Is it an object with attributes of its own, or a list or dict with such objects in it?"""
    if type(value) in (list, dict):
        return any(map(_has_parts, value.values() if isinstance(value, dict) else value))
    library = type(value).__module__.partition(".")[0] in ("builtins", "torch", "numpy")
    return not library and not callable(value) and (hasattr(value, "__dict__") or hasattr(type(value), "__slots__"))


def _filled(made: object, values: dict) -> object:
    """An object of the body's with real values in place of recorded ones."""
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def real_of(lazy: LazyObject) -> object:
    """The object that `lazy` stands for; in an open body the model runs for it."""
    return lazy._look()


def lazies(value: object) -> list:
    """The recorded values in a container, nested ones too."""
    found, seen, left = [], set(), [value]
    while left:
        v = left.pop()
        if id(v) in seen:
            continue
        seen.add(id(v))
        if type(v) is LazyTensor or isinstance(v, LazyObject):
            found.append(v)
            continue
        parts = tree.children(v)
        if parts is not None:
            left += reversed(parts[2])
        elif isinstance(v, dict):
            left += reversed(v.values())
        elif isinstance(v, set | frozenset):
            left += v
    return found


class Objects:
    """Those of one recording."""

    def __init__(self, tape: Tape):
        self.tape = tape
        self.kept: dict[int, tuple[LazyObject, Value]] = {}  # by id: those that the run shall give
        self.asked: set[int] = set()  # ids of those that a session has saved
        self._given: dict[int, tuple] = {}  # by id: what a look has given, and what stands for it
        self._made: list[weakref.ref[LazyObject]] = []

    def stand_in(self, key: Value | None, kind: type) -> LazyObject:
        """What stands for the object at a leaf of a read, `key`."""
        made = LazyObject(self.tape, key, kind)
        if key is None or not isinstance(self.tape.ops[key.op].verb, Observe):  # a cache keeps no objects
            self._made.append(weakref.ref(made))
        return made

    def returned(self, n: int, kind: type) -> LazyObject:
        """What stands for the object that operation `n` returns."""
        made = self.stand_in(Value(n, 0), kind)
        self.kept[id(made)] = (made, made._key)
        self.tape.add(Save(), (made,), result=nothing)
        return made

    def given(self, value: object) -> Any:
        """What a look gives to the body: a tensor as a recorded value, an object as what stands for it."""
        if type(value) is tuple:
            return tuple(map(self.given, value))
        if isinstance(value, MethodType | BuiltinMethodType) and value.__self__ is not None:
            return lambda *args, **kwargs: self.given(
                value(*self.tape.syncs.real_args(args), **self.tape.syncs.real_args(kwargs))
            )
        if type(value) is not torch.Tensor and not _has_parts(value):
            return value
        if id(value) not in self._given:
            if isinstance(value, torch.Tensor):
                made: Any = self.tape.call(torch.Tensor.view_as, (value, value), {}).save()
            else:
                made = self.stand_in(None, type(value))
                made.__dict__["_real"] = value
            self._given[id(value)] = value, made
        return self._given[id(value)][1]

    @property
    def held(self) -> list[LazyObject]:
        """Those that somebody holds, and that are not real yet."""
        return [x for x in [ref() for ref in self._made] if isinstance(x, LazyObject) and "_tape" in x.__dict__]

    def save(self, lazy: LazyObject) -> LazyObject:
        """`cache.save()`."""
        self.tape.check_open((lazy,), {})
        self.tape.containers.append(lazy)
        return lazy

    def keep_saved(self) -> None:
        """The model is about to run past them: what the saved containers hold so far."""
        if self._made:
            for container in self.tape.containers:
                for lazy in lazies(container):
                    if isinstance(lazy, LazyObject) and lazy.__dict__.get("_tape") is self.tape:
                        self.keep(lazy)

    def keep(self, lazy: LazyObject, asked: bool = True) -> None:
        """The run shall give an object: somebody has saved it, or an operation uses it; not `asked`, if it can."""
        tape = self.tape
        if not tape.open or tape.closed or "_real" in lazy.__dict__ or id(lazy) in self.kept:
            return
        read = tape.ops[lazy._key.op]
        assert isinstance(read.verb, AtSite | Visit)
        if read.invoke == tape.invoke.index and tape.accesses.passed is not None:
            try:
                tape.accesses.check_passed(read.verb.site, "saved, or used as an object,")
            except OutOfOrderError:
                if not asked:
                    return
                raise
        with tape.within(read.invoke):
            n = tape.number(ReadObject(read.verb.site, lazy._key.leaf), result=nothing)
        self.kept[id(lazy)] = (lazy, Value(n, 0))

    def key(self, lazy: object) -> Key:
        """An object as the argument of an operation: a function that is called on it gets the real one."""
        if not isinstance(lazy, LazyObject):
            return Identity(lazy)
        if lazy._tape is not self.tape or "_real" in lazy.__dict__:
            return Identity(lazy._look())
        self.tape.check_open((lazy,), {})
        self.keep(lazy)
        return self.kept[id(lazy)][1]

    def written(self, leaf: object, site: Site) -> object:
        """A leaf that is written to a site: an object of the site itself stays where it is, one that the body has made gets its
        real values when the model comes by."""
        if isinstance(leaf, LazyObject) and "_real" in leaf.__dict__:
            return leaf._look()
        values = {name: x for name, x in getattr(leaf, "__dict__", {}).items() if isinstance(x, LazyTensor)}
        if values and not isinstance(leaf, torch.Tensor | LazyObject):
            n = self.tape.number(Apply(Identity(_filled)), (leaf, values))
            made = self.stand_in(Value(n, 0), type(leaf))
            self.kept[id(made)] = (made, made._key)
            return made
        key = leaf._key if isinstance(leaf, LazyObject) and leaf._tape is self.tape else None
        if key is None:
            return leaf
        read = self.tape.ops[key.op].verb
        return Keep(key.leaf) if isinstance(read, AtSite | Visit) and read.site == site else leaf

    def look(self, lazy: LazyObject) -> object:
        """The real object, by a sync point. `lazy` itself, where its trace has run and made it real."""
        tape = self.tape
        if tape.pending is not None:
            tape.pending()
            if not isinstance(lazy, LazyObject) or "_real" in lazy.__dict__:
                return lazy.__dict__.get("_real", lazy)
        if (tape.closed or tape.bridged) and id(lazy) in self.kept:
            return tape.syncs.run_until(tape)(self.kept[id(lazy)][1])
        if not tape.open and id(lazy) in self.kept:
            raise UnsavedValueError(
                f"{user_line()}: `{tape.describe(lazy._key)}`, made at {lazy._line}, was saved, but there is no object: the trace was a "
                "scan, which runs nothing, or its run did not reach that site."
            )
        if tape.bridged:
            raise tape.unsaved(lazy)
        tape.check_open((lazy,), {})
        read = tape.ops[lazy._key.op].verb
        if not isinstance(read, Read):  # what an operation returned
            return tape.syncs.values_of([lazy._key])[0]
        n = tape.number(Read(read.site), result=nothing)
        return tree.flatten(tape.syncs.values_of([Value(n, -1)])[0])[0][lazy._key.leaf]
