"""`NNsight`: a wrapped model."""

from __future__ import annotations

import dis
import functools
import inspect
import operator
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from . import bug_report, compat, compiled, keywords
from .aliasing import Names, Rename
from .cache import CacheView, cache, observed
from .capture.markers import Markers
from .capture.scan import PLAIN, callee
from .edit import Edits
from .engine.generation import Generation
from .engine.removal import removable
from .engine.run import Run
from .engine.sites import Scanner
from .engine.spliced import Capture, Options, SplicedRun
from .engine.switch import State
from .engine.wave import Wave
from .envoy import Envoy
from .errors import InvokeError, NestedTraceError, UnknownModuleError, nearest
from .explain import Explanation
from .harvest.activations import Activations
from .harvest.harvest import harvest
from .passes import OPTIONAL, PIPELINE, pipeline
from .program import Program
from .sweep.results import Results
from .sweep.session import Session
from .sweep.sweep import sweep
from .tracing import tree
from .tracing.contexts import Tracer
from .tracing.lazy import user_line
from .tracing.saving import save
from .tracing.tape import Tape


@dataclass(frozen=True)
class Batch:
    """One prepared input: what the model is called with, and its rows on dimension 0."""

    args: tuple
    kwargs: dict
    rows: int
    text: bool = False  # was it text, whose length is another one in the next
    length: int | None = None  # how many tokens a row of prompts has

    @functools.cached_property
    def flat(self) -> tuple[list, tree.Spec]:
        """The leaves of both, and their structure."""
        return tree.flatten((self.args, self.kwargs))

    def let_lengths_vary(self) -> None:
        """Tell Dynamo beforehand that the number of tokens will be another in the next input."""
        shape = (self.rows, self.length)
        for x in self.flat[0]:
            if isinstance(x, torch.Tensor) and x.dim() in (2, 3) and x.shape[:2] == shape:
                compat.dynamo.may_vary(x, 1)


class Plain:
    """A wrapped model as the host of a trace whose inputs go to the module as they come: not prompts, say."""

    OWN = ("_collate", "_has_input", "_length", "_prepare", "_unknown_dims")

    _edits = ()  # those of the whole model are at sites that a part of it may not have

    def __init__(self, host: NNsight):
        self.__dict__["host"] = host

    def _replay_edits(self, tape: Tape) -> None:
        """None."""

    def __getattr__(self, name: str) -> Any:
        found = NNsight.__dict__[name] if name in self.OWN else None
        return getattr(self.host, name) if found is None else found.__get__(self.host)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.host, name, value)


class Shared:
    """What a wrapped model and its edited copies have in common."""

    def __init__(self, model: NNsight):
        self.tracer: Any = None
        self.captures: dict[Options, Capture] = {}
        self.verb: Any = None  # what gathers the notes of several traces that are one verb's
        self.family = weakref.WeakSet([model])

    def renew(self, module: nn.Module) -> None:
        """Learn the module tree."""
        self.markers, self.scanner = Markers(module), Scanner(module)
        for capture in self.captures.values():
            capture.markers = self.markers
            capture.reset()


def _of_shared(name: str, doc: str = "") -> Any:
    return property(operator.attrgetter(f"_shared.{name}"), lambda self, v: setattr(self._shared, name, v), doc=doc)


