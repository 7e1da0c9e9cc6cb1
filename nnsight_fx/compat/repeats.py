"""Dynamo: a stretch of a trace that belongs to one module, recorded once and put into the graph again for another module.

What Dynamo traces follows from what it guards, from the arguments and from the modes in force. So a stretch holds for another
module when each guard on the first one holds for it, too, with the same arguments otherwise. `capture/repeats.py` says which
modules are tried.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from .guards import TABLE
from .identities import Identities, Looking, Translator, Unlike, Variable, named
from .probe import Name
from .tensors import memory, tree_map_only
from .transformers import COLLECTING

if TYPE_CHECKING:
    from torch._guards import Guard, Source

Given = tuple[list[Variable], dict[str, Variable]]  # what a call gets

EACH = "each block of a model is traced, also where it repeats another"
_CHECKS = Name("torch._dynamo.guards.GUARD_VALUE_DISPATCH", EACH)
_SKIPPED = Name("torch._dynamo.guards.SKIP_GUARD", EACH)
_INSTALL = Name("torch._dynamo.guards.install_guard", EACH)
_DUPLICATE = Name("torch._dynamo.guards.GuardBuilder.DUPLICATE_INPUT", EACH)
_BUILDER = Name("torch._dynamo.variables.builder.VariableBuilder", EACH)
_WRAP = Name("torch._dynamo.variables.builder.wrap_fx_proxy", EACH)
_SOURCE = Name("torch._guards.Source.get_value", EACH)
_MUTATED = Name("torch._dynamo.side_effects.SideEffects.mutated_sources", EACH)
_RAISED = Name("torch._dynamo.exc.TorchDynamoException", EACH)
_SET = Name("torch.utils._ordered_set.OrderedSet", EACH)
_FAKE = Name("torch._subclasses.fake_tensor.FakeTensor", EACH)
_VARIABLES = [
    Name(f"torch._dynamo.variables.{name}", EACH)
    for name in ("TensorVariable", "SymNodeVariable", "ConstantVariable", "TupleVariable")
]
_MODES = Name("torch._dynamo.symbolic_convert.InstructionTranslatorBase.symbolic_torch_function_state", EACH)
_EXACT = ("EQUALS_MATCH", "CONSTANT_MATCH")  # compare by `==`, which a bool and a number pass, and zeros of either sign
_BUILT = "TENSOR_MATCH"  # what Dynamo installs itself when it takes a tensor for an input


def known() -> bool:
    """Has this torch all that it takes?"""
    names = (_CHECKS, _SKIPPED, _INSTALL, _DUPLICATE, _BUILDER, _WRAP, _SOURCE, _SET, _FAKE, *_VARIABLES)
    return not _CHECKS.lacking and all(name() is not None for name in names)


def name_of(tx: Translator) -> str:
    """The name of the code that Dynamo captures."""
    return tx.output.root_tx.f_code.co_name


def module_of(variable: Variable) -> tuple[torch.nn.Module, Source] | None:
    """The module that a variable stands for, and from where Dynamo has it."""
    value, source = getattr(variable, "value", None), getattr(variable, "source", None)
    if isinstance(value, torch.nn.Module) and source is not None:
        return value, source
    return None


# -- what goes in ------------------------------------------------------------------------------------------------


def _number(x: object) -> object:
    """A size as something to compare: no symbol gets a guard by it."""
    return x.node.expr if isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool) else x


def described(x: object) -> object:
    """A fake tensor as Dynamo tells it from others."""
    if not isinstance(x, torch.Tensor):
        return None
    strided = x.layout is torch.strided
    where = (*map(_number, x.stride()), _number(x.storage_offset())) if strided else ()
    bits = (x.requires_grad, x.is_conj(), x.is_neg(), x.is_inference())
    return type(x), tuple(map(_number, x.shape)), where, x.dtype, x.device, x.layout, bits


class _Arguments:
    """The arguments of a call: what they are, and the nodes of the tensors and numbers among them."""

    def __init__(self, args: list[Variable], kwargs: dict[str, Variable]):
        self.nodes: list[fx.Node] = []
        self.kinds: list[object] = []
        self.of: dict[fx.Node, Variable] = {}
        self.held: list[Variable] = []  # so that no other object gets their ids
        self.told = [self._tell(x) for x in args], [(name, self._tell(x)) for name, x in kwargs.items()]

    def _tell(self, value: Variable) -> object:
        tensor, number, constant, several = (name() for name in _VARIABLES)
        if type(value) is several:
            return tuple(self._tell(item) for item in value.items)
        if type(value) is constant:
            return type(value.value), value.value, repr(value.value)
        if getattr(value, "source", None) is not None:  # an object that the model had before: the very same
            if isinstance(vars(value).get("value"), torch.nn.Module):  # by which a block may get at any other
                raise Unlike("an argument that is a module")
            if type(value) is tensor or type(value) is number:
                self._note(value)
            self.held.append(value)
            return id(value)
        if type(value) is tensor:
            node = self._note(value)
            return self.nodes.index(node), value.class_type, described(_value(node))
        if type(value) is number:
            node = self._note(value)
            return self.nodes.index(node), _number(value.sym_num)
        raise Unlike(f"an argument that is {type(value).__name__}")

    def _note(self, value: Variable) -> fx.Node:
        node = value.as_proxy().node
        if node not in self.of:
            _only_fakes(node)
            self.nodes.append(node)
            self.of[node] = value
            self.kinds.append(described(_value(node)))
        return node

    def unchanged(self) -> bool:
        """Are the tensors still of the kind that they were of? Operations in place change shapes, too."""
        return self.kinds == [described(_value(node)) for node in self.nodes]


def _ambient(tx: Translator) -> tuple:
    """The modes in force."""
    functions = _MODES.of(tx)
    if functions is None or functions.mode_stack:
        raise Unlike("a mode of functions")
    casts = tuple(
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", *_accelerators())
    )
    off = functions.torch_function_mode_enabled, functions.torch_function_subclass_enabled
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), casts, off


@functools.cache
def _accelerators() -> tuple[str, ...]:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return () if found is None else (found.type,)


def _state(tx: Translator) -> tuple:
    """How often tracing has changed objects that the model had before, and how many random numbers Dynamo drew.

    `Unlike` if the model changes anything that a block may read: of that the guards say nothing."""
    effects = tx.output.side_effects
    found = _MUTATED.of(effects)
    if type(found) is not _counting():
        if found is None:
            raise Unlike("Dynamo does not tell what the model changes")
        effects.mutated_sources = found = _counting()(found)
    for source in found:
        if COLLECTING not in named(source):
            raise Unlike(f"{named(source)} was changed")
    return found.added, len(getattr(tx.output, "random_calls", ())), len(getattr(effects, "tensor_hooks", ()))


@functools.cache
def _counting() -> type:
    """Dynamo's set of what was changed, which counts how often: of an object that changes again it says nothing."""
    base: type = _SET()

    class Counting(base):
        added = 0

        def add(self, value: object) -> None:
            self.added += 1
            super().add(value)

    return Counting


