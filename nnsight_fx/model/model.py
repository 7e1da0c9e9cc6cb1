"""`NNsight`: a wrapped model."""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch.nn as nn

from ..batching.session import Session
from ..derivatives.verbs import jacobian, jvp, vjp
from ..engine.request import Compile
from ..envoys.envoy import Envoy, path_of
from ..errors import NestedTraceError, UnknownModuleError, nearest
from ..harvest.harvest import harvest
from ..lines import user_line
from ..report.explain import Explanation
from ..scan.scan import callee
from ..signatures import exact
from ..sweep.results import Results
from ..sweep.sweep import sweep
from ..tracing.contexts import Tracer
from ..tracing.saving import save
from . import compiled, keywords
from .aliasing import Rename
from .edit import Edits
from .host import ModelHost
from .inputs import ModuleInputs
from .program import Program
from .tree import EnvoyTree

F = TypeVar("F", bound=Callable)


def _verb(function: F) -> F:
    """`function(model, ...)` as a method, which tells a misspelt keyword."""

    @keywords.shows(function)
    def method(self: NNsight, *args: object, **options: object) -> object:
        self._check_options(function.__name__, function, options)
        return function(self, *args, **options)

    return method  # type: ignore[return-value]


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
    the path (`{"h.*": Block}`); a subclass of `NNsight` may set it as an attribute. `nnsight_fx.model.aliasing` has the rules.

    Raises:
        ValueError: an alias that would hide something, or that names two modules.
    """

    envoys: object = None

    def __init__(self, module: nn.Module, *, rename: Rename | None = None, envoys: object = None):
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"{user_line()}: `NNsight` wraps an `nn.Module`, and got {module!r}. A name or a folder is for `LanguageModel`."
            )
        self._rename = rename or {}
        self._envoy_classes = envoys if envoys is not None else type(self).envoys
        self._module = module  # a tree of envoys needs one
        self._tree = EnvoyTree(self, self._rename, self._envoy_classes)
        super().__init__(module, "", self)
        self._host = ModelHost(self, module)
        self._tree.changed()

    def _inputs(self, host: ModelHost) -> ModuleInputs:
        """Where the inputs of this model's traces come from."""
        return ModuleInputs(host)

    @classmethod
    def unpacked(cls, module: nn.Module, state: dict, compiled: dict | None) -> NNsight:
        """The model that `sweep/packing.py` sent to this process: its own `state`, compiled with those options if there are any."""
        made = object.__new__(cls)
        made.__dict__.update(state)
        NNsight.__init__(made, module, rename=state["_rename"], envoys=state["_envoy_classes"])
        if compiled is not None:
            made.compile(**compiled)
        return made

    def clear_cache(self) -> None:
        """Forget all scans, captures and compiled plans, and free what they hold. They are bounded anyway, and made anew."""
        if self.tracer is not None:
            raise NestedTraceError(
                f"{user_line()}: the open trace, from {self.tracer.line}, uses them. Leave it first."
            )
        self._tree.changed()

    @property
    def tracer(self) -> Any:
        """The trace or edit that is open."""
        return self._host.shared.tracer

    def dispatch(self) -> None:
        """Load the weights of a model that has none yet."""

    # -- traces --------------------------------------------------------------------------------------------------

    def trace(
        self,
        *args: object,
        compile: Compile = None,
        fn: str | None = None,
        pad_to: int | None = None,
        trace: bool = True,
        **kwargs: object,
    ) -> Any:
        """Run the model on an input with the interventions of a `with` block.

        `compile=False` runs on hooks, `True` or a dict of `compile` options on captured graphs, `"auto"` on these once compiling
        pays; by default as `model.compile()` was called. `fn` names another method to trace, `pad_to` fixes the padded length of prompts.
        `trace=False` just runs the model and returns its output. Every other keyword is the model's.
        """
        return self._trace(self._host, args, kwargs, compile, fn, pad_to, trace)

    def _trace(
        self,
        host: ModelHost,
        args: tuple,
        kwargs: dict,
        compile: Compile = None,
        fn: str | None = None,
        pad_to: int | None = None,
        trace: bool = True,
    ) -> Any:
        self._check_fn(fn)
        self.dispatch()
        host.check_keywords(fn, kwargs, "generate" if fn == "generate" else "trace", NNsight.trace)
        if not trace and host.edits:
            with self.trace(*args, compile=compile, fn=fn, pad_to=pad_to, **kwargs) as tracer:
                result = save(tracer.result)
            return result
        if not trace:
            batch = host.inputs.arguments(fn, [host.inputs.prepare(args, kwargs)], pad_to)
            return callee(self._module, fn)(*batch.args, **batch.kwargs)
        return Tracer(host, args, kwargs, compile=compile, fn=fn, pad_to=pad_to)

    def _part_trace(self, part: Envoy, args: tuple, kwargs: dict, fn: str | None) -> Any:
        """A trace of one module of the model, whose inputs are not the model's."""
        options = {name: kwargs.pop(name) for name in ("compile", "pad_to", "trace") if name in kwargs}
        return self._trace(
            self._host.of_part(), args, kwargs, fn=".".join(p for p in (path_of(part), fn) if p), **options
        )

    def scan(self, *args: object, fn: str | None = None, pad_to: int | None = None, **kwargs: object) -> Tracer:
        """A trace that runs nothing: the body sees shapes and dtypes, and is refused what a trace would refuse.

        Saved values become tensors on the `meta` device. Nothing of the model moves.
        """
        self._check_fn(fn)
        self._host.check_keywords(fn, kwargs, "scan", NNsight.scan)
        return Tracer(self._host, args, kwargs, compile=False, fn=fn, pad_to=pad_to, scan_only=True)

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
        self._host.check_keywords(options.get("fn"), options.keys() - own, verb, function)

    def __call__(self, *args: object, hook: bool = False, **kwargs: object) -> Any:
        if self.tracer is None and self._host.caller is not None:
            return self._host.caller(*args, **kwargs)
        return super().__call__(*args, hook=hook, **kwargs)

    def _copy(self) -> NNsight:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, _root=made)
        made._tree, made._host = self._tree.copy(made), self._host.copy(made)
        return made

    def __iter__(self) -> Iterator[object]:
        opened, self._host.unpacks = self._host.unpacks, None
        if opened is not None and not opened.tape.ops and _binds_two(sys._getframe(1)):  # `as (tracer, edited)`
            return iter((opened, self))
        return super().__iter__()

    @exact
    def session(self) -> Session:
        """Several traces whose values flow from one to the next without `.save()`; see `Session`."""
        return Session()

    @keywords.shows(sweep)
    def sweep(
        self, fn: Callable[..., object], inputs: object, /, over: Mapping[str, Iterable], **options: Any
    ) -> Results:
        for name in options.keys() & {"fn", "inputs"}:
            raise TypeError(
                f"{user_line()}: `{name}=` is ambiguous: a sweep takes its body and its inputs by position. Where the model takes a `{name}` "
                f'of its own, put it among the inputs: `model.sweep(body, {{"input_ids": ids, "{name}": ...}}, over=...)`.'
            )
        self._check_options("sweep", sweep, options)
        return sweep(self, fn, inputs, over, **options)

    harvest = _verb(harvest)
    vjp, jvp, jacobian = _verb(vjp), _verb(jvp), _verb(jacobian)

    def program(self, fn: Callable[..., object], *, stop: bool = False, **options: object) -> Program:
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

    def explain(self, *args: object, **kwargs: Any) -> Explanation:
        """What ran how: engine, segments and graph breaks, compiles, passes, what ran outside captured code, the latest trace.

        With inputs the model runs on them first, without interventions.
        """
        if args or kwargs:
            with self.trace(*args, **kwargs):
                pass
        ran = self._host.told.ran
        latest = ran.told() if hasattr(ran, "told") else ran
        return Explanation(self._module, list(self._host.captures.values()), self._host.compiled, latest)

    @exact
    def compile(
        self,
        backend: object = "inductor",
        mode: str | None = None,
        dynamic: bool | None = None,
        fullgraph: bool = False,
        options: dict | None = None,
        capture: str = "dynamo",
        regional: bool | None = None,
        passes: Sequence | None = None,
        disable: Collection[str] = (),
        warm: object = None,
        auto: bool = False,
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

        `warm=prompt` captures and compiles now, on an input as `trace` takes it (a prompt, a tensor; a dict is keywords), and not in
        the first trace. The model runs once, without interventions, in the grad mode that is on: under `torch.no_grad()` for traces
        under it. A trace then captures nothing, and compiles only what it changes where equal blocks are compiled once
        (`regional`). Sweeps capture for any number of rows, once more. On a terminal a line shows what takes the time.

        `auto=True` compiles once that pays: traces run on hooks, without a wait, until what they took there is what compiling is
        likely to take (by the model's modules, and by what it took before in this process; a compiled trace takes a third less
        time). Whatever is to come, both together take at most about twice what the better one would have. `explain()` says how far it is.
        A trace with `compile=True` compiles now, one with `compile="auto"` waits so where the model does not. Backends
        `"eager"` and `"aot_eager"`, which take no time to compile, are not waited with; a sweep decides by its cells.

        Raises:
            ValueError: a backend that torch does not know; another `capture`, or `dynamic=True` with a symbolic one; a pass that
                cannot be left out, or is none.
        """
        self._host.compiled = self._host.captured(
            backend, mode, dynamic, fullgraph, options, capture, regional, passes, disable
        )
        self._host.auto = auto
        if warm is not None:
            args, kwargs = ((), warm) if isinstance(warm, dict) else ((warm,), {})
            with self.trace(*args, compile=True, **kwargs) as tracer:
                save(tracer.result)  # else what computes it would be left out

    def save_compiled(self, path: object) -> None:
        """Save what compilers made in this process so far into the folder `path`, for `load_compiled` in another process.

        That is the compilers' own caches (`torch.compiler.save_cache_artifacts`), of all models of the process, and the C++
        kernels that were built from them, for the same CPU, C library and Python (others build them anew). Dynamo still traces
        the model there, once.

        Raises:
            StoreError: nothing was compiled yet, or the folder is of something else.
        """
        compiled.save(path)

    def load_compiled(self, path: object) -> None:
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
