"""Every private torch name that nnsight_fx uses, in one place.

| name | used for | seen on |
| --- | --- | --- |
| `FakeTensorMode`, `FakeCopyMode`, `FakeTensor`, its exceptions | shapes and dtypes without data | 2.11, 2.13 |
| `torch._C._functorch.maybe_current_level`, `torch._C._is_alias_of` | transforms, shared memory | 2.11, 2.13 |
| `torch._C._swap_tensor_impl` | a recorded tensor becomes the real one | 2.11, 2.13 |
| `_torchdynamo_orig_callable`, `OptimizedModule` | what the user compiled, as it was | 2.11, 2.13 |
| `Tensor._use_count`, `torch._dynamo.exc.Unsupported` | is a tensor ours alone; did Dynamo refuse | 2.11, 2.13 |
| `torch._dynamo.eval_frame._stance`, `set_eval_frame` | bodies run eagerly; suspended runs | 2.11, 2.13 |
| `torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth` | a captured graph that fails | 2.11, 2.13 |
| `torch._C._get_flash_sdp_enabled` and its like | settings of the process, at each trace | 2.11, 2.13 |
| `torch._guards.TracingContext`, `tracing` | variants compile as Dynamo would | 2.11, 2.13 |
| `ShapeEnv.produce_guards_expression` | guards that a variant adds | 2.11, 2.13 |
| `torch._TorchCompileInductorWrapper`, `lookup_backend` | the backend of `torch.compile` | 2.11, 2.13 |
| `is_traceable_wrapper_subclass` | tensors that cannot be recorded | 2.11, 2.13 |
| `torch.nn.modules.module._has_any_global_hook` | hooks that a traced graph would not call | 2.11, 2.13 |
| `InstructionTranslator.current_tx().output`: `side_effects`, `guards` | whether Dynamo replays anything; what it guards | 2.11, 2.13 |
| `TorchInGraphFunctionVariable._get_handlers`, `torch._dynamo.variables` | modules' calls, on Dynamo's variables | 2.11, 2.13 |
| `LazyConstantVariable`: `peek_type`, or `_ensure_type_guard` and `python_type` | constants of which the type is guarded | 2.11; 2.13 |
| `is_underlying_vt_modified`, or `is_base_vt_modified` | whether Dynamo replays anything | 2.11; 2.13 |
| `torch._inductor.codecache`: `CppCodeCache.cache`, `get_path`, `cache_dir` | built C++ kernels | 2.11, 2.13 |
| `GuardFilterEntry.orig_guard.obj_weakref` | guards on what a property makes at each look | 2.11, 2.13 |
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import sympy
import torch
import torch._guards
from torch._dispatch.python import enable_python_dispatcher, no_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
    is_traceable_wrapper_subclass,
)

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeCopyMode",
    "FakeTensor",
    "FakeTensorMode",
    "GuardOnDataDependentSymNode",
    "UnsupportedOperatorException",
    "detect_fake_mode",
    "enable_python_dispatcher",
    "no_python_dispatcher",
]
SET_GRAD = torch._C._set_grad_enabled
NoTorchFunction, TorchFunction = torch._C.DisableTorchFunction, torch._C._EnableTorchFunction


def transforms() -> int | None:
    """How deep in torch.func transforms this thread is."""
    return torch._C._functorch.maybe_current_level()  # type: ignore[attr-defined]


def shares_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch._C._is_alias_of(x, y)  # type: ignore[attr-defined]


def swap(lazy: torch.Tensor, real: torch.Tensor) -> None:
    """Make `lazy` the tensor that `real` is, wherever it is held. `real` must be held by nobody else."""
    torch._C._swap_tensor_impl(lazy, real)
    lazy.__class__ = torch.Tensor


def cannot_trace(error: Exception) -> bool:
    """Did Dynamo refuse to trace something, as it does under `fullgraph=True`?"""
    from torch._dynamo.exc import Unsupported

    return isinstance(error, Unsupported)


def fails(error: Exception) -> bool:
    """Is it an error of Dynamo's own, or of its fake tensors, and not as the model would raise it?"""
    from torch._dynamo.exc import InternalTorchDynamoError, TorchRuntimeError

    return isinstance(error, InternalTorchDynamoError | TorchRuntimeError)