def _last(tx: Translator) -> fx.Node | None:
    graph = tx.output.graph
    if tx.output.current_tracer.graph is not graph:  # inside of an operator that takes functions
        return None
    node = next(iter(reversed(graph.nodes)), None)
    return None if node is None or node.op == "placeholder" else node


def _known_to_us(method: Callable) -> Callable:
    """`Unlike`, too, where this torch's private parts are not as we know them: the block is traced, and none is repeated from
    then on."""

    @functools.wraps(method)
    def wrapped(*args: Variable, **kwargs: Variable) -> Variable:
        try:
            return method(*args, **kwargs)
        except Unlike:
            raise
        except Exception as error:
            if isinstance(error, _RAISED() or ()):  # Dynamo's own: it starts anew, or ends the graph here
                raise
            _CHECKS.fails()
            raise Unlike(f"{type(error).__name__}: {error}") from error

    return wrapped


# -- a stretch ---------------------------------------------------------------------------------------------------


class Beginning:
    """A stretch while it is traced: made where it begins."""

    @_known_to_us
    def __init__(self, tx: Translator, source: Source, given: Given):
        self.source, self.values, self.ambient, self.state = source, _Arguments(*given), _ambient(tx), _state(tx)
        self.before = _last(tx)
        if self.before is None:
            raise Unlike("nothing comes before it")
        self.recorded = _recorded(tx)

    @_known_to_us
    def ended(self, tx: Translator, out: Variable) -> Stretch:
        """The stretch, of what was traced since. `Unlike` if it cannot be repeated."""
        if (
            _ambient(tx) != self.ambient
            or _state(tx) != self.state
            or tx.output.current_tracer.graph is not tx.output.graph
        ):
            raise Unlike("it changes something outside")
        assert self.before is not None
        if any(_needs_grad(n) != needs for n, needs in self.recorded) or not self.values.unchanged():
            raise Unlike("it changes what kind of tensor something is")
        nodes, node = [], self.before.next
        while node.op != "root":
            if node.op not in ("call_function", "call_method") or "unbacked_bindings" in node.meta:
                raise Unlike(f"{node.op} {node.target}")
            _only_fakes(node)
            nodes.append(node)
            node = node.next
        return Stretch(tx, self, nodes, out)