class NNsight(Edits, Envoy):
    """Wrap any `nn.Module`.

    ```python
    model = NNsight(module)
    with model.trace(x):
        model.layer[2].output[:] = 0
        out = model.output.save()
    ```

    `rename` gives modules further names, `{"transformer.h": "layers", "mlp": ["ffn", "feed_forward"]}`, and `envoys` says
    of which `Envoy` subclass they are: one class, or a dict by module class (`{GPT2Attention: Heads}`) or by the end of
    the path (`{"h.*": Block}`); a subclass of `NNsight` may set it as an attribute. `nnsight_fx.aliasing` has the rules.

    Raises:
        ValueError: an alias that would hide something, or that names two modules.
    """

    envoys: Any = None

    def __init__(self, module: nn.Module, *, rename: Rename | None = None, envoys: Any = None):
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"{user_line()}: `NNsight` wraps an `nn.Module`, and got {module!r}. A name or a folder is for `LanguageModel`."
            )
        self._shared = Shared(self)
        self._envoys: dict[int, Envoy] = {}
        self._caller: Callable | None = None  # who runs the calls of the model outside of traces
        self._attached: dict[str, nn.Module] = {}  # what the user put into the tree
        self._rename = rename or {}
        self._envoy_classes = envoys if envoys is not None else type(self).envoys
        super().__init__(module, "", self)
        self._compiled: Capture | None = None
        self._edits: list[Any] = []
        self._latest: Any = (
            None  # what ran last: `Notes`, a session's or sweep's `Report`, or what gives notes when it is asked
        )
        self._unpacks: Any = None  # the edit that has just been opened
        self._module_changed()

    def _module_changed(self) -> None:
        """The module tree is new: everything learnt of the old one is forgotten."""
        self._shared.renew(self._module)
        for model in self._shared.family:
            model._know_tree()

    def clear_cache(self) -> None:
        """Forget all scans, captures and compiled plans, and free what they hold. They are bounded anyway, and made anew."""
        if self.tracer is not None:
            raise NestedTraceError(
                f"{user_line()}: the open trace, from {self.tracer.line}, uses them. Leave it first."
            )
        self._module_changed()

    def _know_tree(self) -> None:
        self._names = Names(self._module, self._rename, Envoy)
        kept = [e for e in (self, *self._envoys.values()) if e._module in self._markers.paths]
        for envoy in kept:  # what a user holds stays good
            envoy._path = self._markers.paths[envoy._module]
        self._envoys = {id(e._module): e for e in kept}

    tracer = _of_shared("tracer", "The trace or edit that is open.")
    _markers = _of_shared("markers")
    _scanner = _of_shared("scanner")
    _captures = _of_shared("captures")

    def _adopt(self, module: nn.Module) -> None:
        """Go on with another module of the same structure; every envoy stays, and gets its part of it."""
        for path, attached in self._attached.items():
            where, _, name = path.rpartition(".")
            setattr(module.get_submodule(where), name, attached)
        for envoy in [e for model in self._shared.family for e in model._envoys.values()]:
            envoy._module = module.get_submodule(envoy._path)
        self._module_changed()

    def dispatch(self) -> None:
        """Load the weights of a model that has none yet."""

    def _envoy_of(self, module: nn.Module) -> Envoy:
        if id(module) not in self._envoys:
            if module not in self._markers.paths:
                self._module_changed()
            path = self._markers.paths[module]
            cls = self._names.chosen(self._envoy_classes, module, Envoy)
            self._envoys[id(module)] = cls(module, path, self)
        return self._envoys[id(module)]

    # -- traces --------------------------------------------------------------------------------------------------

    def trace(
        self,
        *args: Any,
        compile: bool | dict | None = None,
        fn: str | None = None,
        pad_to: int | None = None,
        trace: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Run the model on an input with the interventions of a `with` block.

        `compile=False` runs on hooks, `True` or a dict of `compile` options on captured graphs; by default as
        `model.compile()` was called. `fn` names another method to trace, `pad_to` fixes the padded length of prompts.
        `trace=False` just runs the model and returns its output. Every other keyword is the model's.
        """
        self._check_fn(fn)
        self.dispatch()
        self._check_keywords(fn, kwargs, "trace", NNsight.trace)
        if not trace and self._edits:
            with self.trace(*args, compile=compile, fn=fn, pad_to=pad_to, **kwargs) as tracer:
                result = save(tracer.result)
            return result
        if not trace:
            batch = self._arguments(fn, [self._prepare(args, kwargs)], pad_to)
            return callee(self._module, fn)(*batch.args, **batch.kwargs)
        return Tracer(self, args, kwargs, compile=compile, fn=fn, pad_to=pad_to)

    def scan(self, *args: Any, fn: str | None = None, pad_to: int | None = None, **kwargs: Any) -> Tracer:
        """A trace that runs nothing: the body sees shapes and dtypes, and is refused what a trace would refuse.

        Saved values become tensors on the `meta` device. Nothing of the model moves.
        """
        self._check_fn(fn)
        self._check_keywords(fn, kwargs, "scan", NNsight.scan)
        return Tracer(self, args, kwargs, compile=False, fn=fn, pad_to=pad_to, scan_only=True)

    def _part_trace(self, part: Envoy, args: tuple, kwargs: dict, fn: str | None) -> Any:
        """A trace of one module of the model, whose inputs are not the model's."""
        return NNsight.trace(Plain(self), *args, fn=".".join(p for p in (part._path, fn) if p), **kwargs)  # type: ignore[arg-type]

    def _check_fn(self, fn: str | None) -> None:
        if fn is None:
            return
        try:
            callee(self._module, fn)
        except AttributeError as error:
            known = [n for n in dir(self._module) if not n.startswith("_") and callable(getattr(self._module, n, None))]
            raise UnknownModuleError(
                f"{user_line()}: `{fn}` is no method of the model; {nearest(fn, known)}"
            ) from error

    def _check_options(self, verb: str, function: Callable, options: dict) -> None:
        """Keywords of a verb that makes traces: its own, those of a trace, and the model's."""
        own = {"compile", "fn", "pad_to"} | inspect.signature(function).parameters.keys()
        self._check_fn(options.get("fn"))
        self.dispatch()
        self._check_keywords(options.get("fn"), options.keys() - own, verb, function)

    def _check_keywords(self, fn: str | None, names: Iterable[str], verb: str, *functions: Callable) -> None:
        keywords.check(self._module, fn, names, verb, *functions)

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        if self.tracer is None and self._caller is not None:
            return self._caller(*args, **kwargs)
        return super().__call__(*args, hook=hook, **kwargs)

    def _copy(self) -> NNsight:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, _root=made, _envoys={}, _edits=list(self._edits))
        made._envoys[id(made._module)] = made
        self._shared.family.add(made)
        return made

    def __iter__(self) -> Iterator[Any]:
        opened, self._unpacks = self._unpacks, None
        if opened is not None and not opened.tape.ops and _binds_two(sys._getframe(1)):  # `as (tracer, edited)`
            return iter((opened, self))
        return super().__iter__()

    def session(self) -> Session:
        """Several traces whose values flow from one to the next without `.save()`; see `Session`."""
        return Session()

    @keywords.shows(sweep)
    def sweep(self, fn: Callable[..., Any], inputs: Any, /, over: Mapping[str, Iterable], **options: Any) -> Results:
        for name in options.keys() & {"fn", "inputs"}:
            raise TypeError(
                f"{user_line()}: `{name}=` is ambiguous: a sweep takes its body and its inputs by position. Where the model takes a `{name}` "
                f'of its own, put it among the inputs: `model.sweep(body, {{"input_ids": ids, "{name}": ...}}, over=...)`.'
            )
        self._check_options("sweep", sweep, options)
        return sweep(self, fn, inputs, over, **options)

    @keywords.shows(harvest)
    def harvest(self, dataset: Iterable, sites: Any, out: Any, **options: Any) -> Activations:
        self._check_options("harvest", harvest, options)
        return harvest(self, dataset, sites, out, **options)

    def program(self, fn: Callable[..., Any], *, stop: bool = False, **options: Any) -> Program:
        """`fn(tracer, *args)` as a function `program(inputs, *args)`, recorded once for each kind of input; see `Program`.

        `stop` ends each forward behind the last site of the body. `options` are keywords of every trace: `compile`, `fn`, `pad_to`, and the model's own.

        ```python
        def steered(tracer, alpha, vector):
            model.transformer.h[5].output += alpha * vector
            return model.lm_head.output[:, -1]

        program = model.program(steered)
        logits = program(prompt, torch.tensor(2.0), vector)
        ```
        """
        self._check_options("program", NNsight.program, options)
        return Program(self, fn, stop, options)

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """What ran how: engine, segments and graph breaks, compiles, passes, what ran outside captured code, the latest trace.

        With inputs the model runs on them first, without interventions.
        """
        if args or kwargs:
            with self.trace(*args, **kwargs):
                pass
        latest = self._latest.told() if hasattr(self._latest, "told") else self._latest
        return Explanation(self._module, list(self._captures.values()), self._compiled, latest)

    def _bug_report(self, tracer: Tracer, path: Any, inputs: bool) -> None:
        bug_report.write(tracer, path, inputs)

    def _note(self, tracer: Tracer) -> None:
        """A trace has run."""
        notes = tracer.notes
        if notes and tracer.session is None:
            self._latest = functools.reduce(operator.add, notes)
            if self._shared.verb is not None:
                self._shared.verb.alone(tracer.line, notes)

    def _has_input(self, kwargs: dict) -> bool:
        """Do keywords alone make an input of this model?"""
        return bool(kwargs)

    def _prepare(self, args: tuple, kwargs: dict) -> Batch:
        """One invoke's input, on the model's device; where its weights are not loaded, as it came."""
        device = self.device
        if device is not None and device.type == "meta":
            device = None
        leaves, spec = tree.flatten((args, kwargs))
        elsewhere, rows = False, None
        for x in leaves:
            if isinstance(x, torch.Tensor):
                elsewhere = elsewhere or (device is not None and x.device != device)
                rows = x.shape[0] if rows is None and x.dim() else rows
        if elsewhere:
            leaves = [x.to(device) if isinstance(x, torch.Tensor) else x for x in leaves]
            args, kwargs = tree.unflatten(leaves, spec, (args, kwargs))  # else the model gets the user's own lists
        batch = Batch(args, kwargs, 1 if rows is None else rows)
        batch.__dict__["flat"] = (leaves, spec)
        return batch

    def _given(self, args: tuple, kwargs: dict, rows: int, text: bool) -> Batch:
        """What a generation calls the model with: as it is."""
        return Batch(args, kwargs, rows, text)

    def _collate(self, batches: list[Batch], pad_to: int | None = None) -> Batch:
        """Several inputs as one: tensors are concatenated on dimension 0."""
        if len(batches) == 1:
            return batches[0]
        flat = [tree.flatten((b.args, b.kwargs)) for b in batches]
        if any(spec != flat[0][1] for _, spec in flat):
            raise InvokeError(
                f"{user_line()}: the invokes of one batch must be called with the same arguments, and their structures differ. "
                "Call them alike, or use several traces."
            )
        joined = [
            self._join(i, list(column)) for i, column in enumerate(zip(*(leaves for leaves, _ in flat), strict=True))
        ]
        args, kwargs = tree.unflatten(joined, flat[0][1])
        return Batch(args, kwargs, sum(b.rows for b in batches), any(b.text for b in batches))

    @staticmethod
    def _join(index: int, column: list) -> Any:
        first = column[0]
        if isinstance(first, torch.Tensor) and first.dim() > 0:
            if any(x.shape[1:] != first.shape[1:] for x in column):
                shapes = ", ".join(str(tuple(x.shape)) for x in column)
                raise InvokeError(
                    f"{user_line()}: argument {index} of the invokes cannot be batched: shapes {shapes} differ behind dimension 0. "
                    "Pad them to one shape, or use several traces."
                )
            return torch.cat(column)
        if any(x is not first and x != first for x in column):
            raise InvokeError(
                f"{user_line()}: argument {index} of the invokes cannot be batched: {column} are not equal, and one forward takes one "
                "value for all rows. Use several traces."
            )
        return first

    def _let_vary(self, batch: Batch, generates: bool) -> None:
        """Tell Dynamo beforehand which sizes of an input will be others in the next."""

    def _unknown_dims(self, batch: Batch) -> tuple:
        """For each leaf of an input, the dims that hold the rows and the (padded) length, or `None`."""
        return tuple(
            (0 if isinstance(x, torch.Tensor) and x.dim() > 0 and x.shape[0] == batch.rows else None, None)
            for x in tree.flatten((batch.args, batch.kwargs))[0]
        )

    def _moves_state(self, wave: Wave) -> str | None:
        """Why a second forward in one trace would move state twice, if it would."""
        kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
        active = next((p for m, p in self._markers.paths.items() if m.training and isinstance(m, kinds)), None)
        if active is not None:
            return f"`{active}` is in train mode"
        objects = [
            x
            for b in wave.batches
            for x in tree.flatten((b.args, b.kwargs))[0]
            if not isinstance(x, (torch.Tensor, *PLAIN))
        ]
        return f"a {type(objects[0]).__name__} was given" if objects else None

    def _length(self, batch: Batch) -> int | None:
        """The padded length of a batch, for models that have one."""
        return None

    # -- what a trace asks of its model --------------------------------------------------------------------------

    def _state(self) -> State:
        return State()

    def _suspend(self) -> Callable[[], None]:
        """While a body runs, functions that the user compiled run as written; the return undoes it."""
        old = compat.frames.stance()
        compat.frames.set_stance(old and (old[0], True))
        return lambda: compat.frames.set_stance(old)

    def _wave(self, tracer: Tracer, first: Any, alone: bool) -> Wave:
        if tracer.generation is not None:
            return tracer.generation.wave()
        return Wave(self, tracer, first, alone)

    def _generation(self, tracer: Tracer, first: Batch) -> Generation | None:
        """The generation that a trace is, if its function runs the model many times."""
        if tracer.fn != "generate" or tracer.scan_only:
            return None
        batch = self._arguments(tracer.fn, [first], tracer.pad_to)
        return Generation(self, tracer, batch.args, batch.kwargs, batch.text)

    def _results(self, generations: list[Generation]) -> Any:
        """What several generations gave, as one batch."""
        results = [g.result for g in generations]
        if not all(isinstance(x, torch.Tensor) and x.shape[1:] == results[0].shape[1:] for x in results):
            raise InvokeError(
                f"{user_line()}: the invokes' results have no common shape, so there is none of the whole batch. Take `tracer.result` "
                "in each invoke."
            )
        return torch.cat(results)

    def _arguments(self, fn: str | None, batches: list[Batch], pad_to: int | None) -> Batch:
        """What a function of the model is called with."""
        batch = self._collate(batches, pad_to=pad_to)
        if fn == "generate" and not any("position_ids" in b.kwargs for b in batches):
            batch.kwargs.pop("position_ids", None)  # it counts them itself, step by step
        return batch

    def _run(self, wave: Wave, plan: Any, constants: list, lines: list) -> Run:
        fn = wave.fn
        batch = wave.batch

        def call() -> Any:
            return callee(self._module, fn)(*batch.args, **batch.kwargs)

        capture = self._capture_for(wave.tracer.compile)
        why = capture.refusal(plan, wave.tape.sites, batch.flat[0]) if capture is not None else None
        if capture is not None and why is not None:
            capture.fall_back(why)
            capture = None
        cls = Run if capture is None else SplicedRun
        run = cls(
            plan,
            constants,
            lines,
            self._markers,
            call,
            self._module.get_submodule,
            wave.symbols,
        )
        run.report += [why] if why is not None else []
        if isinstance(run, SplicedRun) and capture is not None:
            sites: Any = wave.tape.sites
            frames = self._markers.operations.frames(plan)
            leaves_out = not frames and plan.recapture == "removes" and capture.shares(fn, plan)
            removes = leaves_out and removable(plan, wave.tape, self._module)

            def stop_at() -> Any:
                return sites.replay(wave.tape, plan, constants[len(wave.tape.constants) :]).stop_site

            def entry(half: Any) -> Any:
                return capture.entry(self._module, fn, half, frames, self._scanner.collects)

            run.opened = wave.tracer.line
            if capture.options.dynamic is None and capture.options.capture == "dynamo":
                self._let_vary(batch, wave.tracer.generation is not None)
                if wave.tracer.session is not None and capture.lets_vary(fn, batch.length, batch.text):
                    batch.let_lengths_vary()
            unread = wave.tracer.generation is None  # which goes on with what the model returns
            run.start(capture, stop_at, sites, entry, (batch.args, batch.kwargs), removes, unread)
        return run

    def _cache(
        self, tracer: Any, modules: Any, device: Any, dtype: Any, detach: bool, output: bool, inputs: bool
    ) -> CacheView:
        kinds = [kind for kind, wanted in (("input", inputs), ("output", output)) if wanted]
        return cache(tracer, modules, kinds, observed(detach, device, dtype))

    def _capture_for(self, compile: bool | dict | None) -> Capture | None:
        """The capture that a trace runs on, or `None` for the hook engine."""
        if compile is False or (compile is None and self._compiled is None):
            return None
        if compile is None or (compile is True and self._compiled is not None):
            return self._compiled
        return self._captured(**(compile if isinstance(compile, dict) else {}))

    def _captured(
        self,
        backend: Any = "inductor",
        mode: Any = None,
        dynamic: Any = None,
        fullgraph: bool = False,
        options: Any = None,
        capture: str = "dynamo",
        regional: bool | None = None,
        passes: Sequence | None = None,
        disable: Collection[str] = (),
    ) -> Capture:
        if capture not in ("dynamo", "symbolic"):
            raise ValueError(f'{user_line()}: `capture={capture!r}` is unknown; there is "dynamo" and "symbolic"')
        if capture == "symbolic" and dynamic:
            raise ValueError(
                f"{user_line()}: a symbolic capture is for the sizes that it was made with, so `dynamic=True` cannot hold; "
                "leave it out, or capture with Dynamo"
            )
        needed = {step.__name__ for step in PIPELINE} - OPTIONAL
        for name in disable:
            if name not in OPTIONAL:
                why = "without it a plan would not run" if name in needed else nearest(str(name), OPTIONAL)
                raise ValueError(f"{user_line()}: the pass `{name}` cannot be left out: {why}")
        try:
            steps = None if passes is None else pipeline(passes)
        except ValueError as error:
            raise ValueError(f"{user_line()}: {error}") from None
        further = tuple(sorted((options or {}).items()))
        chosen = Options(*(backend, mode, dynamic, fullgraph, further, capture, regional), steps, frozenset(disable))
        if chosen not in self._captures:
            self._captures[chosen] = Capture(self._markers, chosen)
        return self._captures[chosen]

    def compile(
        self,
        backend: Any = "inductor",
        mode: str | None = None,
        dynamic: bool | None = None,
        fullgraph: bool = False,
        options: dict | None = None,
        capture: str = "dynamo",
        regional: bool | None = None,
        passes: Sequence | None = None,
        disable: Collection[str] = (),
    ) -> None:
        """Run traces on captured, compiled graphs from now on; the arguments are `nn.Module.compile`'s.

        `regional`: compile a model's equal blocks once, and another plan's only where they differ, instead of the graph as a whole.
        `None` is yes for Inductor in its default mode and no otherwise; `explain()` says where it could not be.

        `capture="symbolic"` makes the graphs as `torch.fx.symbolic_trace` does, by running the model's Python once on tensors
        without data, for each shape of its inputs. What that cannot take (control flow on values, hooks of your own,
        attributes that a forward sets, objects as arguments) runs on hooks, and `explain()` says at which line; with
        `fullgraph=True` it is a `FallbackError`. Globals and closures that a forward reads are taken to stay as they are.

        `passes=(..., mine)`: passes of your own over each captured graph, behind the library's, for which `...` stands, or among
        them, behind `splice` (`nnsight_fx.passes.PIPELINE`). A pass is `def mine(gm, job) -> int`: it changes the
        `torch.fx.GraphModule` and says how many rewrites it made; `explain()` counts them. Sessions and sweeps then run one trace a forward. `disable={"prune"}` leaves passes out.
        `docs/passes.md` has the list.

        Raises:
            ValueError: another `capture`, or `dynamic=True` with a symbolic one; a pass that cannot be left out, or is none.
        """
        self._compiled = self._captured(backend, mode, dynamic, fullgraph, options, capture, regional, passes, disable)

    def save_compiled(self, path: Any) -> None:
        """Save what compilers made in this process so far into the folder `path`, for `load_compiled` in another process.

        That is the compilers' own caches (`torch.compiler.save_cache_artifacts`), of all models of the process, and the C++
        kernels that were built from them, for the same CPU, C library and Python (others build them anew). Dynamo still traces
        the model there, once.

        Raises:
            StoreError: nothing was compiled yet, or the folder is of something else.
        """
        compiled.save(path)

    def load_compiled(self, path: Any) -> None:
        """Use what `save_compiled` wrote: the same traces of the same model compile nothing anew.

        Raises:
            StoreError: the folder is of something else, of another torch or kind of machine, or damaged.
        """
        compiled.load(path)


def _binds_two(frame: Any) -> bool:
    """Does a frame unpack, into two names, what a `with` or a call has just given, and no variable?"""
    before = None
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset == frame.f_lasti:
            two = instruction.opname == "UNPACK_SEQUENCE" and instruction.arg == 2
            return two and before is not None and not before.opname.startswith("LOAD_")
        before = instruction
    return False
