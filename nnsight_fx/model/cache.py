"""`tracer.cache(...)`: what many modules return or get, kept in one object."""

from __future__ import annotations

import contextlib
import difflib
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .. import names
from ..envoys.envoy import Envoy, host_of, path_of, tree_of
from ..envoys.paths import module_of
from ..errors import InvokeError, UnknownModuleError, nearest
from ..lines import user_line
from ..plan import tree
from ..plan.verbs import Observation
from ..tracing.lazy import LazyTensor, key_of
from ..tracing.steps import DeclaredCache, Invoke, SiteMeta
from ..tracing.tape import Tape

if TYPE_CHECKING:
    from ..engine.wave import ForwardWave
    from ..tracing.contexts import Tracer


SLOTS = {"input": "inputs", "output": "output"}  # kind of site -> field of an `Entry`


@dataclass
class Entry:
    """One visit to a module: what it returned, and `(args, kwargs)` that it got, where they were asked for."""

    output: Any = None
    inputs: Any = None

    @property
    def input(self) -> Any:
        """The first argument: positional, else by keyword."""
        if self.inputs is None:
            return None
        args, kwargs = self.inputs
        return next(iter([*args, *kwargs.values()]), None)


class Cache:
    """The values of one `tracer.cache(...)`, by module path: an `Entry` for each visit."""

    def __init__(self, root: Any, modules: list | None, kinds: list[str], how: Observation):
        self.root, self.kinds, self.how = root, kinds, how
        self.named = modules is not None
        self.paths = list(dict.fromkeys(_path(root, m) for m in (root.modules() if modules is None else modules)))
        self.entries: dict[str, list[Entry]] = {}
        self.real = False  # are the entries a run's, or still what was recorded
        self.forwards = 0  # observed, and not yet filled in

    def arguments(self) -> dict:
        """What `tracer.cache` was told, as plain values."""
        steps = {name: dict(given) for name, given in self.how.steps}
        device, dtype = (steps.get("to", {}).get(name) for name in ("device", "dtype"))
        return {
            "modules": [_shown(p) for p in self.paths] if self.named else None,
            "device": None if device is None else str(device),
            "dtype": None if dtype is None else str(dtype),
            "detach": "detach" in steps,
            "include_output": "output" in self.kinds,
            "include_inputs": "input" in self.kinds,
        }

    def __getstate__(self) -> dict:
        return {**self.__dict__, "root": None}

    def record(self, wave: ForwardWave) -> None:
        """Observe a forward, in a worker over the rows of the invoke that is open."""
        tape = wave.tape
        mine = tape.invoke
        tape.invoke = Invoke(wave.shadow(mine.index))
        try:
            self._record(tape)
        finally:
            tape.invoke = mine

    def _record(self, tape: Tape) -> None:
        """Add the observations to a recording, in the order in which the model passes the sites."""
        recorded: list[tuple[str, str, int, int, Any]] = []  # path, kind, call, operation, value
        followed: list[tuple[str, str, int]] = []  # sites that the scan does not know: path, kind, operation
        known: list[tuple[float, tuple]] = []
        for path in self.paths:
            for kind in self.kinds:
                call = 0
                while isinstance(meta := tape.meta((path, kind, call)), SiteMeta) and not meta.unsure:
                    known.append((meta.order, (path, kind, call)))
                    call += 1
                if isinstance(meta, SiteMeta) or not (call or meta.certain):
                    followed.append((path, kind, tape.accesses.follow(path, kind, self.how)))
        for _, site in sorted(known):
            if site[:2] not in {f[:2] for f in followed}:
                n, value = tape.accesses.observe(site, self.how)
                recorded.append((*site, n, value))
        self.forwards += 1
        tape.told.append(lambda wave: self._fill(wave, recorded, followed))
        for path, kind, _, _, value in () if self.entries else recorded:
            self._put(path, kind, value)

    def _fill(self, wave: ForwardWave, recorded: list, followed: list) -> None:
        """After a forward: keep the visits that took place, behind those of the forwards before."""
        self.entries, self.real = self.entries if self.real else {}, True
        before = {path: len(visits) for path, visits in self.entries.items()}
        for path, kind, call, n, value in recorded:
            if wave.performed(n):
                self._put(path, kind, tree.tree_map(lambda x: _real(x, wave), value), before.get(path, 0) + call)
        for path, kind, n in followed:
            for call, value in enumerate(wave.visits(n)):
                self._put(path, kind, value, before.get(path, 0) + call)
        self.forwards -= 1
        missed = [p for p in self.paths if p not in self.entries] if self.named and not self.forwards else []
        if missed:
            some = ", ".join(f"`{names.shown(p)}`" for p in missed)
            warnings.warn(
                f"nnsight_fx: a module to be cached was missed: {some} did not run in this trace (skipped, behind a stop, on a "
                "branch not taken, or its parent uses its weight without calling it).",
                stacklevel=2,
            )

    def _put(self, path: str, kind: str, value: object, call: int = -1) -> None:
        visits = self.entries.setdefault(path, [])
        slot = SLOTS[kind]
        at = call if call >= 0 else next((i for i, e in enumerate(visits) if getattr(e, slot) is None), len(visits))
        while len(visits) <= at:
            visits.append(Entry())
        setattr(visits[at], slot, value)


