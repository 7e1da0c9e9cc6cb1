"""The cells of a sweep, and how some of them run: what an executor hands out."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..compat.fakes import attributes
from ..draws import draw_for, own_draws
from ..engine.captured.capture import Capture
from ..envoys.envoy import host_of
from ..errors import NotRecordableError
from ..generation.grid import Failed, GridCell, Made, Returned
from ..generation.grid import run as generations
from ..lines import user_line
from ..plan import tree
from ..report.provenance import hashed
from ..report.runs import Report, gathered
from ..tracing.lazy import LazyTensor
from .steps import TEXT, TOKENS, padded, stacked
from .store import label, short

if TYPE_CHECKING:
    from ..envoys.envoy import Envoy
    from ..tracing.contexts import Tracer


PROMPT = "prompt"  # the axis of a list of inputs


class Done(NamedTuple):
    """What a chunk gave: each cell's results by name, on the CPU, a digest of its plan where the job is `stored`, how it ran."""

    results: list[dict[str, torch.Tensor] | None]  # `None`: it failed
    plans: list[str]
    report: Report
    failed: tuple[Exception, ...] = ()

    def joined(self, other: Done) -> Done:
        """Both, told as one."""
        self.report.take(other.report)
        failed = (*self.failed, *other.failed)
        return Done([*self.results, *other.results], [*self.plans, *other.plans], self.report, failed)