def alone(held: list[torch.Tensor]) -> bool:
    """Does Python hold the one tensor in this list nowhere else?

    Measured against a new tensor in the same place, since a call may hold its arguments twice (it does while Dynamo
    evaluates frames). torch >= 2.10 adds one reference of its own while C++ (an autograd graph, say) holds the tensor too.
    """
    new = [torch.empty(0)]
    return sys.getrefcount(held[0]) == sys.getrefcount(new[0]) + (held[0]._use_count() > 1)  # type: ignore[attr-defined]


def function_modes(take: bool = False) -> list[TorchFunctionMode]:
    """The thread's stack of function modes, bottom first; `take` leaves it empty."""
    modes = _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else []
    for _ in modes if take else ():
        torch._C._pop_torch_function_stack()
    return modes


def push_function_modes(modes: list[TorchFunctionMode]) -> None:
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


def dispatch_modes(take: bool = False) -> list[Any]:
    """The thread's stack of dispatch modes, bottom first; `take` leaves it empty."""
    modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else []
    for _ in modes if take else ():
        _pop_mode()
    return modes


def push_dispatch_modes(modes: list[Any]) -> None:
    for mode in modes:
        _push_mode(mode)


def _eval_frame() -> Any:
    """Dynamo's frame evaluation, if anything has loaded it yet."""
    return sys.modules.get("torch._dynamo.eval_frame")


class _Stance:
    """Dynamo's stance while bodies run: on their threads compiled functions run as written, on others as ever.

    The stance belongs to the process and bodies belong to threads, so one object stands for both, for as long as any
    thread has a body open.
    """

    bodies = threading.local()  # .open: is this thread in a body
    lock = threading.Lock()
    count = 0  # the threads that are

    def __init__(self, under: Any):
        self.under = under

    @property
    def stance(self) -> str:
        return "force_eager" if getattr(_Stance.bodies, "open", False) else self.under.stance

    def __getattr__(self, name: str) -> Any:
        return getattr(self.under, name)


def stance() -> Any:
    """The thread's stance: the one that the user has set, and whether a body is open."""
    module = _eval_frame()
    if module is None:
        return None
    now = module._stance
    return (now.under if isinstance(now, _Stance) else now), getattr(_Stance.bodies, "open", False)


def set_stance(value: Any) -> None:
    module = _eval_frame()
    if module is not None and value is not None:
        under, body = value
        with _Stance.lock:
            _Stance.count += body - getattr(_Stance.bodies, "open", False)
            _Stance.bodies.open = body
            module._stance = _Stance(under) if _Stance.count else under


def body_stance(body: bool = True) -> Any:
    """The stance under which compiled functions run as written; or, for a model that runs inside a body, as compiled."""
    now = stance()
    return now and (now[0], body)


def as_compiled() -> contextlib.AbstractContextManager:
    """Compiled functions run as such in the block, also where it runs inside the body of another trace."""
    return _out_of_body() if getattr(_Stance.bodies, "open", False) else contextlib.nullcontext()


@contextlib.contextmanager
def _out_of_body() -> Iterator[None]:
    old = stance()
    set_stance(body_stance(False))
    try:
        yield
    finally:
        set_stance(old)


def frame_callback(value: Any = None) -> Any:
    """Set the thread's frame evaluation callback; returns the one that was set."""
    module = _eval_frame()
    return None if module is None else module.set_eval_frame(value)


