"""Occurrences: which call of a module a line of the body means, and the loops that move along them.

A module may be called many times in a trace, in one forward or over the forwards of a generation. Each call is an
occurrence of its sites. The cursor of a trace says which one is meant: occurrence 0, or, in a loop over `tracer.iter`,
the one that the loop stands at, which the first site that the body touches decides; the rest of the body stays with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import MissedSiteError, OutOfOrderError
from ..lines import user_line
from .lazy import LazyTensor
from .objects import LazyObject

if TYPE_CHECKING:
    from .contexts import Tracer


class Hit(NamedTuple):
    """What the first site of a loop's body has decided."""

    path: str
    kind: str
    step: int  # the forward
    call: int  # the call in that forward


class Never(MissedSiteError):
    """An occurrence that the run does not come to."""


class Cursor:
    """Where a body stands among the occurrences."""

    def __init__(self, tracer: Tracer):
        self.tracer = tracer
        self.reset()

    def reset(self) -> None:
        """Another invoke counts from its start."""
        self.pin: int | None = None  # None: no loop, occurrence 0
        self.moved: dict[str, int] = {}  # by `envoy.next()`
        self.hit: Hit | None = None
        self.last: Hit | None = None  # of the body before

    def next(self, step: int, path: str | None = None) -> None:
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"{user_line()}: `next` goes forward by a number of occurrences, and got {step!r}")
        if path is None:
            self.pin, self.hit = (self.pin or 0) + step, None
        else:
            self.moved[path] = self.moved.get(path, 0) + step

    def call(self, path: str, kind: str) -> int:
        """The call, in the open forward, of the occurrence of a site that is meant; opens the forward that has it."""
        tracer, forwards, hit = self.tracer, self.tracer.forwards, self.hit
        if hit is None and self.pin is None and not self.moved and tracer.generation is None:
            return 0  # or never: the run says what there is to say
        moved = self.moved.get(path, 0)
        if hit is None:
            want = (self.pin or 0) + moved
        else:
            calls = hit.call + 1 if forwards.open_ended(path, kind, hit.step) else forwards.calls(path, kind, hit.step)
            want = forwards.before(path, kind, hit.step) + max(0, min(hit.call, calls - 1)) + moved
        call = self._seek(path, kind, want)
        if self.pin is not None and hit is None and not moved:
            self.hit = Hit(path, kind, forwards.step, call)
        return call

    def _seek(self, path: str, kind: str, want: int) -> int:
        tracer, forwards = self.tracer, self.tracer.forwards
        while True:
            before = forwards.before(path, kind, forwards.step)
            if want < before:
                raise OutOfOrderError(
                    f"{user_line()}: occurrence {want} of `{path}.{kind}` was passed: the generation has run to its forward "
                    f"{forwards.step}. Touch it before that, or use `for step in tracer.iter[:]`."
                )
            if forwards.open_ended(path, kind, forwards.step):
                if not forwards.can_advance or tracer.tape.accesses.reaches((path, kind, want - before)):
                    return want - before
            elif want < before + forwards.calls(path, kind, forwards.step):
                return want - before
            if forwards.can_advance:
                forwards.advance()
            else:
                seen = before + forwards.calls(path, kind, forwards.step)
                raise Never(
                    f"{user_line()}: occurrence {want} of `{path}.{kind}` never came: there were {seen}. "
                    "Everything else that was saved has been delivered."
                )

    def goes_on(self, index: int) -> bool:
        """Can there be a body for occurrence `index`? Runs the forwards before the one that holds it."""
        tracer, forwards = self.tracer, self.tracer.forwards
        most = 0
        while True:
            if self.last is not None:
                path, kind = self.last.path, self.last.kind
                before = forwards.before(path, kind, forwards.step)
                if not forwards.open_ended(path, kind, forwards.step):
                    most = before + forwards.calls(path, kind, forwards.step)
                elif index < before or tracer.tape.accesses.reaches((path, kind, index - before)):
                    return True
            elif forwards.decides():
                return True  # values decide: who touches a site finds out
            else:
                most = sum(forwards.most_calls(step) for step in range(forwards.step + 1))
            if index < most:
                return True
            if not forwards.can_advance:
                return False
            forwards.advance()