class Stretch:
    """The nodes that Dynamo traced for one module, with the guards by which they follow from it."""

    def __init__(self, tx: Translator, begun: Beginning, nodes: list[fx.Node], out: Variable):
        self.source, self.values, self.ambient = begun.source, begun.values, begun.ambient
        self.state, self.nodes, self.out = begun.state, nodes, out
        self.made_of(out, lambda _, old: old)  # can it be made again
        reroot = _Rerooted(self.source, _NOWHERE)
        self.taken: list[
            tuple[fx.Node, Source]
        ] = []  # inputs of the graph that belong to the module, and where they are
        self.inside = set(nodes)
        for node in tx.output.graph.find_nodes(op="placeholder"):  # also one of which only the shape was read
            given = node.meta.get("grapharg")
            if given is not None and reroot(given.source) is _NOWHERE:
                if not isinstance(_value(node), torch.Tensor) or node in self.values.of:
                    raise Unlike(f"an input at {given.source.name}")
                self.taken.append((node, given.source))
        self.identities = Identities(tx, self.source, lambda place: reroot(place) is _NOWHERE, list(tx.output.guards))
        look = Looking(tx)
        self.ordered = [  # dicts of the module of which the order of their keys matters
            (source, list(look.at(source))) for source in tx.output.guard_on_key_order if reroot(source) != source
        ]
        self.checks = list(self._checks(tx, reroot))

    def _checks(self, tx: Translator, reroot: _Rerooted) -> Iterable[tuple[Guard, Callable | None]]:
        """The guards on what belongs to the module, each with a test of another value."""
        look = Looking(tx)
        built = {source for _, source in self.taken}
        for guard in tx.output.guards:
            source, kind = guard.originating_source, guard.create_fn_name()
            if reroot(source) == source or TABLE.search(guard.name):  # of another thing; of our own hooks
                continue
            if guard.inner_create_fn() is _DUPLICATE():
                yield guard, None
                continue
            check = _CHECKS().get(kind)
            if check is None or check is _SKIPPED() or not hasattr(check, "eval_fn"):
                raise Unlike(f"a guard of kind {kind}")
            if kind == _BUILT and source not in built:
                raise Unlike(f"a tensor at {source.name}")
            value = look.at(source)
            wanted = check.get_metadata_fn(guard, value)
            yield guard, functools.partial(_passes, check.eval_fn, wanted, type(value) if kind in _EXACT else None)

    @_known_to_us
    def again(self, tx: Translator, source: Source, values: Given, retold: Callable[[fx.Node], tuple]) -> Variable:
        """The stretch once more, for the module at `source`: its result. `retold` gives the arguments of a copied node.

        `Unlike` if it does not hold there; the graph computes what it did then."""
        given = _Arguments(*values)
        if (
            given.told != self.values.told
            or _ambient(tx) != self.ambient
            or _state(tx) != self.state
            or _last(tx) is None
        ):
            raise Unlike("other arguments")
        arguments = [retold(node) for node in self.nodes]
        reroot, inside = _Rerooted(self.source, source), _Rerooted(source, _NOWHERE)
        self.identities.check(tx, source, lambda place: inside(place) is _NOWHERE, reroot)
        fresh, ordered, last = self._holding(tx, reroot), [reroot(source) for source, _ in self.ordered], _last(tx)
        nodes = dict(zip(self.values.nodes, given.nodes, strict=True)) | self._inputs(tx, reroot)
        _INSTALL()(*fresh)
        tx.output.guard_on_key_order.update(ordered)
        try:
            self._copy(tx, nodes, arguments)
            return self._result(tx, nodes, given)
        except BaseException:
            for node in reversed(tx.output.graph.nodes):
                if node is last:
                    break
                tx.output.graph.erase_node(node)
            raise

    def _holding(self, tx: Translator, reroot: _Rerooted) -> list[Guard]:
        """The guards on another module, all of which hold."""
        fresh: list[Guard] = []
        look = Looking(tx)
        for guard, holds in self.checks:
            place = reroot(guard.originating_source)
            try:
                value = look.at(place)
                if holds is None:
                    partial: Variable = guard.create_fn
                    other = reroot(partial.keywords["source_b"])
                    same = value is look.at(other)
                    create: Callable = functools.partial(_DUPLICATE(), source_b=other)
                else:
                    same, create = holds(value), guard.create_fn
            except Exception as error:
                raise Unlike(f"no {place.name}") from error
            if not same:
                raise Unlike(f"{guard.create_fn_name()} on {place.name}")
            if guard.create_fn_name() != _BUILT:
                fresh.append(dataclasses.replace(guard, originating_source=place, create_fn=create, _hash=None))
        if any(list(look.at(reroot(s))) != keys for s, keys in self.ordered):
            raise Unlike("the order of a dict")
        return fresh

    def _inputs(self, tx: Translator, reroot: _Rerooted) -> dict[fx.Node, fx.Node]:
        """The inputs of the graph that belong to another module, in place of those of this one."""
        look = Looking(tx)
        nodes: dict[fx.Node, fx.Node] = {}
        for node, old in self.taken:
            place = reroot(old)
            variable = _BUILDER()(tx, place)(look.at(place))
            new = variable.as_proxy().node
            if described(_value(new)) != described(_value(node)):
                raise Unlike(f"another tensor at {place.name}")
            nodes[node] = new
        return nodes

    def _copy(self, tx: Translator, nodes: dict[fx.Node, fx.Node], retold: list[tuple]) -> None:
        stays = {n: n for node in self.nodes for n in node.all_input_nodes if n not in nodes}
        known = {n: new for n, new in (nodes | stays).items() if n not in self.inside}
        values = _Values(tx, [(_value(old), _value(new)) for old, new in known.items()])
        for node, args in zip(self.nodes, retold, strict=True):
            made = tx.output.graph.node_copy(node, lambda n: nodes.get(n, n))
            made.args = fx.map_arg(args, lambda n: nodes.get(n, n))
            made.meta = copy.copy(node.meta)
            if "example_value" in made.meta:
                made.meta["example_value"] = values.like(made.meta["example_value"])
            nodes[node] = made

    def _result(self, tx: Translator, nodes: dict[fx.Node, fx.Node], given: _Arguments) -> Variable:
        made: dict[fx.Node, Variable] = {}

        def variable(node: fx.Node, old: Variable) -> Variable:
            new = nodes.get(node, node)
            if new in given.of:
                return given.of[new]
            if node not in self.inside:  # as it is: no node of this stretch
                return old
            if new not in made:
                value = new.meta.pop("example_value")
                proxy = fx.Proxy(new, tx.output.current_tracer)
                made[new] = _WRAP()(tx=tx, proxy=proxy, example_value=value)
            return made[new]

        return self.made_of(self.out, variable)

    def made_of(self, out: Variable, variable: Callable[[fx.Node, Variable], Variable]) -> Variable:
        """A result of the same structure, with other tensors."""
        tensor, _, constant, several = (name() for name in _VARIABLES)
        if type(out) is tensor:
            return variable(out.as_proxy().node, out)
        if type(out) is several:
            return several([self.made_of(item, variable) for item in out.items])
        if type(out) is constant:
            return out
        raise Unlike(f"a result that is {type(out).__name__}")