def never_compile(function: Callable) -> None:
    """Run this function's frames as they are when called directly; Dynamo still traces through calls to it."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(function.__code__)


def register(*functions: Callable) -> None:
    """Make functions graph nodes of their own when Dynamo traces a call of them."""
    for function in functions:
        torch.compiler.allow_in_graph(function)


# -- Dynamo's own variables ------------------------------------------------------------------------------------------


def traced_by(function: Callable, handler: Callable) -> None:
    """Have Dynamo call `handler(tx, *args, **kwargs)` on its variables where it would read the instructions of `function`."""
    handlers = getattr(_vt().TorchInGraphFunctionVariable, "_get_handlers", None)
    if handlers is not None:  # another torch reads
        torch.compiler.allow_in_graph(function)
        handlers()[function] = lambda _, tx, /, *args, **kwargs: handler(tx, *args, **kwargs)


def is_tensor(value: Any) -> bool:
    return type(value) is _vt().TensorVariable


def _vt() -> Any:
    """Their classes: importing them loads Dynamo."""
    from torch._dynamo import variables

    return variables


def _unread() -> type | None:
    """The class of a constant of which Dynamo guards no more than the type, until something depends on its value."""
    return getattr(_vt().lazy, "LazyConstantVariable", None)


def looked_at(value: Any) -> Any:
    """A variable as an `isinstance` leaves it."""
    return value if type(value) is _unread() and not value.is_realized() else value.realize()


def is_plain(value: Any, types: tuple[type, ...]) -> bool:
    """Is it `None`, or a constant of one of these types?"""
    constant = type(value) in (_vt().ConstantVariable, _unread())
    return constant and issubclass(_type_of(value), (type(None), *types))


def _type_of(value: Any) -> type:
    """Of a constant: its type is guarded, and its value is not. torch 2.11's `python_type` would guard the value."""
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import is_constant_source

    if type(value) is not _unread() or value.is_realized() or hasattr(_unread(), "_ensure_type_guard"):
        return value.python_type()
    if is_constant_source(value.source):  # nothing to guard
        return value.python_type()
    install_guard(value.source.make_guard(GuardBuilder.TYPE_MATCH))
    return value.peek_type()


def items(value: Any) -> Any:
    """What is in a tuple, if it is one and no named one."""
    return list(value.items) if type(value) is _vt().TupleVariable else None


def tuple_of(values: list) -> Any:
    return _vt().TupleVariable(values)


def attribute(tx: Any, value: Any, name: str) -> Any:
    variable = _vt().VariableTracker.build
    return variable(tx, getattr).call_function(tx, [value, variable(tx, name)], {})


def length(tx: Any, module: Any, name: str) -> int:
    """Of a table among a module's attributes: as it is, where the code that Dynamo has read so far did not look at it."""
    table = getattr(getattr(module, "value", None), name, None)
    if table is None or table in tx.output.side_effects:
        return attribute(tx, module, name).realize().len()
    return len(table)


def node(tx: Any, function: Callable, *args: Any) -> Any:
    """A call of a function that is `register`ed."""
    return _vt().TorchInGraphFunctionVariable(function).call_function(tx, _variables(tx, args), {})


def inlined(tx: Any, function: Callable, /, *args: Any, **kwargs: Any) -> Any:
    """A call of a function whose instructions Dynamo reads."""
    return _vt().UserFunctionVariable(function).call_function(tx, _variables(tx, args), kwargs)


def _variables(tx: Any, args: Sequence) -> list:
    of = _vt().VariableTracker
    return [x if isinstance(x, of) else of.build(tx, x) for x in args]


def backend(name: Any, mode: str | None, options: dict | None, dynamic: bool | None) -> Callable:
    """The compiler that `torch.compile(backend=name, ...)` would use: `(gm, inputs) -> callable`."""
    if name == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, dynamic)
    if not isinstance(name, str):
        return name
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(name)


def constant_source(name: str) -> Any:
    """Where a size that is no input's comes from: what a symbol made by hand is called."""
    from torch._dynamo.source import ConstantSource

    return ConstantSource(name)


def as_dynamos(gm: torch.fx.GraphModule) -> None:
    """Say of a rewritten graph what Dynamo says of its own: which inputs (parameters) stay where they are, as CUDA graphs ask.

    Without it they would copy every parameter into memory of theirs, at each replay.
    """
    from torch._dynamo.source import LocalSource

    gm.meta.setdefault("dynamo_compile_id", None)
    gm._param_name_to_source = {}  # type: ignore[assignment]
    for node in gm.graph.find_nodes(op="placeholder"):
        node._dynamo_source = LocalSource(node.name)


def tracing_context() -> Any:
    return torch._guards.TracingContext.try_get()


def new_context(mode: FakeTensorMode) -> tuple[Any, Any]:
    """A context of compilation as Dynamo would have made it, and the block in which it holds."""
    context = torch._guards.TracingContext(mode)
    return context, torch._guards.tracing(context)


SDPA = {
    "flash": torch._C._get_flash_sdp_enabled,
    "mem_efficient": torch._C._get_mem_efficient_sdp_enabled,
    "math": torch._C._get_math_sdp_enabled,
    "cudnn": torch._C._get_cudnn_sdp_enabled,
}