@dataclass
class SweepJob:
    """One body over a grid. Called with the numbers of some cells it runs them, in one session."""

    model: Envoy
    fn: Callable
    inputs: list
    axes: dict[str, list]
    options: dict
    many: bool = False  # the first axis are the inputs
    prepare: Callable | None = None
    stop: bool = False
    seed: int = 0
    stored: bool = False
    shapes: list[tuple] = field(default_factory=list)  # of each input's tensors
    texts: list[tuple[int | None, bool]] = field(default_factory=list)  # how many tokens each input has, and is it text
    on_hooks: bool = False  # whatever the model is compiled for
    generate: dict | None = None  # each cell is a generation with these options
    by_step: set[str] = field(default_factory=set)  # results that have a value for each step

    def __post_init__(self):
        self.cells = list(itertools.product(*self.axes.values()))
        self.names = tuple(self.axes)
        self.call = _caller(self.fn, self.names, self.many)

    def chunks(self, size: int) -> list[list[int]]:
        """The numbers of all cells, `size` at a time; cells whose inputs have one shape stand together, and share forwards."""
        order = range(len(self.cells))
        if self.many:
            first = {shape: n for n, shape in reversed(list(enumerate(self.shapes)))}
            order = sorted(order, key=lambda i: first[self.shapes[self.prompt(i)]])
        return [list(order[start : start + size]) for start in range(0, len(self.cells), size)]

    @property
    def capture(self) -> Capture | None:
        """What the model's graphs are kept in; `None`: it runs on hooks."""
        return host_of(self.model).captured_by(self.options.get("compile"))[0]

    def note_lengths(self) -> None:
        """The model is going to run with all these numbers of tokens: its graphs are captured for any, where there are several."""
        if self.capture is not None:
            known = self.capture.lengths.setdefault(self.options.get("fn"), set())
            known |= {length for length, _ in self.texts if length is not None}

    def prompt(self, cell: int) -> int:
        """Which input a cell is about."""
        return self.cells[cell][0] if self.many else 0

    def named(self, cell: int) -> str:
        return ", ".join(f"{name}={_told(value)}" for name, value in zip(self.names, self.cells[cell], strict=True))

    def prepared(self, chunk: Sequence[int]) -> None:
        """Have what the bodies of some cells need."""
        if self.prepare is not None:
            with own_draws(self.model), torch.no_grad(), self._engine():
                self.prepare(sorted({self.prompt(cell) for cell in chunk}))

    @contextlib.contextmanager
    def _engine(self) -> Iterator[None]:
        """What runs without a word of its own runs on hooks, where the sweep does."""
        compiled = host_of(self.model).compiled
        if self.on_hooks:
            host_of(self.model).compiled = None
        try:
            yield
        finally:
            host_of(self.model).compiled = compiled

    def __call__(self, chunk: Sequence[int], ready: bool = False) -> Done:
        """Run some cells; `ready`: what they need is `prepared`."""
        if self.generate is not None:
            return self._generations(chunk, ready)
        saved: list[dict] = []
        plans: list[str] = []
        options = {**self.options, "compile": False} if self.on_hooks else self.options
        if not self.on_hooks:
            self.note_lengths()
        with gathered(self.model, Report()) as report:
            if not ready:
                self.prepared(chunk)
            with own_draws(self.model), torch.no_grad(), self._engine(), self.model.session() as session:
                session.apart = True
                for n, cell in enumerate(chunk):
                    args, kwargs = tree.tree_map(_own, given(self.model, self.inputs[self.prompt(cell)]))
                    draw_for(self.seed, cell)
                    with self._told(cell):
                        with self.model.trace(*args, **kwargs, **options) as tracer:
                            saved.append(_saved(self.call(tracer, self.cells[cell])))
                            plans += [hashed([repr(w.tape.ops) for w in tracer.waves])] if self.stored else []
                            if self.stop:
                                tracer.stop()
                        if len(saved) <= n:
                            raise NotRecordableError(
                                f"{user_line()}: a sweep's body ended by `tracer.stop()`, before it returned its result. Give the sweep "
                                "`stop=True`: then each forward ends behind the last site of its body."
                            )
        return Done([{name: value.detach().cpu() for name, value in each.items()} for each in saved], plans, report)

    @property
    def steps(self) -> int:
        """How many tokens a cell makes at most."""
        return 0 if self.generate is None else self.generate["max_new_tokens"]

    def _generations(self, chunk: Sequence[int], ready: bool) -> Done:
        """Run some cells as generations."""
        assert self.generate is not None
        plans: dict[int, str] = {}

        def body(tracer: Tracer, cell: int) -> Returned:
            saved = _each(self.call(tracer, self.cells[cell]))
            plans[cell] = hashed([[repr(w.tape.ops) for w in tracer.waves], self.cells[cell]]) if self.stored else ""
            return saved

        cells = []
        for cell in chunk:
            args, kwargs = tree.tree_map(_own, given(self.model, self.inputs[self.prompt(cell)]))
            options = {name: value for name, value in self.options.items() if name != "compile"} | self.generate
            compile = False if self.on_hooks else self.options.get("compile")
            play = functools.partial(body, cell=cell)
            cells.append(GridCell(args, kwargs | options, play, (self.seed, cell), compile, self.named(cell)))
        with gathered(self.model, Report()) as report:
            if not ready:
                self.prepared(chunk)
            with own_draws(self.model), torch.no_grad(), self._engine():
                made = generations(self.model, cells, report)
        self.by_step |= {
            name
            for each in made
            if isinstance(each, Made)
            for name, value in each.returned.items()
            if not isinstance(value, torch.Tensor)
        }
        results = [
            {**stacked(each.returned, self.steps), TOKENS: padded(each.tokens, self.steps)}
            if isinstance(each, Made)
            else None
            for each in made
        ]
        failed = tuple(each.error for each in made if isinstance(each, Failed))
        return Done(results, [plans.get(cell, "") for cell in chunk] if self.stored else [], report, failed)

    @contextlib.contextmanager
    def _told(self, cell: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            error.add_note(f"nnsight_fx: in the sweep's cell {self.named(cell)}")
            raise


def given(model: object, item: object) -> tuple[tuple, dict]:
    """One input as `model.trace` takes it."""
    if isinstance(item, tuple):
        return item, {}
    if isinstance(item, dict) and not hasattr(model, "tokenizer"):
        return (), item
    return (item,), {}


def look(model: Envoy, item: object) -> tuple[str, tuple, tuple[int | None, bool]]:
    """A digest of one input as the model gets it, the shapes in it, how many tokens it has, and is it text."""
    args, kwargs = given(model, item)
    batch = host_of(model).inputs.prepare(args, kwargs)
    leaves = tree.flatten((batch.args, batch.kwargs))[0]
    shapes = tuple(tuple(x.shape) for x in leaves if isinstance(x, torch.Tensor))
    return hashed(leaves), shapes, (batch.length, batch.text)


def is_dataset(model: object, inputs: object) -> bool:
    """A list of inputs? A list of numbers is one prompt's token ids."""
    ids = hasattr(model, "tokenizer") and isinstance(inputs, list) and all(isinstance(x, int) for x in inputs)
    return isinstance(inputs, list) and not (ids and inputs)


def _told(value: object) -> str:
    text = repr(value) if isinstance(value, str) else str(label(value))
    return text if short(text) or isinstance(value, str) else f"a {type(value).__name__}"


def _own(x: object) -> object:
    """An input that a body, or the model, may change in place: the next cell has it as it was."""
    if not isinstance(x, torch.Tensor):
        return x
    made = x.clone()
    for name in attributes(x):
        setattr(made, name, getattr(x, name))
    return made


def _saved(result: object) -> dict[str, object]:
    """What a body returned, by name, saved."""
    named = dict(result) if isinstance(result, Mapping) else {"result": result}
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise NotRecordableError(
                f"{user_line()}: a sweep's body returns its result, a recorded value or a dict of them; `{name}` is a "
                f"{type(value).__name__}. End the body with `return model.lm_head.output[:, -1]`, say."
            )
        if isinstance(value, LazyTensor):
            value.save()
    return named


def _each(result: object) -> Returned:
    """What the body of a generation returned, by name, saved: values, and lists of them with one for each step."""
    named: dict = {} if result is None else dict(result) if isinstance(result, Mapping) else {"result": result}
    for name, value in named.items():
        many = isinstance(value, list | tuple)
        wrong = [x for x in (value if many else [value]) if not isinstance(x, torch.Tensor)]
        if wrong or name in (TOKENS, TEXT):
            what = (
                f"`{name}` is the name of what was generated"
                if not wrong
                else f"`{name}` holds a {type(wrong[0]).__name__}"
            )
            raise NotRecordableError(
                f"{user_line()}: the body of a sweep's generations returns nothing, recorded values, or lists of them with one for "
                f"each step, by name if they are several; {what}."
            )
        for x in value if many else [value]:
            if isinstance(x, LazyTensor):
                x.save()
    return named


def _caller(fn: Callable, names: tuple[str, ...], many: bool) -> Callable[[object, tuple], object]:
    """`fn` with a cell's values by name, where it has parameters of these names; else in their order, without the prompt."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())[1:]
    except (TypeError, ValueError):
        parameters = []
    own = {p.name for p in parameters}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        own |= set(names)
    needed = set(names[many:])
    if needed <= own and (needed or PROMPT in own):
        return lambda tracer, values: fn(tracer, **{n: v for n, v in zip(names, values, strict=True) if n in own})
    return lambda tracer, values: fn(tracer, *values[many:])
