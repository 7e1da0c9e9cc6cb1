"""Objects in values that were read (a KV cache): what stands for them while a body is recorded."""

from __future__ import annotations

import copy
import functools
import weakref
from typing import TYPE_CHECKING, Any

from ..errors import UnsavedValueError
from . import tree
from .encode import Identity, Keep, Key
from .lazy import user_line
from .plan import OBJECT, READ, Site

if TYPE_CHECKING:
    from .tape import Tape


class LazyObject:
    """An object in a container that was read (a KV cache). In the body a look at it is a sync point.

    After the trace a saved one has the class of the real object and shares its attributes. Where Python allows no such change
    of class (slots, a subclass of `dict`), it passes everything on to the real object.
    """

    @staticmethod
    def __new__(cls, tape: Tape, key: tuple, kind: type) -> LazyObject:
        return object.__new__(_stand_in(kind))

    def __init__(self, tape: Tape, key: tuple, kind: type):
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
        if "_real" not in known:
            if name == "save" and not hasattr(known["_class"], name):
                return functools.partial(known["_tape"].objects.save, self)
            if name.startswith("__"):
                raise AttributeError(name)
        return getattr(self._look(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._look(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._look(), name)

    def __dir__(self) -> Any:
        return dir(self._look())

    def __bool__(self) -> bool:
        return bool(self._look())

    def __copy__(self) -> Any:
        return copy.copy(self._look())

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self._look(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
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

    def passed_on(name: str) -> Any:
        return lambda self, *args, **kwargs: getattr(self._look(), name)(*args, **kwargs)

    def special(name: str) -> bool:
        inherited = getattr(object, name, None)
        return (
            name.startswith("__") and name not in _OWN and callable(found := getattr(kind, name)) and found != inherited
        )

    return type("LazyObject", (LazyObject,), {name: passed_on(name) for name in dir(kind) if special(name)})


def become(lazy: LazyObject, real: Any) -> None:
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


class Objects:
    """Those of one recording."""

    def __init__(self, tape: Tape):
        self.tape = tape
        self.kept: dict[int, tuple[LazyObject, Key]] = {}  # by id: those that the run shall give
        self.asked: set[int] = set()  # ids of those that a session has saved
        self._made: list[weakref.ref[LazyObject]] = []

    def stand_in(self, key: Key, kind: type) -> LazyObject:
        """What stands for the object at a leaf of a read, `key`."""
        made = LazyObject(self.tape, key, kind)
        self._made.append(weakref.ref(made))
        return made

    @property
    def held(self) -> list[LazyObject]:
        """Those that somebody holds, and that are not real yet."""
        return [x for x in [ref() for ref in self._made] if isinstance(x, LazyObject) and "_tape" in x.__dict__]

    def save(self, lazy: LazyObject) -> LazyObject:
        """`cache.save()`."""
        self.tape.check_open((lazy,), {})
        self.tape.containers.append(lazy)
        return lazy

    def keep(self, lazy: LazyObject) -> None:
        """The run shall give an object: somebody has saved it, or an operation uses it."""
        tape = self.tape
        if not tape.open or tape.closed or "_real" in lazy.__dict__ or id(lazy) in self.kept:
            return
        read = tape.ops[lazy._key[1]]
        with tape.within(read.invoke):
            n = tape.number(OBJECT, read.target, (), {}, extra=lazy._key[2], result=lambda: None)
        self.kept[id(lazy)] = (lazy, ("v", n, 0))

    def key(self, lazy: Any) -> Key:
        """An object as the argument of an operation: a function that is called on it gets the real one."""
        if not isinstance(lazy, LazyObject):
            return ("o", Identity(lazy))
        if lazy._tape is not self.tape or "_real" in lazy.__dict__:
            return ("o", Identity(lazy._look()))
        self.tape.check_open((lazy,), {})
        self.keep(lazy)
        return self.kept[id(lazy)][1]

    def written(self, leaf: Any, site: Site) -> Any:
        """A leaf that is written to a site: an object of the site itself stays where it is."""
        own = isinstance(leaf, LazyObject) and leaf._tape is self.tape and self.tape.ops[leaf._key[1]].target == site
        return Keep(leaf._key[2]) if own else leaf

    def look(self, lazy: LazyObject) -> Any:
        """The real object, by a sync point. `lazy` itself, where its trace has run and made it real."""
        tape = self.tape
        if tape.pending is not None:
            tape.pending()
            if not isinstance(lazy, LazyObject) or "_real" in lazy.__dict__:
                return lazy.__dict__.get("_real", lazy)
        if (tape.closed or tape.bridged) and id(lazy) in self.kept:
            return tape.run_until(tape)(self.kept[id(lazy)][1])
        if not tape.open and id(lazy) in self.kept:
            raise UnsavedValueError(
                f"{user_line()}: `{tape.describe(lazy._key)}`, made at {lazy._line}, was saved, but there is no object: the trace was a "
                "scan, which runs nothing, or its run did not reach that site."
            )
        if tape.bridged:
            raise tape.unsaved(lazy)
        tape.check_open((lazy,), {})
        n = tape.number(READ, tape.ops[lazy._key[1]].target, (), {}, extra=None, result=lambda: None)
        return tree.flatten(tape.values_of([("v", n, -1)])[0])[0][lazy._key[2]]