def _real(leaf: Any, wave: ForwardWave) -> Any:
    """What a leaf is that the scan took for a tensor and the run did not (an attention mask that need not be made)."""
    if not isinstance(leaf, LazyTensor):
        return leaf
    try:
        real = wave.value(key_of(leaf))
    except KeyError:
        return None
    return leaf if isinstance(real, torch.Tensor) else real


def cache(tracer: Tracer, modules: list | None, kinds: list[str], how: Observation) -> CacheView:
    """Record a cache in the invoke of `tracer` that is open; in a generation, in every forward from there on."""
    tape = tracer.tape
    mine = tape.invoke
    if any(op.invoke == mine.index for op in tape.ops):
        raise InvokeError(
            f"{user_line()}: `tracer.cache()` must be declared before reading or modifying a model value: "
            "make it the first line of the trace, or of the invoke."
        )
    made = Cache(tracer.host.model, modules, kinds, how)
    made.record(tracer.waves[-1])
    if tracer.generation is not None:
        tracer.generation.caches.append(made)
    view = CacheView(made, None)
    tape.caches.append(DeclaredCache(view, mine.index, user_line(), made.arguments()))
    return view


class CacheView:
    """What a cache holds at a module, and below it.

    `cache["model.transformer.h.0"].output` and `cache.model.transformer.h[0].output` are the same. A module that ran
    once has its value there, one that ran several times a list; `view[i]` is the `Entry` of visit `i` where no child has
    that index, `view.visits` all of them, and `len(view)` how many. `keys`, `values`, `items`, `in` and iteration go over
    the module paths at or below.

    Raises `KeyError`, `AttributeError` or `IndexError` for what was not cached.
    """

    def __init__(self, cache: Cache, envoy: Envoy | None, path: str | None = None):
        self.__dict__.update(_cache=cache, _envoy=envoy, _path=path if envoy is None else envoy._path)

    def __getstate__(self) -> dict:
        return {"_cache": self._cache, "_envoy": None, "_path": self._path}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)

    # -- values --------------------------------------------------------------------------------------------------

    @property
    def visits(self) -> list[Entry]:
        """An `Entry` for each time the module ran."""
        if self._path not in self._cache.entries:
            raise KeyError(f"{user_line()}: {self._missing()}")
        return self._cache.entries[self._path]

    def _values(self, slot: str) -> Any:
        values = [getattr(entry, slot) for entry in self.visits]
        return values[0] if len(values) == 1 else values

    output = property(lambda self: self._values("output"), doc="What the module returned.")
    inputs = property(lambda self: self._values("inputs"), doc="`(args, kwargs)` that the module got.")
    input = property(lambda self: self._values("input"), doc="The first argument that the module got.")

    # -- the tree ------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._child(
                name.removeprefix("E_") if name.removeprefix("E_") in ("output", "inputs", "input") else name
            )
        except KeyError as error:
            close = difflib.get_close_matches(
                name, ("output", "input", "inputs", "visits", "keys", "values", "items"), n=1
            )
            hint = f"; a cache has `.{close[0]}`" if close else ""
            raise AttributeError(f"{user_line()}: {error.args[0]}{hint}") from None

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, int):
            envoy = self._envoy if self._path is not None else self._cache.root
            children = list(envoy._module._modules) if envoy is not None else []
            if children or self._path is None:
                if not -len(children) <= key < len(children):
                    raise IndexError(
                        f"{user_line()}: index {key} is out of bounds: {self._here()} has {len(children)} children"
                    )
                return self._child(children[key])
            if not -len(self.visits) <= key < len(self.visits):
                raise IndexError(
                    f"{user_line()}: {self._here()} was visited {len(self.visits)} times; there is no [{key}]"
                )
            return self.visits[key]
        key = names.plain(key)
        try:
            return self._below(key)
        except KeyError as error:
            if self._path is None:  # a path of the module's own, without the `model` in front
                with contextlib.suppress(KeyError):
                    return self._below(f"model.{key}")
            found = self._ending(key)
            if len(found) == 1:
                return self._at(_shown(found[0]))
            why = names.refused(key, (), found, "cached module") if found else self._why_not(key) or error.args[0]
            raise KeyError(f"{user_line()}: {why}") from None

    def _why_not(self, key: str) -> str:
        """What is wrong with a path from the root on."""
        if self._path is not None or self._cache.root is None:
            return ""
        with contextlib.suppress(UnknownModuleError):
            return self._missing(path_of(module_of(self._cache.root, key, "a cache")))
        return names.refused(key, tree_of(self._cache.root).names.spelled)

    def _ending(self, key: str) -> list[str]:
        """The own paths here that end so: of what was cached, and of what that is in."""
        front = f"{self._path}." if self._path else ""
        cached = [path.split(".") for path in self._cache.entries if path.startswith(front)]
        inside = {".".join(parts[: n + 1]) for parts in cached for n in range(len(parts))}
        root, spelled = self._cache.root, {path: path for path in sorted(inside)}
        if root is not None:
            paths = host_of(root).markers.paths
            spelled |= {s: paths[m] for s, m in tree_of(root).names.spelled.items() if paths.get(m) in inside}
        known = {s.removeprefix(front): path for s, path in spelled.items() if s.startswith(front)}
        return list(dict.fromkeys(known[s] for s in names.matches(key, known)))

    def _below(self, path: str) -> CacheView:
        return functools.reduce(lambda view, part: view._child(part), path.split("."), self)

    def _child(self, name: str) -> CacheView:
        """The view one component further down."""
        root = self._cache.root
        if root is None:  # unpickled: the tree is what the paths say
            path = "" if self._path is None and name == "model" else f"{self._path or ''}.{name}".lstrip(".")
            view = CacheView(self._cache, None, path)
        else:
            here = self._envoy if self._envoy is not None else root
            if self._envoy is None and name == "model":
                view = CacheView(self._cache, root)
            else:
                view = CacheView(self._cache, here._child(name) if self._has_child(name) else _nobody(here, name))
        if not view.keys():
            raise KeyError(view._missing())
        return view

    def _has_child(self, name: str) -> bool:
        envoy = self._envoy if self._envoy is not None else self._cache.root
        return envoy is not None and name in _names(envoy)

    def _here(self) -> str:
        return "the cache" if self._path is None else f"`{names.shown(self._path)}`"

    def _missing(self, path: str | None = None) -> str:
        wanted, known = (
            names.shown((path if path is not None else self._path) or ""),
            [names.shown(p) for p in self._cache.entries],
        )
        hint = difflib.get_close_matches(wanted, known, n=1) or known[:1]
        close = f"; the nearest that was is `{hint[0]}`" if hint else "; nothing was"
        return f"`{wanted}` module path was never cached{close}"

    # -- as a dict -----------------------------------------------------------------------------------------------

    def keys(self, alias: bool = False) -> list[str]:
        """The cached module paths at or below this one; with `alias`, by the names that `rename=` gave."""
        root = self._cache.root
        return [
            tree_of(root).names.spellings(_shown(p), root._module.get_submodule(p))[-1] if alias else _shown(p)
            for p in self._inside()
        ]

    def _inside(self) -> list[str]:
        return [p for p in self._cache.entries if self._path in (None, "", p) or p.startswith(f"{self._path}.")]

    def values(self) -> list[CacheView]:
        return [self._at(path) for path in self.keys()]

    def items(self) -> list[tuple[str, CacheView]]:
        return list(zip(self.keys(), self.values(), strict=True))

    def _at(self, shown: str) -> CacheView:
        return CacheView(self._cache, None)[shown]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, key: str) -> bool:
        try:
            return self[key]._path in self._cache.entries
        except (KeyError, IndexError):
            return False

    def __len__(self) -> int:
        return len(self.keys()) if self._path is None else len(self.visits)

    def __repr__(self) -> str:
        return f"CacheView({self._here()}: {', '.join(map(names.shown, self._inside()))})"