def deterministic() -> tuple[bool, bool]:
    """Are deterministic algorithms asked for, and is it no error where there is none?"""
    return torch._C._get_deterministic_algorithms(), torch._C._get_deterministic_algorithms_warn_only()


def process_flags() -> tuple:
    """What Python can look at of the process, and operations of a graph do not take as an argument."""
    cuda = torch.backends.cuda
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.backends.mha.get_fastpath_enabled(),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
    )


def wraps_tensors(x: torch.Tensor) -> bool:
    """Is it a tensor of a class that is made of other tensors: a `DTensor`, a jagged `NestedTensor`, a quantised weight?"""
    return is_traceable_wrapper_subclass(x)


def hooked_everywhere() -> bool:
    """Has anybody put a hook on all modules?"""
    return bool(torch.nn.modules.module._has_any_global_hook())


@contextlib.contextmanager
def tracing(context: Any) -> Iterator[None]:
    """Compile under a captured graph's context. Integers may be read from tensors there: that is how positions are lifted."""
    env = context.fake_mode.shape_env
    old: Any = env.settings if env is not None else None
    if env is not None:
        env.settings = dataclasses.replace(old, allow_scalar_outputs=True)
    try:
        with torch._guards.tracing(context):
            yield
    finally:
        if env is not None:
            env.settings = old


@contextlib.contextmanager
def own_sizes(context: Any, fakes: Sequence = (), values: Sequence = ()) -> Iterator[list]:
    """Compile one variant: what is decided of the sizes meanwhile (a symbol is 2, say) holds for it alone, not for the next.

    It is decided by the sizes of the call's `values`, not by those that the graph was captured with: the block gets the
    `fakes` of the inputs with these.
    """
    env = context.fake_mode.shape_env
    if env is None:
        yield list(fakes)
        return
    captured: dict = getattr(env, "backed_var_to_val" if hasattr(env, "backed_var_to_val") else "var_to_val")
    now = {s: n for s, n in sizes_of(fakes, values).items() if s in captured and captured[s] != n}
    before = {s: captured[s] for s in now}
    captured.update(now)
    if now:
        fakes = [_hinted(context, env, fake, captured) for fake in fakes]
        _refresh(env)
    ranges, guards = dict(env.var_to_range), list(env.guards)
    kept = {name: dict(getattr(env, name)) for name in ("replacements", "replacements_slocs") if hasattr(env, name)}
    divisible = set(env.divisible)
    try:
        yield list(fakes)
    finally:
        captured.update(before)
        env.var_to_range.update(ranges)
        env.guards[:] = guards
        for name, old in kept.items():  # symbols that this variant made keep theirs: its backward may be compiled later
            now = getattr(env, name)
            made = {symbol: value for symbol, value in now.items() if symbol not in ranges}
            now.clear()
            now.update(made | old)
        env.divisible.clear()
        env.divisible.update(divisible)
        _refresh(env)


def _refresh(env: Any) -> None:
    """What was derived from sizes is derived anew."""
    env._update_version_counter()
    if hasattr(env, "_replacements_version_counter"):  # symbols keep what they were replaced with, by this count
        env._replacements_version_counter += 1
    getattr(env, "fake_tensor_cache", {}).clear()
    for function in vars(type(env)).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def sizes_of(fakes: Sequence, values: Sequence) -> dict[Any, sympy.Integer]:
    """What each symbol among the sizes of fake inputs is in a call."""
    found = {}
    for fake, value in zip(fakes, values, strict=False):
        pairs = zip(fake.shape, value.shape, strict=True) if isinstance(fake, torch.Tensor) else [(fake, value)]
        for size, number in pairs:
            if isinstance(size, torch.SymInt) and isinstance(number, int) and size.node._expr.is_symbol:
                found[size.node._expr] = sympy.Integer(number)
    return found


