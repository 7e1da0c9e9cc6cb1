"""A function rewritten so that each call in its own frame goes through an `op`: the operations of a `forward`.

```
h = torch.relu(self.fc1(x))      ->      h = op("h_0", None, op("torch_relu_0", torch.relu, op("self_fc1_0", self.fc1, x)))
```

The rewrite knows nothing of hooks or capture: the same text runs live, on fakes and under Dynamo. As in nnsight 0.8.1 an
operation is named after the dotted name that is called (or assigned), and its ordinal in the frame.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple

from ..errors import SourceNotAvailable

OP = "__nnsight_fx_op__"
SHELL, DEFINITION = "__nnsight_fx_shell__", "__nnsight_fx_definition__"
FRAME_BOUND = {
    "super",
    "locals",
    "globals",
    "vars",
    "dir",
    "eval",
    "exec",
}  # these look at the frame they are called from
FUTURE = 0x1FF0000  # the `from __future__` flags of a code object


class Frame(NamedTuple):
    """A function's operations: what its rewritten code calls, in the order of evaluation."""

    code: CodeType
    names: tuple[str, ...]
    aliases: dict[str, str]  # nnsight 0.8.1's name -> ours, where they differ
    lines: dict[str, int]  # name -> line of `text`, from 1
    text: str