def _shown(path: str) -> str:
    return ".".join(p for p in ("model", path) if p)


def _path(root: Any, module: Any) -> str:
    """The path of a module that was given as an envoy or as text, from `model` on, or from the root."""
    if isinstance(module, Envoy):
        return path_of(module)
    if not isinstance(module, str):
        raise TypeError(f"{user_line()}: a cache takes modules as envoys or paths, and got {module!r}")
    return path_of(module_of(root, module, "a cache"))


def _names(envoy: Envoy) -> list[str]:
    """What the children of a module are called, aliases last."""
    return [*envoy._module._modules, *tree_of(envoy).names.at.get(envoy._module, {})]


def _nobody(envoy: Envoy, name: str) -> Any:
    raise KeyError(f"`{names.shown(path_of(envoy))}` has no module `{name}`; {nearest(name, _names(envoy))}")


def observed(detach: bool, device: Any, dtype: torch.dtype | None) -> Observation:
    """What is done to each tensor that is cached: detached, then moved, then cast."""
    steps: list[tuple[str, tuple]] = [("detach", ())] if detach else []
    if device is not None or dtype is not None:
        given = {"device": None if device is None else torch.device(device), "dtype": dtype}
        steps.append(("to", tuple((k, v) for k, v in given.items() if v is not None)))
    return Observation(tuple(steps))
