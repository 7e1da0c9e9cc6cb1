"""Sizes that are symbols: their hints, ranges and guards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch

from .fakes import fake_like
from .probe import Name, needed

if TYPE_CHECKING:
    from torch._guards import TracingContext
    from torch.fx.experimental.symbolic_shapes import ShapeEnv as SizeTable

_SYMBOLS = "torch.fx.experimental.symbolic_shapes"
ShapeEnv, DimDynamic, StatelessSymbolicContext, free_symbols, free_unbacked_symbols = (
    needed(f"{_SYMBOLS}.{name}")
    for name in ("ShapeEnv", "DimDynamic", "StatelessSymbolicContext", "free_symbols", "free_unbacked_symbols")
)
_SOURCE = Name("torch._dynamo.source.ConstantSource", "a growing cache's length has the name that torch gives it")
_PRODUCE = Name(f"{_SYMBOLS}.ShapeEnv.produce_guards_expression", "guards on sizes are evaluated by sympy")
_EVALUATE = Name(f"{_SYMBOLS}.ShapeEnv.evaluate_guards_expression", "guards on sizes are evaluated by sympy")
_TABLES = "what one compile decides of a size holds for later ones of the graph, too"
_HINTS = Name(f"{_SYMBOLS}.ShapeEnv.backed_var_to_val", _TABLES)
_OLD_HINTS = Name(f"{_SYMBOLS}.ShapeEnv.var_to_val", _TABLES)  # torch 2.11
_RANGES = Name(f"{_SYMBOLS}.ShapeEnv.var_to_range", _TABLES)
_DIVISIBLE = Name(f"{_SYMBOLS}.ShapeEnv.divisible", _TABLES)
_COUNTER = Name(f"{_SYMBOLS}.ShapeEnv._update_version_counter", _TABLES)
_MADE = Name(f"{_SYMBOLS}.ShapeEnv.create_symintnode", _TABLES)


def constant_source(name: str) -> Any:
    """Where a size that is no input's comes from: what a symbol made by hand is called."""
    made = _SOURCE()
    return None if made is None else made(name)


def _hints(env: object) -> dict | None:
    """What each symbol was when its graph was captured."""
    new = hasattr(env, "backed_var_to_val") or not hasattr(env, "var_to_val")
    return _HINTS.of(env) if new else _OLD_HINTS.of(env)


@contextlib.contextmanager
def own_sizes(context: Any, fakes: Sequence = (), values: Sequence = ()) -> Iterator[list]:
    """Compile one variant: what is decided of the sizes meanwhile (a symbol is 2, say) holds for it alone, not for the next.

    It is decided by the sizes of the call's `values`, not by those that the graph was captured with: the block gets the
    `fakes` of the inputs with these.
    """
    env = context.fake_mode.shape_env
    tables: tuple = (
        () if env is None else (_hints(env), *(name.of(env) for name in (_RANGES, _DIVISIBLE, _COUNTER, _MADE)))
    )
    if env is None or any(table is None for table in tables):
        yield list(fakes)
        return
    captured: dict = tables[0]
    now = {s: n for s, n in _alike(env, sizes_of(fakes, values)).items() if s in captured and captured[s] != n}
    before = {s: captured[s] for s in now}
    captured.update(now)
    if now:
        fakes = [_hinted(context, env, fake, captured) for fake in fakes]
        _refresh(env)
    ranges, guards = dict(env.var_to_range), list(env.guards)
    kept = {name: dict(getattr(env, name)) for name in ("replacements", "replacements_slocs") if hasattr(env, name)}
    divisible, known = set(env.divisible), dict(getattr(env, "axioms", {}))  # what guards imply
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
        if hasattr(env, "axioms"):
            env.axioms.clear()
            env.axioms.update(known)
        _refresh(env)


def _alike(env: SizeTable, sizes: dict) -> dict:
    """Sizes of a call, and of the symbols that are equal to theirs by the graph's own guards."""
    equal = [(a, b) for a, b in getattr(env, "replacements", {}).items() if b.is_symbol]
    sizes = sizes | {b: sizes[a] for a, b in equal if a in sizes}
    return sizes | {a: sizes[b] for a, b in equal if b in sizes}


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


def size_at(size: int | torch.SymInt, numbers: Mapping[sympy.Symbol, int | sympy.Integer]) -> int | None:
    """A size, with numbers for its symbols; `None` where one is missing."""
    if not isinstance(size, torch.SymInt):
        return size
    found = size.node.expr.xreplace({s: sympy.Integer(n) for s, n in numbers.items()})
    return int(found) if found.is_number else None