class _Calls(ast.NodeTransformer):
    """Wraps the calls and assignments of one frame. Calls are numbered by themselves; nnsight 0.8.1 counts the
    assignments of a name with its calls, so that gives the assignments' numbers and the aliases of calls."""

    def __init__(self, taken: Iterable[str] = ()):
        self.taken = frozenset(taken)  # names of calls, which no assignment gets
        self.calls: Counter[str] = Counter()
        self.all: Counter[str] = Counter()
        self.nested = 0  # inside a lambda, a comprehension, a function: other frames
        self.bare: set[int] = set()
        self.lines: dict[str, int] = {}
        self.called: list[str] = []
        self.aliases: dict[str, str] = {}

    def _wrap(self, name: str, fn: ast.expr, args: list, keywords: list, node: ast.AST) -> ast.expr:
        self.lines[name] = node.lineno  # type: ignore[attr-defined]
        given = [ast.Constant(name), fn, *args]
        return ast.copy_location(ast.Call(ast.Name(OP, ast.Load()), given, keywords), node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        bound = isinstance(node.func, ast.Name) and node.func.id in FRAME_BOUND
        bare = id(node) in self.bare
        self.generic_visit(node)
        if bound and not node.args and not node.keywords:
            return node
        name = "_".join(_dotted(node.func)[0]) or "call"
        number = self.all[name]
        self.all[name] += 1
        if self.nested or bound or bare:
            return node
        own = f"{name}_{self.calls[name]}"
        self.calls[name] += 1
        self.called.append(own)
        if number != self.calls[name] - 1:
            self.aliases[f"{name}_{number}"] = own
        return self._wrap(own, node.func, node.args, node.keywords, node)

    def _bound(self, target: ast.expr, value: ast.expr, node: ast.AST) -> ast.expr:
        """The assigned value as an operation of the target's name."""
        pair = (ast.Tuple, ast.List)
        if isinstance(target, pair) and isinstance(value, pair):
            if len(target.elts) == len(value.elts) and not any(
                isinstance(e, ast.Starred) for e in (*target.elts, *value.elts)
            ):
                value.elts = [self._bound(t, v, node) for t, v in zip(target.elts, value.elts, strict=True)]
            return value
        parts, rooted = _dotted(target)
        if not rooted:
            return value
        name = "_".join(parts)
        own = f"{name}_{self.all[name]}"
        self.all[name] += 1
        if self.nested or own in self.taken:
            return value
        return self._wrap(own, ast.Constant(None), [value], [], node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        node.value = self.visit(node.value)
        node.targets = [self.visit(t) for t in node.targets]
        if len(node.targets) == 1:
            node.value = self._bound(node.targets[0], node.value, node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self._bound(node.target, self.visit(node.value), node)
        return node

    def visit_withitem(self, node: ast.withitem) -> ast.AST:
        self.bare.add(id(node.context_expr))  # a context manager is no value
        return self.generic_visit(node)

    # Other frames: what they do is not listed, what the own frame does to make them is.
    def _elsewhere(self, node: ast.AST, fields: Iterable[str]) -> None:
        self.nested += 1
        for name in fields:
            value = getattr(node, name)
            if isinstance(value, list):
                setattr(node, name, [self.visit(v) for v in value])
            else:
                setattr(node, name, self.visit(value))
        self.nested -= 1

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        node.args = self.visit(node.args)
        self._elsewhere(node, ["body"])
        return node

    def visit_FunctionDef(self, node: Any) -> ast.AST:
        node.decorator_list = [self.visit(d) for d in node.decorator_list]
        node.args.defaults = [self.visit(d) for d in node.args.defaults]
        node.args.kw_defaults = [d and self.visit(d) for d in node.args.kw_defaults]
        self._elsewhere(node, ["body"])
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self._elsewhere(node, ["body"])
        return node

    def _comprehension(self, node: Any) -> ast.AST:
        first = node.generators[0]
        first.iter = self.visit(first.iter)  # evaluated by the frame around it
        self._elsewhere(first, ["ifs"])
        self._elsewhere(node, ["key", "value"] if isinstance(node, ast.DictComp) else ["elt"])
        self.nested += 1
        node.generators[1:] = [self.visit(g) for g in node.generators[1:]]
        self.nested -= 1
        return node

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension


def _dotted(expr: ast.expr) -> tuple[list[str], bool]:
    """The names of an attribute chain, and whether a variable is at its root: `self.a[0].b` is `self, a, b`."""
    parts: list[str] = []
    while True:
        if isinstance(expr, ast.Attribute):
            parts.append(expr.attr)
            expr = expr.value
        elif isinstance(expr, ast.Subscript):
            expr = expr.value
        elif isinstance(expr, ast.Name):
            return [expr.id, *reversed(parts)], True
        else:
            return parts[::-1], False


_frames: dict[CodeType, Frame] = {}


def frame_of(function: FunctionType) -> Frame:
    """The operations of a function, rewritten once. Raises `SourceNotAvailable`."""
    code = function.__code__
    if code not in _frames:
        _frames[code] = _rewrite(function)
    return _frames[code]


def _tree(code: CodeType) -> tuple[ast.Module, int, str]:
    try:
        lines, start = inspect.getsourcelines(code)  # of the code: a function's would be what it wraps
        text = textwrap.dedent("".join(lines))
        return ast.parse(text), start, text
    except (OSError, TypeError, SyntaxError) as e:
        raise SourceNotAvailable(f"there is no source text of `{code.co_name}` (made by `exec`, or a REPL?)") from e


def _rewrite(function: FunctionType) -> Frame:
    code = function.__code__
    tree, start, text = _tree(code)
    definition = tree.body[0]
    if not isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef)):
        raise SourceNotAvailable(f"`{code.co_name}` is not written as a `def`")
    definition.decorator_list = []
    name, definition.name = definition.name, DEFINITION  # a function that calls itself finds itself outside the shell
    dry = _Calls()
    for statement in copy.deepcopy(definition.body):
        dry.visit(statement)
    calls = _Calls(dry.called)
    definition.body = [calls.visit(s) for s in definition.body]
    lines = dict(calls.lines)

    # Free variables stay free inside a shell that has them as parameters, and names like `self.__x` belong to a class.
    free = [ast.arg(n) for n in (*code.co_freevars, OP)]
    given = ast.arguments(posonlyargs=[], args=free, kwonlyargs=[], kw_defaults=[], defaults=[])
    returned = ast.Return(ast.Name(definition.name, ast.Load()))
    shell: object = ast.FunctionDef(name=SHELL, args=given, body=[definition, returned], decorator_list=[])
    owner = function.__qualname__.split(".")[-2:-1]
    if owner and owner[0].isidentifier():
        shell = ast.ClassDef(name=owner[0], bases=[], keywords=[], body=[shell], decorator_list=[])
    tree.body = [ast.copy_location(shell, definition)]
    for node in ast.walk(shell):  # Python 3.12 and later
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and "type_params" in node._fields:
            node.type_params = getattr(node, "type_params", None) or []  # type: ignore[attr-defined]
    ast.increment_lineno(tree, start - 1)
    ast.fix_missing_locations(tree)
    module = compile(tree, code.co_filename, "exec", flags=code.co_flags & FUTURE, dont_inherit=True)
    made = _find(_find(module, SHELL), DEFINITION)
    if made is None or name != code.co_name or made.co_varnames != code.co_varnames:
        raise SourceNotAvailable(f"the source text of `{code.co_name}` is not the code that runs (edited since?)")
    aliases = {a: n for a, n in calls.aliases.items() if a not in lines}
    made = made.replace(co_name=code.co_name, co_qualname=code.co_qualname)
    return Frame(made, tuple(lines), aliases, lines, text)


def _find(code: CodeType | None, name: str) -> CodeType | None:
    """The code of the function `name` that is defined in `code`."""
    for const in code.co_consts if code is not None else ():
        if isinstance(const, CodeType):
            found = const if const.co_name == name else _find(const, name) if name == SHELL else None
            if found is not None:
                return found
    return None


def _decorated(wrapper: FunctionType) -> int | None:
    """The closure cell of the function that a decorator's wrapper calls, where that is plain from its text."""
    if not wrapper.__closure__:
        return None
    try:
        tree, _, _ = _tree(wrapper.__code__)
    except SourceNotAvailable:
        return None
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    cells = zip(wrapper.__code__.co_freevars, wrapper.__closure__, strict=True)
    found = [i for i, (name, cell) in enumerate(cells) if name in called and _held(cell) is not None]
    return found[0] if len(found) == 1 else None


def _held(cell: CellType) -> FunctionType | None:
    try:
        held = cell.cell_contents
    except ValueError:  # not bound yet
        return None
    return held if isinstance(held, FunctionType) else None


def _peeled(function: FunctionType) -> tuple[FunctionType, list[tuple[FunctionType, int]]]:
    """A function without its decorators, and these, outermost first."""
    chain: list[tuple[FunctionType, int]] = []
    seen = {function}
    while (index := _decorated(function)) is not None:
        inner = _held(function.__closure__[index])  # type: ignore[index]
        if inner is None or inner in seen:
            break
        chain.append((function, index))
        function = inner
        seen.add(function)
    return function, chain


def _like(function: FunctionType, code: CodeType, closure: tuple) -> FunctionType:
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure or None)
    made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, function.__qualname__
    made.__annotations__, made.__module__ = function.__annotations__, function.__module__
    made.__dict__.update(function.__dict__)
    return made


def plain(called: object) -> tuple[FunctionType, bool]:
    """The Python function behind something that is called, and whether its receiver comes first. Raises `SourceNotAvailable`."""
    if inspect.ismethod(called) and isinstance(called.__func__, FunctionType):
        return called.__func__, True
    if isinstance(called, FunctionType):
        return called, False
    raise SourceNotAvailable(f"`{getattr(called, '__name__', None) or type(called).__name__}` is not a Python function")


def operations(function: FunctionType) -> Frame:
    """The operations of a function, decorators aside. Raises `SourceNotAvailable`."""
    return frame_of(_peeled(function)[0])


def instrumented(function: FunctionType, op: Callable) -> FunctionType:
    """`function` with each call of its own frame made by `op(name, fn, *args, **kwargs)`, in its decorators."""
    inner, chain = _peeled(function)
    code = frame_of(inner).code
    cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True))
    made = _like(inner, code, tuple(CellType(op) if n == OP else cells[n] for n in code.co_freevars))
    for wrapper, index in reversed(chain):
        around = list(wrapper.__closure__ or ())
        around[index] = CellType(made)
        made = _like(wrapper, wrapper.__code__, tuple(around))
    return made
