"""What a path leads to: the one way in which every verb takes the paths that a user writes."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn as nn

from .. import names
from ..errors import UnknownModuleError
from ..lines import user_line
from .envoy import Envoy, path_of, tree_of

VALUES = ("output", "input", "inputs", "source", "skip")  # what every module has


def resolved(here: Envoy, text: str, keys: bool = False) -> tuple[Envoy, list[str]]:
    """The module that a path names from an envoy on, and the names behind it: of its values, its `.source`, its attributes.

    Taken are the module's own path, `model.` in front of it (that first with `keys`, as a cache has them), and an end that
    only one module has. Raises `UnknownModuleError`.
    """
    parts = names.plain(text).split(".") if text else []
    whole = not path_of(here)
    forms = [parts, parts[1:]] if whole and parts[:1] == ["model"] else [parts]
    for given in reversed(forms) if keys else forms:
        at, rest = _walk(here, given)
        if not rest or _has(at, rest[0]):
            return at, rest
    known = _below(here)
    sites: list[str] = []
    for n in range(len(parts), 0, -1):
        found = names.matches(".".join(parts[:n]), known) if whole else _ends(parts[:n], known)
        modules = {known[path]: path for path in reversed(found)}
        ats = [tree_of(here).envoy_of(module) for module in modules]
        good = [at for at in ats if n == len(parts) or _has(at, parts[n])]
        if len(good) == 1:
            return good[0], parts[n:]
        if good:
            paths = [".".join([path_of(at), *parts[n:]]) for at in reversed(good)]
            raise UnknownModuleError(f"{user_line()}: {names.refused(text, (), paths)}.")
        sites = sites or [f"{path_of(at)}.{value}" for at in ats[:1] for value in VALUES if path_of(at)]
    raise UnknownModuleError(f"{user_line()}: {names.refused(text, [*known, *sites])}")


def module_of(here: Envoy, text: str, who: str) -> Envoy:
    """The module that a path or a key names, where a module is wanted and no value of it."""
    at, rest = resolved(here, text, keys=True)
    if rest:
        raise UnknownModuleError(
            f"{user_line()}: `{text}` is no module: {who} takes modules, here `{names.shown(path_of(at))}`."
        )
    return at


def child_of(envoy: Envoy, name: str) -> nn.Module | None:
    """The child of that name, or of that alias."""
    found = envoy._module._modules.get(name)
    return found if found is not None else tree_of(envoy).names.at.get(envoy._module, {}).get(name)


def _walk(here: Envoy, parts: list[str]) -> tuple[Envoy, list[str]]:
    """As far as the names lead from child to child, and what is left."""
    for n, name in enumerate(parts):
        module = child_of(here, name)
        if module is None:
            return here, parts[n:]
        here = tree_of(here).envoy_of(module)
    return here, []


def _has(envoy: Envoy, name: str) -> bool:
    """Has it a value or an attribute of that name, which is no child?"""
    if name in VALUES or hasattr(type(envoy), name):
        return True
    return child_of(envoy, name) is None and hasattr(envoy._module, name)


def _below(here: Envoy) -> Mapping[str, nn.Module]:
    """The modules below an envoy, by every path from it on."""
    spelled = tree_of(here).names.spelled
    if not path_of(here):
        return spelled
    front = f"{path_of(here)}."
    return {path.removeprefix(front): module for path, module in spelled.items() if path.startswith(front)}


def _ends(parts: list[str], known: Mapping[str, nn.Module]) -> list[str]:
    return [path for path in known if f".{path}".endswith("." + ".".join(parts))]
