"""Paths of modules: what a user may write, and the one form that is printed.

Printed is the module's own path, which in code stands behind `model.`: `transformer.h.3`, or `model.layers.3` for
`model.model.layers[3]`. Taken are that, the same with `model.` in front (as keys of a cache have it), with brackets as in
code, and every end of it that no other module has: `layers.3`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from .errors import nearest

_BRACKETS = re.compile(r"\[\s*[\"']?([^\]\"']+?)[\"']?\s*\]")


def plain(text: str) -> str:
    """`layers[3].mlp` as `layers.3.mlp`."""
    return _BRACKETS.sub(r".\1", text).lstrip(".") if "[" in text else text


def shown(path: str) -> str:
    """A module's own path for a reader; the root is `model`."""
    return path or "model"


def matches(text: str, paths: Iterable[str]) -> list[str]:
    """Those of `paths` that a text names: the one that it is, with or without `model` in front, else all that end so."""
    known = dict.fromkeys(paths)
    text = plain(text)
    forms = list(dict.fromkeys([text, "" if text == "model" else text.removeprefix("model.")]))
    for form in forms:
        if form in known:
            return [form]
    return next(filter(None, ([p for p in known if p.endswith(f".{form}")] for form in forms if form)), [])


def refused(text: str, paths: Iterable[str], found: Iterable[str] = (), what: str = "module") -> str:
    """Why a text names none of `paths`: several of them end so (`found`), or none; with the nearest that there are."""
    several = list(found)
    if several:
        some = ", ".join(f"`{p}`" for p in several[:3]) + (", ..." if len(several) > 3 else "")
        return f"`{text}` is the end of {len(several)} {what}s, {some}; write more of the path"
    known, wanted = [p for p in paths if p], plain(text)
    if not any(p.split(".")[0] == "model" for p in known):
        wanted = wanted.removeprefix("model.")
    size = wanted.count(".") + 1
    tails: dict[str, str] = {}
    for path in known:
        tails.setdefault(".".join(path.split(".")[-size:]), path)
    close = difflib.get_close_matches(wanted, tails, cutoff=0.4)
    return f"there is no {what} `{text}`; " + (
        "did you mean " + ", ".join(f"`{tails[c]}`" for c in close) + "?" if close else nearest(wanted, known)
    )