def _hinted(context: Any, env: Any, fake: Any, sizes: dict) -> Any:
    """A fake input with the sizes of this call as its hints."""

    def hinted(size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expr = size.node._expr
        return env.create_symintnode(expr, hint=int(expr.xreplace(sizes)))

    if not isinstance(fake, torch.Tensor):
        return hinted(fake)
    if not any(isinstance(n, torch.SymInt) for n in (*fake.shape, *fake.stride())):
        return fake
    shape, stride = tuple(map(hinted, fake.shape)), tuple(map(hinted, fake.stride()))
    return fake_like(context, (shape, stride, fake.dtype, fake.device, fake.requires_grad))


def placeholder_fakes(gm: torch.fx.GraphModule) -> list:
    """The fake inputs that Dynamo left on a graph's placeholders."""
    return [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]


def replays_nothing(restored: Callable[[Any], bool]) -> bool:
    """In a backend's callback: does nothing that existed before the frame change when the graph has run, tensors aside?

    `restored` tells objects that Dynamo writes to and that are then as they were. When this cannot tell, it says no.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output = InstructionTranslator.current_tx().output
        effects = output.side_effects
        changed: list[Any] = [
            v
            for v in effects.id_to_variable.values()
            if effects.is_modified(v)
            and type(v.mutation_type).__name__ in ("AttributeMutationExisting", "ValueMutationExisting")
        ]
        others = (
            effects.tensor_hooks,
            effects.save_for_backward,
            effects.ca_final_callbacks_var,
            output.random_calls,
            output.backward_state,
        )
        return not any(others) and all(_as_before(effects, v) and restored(v.value) for v in changed)
    except Exception:  # another torch: Dynamo's tables look different there
        return False


def _as_before(effects: Any, variable: Any) -> bool:
    """Are all attributes that Dynamo is to store on an object the constants that it holds already?"""
    stores = effects.store_attr_mutations.get(variable)
    name = (
        "is_base_vt_modified" if hasattr(type(variable), "is_base_vt_modified") else "is_underlying_vt_modified"
    )  # 2.11
    if not stores or getattr(variable, name)(effects):
        return False
    held = vars(variable.value)
    return all(
        new.is_python_constant() and name in held and held[name] is new.as_python_constant()
        for name, new in stores.items()
    )


def any_size(x: torch.Tensor, dim: int) -> None:
    """Let a capture hold for every size of a dimension, from 2 up."""
    torch._dynamo.mark_dynamic(x, dim)


def guard_count(context: Any) -> int:
    env = context.fake_mode.shape_env
    return 0 if env is None else len(env.guards)


def add_guards(context: Any, guards: list) -> None:
    """What is compiled now holds under these guards, too."""
    if guards:
        known = {g.expr for g in context.fake_mode.shape_env.guards}
        context.fake_mode.shape_env.guards.extend(g for g in guards if g.expr not in known)


class Sizes:
    """What something that is compiled takes some symbols to be: their ranges before it was, and the guards on them behind it."""

    def __init__(self, context: Any, symbols: tuple):
        self.symbols, self.env = symbols, context.fake_mode.shape_env
        self.ranges = self._ranges(symbols)
        self.guards: list = []

    def compiled(self) -> None:
        self.guards = [g for g in self.env.guards if g.expr.free_symbols & {*self.symbols}] if self.symbols else []

    def _ranges(self, symbols: tuple) -> list:
        return [self.env.var_to_range[s] for s in symbols]

    def among(self, symbols: tuple, values: dict) -> list | None:
        """The guards under which `symbols` can stand for those here, if with these `values` they hold."""
        if symbols != self.symbols:
            ranges = zip(self._ranges(symbols), self.ranges, strict=True)
            beside = any(not g.expr.free_symbols <= {*self.symbols} for g in self.guards)  # guards on others, too
            if beside or not all(new.issubset(old) for new, old in ranges):
                return None
        others = dict(zip(self.symbols, symbols, strict=True))
        guards = [g._replace(expr=g.expr.xreplace(others)) for g in self.guards]
        return guards if all(g.expr.xreplace(values) == True for g in guards) else None  # noqa: E712


def symbols_among(values: Sequence) -> tuple:
    """The symbols of the sizes of fake inputs, in order."""
    return tuple(dict.fromkeys(s for size in _symbolic(values) for s in sorted(size.free_symbols, key=str)))


def numbered(symbols: tuple) -> dict:
    """Other names for symbols: by their order."""
    return {s: sympy.Symbol(f"size_{i}", integer=True) for i, s in enumerate(symbols)}


def renamed(size: Any, names: dict) -> str:
    """A size as text, with other names for its symbols."""
    return str(size.node.expr.xreplace(names) if isinstance(size, torch.SymInt) else size)


@contextlib.contextmanager
def on_fakes(mode: FakeTensorMode) -> Iterator[None]:
    """Run operations on the fakes of a mode, of which nothing is kept but what they look like: sizes that are known only when
    the graph runs are of no interest to a compilation that has its own."""
    env = mode.shape_env
    quiet = contextlib.nullcontext() if env is None else env.ignore_fresh_unbacked_symbols()
    with mode, quiet, on_symbols():
        yield


def on_symbols() -> contextlib.AbstractContextManager:
    """The block in which operations take sizes that are symbols: `linear` of torch 2.11 wants Python's dispatcher for them."""
    return enable_python_dispatcher() if torch.__version__ < (2, 13) else contextlib.nullcontext()  # type: ignore[operator]


def unbacked(fake: torch.Tensor) -> bool:
    """Has a fake a size that is known only when the graph runs?"""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols((*fake.shape, *fake.stride())))


