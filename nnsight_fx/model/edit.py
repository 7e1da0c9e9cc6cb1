"""`model.edit()`: interventions that stay."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import InvokeError, NestedTraceError, NotRecordableError, own_error
from ..lines import user_line
from ..signatures import exact
from ..stored import edits
from ..tracing.conditions import Stopping
from ..tracing.draft import Draft, Turn
from ..tracing.iteration import Iterations
from ..tracing.recorder import Recorder

if TYPE_CHECKING:
    from .host import ModelHost


class Editor:
    """An open edit: `with model.edit() as (tracer, edited)`, or `as edited`; with `inplace=True`, `as tracer`."""

    def __init__(self, model: Any, inplace: bool):
        self.model, self.inplace = model if inplace else model._copy(), inplace
        self.host = self.model._host
        self.tape = Draft()
        self.recorder = Recorder(self.tape)
        self.cursor = Every()
        self.waves = [self]  # as a trace has them: of each, the tape
        self.line = user_line()

    def __enter__(self) -> Any:
        self.line = user_line()
        if self.host.tracer is not None:
            raise NestedTraceError(
                f"{self.line}: this model has an open trace, from {self.host.tracer.line}. An edit is made before the trace in "
                "which it is to hold."
            )
        self.host.tracer = self
        self.resume_body = self.host.suspend()
        self.recorder.__enter__()
        if self.inplace:
            return self
        self.host.unpacks = self
        return self.model

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.recorder.__exit__(None, None, None)
        self.resume_body()
        self.tape.open = False
        self.host.tracer = None
        self.host.unpacks = None
        if error is None or type(error) is Stopping:
            self.host.edits = [*self.host.edits, self.tape]
        return type(error) is Stopping

    @property
    def iter(self) -> Turns:
        """Chosen occurrences: `for step in tracer.iter[1:3]`, over the forwards of a generation."""
        return Turns(self)

    def all(self) -> Turns:
        """Every occurrence: `tracer.iter[:]`."""
        return Turns(self)

    @own_error
    def result(self) -> Any:
        """What the model returns."""
        return self.tape.read(("", "result", 0))

    def stop(self) -> NoReturn:
        """End every forward here."""
        self.tape.stop()
        raise Stopping

    def _not_here(self, *_: object, **__: object) -> NoReturn:
        raise InvokeError(
            f"{user_line()}: an edit has no inputs and runs nothing, so it has no invokes, caches, `apply` or `cond`. Use them in a "
            "trace of the edited model."
        )

    invoke = batch = cache = apply = log = barrier = cond = _not_here

    def __getattr__(self, name: str) -> Any:
        own_error.reraise(self)
        if name.startswith("_") or "model" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.model, name)


class Edits:
    """The edits of a wrapped model: interventions of every trace of it."""

    _host: ModelHost

    @exact
    def edit(self, *, inplace: bool = False) -> Editor:
        """Record interventions that hold in every later trace, before its own, over the whole batch.

        ```python
        with model.edit() as (tracer, edited):  # or: as edited
            edited.transformer.h[1].mlp.output[:] = 0
        with edited.trace(prompt):
            logits = edited.lm_head.output.save()  # without that layer's MLP; `model` still has it
        ```

        `edited` shares the weights, and what was captured, with `model`. With `inplace=True` the edit is made to this model
        itself. Edits add up, in the order in which they were made; `clear_edits()` takes them all off. The block runs once,
        before any input is known: its values have no shapes, only operations. Calling the module itself ignores edits.
        """
        return Editor(self, inplace)

    def clear_edits(self) -> None:
        """Take off every edit of this model."""
        self._host.edits = []

    def export_edits(
        self, name: str | None = None, export_dir: str | os.PathLike | None = None, variant: str = "__default__"
    ) -> str:
        """Write this model's edits into a file, `<export_dir>/<name>/<variant>.safetensors`, and return its path.

        ```python
        with model.edit() as edited:
            edited.transformer.h[6].output[:, -1] += steering
        edited.export_edits("steered", "edits")
        # elsewhere, on the same model or one with the same modules:
        model.import_edits("steered", "edits")
        ```

        The file holds operations, and the tensors that they use as they are now; parameters and buffers of the model are
        kept by name. No pickle, no code. By default `name` is the model's own (its hub id, or its class) and `export_dir`
        `~/.cache/nnsight_fx/edits`. The model may have no weights yet.

        Raises:
            PlanError: there are no edits, or one holds what is no data, with its line.

        Source: nnsight 0.7's `export_edits`.
        """
        path = edits.place(self, name, export_dir, variant)
        edits.export(self, path)
        return path

    def import_edits(
        self, name: str | None = None, export_dir: str | os.PathLike | None = None, variant: str = "__default__"
    ) -> None:
        """Add the edits that `export_edits` wrote to this model, in place, behind those that it has.

        Raises:
            PlanError: there is no such file, it is no export of edits or of another version, it names an operation that is
                not torch's, or a module or parameter that this model does not have. Shapes are known only in a trace,
                which tells what does not fit, with the line of the edit.
        """
        path = edits.place(self, name, export_dir, variant)
        self._host.edits = [*self._host.edits, *edits.imported(self, path)]


class Turns(Iterations):
    """`tracer.iter[...]` in an edit: for which occurrences of its sites the body holds, in every later trace and generation.

    An end that is known makes a body for each number. Without one the body is recorded once, for all, and has no number.
    """

    def __init__(self, editor: Any, chosen: object = None):
        super().__init__(editor, chosen)

    def __getitem__(self, chosen: int | slice | list[int]) -> Turns:
        return Turns(self.tracer, super().__getitem__(chosen).chosen)

    def __iter__(self) -> Iterator[Any]:
        tape: Any = self.tracer.tape
        try:
            if self._endless:
                tape.turn = Turn(self.chosen.start or 0, None, self.chosen.step or 1)
                yield Unnumbered()
            else:
                for index in self._indices():
                    tape.turn = Turn(index, index + 1, 1)
                    yield index
        finally:
            tape.turn = None

    def __enter__(self) -> Any:
        self.open = iter(self)
        first = next(self.open, None)
        if not isinstance(self.chosen, int) or first is None:
            self.open.close()  # type: ignore[attr-defined]
            raise ValueError(
                f"{user_line()}: in an edit `with tracer.iter[...]` is for one occurrence. Write `for step in tracer.iter[...]:`."
            )
        return first

    def __exit__(self, *_: object) -> bool:
        self.open.close()  # type: ignore[attr-defined]
        return False


class Unnumbered:
    """The number of an occurrence, in a body that is for all of them."""

    def _refuse(self, *_: object) -> NoReturn:
        raise NotRecordableError(
            f"{user_line()}: an edit's `for step in tracer.iter[...]` without an end is recorded once, for all occurrences, so `step` is "
            "no number. Give an end (`tracer.iter[0:8]`), or do this in the traces."
        )

    __index__ = __int__ = __float__ = __bool__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __lt__ = __le__ = __gt__ = __ge__ = __mod__ = __pow__ = __rpow__ = __eq__ = (
        __hash__
    ) = _refuse  # type: ignore[assignment]


class Every:
    """Where an edit stands among the occurrences: at the first of every forward."""

    def call(self, path: str, kind: str) -> int:
        return 0

    def next(self, step: int, path: str | None = None) -> NoReturn:
        raise NotRecordableError(f"{user_line()}: an edit counts no occurrences. Use `.next()` in a trace.")
