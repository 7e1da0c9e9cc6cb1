"""`.source`: the operations inside a module's `forward`, read, written and skipped as modules are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import torch.nn as nn

from .. import names
from ..capture import operations
from ..capture.source import Frame, plain
from ..capture.source import operations as frame_of
from ..errors import OutsideTraceError, SourceNotAvailable, UnknownOperationError, nearest, own_error
from ..lines import Line, user_line
from . import attention
from .envoy import Envoy, Observed, host_of, tree_of


class Operation(Observed):
    """One operation of a frame: `.output`, `.inputs`, `.input`, `.skip(value)` as for a module.

    `.inputs` of a method are its arguments without the object it belongs to. An assignment (`h = q @ k`) has its value as input
    and as output. In a loop each turn is a call of its own.
    """

    def __init__(self, name: str, within: Source):
        self.name, self._within = name, within
        self._path, self._root = f"{within._path}.{name}", within._root

    output, inputs, input = Observed.output, Observed.inputs, Observed.input

    @property
    def source(self) -> Source:
        """The operations inside the function that this one calls, as known inside a trace.

        Raises `SourceNotAvailable` for a function that is not Python, for an assignment, and for a module: that has a
        `.source` of its own.
        """
        known = host_of(self._root).markers.operations.known
        if self._path not in known:
            if self._root.tracer is None:
                raise OutsideTraceError(
                    f"{user_line()}: what `{names.shown(self._path)}` calls is known only inside a trace: open one, `with model.trace(...):`."
                )
            called = self._root.tracer.tape.sites.called(self._path)
            with _named(names.shown(self._path), user_line()):
                if called is None:
                    raise SourceNotAvailable("it is an assignment, or is not run in this trace")
                if isinstance(called, nn.Module):
                    raise SourceNotAvailable("it calls a module, which has a `.source` of its own")
                known[self._path] = plain(called)
        with _named(names.shown(self._path), user_line()):
            return Source(operations.frame(self._path), self._root, frame_of(known[self._path][0]))

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_") and name != "name" and not hasattr(type(self), name):
            raise AttributeError(
                f"{user_line()}: `{names.shown(self._path)}` has no `{name}`; {nearest(name, ['output', 'input', 'inputs'])}"
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> NoReturn:
        own_error.reraise(self)
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(
            f"{user_line()}: `{names.shown(self._path)}` has no `{name}`: it is an operation, whose values are `.output`, `.input` and "
            "`.inputs`.",
            name=name,
            obj=self,
        )

    def __repr__(self) -> str:
        line = self._within._frame.lines[self.name]
        text = self._within._frame.text.split("\n")
        shown = range(max(0, line - 6), min(len(text), line + 5))
        return "\n".join(
            [f"{names.shown(self._path)}:", "", *(f"{'-->' if i == line - 1 else '   '} {text[i]}" for i in shown)]
        )


class Source:
    """The operations of one frame, by name; iteration gives them in the order of evaluation."""

    def __init__(self, path: str, root: Envoy, frame: Frame):
        self._path, self._root, self._frame = path, root, frame

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all operations, in the order of evaluation."""
        return self._frame.names

    def __getattr__(self, name: str) -> Operation:
        if name.startswith("__"):
            raise AttributeError(name)
        own = self._frame.aliases.get(name, name)
        if own not in self._frame.lines:
            raise UnknownOperationError(
                f"{user_line()}: `{names.shown(self._path)}` has no operation `{name}`; {nearest(name, self.names)} "
                f"`print` the source to see all {len(self.names)}.{attention.hint(self._root, name)}"
            )
        return Operation(own, self)

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_"):
            raise AttributeError(f"{user_line()}: an operation is no value; write `.source.{name}.output = ...`")
        super().__setattr__(name, value)

    def __iter__(self) -> Iterator[Operation]:
        return (Operation(name, self) for name in self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._frame.lines or name in self._frame.aliases

    def __dir__(self) -> list[str]:
        return [*self.names, "names"]

    def __repr__(self) -> str:
        """The source text, with the operations of each line beside it."""
        at: dict[int, list[str]] = {}
        for name, line in self._frame.lines.items():
            at.setdefault(line, []).append(name)
        width = max(map(len, self.names), default=0)
        shown = []
        for number, line in enumerate(self._frame.text.rstrip("\n").split("\n"), 1):
            first, *rest = at.get(number, [""])
            shown.append(f" {first:{width}} {'->' if first else '  '} {number - 1:3d} {line}".rstrip())
            indent = " " * (len(line) - len(line.lstrip()))
            shown += [f" {name:{width}} ->   + {indent}..." for name in rest]
        return "\n".join(shown)


def source_of(envoy: Envoy) -> Source:
    """A module's `.source`."""
    module, root = envoy._module, envoy._root
    with _named(names.shown(envoy._path), user_line()):
        function, _ = plain(host_of(root).markers.forward_of(module))
        return Source(operations.frame(envoy._path), root, frame_of(function))


def is_inside(path: str) -> bool:
    """Is it the path of an operation, and not of a module?"""
    return ".source." in f".{path}"


def at(root: Any, path: str) -> Any:
    """The operation at the path of its sites, of which all but the first may only be known inside a trace.

    Raises `UnknownOperationError`, `SourceNotAvailable`, or torch's own error for a module that is not there.
    """
    module, *names = f".{path}".split(".source.")
    found: Any = tree_of(root).envoy_of(root._module.get_submodule(module.removeprefix(".")))
    for name in names:
        found = getattr(found.source if isinstance(found, Envoy) else found.source, name)
    return found


@contextlib.contextmanager
def _named(path: str, line: Line) -> Iterator[None]:
    """Say whose source is not available."""
    try:
        yield
    except SourceNotAvailable as e:
        raise SourceNotAvailable(f"{line}: `{path}.source`: {e}.") from None