def _value(node: fx.Node) -> Variable:
    """The fake value of a node."""
    return node.meta.get("example_value")


def _only_fakes(node: fx.Node) -> None:
    """Not those inside of `torch.func`, nor subclasses."""
    found: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, found.append, _value(node))
    if any(type(x) is not _FAKE() for x in found):
        raise Unlike(f"{node} is no plain tensor")


def _needs_grad(node: fx.Node) -> bool:
    return getattr(_value(node), "requires_grad", False)


def _recorded(tx: Translator) -> list[tuple[fx.Node, bool]]:
    return [(node, _needs_grad(node)) for node in tx.output.graph.nodes]


def _passes(test: Callable, wanted: object, kind: type | None, value: object) -> bool:
    exact = kind is None or (type(value) is kind and repr(value) == repr(wanted))
    return exact and bool(test(value, wanted))


_NOWHERE: Any = object()


class _Rerooted:
    """Where a thing of one module lies in another: `layers[0].mlp.scale` -> `layers[1].mlp.scale`."""

    def __init__(self, old: Source, new: Source):
        self.known: dict[Source, Source] = {old: new}

    def __call__(self, source: Source) -> Source:
        found = self.known.get(source)
        if found is None:
            fields = [(f.name, getattr(source, f.name)) for f in dataclasses.fields(source)]  # type: ignore[arg-type]
            changed = {name: self(x) for name, x in fields if isinstance(x, _source())}
            changed = {name: x for name, x in changed.items() if x is not getattr(source, name)}
            if _NOWHERE in changed.values():
                found = _NOWHERE
            else:
                found = dataclasses.replace(source, **changed) if changed else source  # type: ignore[type-var]
            self.known[source] = found
        return found