def symbols_of(size: int | torch.SymInt) -> set[sympy.Symbol]:
    """The symbols in a size."""
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Are two sizes written alike? Asked without a guard."""
    plain = [size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size) for size in (a, b)]
    return plain[0] == plain[1]


def may_be(context: TracingContext, numbers: Mapping[sympy.Symbol, int]) -> bool:
    """Could the inputs of a captured graph have these sizes, by its own guards?"""
    env = _env(context)
    if env is None:
        return False
    values = {s: sympy.Integer(n) for s, n in numbers.items()}
    inside = all(n in env.var_to_range[s] for s, n in values.items() if s in env.var_to_range)
    return inside and not any(g.expr.xreplace(values) == False for g in env.guards)  # noqa: E712  (sympy's)


def input_of_size(fakes: Sequence, size: int, dim: int) -> int | None:
    """The place of an input that is a symbol and `size` in this call: of several rather one that is dimension `dim` of a tensor."""
    found = {}
    for i, fake in enumerate(fakes):
        if isinstance(fake, torch.SymInt) and fake.node.expr.is_symbol and fake.node.hint == size > 1:
            found[fake.node.expr] = i
    sizes = [fake.shape[dim] for fake in fakes if isinstance(fake, torch.Tensor) and fake.dim() > dim]
    there = [n.node.expr for n in sizes if isinstance(n, torch.SymInt)]
    return found.get(next((expr for expr in (*there, *found) if expr in found), None))


def _hinted(context: object, env: Any, fake: object, sizes: dict) -> object:
    """A fake input with the sizes of this call as its hints."""

    def hinted(size: object) -> object:
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


def of_now(context: Any, fakes: list) -> list:
    """Fakes that an earlier variant made, with the sizes of the call that is compiled now as their hints."""
    env = context.fake_mode.shape_env
    hints = None if env is None else _hints(env)
    return fakes if hints is None else [_hinted(context, env, fake, hints) for fake in fakes]


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
        return guards if _true(guards, values) else None


def symbols_among(values: Sequence) -> tuple:
    """The symbols of the sizes of fake inputs, in order."""
    return tuple(dict.fromkeys(s for size in _symbolic(values) for s in sorted(size.free_symbols, key=str)))


def numbered(symbols: tuple) -> dict:
    """Other names for symbols: by their order."""
    return {s: sympy.Symbol(f"size_{i}", integer=True) for i, s in enumerate(symbols)}


def renamed(size: object, names: dict) -> str:
    """A size as text, with other names for its symbols."""
    return str(size.node.expr.xreplace(names) if isinstance(size, torch.SymInt) else size)


def unbacked(fake: torch.Tensor) -> bool:
    """Has a fake a size that is known only when the graph runs?"""
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
    check = _check(env, new, [fakes[i] for i in where]) if where and new else None

    def hold(values: list) -> bool:
        if any(values[i] != number for i, number in fixed.items()):
            return False
        return check is None or check([values[i] for i in where])

    return hold if fixed or check else lambda values: True


def _check(env: object, guards: list, fakes: list) -> Callable[[list], bool] | None:
    """The check of guards on sizes, over the values of `fakes`; `None` where every value fulfils them."""
    if _PRODUCE() is None or _EVALUATE() is None:
        symbols = [fake.node.expr for fake in fakes]
        return lambda values: _true(guards, dict(zip(symbols, map(sympy.Integer, values), strict=True)))
    code = _PRODUCE()(env, fakes, guards=guards)
    return (lambda values: _EVALUATE()(env, code, values)) if code else None


def _true(guards: list, sizes: dict) -> bool:
    return all(g.expr.xreplace(sizes) == True for g in guards)  # noqa: E712  (sympy's)


def guards_since(context: TracingContext, since: int) -> list:
    """The guards on sizes that were added since there were `since`."""
    env = _env(context)
    return [] if env is None else list(env.guards[since:])


def _env(context: TracingContext) -> SizeTable | None:
    return None if context.fake_mode is None else context.fake_mode.shape_env


def hold(context: TracingContext, guards: Sequence, fakes: Sequence, values: Sequence) -> bool:
    """Do guards hold for the sizes of these values? Not, where one is on a size that no input has."""
    env = _env(context)
    return not guards or env is None or _true(list(guards), _alike(env, sizes_of(fakes, values)))


def guards_hold(env: Any, since: int, fakes: list) -> Callable[[list], bool]:
    """The check of the guards on sizes added since `since`, over the values of the symbols `fakes`."""
    new = env.guards[since:]
    check = _check(env, new, fakes) if new else None
    return check or (lambda values: True)
