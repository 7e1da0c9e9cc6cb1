"""Other names for modules (`rename=`) and other classes of envoys (`envoys=`), by nnsight 0.8.1's rules.

A `rename` key names a module from some module of the tree on, and binds its alias there: `"mlp"` wherever there is an
`mlp`, `"transformer.h"` on the root. A `*` stands for any one name, a class for the one child of that class. A dotted
alias binds on the module that its prefix names. Keys that lead nowhere are ignored, so that one dictionary serves many
architectures.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch.nn as nn

from ..names import plain, shown

Rename = Mapping  # a path or a module class -> an alias, or a list of them
Aliases = dict[str, nn.Module]


class Names:
    """The aliases of one module tree."""

    def __init__(self, root: nn.Module, rename: Rename, taken: type):
        self.root, self.taken = root, taken
        self.at: dict[nn.Module, Aliases] = {}
        self.paths: dict[nn.Module, str] = {m: path for path, m in root.named_modules()}
        self.rename: dict[Any, list[str]] = {}
        for key, aliases in rename.items():
            self.rename.setdefault(self._own(key), []).extend([aliases] if isinstance(aliases, str) else aliases)
        if rename:
            for module in reversed(self.paths):  # children first: outer keys may use inner aliases
                self._bind(module)

    @functools.cached_property
    def spelled(self) -> dict[str, nn.Module]:
        """Every module by its path, and by those that aliases make."""
        found = dict(self.root.named_modules(remove_duplicate=False))
        for path, module in list(found.items()) if self.rename else ():
            for other in self.spellings(f"model.{path}", module)[1:] if path else ():
                found.setdefault(other.removeprefix("model."), module)
        return found

    def _own(self, key: str | type) -> str | type:
        """A key without the `model` that paths of envoys begin with, where it leads to a module only so."""
        if not isinstance(key, str):
            return key
        bare = plain(key)
        short = bare.removeprefix("model.")
        return short if self._named(self.root, short) and not self._named(self.root, bare) else bare

    def _bind(self, module: nn.Module) -> None:
        for key, aliases in self.rename.items():
            matches = self._named(module, key)
            name = key.__name__ if isinstance(key, type) else repr(key)
            if len(matches) > 1:
                raise ValueError(
                    f"`rename` key {name} matches {len(matches)} modules under `{self._path(module)}` "
                    f"({', '.join(matches.values())}); an alias names one. Key those by name."
                )
            for target, path in matches.items():
                for alias in aliases:
                    self._put(module, alias, target, path)

    def _put(self, module: nn.Module, alias: str, target: nn.Module, path: str) -> None:
        prefix, _, alias = alias.rpartition(".")
        if prefix:
            if not path.startswith(f"{prefix}."):
                raise ValueError(
                    f"`rename` alias {prefix + '.' + alias!r} for {path!r} names no ancestor of it on "
                    f"`{self._path(module)}`: its prefix must spell the start of the key's path, without `*`."
                )
            module = module.get_submodule(prefix)
        names = self.at.setdefault(module, {})
        if names.get(alias) is target or module._modules.get(alias) is target:
            return
        displaced = (
            "the alias already bound here"
            if alias in names
            else "a child module"
            if alias in module._modules
            else f"the `{self.taken.__name__}.{alias}` attribute"
            if inspect.getattr_static(self.taken, alias, None) is not None
            else "an attribute of the wrapped module"
            if hasattr(module, alias)
            else None
        )
        if displaced:
            raise ValueError(
                f"`rename` alias {alias!r} for {path!r} would shadow {displaced} on `{self._path(module)}`. "
                "Pick another alias."
            )
        names[alias] = target

    def _named(self, module: nn.Module, key: Any) -> dict[nn.Module, str]:
        """The modules that a key names from `module` on, with their paths from there."""
        if isinstance(key, type):
            return {m: name for name, m in _children(module) if isinstance(m, key)}
        found = [("", module)]
        for part in key.lstrip(".").split("."):
            found = [(f"{path}.{name}", m) for path, here in found for name, m in self._step(here, part)]
        return {m: path[1:] for path, m in reversed(found)}

    def _step(self, module: nn.Module, part: str) -> Iterator[tuple[str, nn.Module]]:
        if part == "*":
            yield from _children(module)
        else:
            child = module._modules.get(part) or self.at.get(module, {}).get(part)
            if child is not None:
                yield part, child

    def _path(self, module: nn.Module) -> str:
        return shown(self.paths[module])

    def _full(self, module: nn.Module) -> str:
        return ".".join(p for p in ("model", self.paths[module]) if p)

    def spellings(self, path: str, module: nn.Module | None = None) -> list[str]:
        """Every spelling of a full path (from `model` on) under the aliases, its own first."""
        parts = path.split(".")
        if len(parts) == 1:
            return [path]
        found = [f"{prefix}.{parts[-1]}" for prefix in self.spellings(".".join(parts[:-1]))]
        for key, aliases in self.rename.items():
            size = 1 if isinstance(key, type) else key.lstrip(".").count(".") + 1
            named = isinstance(module, key) if isinstance(key, type) else size < len(parts) and ends_with(path, key)
            for alias in aliases if named else ():
                down = alias.count(".")
                if down < size:
                    host = ".".join(parts[: len(parts) - size + down])
                    found += [f"{prefix}.{alias.split('.')[-1]}" for prefix in self.spellings(host)]
        return found

    def chosen(self, envoys: Any, module: nn.Module, default: type) -> type:
        """The envoy class for a module: `envoys` is one, or a dict by module class or by the end of a path."""
        if not envoys:
            return default
        if isinstance(envoys, type):
            return envoys
        by_class = next((envoys[cls] for cls in type(module).__mro__ if cls in envoys), None)
        if by_class is not None:
            return by_class
        for spelling in self.spellings(self._full(module), module):
            for key, cls in envoys.items():
                if isinstance(key, str) and ends_with(spelling, key):
                    return cls
        return default


def ends_with(path: str, key: str) -> bool:
    """Does a path end with a dotted key, name by name? A `*` in the key stands for any name."""
    names, wanted = path.split("."), key.removeprefix(".").split(".")
    return len(wanted) <= len(names) and all(k in ("*", n) for n, k in zip(names[-len(wanted) :], wanted, strict=True))


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module._modules.items() if child is not None]