def named(values: Sequence) -> bool:
    """Is each symbol among the sizes and strides of a graph's inputs one of them by itself? Inductor knows no other."""
    return {*symbols_among(values)} <= {*_symbolic(values)}


def _symbolic(values: Sequence) -> list:
    """What is no plain number among the sizes and strides of fake inputs."""
    sizes = [n for x in values for n in ((*x.shape, *x.stride()) if isinstance(x, torch.Tensor) else (x,))]
    return [n.node.expr for n in sizes if isinstance(n, torch.SymInt)]


def added_guards(context: Any, since: int, fakes: list) -> Callable[[list], bool]:
    """The check of all guards on sizes that were added since `since`, over the values of a call's inputs."""
    env = context.fake_mode.shape_env
    new = [] if env is None else env.guards[since:]
    if env is None:
        return lambda values: True
    sizes = {i: f.node for i, f in enumerate(fakes) if isinstance(f, torch.SymInt) and f.node._expr.is_symbol}
    fixed = {i: int(node.expr) for i, node in sizes.items() if node.expr.is_number}  # a guard has made them numbers
    where = [i for i, node in sizes.items() if node.expr.is_symbol]
    code = env.produce_guards_expression([fakes[i] for i in where], guards=new) if where and new else None

    def hold(values: list) -> bool:
        if any(values[i] != number for i, number in fixed.items()):
            return False
        return not code or env.evaluate_guards_expression(code, [values[i] for i in where])

    return hold if fixed or code else lambda values: True


def guards_hold(env: Any, since: int, fakes: list) -> Callable[[list], bool]:
    """The check of the guards on sizes added since `since`, over the values of the symbols `fakes`."""
    new = env.guards[since:]
    if not new:
        return lambda values: True
    code = env.produce_guards_expression(fakes, guards=new)
    return (lambda values: env.evaluate_guards_expression(code, values)) if code else lambda values: True


def fake_like(context: Any, facts: tuple) -> torch.Tensor:
    """A fake input of a variant, from what a plan knows of a real tensor."""
    shape, stride, dtype, device, requires_grad = facts
    with context.fake_mode, torch.no_grad():
        made = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return made.requires_grad_(requires_grad)


def unchanged(context: Any, fake: Any, value: Any) -> Any:
    """A fake input that requires grad as its value does: written in place while Dynamo traced, it may have come to."""
    if not isinstance(value, torch.Tensor) or fake.requires_grad == value.requires_grad:
        return fake
    return fake_like(context, (fake.shape, fake.stride(), fake.dtype, fake.device, value.requires_grad))


def as_leaf(context: Any, fake: Any) -> Any:
    """A fake input in the mode that compilation uses: Dynamo makes a new one when it has captured a graph."""
    if not isinstance(fake, torch.Tensor):
        return fake
    return fake_like(context, (fake.shape, fake.stride(), fake.dtype, fake.device, fake.requires_grad))


def as_input(context: Any, fake: Any) -> Any:
    """A fake from inside a graph as the input of another: a leaf."""
    if not isinstance(fake, torch.Tensor) or fake.is_leaf:
        return fake
    return fake_like(context, (fake.shape, fake.stride(), fake.dtype, fake.device, fake.requires_grad))