class Iterations:
    """`tracer.iter[...]`: the occurrences that a loop, or a block, is for.

    ```python
    with model.generate(prompt, max_new_tokens=5) as tracer:
        tokens = nnsight_fx.save([])
        for step in tracer.iter[:]:
            tokens.append(model.lm_head.output[:, -1].argmax(-1))
    ```

    An int is one, a slice many, a list these. A loop over more than there are ends with the last one.
    """

    def __init__(self, tracer: Tracer, chosen: Any = None):
        self.tracer, self.chosen = tracer, slice(None) if chosen is None else chosen

    def __getitem__(self, chosen: int | slice | list[int]) -> Iterations:
        given = [chosen.start, chosen.stop] if isinstance(chosen, slice) else chosen
        numbers = given if isinstance(given, list | tuple | range) else [given]
        if any(n is not None and not isinstance(n, int) for n in numbers):
            raise TypeError(f"{user_line()}: `tracer.iter` takes an int, a slice or a list of ints, and got {chosen!r}")
        if isinstance(chosen, slice) and chosen.step is not None and chosen.step < 1:
            raise ValueError(f"{user_line()}: `tracer.iter` goes forward, and got steps of {chosen.step}")
        for n in numbers:
            if n is not None and n < 0:
                raise ValueError(
                    f"{user_line()}: `tracer.iter` counts from 0, and got {n}; how many there are is not known"
                )
        return Iterations(self.tracer, chosen)

    def _indices(self) -> Iterator[int]:
        if isinstance(self.chosen, int):
            yield self.chosen
        elif isinstance(self.chosen, slice):
            at, step = self.chosen.start or 0, self.chosen.step or 1
            while self.chosen.stop is None or at < self.chosen.stop:
                yield at
                at += step
        else:
            yield from self.chosen

    def __iter__(self) -> Iterator[int]:
        cursor = self.tracer.cursor
        outer = cursor.pin, cursor.hit, cursor.moved, cursor.last
        cursor.last = None
        try:
            for index in self._indices():
                if not cursor.goes_on(index):
                    return
                cursor.pin, cursor.hit, cursor.moved = index, None, {}
                yield index
                if cursor.hit is None and self._endless:
                    if not self.tracer.forwards.can_advance:
                        return
                    self.tracer.forwards.advance()  # a body without a site: one a forward
                cursor.last = cursor.hit or cursor.last
        finally:
            cursor.pin, cursor.hit, cursor.moved, cursor.last = outer

    @property
    def _endless(self) -> bool:
        return isinstance(self.chosen, slice) and self.chosen.stop is None

    # `with tracer.iter[2]:` is one body; a body for several needs the loop

    def __enter__(self) -> int:
        indices = [self.chosen] if isinstance(self.chosen, int) else None
        if isinstance(self.chosen, slice):
            stop = self.chosen.stop
            indices = list(range(self.chosen.start or 0, stop, self.chosen.step or 1)) if stop is not None else []
        elif indices is None:
            indices = list(self.chosen)  # type: ignore[arg-type]
        if len(indices) != 1:
            raise ValueError(
                f"{user_line()}: a `with` block runs once, and `tracer.iter[...]` selects more. "
                "Write `for step in tracer.iter[...]:`."
            )
        cursor = self.tracer.cursor
        self.outer = cursor.pin, cursor.hit, cursor.moved
        self.held = [(c, _contents(c)) for c in self.tracer.forwards.containers()]
        cursor.pin, cursor.hit, cursor.moved = indices[0], None, {}
        return indices[0]

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        cursor = self.tracer.cursor
        cursor.pin, cursor.hit, cursor.moved = self.outer
        if not isinstance(error, Never):
            return False
        for container, held in self.held:
            _undo(container, held)
        return True


def _contents(container: object) -> Any:
    """The identity of what a container holds."""
    values = (
        container.values() if isinstance(container, dict) else container if isinstance(container, list | set) else ()
    )
    return {id(v) for v in values}


def _undo(container: object, held: set[int]) -> None:
    """Take out the recorded values that came since."""

    def new(v: object) -> bool:
        return id(v) not in held and isinstance(v, LazyTensor | LazyObject)

    if isinstance(container, dict):
        for key in [k for k, v in container.items() if new(v)]:
            del container[key]
    elif isinstance(container, list):
        container[:] = [v for v in container if not new(v)]
    elif isinstance(container, set):
        container -= {v for v in container if new(v)}