def _source() -> type:
    from torch._guards import Source

    return Source


class _Values:
    """Fake values like others: tensors that share memory do so here, and one that was an input stands for the input."""

    def __init__(self, tx: Translator, given: list[tuple[torch.Tensor, torch.Tensor]]):
        self.mode: contextlib.AbstractContextManager = tx.fake_mode
        self.known = {id(old): new for old, new in given if isinstance(old, torch.Tensor)}
        self.held = [old for old, _ in given]
        self.memory = {memory(old): new.untyped_storage() for old, new in given if _strided(old)}

    def like(self, value: object) -> object:
        return tree_map_only(torch.Tensor, self._tensor, value)

    def _tensor(self, x: torch.Tensor) -> torch.Tensor:
        if id(x) not in self.known:
            self.held.append(x)
            self.known[id(x)] = self._made(x)
        return self.known[id(x)]

    def _made(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            made = self._plain(x)
        if x.requires_grad:
            made.requires_grad_()
            if not x.is_leaf:
                with self.mode, torch.enable_grad():
                    made = made.view_as(made)
        return made

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        if not _strided(x) or any(isinstance(n, torch.SymInt) for n in x.shape):
            with self.mode:
                return torch.empty_like(x)
        size = x.untyped_storage().nbytes()
        storage = self.memory.setdefault(memory(x), torch.UntypedStorage(size, device="meta"))
        made = torch.empty(0, dtype=x.dtype, device="meta").set_(storage, x.storage_offset(), x.shape, x.stride())
        return _FAKE()(self.mode, made, x.device)


def _strided(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.layout is torch.strided