def break_of(gm: torch.fx.GraphModule) -> tuple[str, str] | None:
    """In a backend's callback: why Dynamo ended this graph where it did, and at which line; `None` at a frame's end."""
    ended = getattr(gm, "compile_subgraph_reason", None)
    if ended is None or not ended.graph_break:
        return None
    line = ended.user_stack[-1] if ended.user_stack else None
    reason = " ".join(str(ended.reason).strip().split("\n")[0].split())
    return reason, f"{line.filename}:{line.lineno}" if line is not None else "an unknown line"


_TABLE = re.compile(r"\.(_forward_(pre_)?hooks|_compiled_call_impl)")  # where ours are
RECOMPILES = 64  # captures of one entry; Dynamo's own default is 8


def patience(modules: int) -> int:
    """How many captures one frame may have: behind graph breaks, modules of one class share the frames of their code."""
    config: Any = torch._dynamo.config
    return max(RECOMPILES, config.recompile_limit, 4 * modules)


def needs_hooks(function: Callable) -> bool:
    """Does the code of any capture of a function get at what a hook holds, as it does for lists that one appends to?"""
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(function.__code__)
    used = [name for entry in entries for name in (*entry.code.co_names, *entry.code.co_consts)]
    return any(isinstance(name, str) and _TABLE.search(f".{name}") for name in used)


def guards(function: Callable) -> list[str]:
    """What Dynamo checks before it uses each capture of a function, as text."""
    found = torch._dynamo.eval_frame._debug_get_cache_entry_list(function.__code__)
    return [str(entry.guard_manager).strip() for entry in found]


def recompiles(functions: list[Callable]) -> int:
    """How many captures the function with the most has."""
    count = torch._dynamo.eval_frame._debug_get_cache_entry_list
    return max((len(count(f.__code__)) for f in functions), default=0)


@contextlib.contextmanager
def capturing(modules: int) -> Iterator[None]:
    """Dynamo's settings while it captures a model for us: its floats are structure, since variants compile too late to ask
    Dynamo to look again; and a frame may have `patience` captures under each of its entries."""
    config: Any = torch._dynamo.config
    limit = patience(modules)
    old = config.specialize_float, config.recompile_limit, config.accumulated_recompile_limit
    config.specialize_float, config.recompile_limit = True, limit
    config.accumulated_recompile_limit = max(old[2], 128 * limit)
    try:
        yield
    finally:
        config.specialize_float, config.recompile_limit, config.accumulated_recompile_limit = old


class NotCaptured(Exception):
    """No capture holds for a call."""


def dynamo_compile(
    function: Callable, backend: Callable, dynamic: bool | None, fullgraph: bool
) -> tuple[Callable, Callable]:
    """`torch.compile`, without the guards on tables of hooks: whoever calls this asks for another function when the user's hooks
    change, and ours never do. What is in the closures of the user's hooks keeps its guards.

    Returns the compiled function, and one that runs what was captured and raises `NotCaptured`, before anything ran, where
    none of it holds.

    Behind a graph break Dynamo captures frames one by one, and modules of one class share a frame: there it looks at which
    module of the model a hook belongs to, and at how often it was called.
    """
    start = root(function)

    def tells(guard: Any) -> bool:
        path = guard.guard_type == "CONSTANT_MATCH" and guard.has_value and isinstance(guard.value, str)
        return (path or guard.name.endswith(".calls") or ".calls[" in guard.name) and not guard.name.startswith(start)

    def keep(guards: Any) -> list[bool]:
        user = tuple(
            guard.name
            for guard in guards
            if guard.guard_type == "CLOSURE_MATCH" and guard.has_value and not _library(guard.value)
        )
        for guard in guards:  # built again, which asserts what a property makes at each look to be one object
            guard.orig_guard.obj_weakref = None
        return [guard.name.startswith(user) or not _TABLE.search(guard.name) or tells(guard) for guard in guards]

    weakref.finalize(
        function, torch._dynamo.eval_frame.reset_code, function.__code__
    ).atexit = False  # what it holds knows it
    context: Any = torch._dynamo.optimize(backend=backend, nopython=fullgraph, dynamic=dynamic, guard_filter_fn=keep)
    return context(function), _cached_only(context, function)


def root(function: Callable) -> tuple[str, ...]:
    """How the names begin of what an entry function closes over: what it holds is always the same."""
    return function.__code__.co_freevars


