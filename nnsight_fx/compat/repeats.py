"""Dynamo: a stretch of a trace that belongs to one module, recorded once and put into the graph again for another module.

What Dynamo traces follows from what it guards, from the arguments and from the modes in force. So a stretch holds for another
module when each guard on the first one holds for it, too, with the same arguments otherwise. `capture/repeats.py` says which
modules are tried.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.fx as fx

from . import given as gave
from . import shelves
from .copies import NOWHERE, Rerooted, Values
from .given import Arguments, Call, classes, described, only_fakes, value_of
from .guards import TABLE
from .identities import Identities, Looking, Translator, Unlike, Variable, named
from .probe import Name
from .shelves import Holdings, Tally
from .transformers import COLLECTING

if TYPE_CHECKING:
    from torch._guards import Guard, Source

_CHECKS = Name("torch._dynamo.guards.GUARD_VALUE_DISPATCH", gave.EACH)
_SKIPPED = Name("torch._dynamo.guards.SKIP_GUARD", gave.EACH)
_INSTALL = Name("torch._dynamo.guards.install_guard", gave.EACH)
_DUPLICATE = Name("torch._dynamo.guards.GuardBuilder.DUPLICATE_INPUT", gave.EACH)
_BUILDER = Name("torch._dynamo.variables.builder.VariableBuilder", gave.EACH)
_WRAP = Name("torch._dynamo.variables.builder.wrap_fx_proxy", gave.EACH)
_SOURCE = Name("torch._guards.Source.get_value", gave.EACH)
_MUTATED = Name("torch._dynamo.side_effects.SideEffects.mutated_sources", gave.EACH)
_RAISED = Name("torch._dynamo.exc.TorchDynamoException", gave.EACH)
_SET = Name("torch.utils._ordered_set.OrderedSet", gave.EACH)
_MODES = Name("torch._dynamo.symbolic_convert.InstructionTranslatorBase.symbolic_torch_function_state", gave.EACH)
_EXACT = ("EQUALS_MATCH", "CONSTANT_MATCH")  # compare by `==`, which a bool and a number pass, and zeros of either sign
_BUILT = "TENSOR_MATCH"  # what Dynamo installs itself when it takes a tensor for an input


def known() -> bool:
    """Has this torch all that it takes?"""
    names = (_CHECKS, _SKIPPED, _INSTALL, _DUPLICATE, _BUILDER, _WRAP, _SOURCE, _SET, *gave.NAMES)
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
    def __init__(self, tx: Translator, source: Source, call: Call):
        self.source, self.ambient, self.state, self.held = source, _ambient(tx), _state(tx), Holdings(tx)
        self.before = _last(tx)
        if self.before is None:
            raise Unlike("nothing comes before it")
        self.recorded = _recorded(tx)
        self.values = Arguments(call, self.held)
        self.values.follow()
        self.watch = Tally(self.values.lists)

    @_known_to_us
    def ended(self, tx: Translator, out: Variable) -> Stretch:
        """The stretch, of what was traced since. `Unlike` if it cannot be repeated."""
        if (
            _ambient(tx) != self.ambient
            or _state(tx) != self.state
            or self.watch.whole
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
            only_fakes(node)
            nodes.append(node)
            node = node.next
        return Stretch(tx, self, nodes, out)

    def close(self) -> None:
        """It is traced no longer."""
        self.watch.close()


class Stretch:
    """The nodes that Dynamo traced for one module, with the guards by which they follow from it."""

    def __init__(self, tx: Translator, begun: Beginning, nodes: list[fx.Node], out: Variable):
        self.source, self.values, self.ambient = begun.source, begun.values, begun.ambient
        self.state, self.nodes, self.out = begun.state, nodes, out
        self.taken = [(self.values.number(listed), key) for listed, key in begun.watch.taken]
        self.got = self._got(tx, self.values, lambda key: key)
        self.writes = [(self.values.number(each), *rest) for each, *rest in begun.held.changed(Holdings(tx))]
        for made in (out, *(value for *_, value in self.writes)):  # can it be made again
            self._made_of(made, self.values, lambda _, old: old)
        reroot = Rerooted(self.source, NOWHERE)
        self.inputs: list[tuple[fx.Node, Source]] = []  # of the graph, that belong to the module, and where they are
        self.inside = set(nodes)
        for node in tx.output.graph.find_nodes(op="placeholder"):  # also one of which only the shape was read
            given = node.meta.get("grapharg")
            if given is not None and reroot(given.source) is NOWHERE:
                if not isinstance(value_of(node), torch.Tensor) or node in self.values.of:
                    raise Unlike(f"an input at {given.source.name}")
                self.inputs.append((node, given.source))
        self.identities = Identities(tx, self.source, lambda place: reroot(place) is NOWHERE, list(tx.output.guards))
        look = Looking(tx)
        self.ordered = [  # dicts of the module of which the order of their keys matters
            (source, list(look.at(source))) for source in tx.output.guard_on_key_order if reroot(source) != source
        ]
        self.checks = list(self._checks(tx, reroot))

    def _checks(self, tx: Translator, reroot: Rerooted) -> Iterable[tuple[Guard, Callable | None]]:
        """The guards on what belongs to the module, each with a test of another value."""
        look = Looking(tx)
        built = {source for _, source in self.inputs}
        keys = {key for _, key in self.taken if not isinstance(key, int)}
        chosen = {
            key for key in keys if not shelves.looked_at(tx, key)
        }  # numbers that say what is taken, and nothing else
        for guard in tx.output.guards:
            source, kind = guard.originating_source, guard.create_fn_name()
            if reroot(source) == source or TABLE.search(guard.name):  # of another thing; of our own hooks
                continue
            if source in chosen and kind == "CONSTANT_MATCH":
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

    def _got(self, tx: Translator, given: Arguments, reroot: Callable[[Source], Source]) -> list:
        """What a block takes from the lists that it was given."""
        look, told = Looking(tx), []
        for number, key in self.taken:
            place: shelves.Key = key if isinstance(key, int) else reroot(key)
            position = place if isinstance(place, int) else look.at(place)
            if type(position) is not int:
                raise Unlike(f"no whole number at {place}")
            told.append(given.tell(shelves.take(given.objects[number], place, position)))
        return told

    @_known_to_us
    def again(self, tx: Translator, source: Source, call: Call, retold: Callable[[fx.Node], tuple]) -> Variable:
        """The stretch once more, for the module at `source`: its result. `retold` gives the arguments of a copied node.

        `Unlike` if it does not hold there; the graph computes what it did then."""
        given, reroot = Arguments(call, Holdings(tx)), Rerooted(self.source, source)
        if (
            given.told != self.values.told
            or self._got(tx, given, reroot) != self.got
            or _ambient(tx) != self.ambient
            or _state(tx) != self.state
            or _last(tx) is None
        ):
            raise Unlike("other arguments")
        arguments = [retold(node) for node in self.nodes]
        inside = Rerooted(source, NOWHERE)
        self.identities.check(tx, source, lambda place: inside(place) is NOWHERE, reroot)
        fresh, ordered, last = self._holding(tx, reroot), [reroot(source) for source, _ in self.ordered], _last(tx)
        inputs = self._inputs(tx, reroot)
        nodes = dict(zip(self.values.nodes, given.nodes, strict=True)) | {
            node: made.as_proxy().node for node, made in inputs.items()
        }
        _INSTALL()(*fresh)
        tx.output.guard_on_key_order.update(ordered)
        try:
            self._copy(tx, nodes, arguments)
            variables = given.of | {made.as_proxy().node: made for made in inputs.values()}
            return self._result(tx, nodes, variables, given)
        except BaseException:
            for node in reversed(tx.output.graph.nodes):
                if node is last:
                    break
                tx.output.graph.erase_node(node)
            raise

    def _holding(self, tx: Translator, reroot: Rerooted) -> list[Guard]:
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
        fresh += [shelves.guard(reroot(key)) for _, key in self.taken if not isinstance(key, int)]
        return fresh

    def _inputs(self, tx: Translator, reroot: Rerooted) -> dict[fx.Node, Variable]:
        """The inputs of the graph that belong to another module, in place of those of this one."""
        look = Looking(tx)
        inputs: dict[fx.Node, Variable] = {}
        for node, old in self.inputs:
            place = reroot(old)
            inputs[node] = variable = _BUILDER()(tx, place)(look.at(place))
            if described(value_of(variable.as_proxy().node)) != described(value_of(node)):
                raise Unlike(f"another tensor at {place.name}")
        return inputs

    def _copy(self, tx: Translator, nodes: dict[fx.Node, fx.Node], retold: list[tuple]) -> None:
        stays = {n: n for node in self.nodes for n in node.all_input_nodes if n not in nodes}
        known = {n: new for n, new in (nodes | stays).items() if n not in self.inside}
        values = Values(tx, [(value_of(old), value_of(new)) for old, new in known.items()])
        for node, args in zip(self.nodes, retold, strict=True):
            made = tx.output.graph.node_copy(node, lambda n: nodes.get(n, n))
            made.args = fx.map_arg(args, lambda n: nodes.get(n, n))
            made.meta = copy.copy(node.meta)
            if "example_value" in made.meta:
                made.meta["example_value"] = values.like(made.meta["example_value"])
            nodes[node] = made

    def _result(
        self, tx: Translator, nodes: dict[fx.Node, fx.Node], variables: dict[fx.Node, Variable], given: Arguments
    ) -> Variable:
        """What the block gives; what it changes is then changed."""

        def variable(node: fx.Node, old: Variable) -> Variable:
            new = nodes.get(node)
            if new is None:  # as it is: no node of this stretch
                return old
            if new not in variables:
                value = new.meta.pop("example_value")
                proxy = fx.Proxy(new, tx.output.current_tracer)
                variables[new] = _WRAP()(tx=tx, proxy=proxy, example_value=value)
            return variables[new]

        out = self._made_of(self.out, given, variable)
        writes = [(number, name, self._made_of(x, given, variable), how) for number, name, how, x in self.writes]
        for number, name, value, how in writes:
            tx.output.side_effects.store_attr(given.objects[number], name, value, how)
        return out

    def _made_of(self, out: Variable, given: Arguments, variable: Callable[[fx.Node, Variable], Variable]) -> Variable:
        """A value of the same structure, with other tensors, numbers and objects."""
        tensor, number, constant, several = classes()
        if type(out) is tensor or type(out) is number:
            return variable(out.as_proxy().node, out)
        if type(out) is several:
            return several([self._made_of(item, given, variable) for item in out.items])
        if type(out) is constant:
            return out
        return given.objects[self.values.number(out)]


def _needs_grad(node: fx.Node) -> bool:
    return getattr(value_of(node), "requires_grad", False)


def _recorded(tx: Translator) -> list[tuple[fx.Node, bool]]:
    return [(node, _needs_grad(node)) for node in tx.output.graph.nodes]


def _passes(test: Callable, wanted: object, kind: type | None, value: object) -> bool:
    exact = kind is None or (type(value) is kind and repr(value) == repr(wanted))
    return exact and bool(test(value, wanted))