def forget_tables(start: tuple[str, ...]) -> None:
    """In a backend's callback for what has that `root`: drop the guards that the filter of `dynamo_compile` drops, where the user has no hooks. Dynamo builds
    all guards before it asks a filter, and then builds again what is left."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    found: Any = getattr(InstructionTranslator.current_tx().output.guards, "inner", None)
    start = tuple(f"L['{name}']" for name in start)
    for guard in list(found or ()):
        name = guard.name if isinstance(guard.name, str) else guard.name()
        told = guard.create_fn_name() == "CONSTANT_MATCH" or ".calls" in name
        if _TABLE.search(name) and (name.startswith(start) or not told):
            found.discard(guard)


def _cached_only(context: Any, function: Callable) -> Callable:
    from torch._dynamo.types import ConvertFrameReturn

    def refuse(frame: Any, *_: Any) -> ConvertFrameReturn:
        if frame.f_code is code:
            raise NotCaptured
        return ConvertFrameReturn()  # a finalizer, say, that happens to run now: as it is

    code, callback = function.__code__, cast(Any, refuse)
    callback._torchdynamo_orig_backend = context.callback  # the captures to look among
    frames, layers = torch._dynamo.eval_frame, torch._C._functorch  # type: ignore[attr-defined]

    def cached(*args: Any) -> Any:
        if frames._stance.stance == "force_eager":
            raise NotCaptured
        depth, outer = layers.get_dynamic_layer_stack_depth(), frames.set_eval_frame(callback)
        try:
            return function(*args)
        except BaseException:
            layers.pop_dynamic_layer_stack_and_undo_to_depth(depth)  # a graph that fails leaves its transforms there
            raise
        finally:
            frames.set_eval_frame(outer)

    return cached


def _library(hook: Any) -> bool:
    return (getattr(hook, "__module__", "") or "").startswith(("nnsight_fx.", "transformers.", "accelerate."))


def compiled_from(function: Any) -> Any:
    """What `torch.compile` made this from, if it did."""
    disabled = getattr(function, "_torchdynamo_disable", False)
    return None if disabled else getattr(function, "_torchdynamo_orig_callable", None)


def hook(tensor: torch.Tensor, function: Callable) -> Any:
    """`tensor.register_hook`, on a view too that was changed through an alias: torch <= 2.14 crashes there, unless somebody has
    looked at its `grad_fn` (pytorch/pytorch#196459)."""
    _ = tensor.grad_fn
    return tensor.register_hook(function)


@functools.cache
def _seen_by_dynamo() -> type:
    from torch._dynamo.eval_frame import OptimizedModule

    class Seen(OptimizedModule):
        """What `torch.compile(module)` returns, while we run it: of that very class Dynamo looks at the module inside only, and
        passes neither its hooks nor its `forward` (torch 2.13, `VariableBuilder.wrap_module`)."""

        __call__ = torch.nn.Module.__call__

    return Seen


def seen_by_dynamo(module: torch.nn.Module) -> Callable[[], None] | None:
    """Have Dynamo look at what `torch.compile(module)` returned as at any module; returns what undoes it, where it was one."""
    old = type(module)
    if old.__name__ != "OptimizedModule" or old.__module__ != "torch._dynamo.eval_frame":
        return None
    object.__setattr__(module, "__class__", _seen_by_dynamo())
    return lambda: object.__setattr__(module, "__class__", old)


def undisturbed(function: Callable) -> Callable:
    """`function` run as it is, also when compiled code calls it."""
    return torch._dynamo.disable(function)


def inside(function: Callable) -> Callable:
    """What `undisturbed` made a function from, for a caller that is undisturbed itself."""
    return function._torchdynamo_orig_callable if hasattr(function, "_torchdynamo_disable") else function  # type: ignore[attr-defined]


def kernel_folder() -> Path:
    """Where Inductor keeps what it builds."""
    from torch._inductor.codecache import cache_dir

    return Path(cache_dir())


def kernels() -> dict[str, Path]:
    """The libraries of C++ kernels that this process has built or loaded, by their names in Inductor's folder."""
    from torch._inductor.codecache import CppCodeCache, get_path

    families, found = [CppCodeCache], {}
    for family in families:
        families += family.__subclasses__()
        for key in family.cache:
            file = Path(get_path(key, "main.so")[2])
            if file.exists():
                found[file.relative_to(kernel_folder()).as_posix()] = file
    return found
