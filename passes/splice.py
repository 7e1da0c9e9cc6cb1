"""Copy each recorded operation to its place among the model's nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from nnsight_fx.capture.markers import site, supply
from nnsight_fx.errors import MissedSiteError, PlanMismatchError
from nnsight_fx.tracing.encode import Identity, Keep, Key
from nnsight_fx.tracing.interleave import Cut as CutHere
from nnsight_fx.tracing.interleave import Firing, Interleaver, gather
from nnsight_fx.tracing.plan import MODULE, SKIP, Op, fx_target

from .job import Cut, Job, constant, fetch, parameter, put_rows, rows


def splice(gm: fx.GraphModule, job: Job) -> int:
    """Interleave the plan with the segment's nodes.

    ```
    h   = linear(x, w, b)                     h   = linear(x, w, b)
    s   = site(h, "l", "output", 0, True)     s   = site(h, "l", "output", 0, True)
    out = relu(s)                     ->      c   = constant(0, "tensor")
    return (out,)                             add = s.add(c)
                                              out = relu(add)
                                              return (out,)
    ```

    for `model.l.output = model.l.output + v`. Reads give the marker node, writes take over its later uses, everything
    between is copied right behind it; tensors and numbers of the body become `constant` nodes, values from elsewhere
    `fetch` nodes. At an operation that needs real values the job gets a `cut`, where the plan stops the model a `stop`:
    nothing is copied behind either.

    Does not fire when: no site of the plan is in the segment. Markers stay; `erase` removes them.
    """
    weaver = Weaver(gm, job)
    rewrites = 0
    group: list[fx.Node] = []
    for index, node in enumerate(list(gm.graph.nodes)):
        if node.op != "call_function" or node.target not in (site, supply):
            continue
        if node.target is supply:
            node.replace_all_uses_with(weaver.supplied_leaf(node))
            gm.graph.erase_node(node)
            rewrites += 1
            continue
        group.append(node)
        if node.args[4]:
            rewrites += weaver.pass_site(group, index)
            if weaver.stopping:
                job.stop = node
            if job.cut is not None or weaver.stopping:
                break
            group = []
    job.exit = weaver
    needed = weaver.wanted()
    for value in needed:
        found = weaver.env.get(value)
        if isinstance(found, fx.Node):
            job.exports[value] = found
    return rewrites


class Weaver(Interleaver):
    """The plan's schedule over `fx` nodes: its values are nodes, its operations emit nodes."""

    live = False

    def __init__(self, gm: fx.GraphModule, job: Job):
        super().__init__(job.plan)
        self.gm, self.job, self.graph = gm, job, gm.graph
        self.at, self.done, self.counts = list(job.entry.at), set(job.entry.done), dict(job.entry.counts)
        self.at += [0] * (len(job.plan.workers) - len(self.at))
        self.skipped = dict(job.entry.skipped)
        self.closed = job.closed
        self.fetched: dict[tuple, fx.Node] = {}
        self.supplied: dict[tuple, list] = {}
        self.made: set[tuple[int, int]] = set()

    # -- sites ---------------------------------------------------------------------------------------------------

    def pass_site(self, group: list[fx.Node], index: int) -> int:
        """One site, all its tensor leaves at once, behind the last marker."""
        path, kind = str(group[0].args[1]), str(group[0].args[2])
        here = (path, kind, self.count(path, kind))
        leaves: list[Any] = [None] * (max(n.args[3] for n in group) + 1)  # type: ignore[type-var]
        for node in group:
            leaves[node.args[3]] = node  # type: ignore[index]
        before = list(leaves)
        emitted = len(self.job.emitted)
        with self.graph.inserting_before(group[-1].next):
            try:
                self.fire(Firing(here, leaves, None))
            except CutHere:
                self.job.cut = Cut(here, index, leaves)
        if self.stopping and self.job.begun:
            self.job.cut = Cut(here, index, leaves)
        if here in self.supplied and here not in self.job.half:
            n = next(n for n in self.plan.touches[here] if self.plan.ops[n].kind == "write")
            raise PlanMismatchError(
                f"{self.job.lines[n] if n < len(self.job.lines) else 'a write'}: `{'.'.join(p for p in here[:2] if p)}` is written with "
                "another shape, dtype or structure after a sync point has begun the captured run, which cannot take it any more. "
                "Write it before the sync point, or trace with `compile=False`."
            )
        if here not in self.supplied and self.job.cut is None:
            for old, new in zip(before, leaves, strict=True):
                if new is not old:
                    old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in self.job.emitted)
        return len(self.job.emitted) - emitted

    def _write(self, op: Op, firing: Firing | None) -> None:
        assert firing is not None
        _, batched, fits = op.extra
        new = list(self.arguments(op)[0][0])
        if fits:
            for i, value in enumerate(new):
                if not (isinstance(value, Keep) and value.index == i):
                    firing.leaves[i] = self.put_rows(
                        firing.leaves[i], value, op.invoke, batched[i] if batched else None
                    )
        else:
            old = list(firing.leaves)
            firing.leaves[:] = [
                (old[v.index] if v.index < len(old) else None) if isinstance(v, Keep) else v for v in new
            ]
            self.supplied[firing.site] = firing.leaves

    def supplied_leaf(self, node: fx.Node) -> Any:
        """The value of a `supply` node: a leaf of a written or skipped output."""
        path, kind, call, leaf = node.args
        here = (path, kind, call)
        if here not in self.supplied:
            with self.graph.inserting_before(node):
                self.supplied[here] = self._gathered(self._parts(str(path), int(call)))  # type: ignore[arg-type]
        value = self.supplied[here][leaf]  # type: ignore[index]
        return value

    def _parts(self, path: str, call: int) -> dict[int, tuple]:
        at = (path, "output", call)
        parts = self.skip_parts(at, self.job.lines)
        if parts is None:
            n = next(n for n in self.plan.touches[at] if self.plan.ops[n].kind == SKIP)
            raise MissedSiteError(
                f"{self.job.lines[n] if n < len(self.job.lines) else 'a skip'}: `{path}` is skipped, but the skip value is not "
                "there yet when the model calls it: an earlier line waits for a later site. Move the skip in front of it."
            )
        return parts

    def _gathered(self, parts: dict[int, tuple]) -> list:
        """A skipped module's output: each invoke's rows, concatenated."""
        ordered = [parts[i] for i in sorted(parts)]
        if len(ordered) == 1:
            return ordered[0][1]
        columns = zip(*(p[1] for p in ordered), strict=True)
        return [
            self._emit("call_function", torch.cat, (list(c),)) if isinstance(c[0], fx.Node) else c[0] for c in columns
        ]

    # -- values --------------------------------------------------------------------------------------------------

    def ready(self, n: int) -> bool:
        return all(v in self.env or v in self.job.entry.known for v in self.plan.needs[n])

    def lookup(self, key: Key) -> Any:
        if key[0] != "v":
            return self.constant(key)
        value = (key[1], key[2])
        if value in self.env:
            return self.env[value]
        return self._source(("fetch", value), fetch, value)

    def constant(self, key: Key) -> Any:
        if key[0] == "s":
            raise CutHere  # a size that only the call knows: the operation runs live
        kind = key[2] if key[0] == "n" else "tensor"
        return self._source(("constant", key[1]), constant, (key[1], kind))

    def _source(self, key: tuple, target: Callable, args: tuple) -> fx.Node:
        """A node for something from outside, made once, in front of everything."""
        if key not in self.fetched:
            first = next(n for n in self.graph.nodes if n.op != "placeholder")
            with self.graph.inserting_before(first):
                self.fetched[key] = self._emit("call_function", target, args)
        return self.fetched[key]

    def _emit(self, op: str, target: Any, args: tuple = (), kwargs: dict | None = None) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs or {})
        self.job.emitted.add(node)
        return node

    def rows(self, leaf: Any, invoke: int, batched: bool | None) -> Any:
        group = self._group(leaf, invoke, batched)
        return (
            leaf
            if group is None
            else self._emit("call_function", rows, (leaf, *group, self.plan.groups.total, batched))
        )

    def put_rows(self, leaf: Any, new: Any, invoke: int, batched: bool | None) -> Any:
        group = self._group(leaf, invoke, batched)
        if group is None:
            return new
        return self._emit("call_function", put_rows, (leaf, new, *group, self.plan.groups.total, batched))

    def _group(self, leaf: Any, invoke: int, batched: bool | None) -> tuple[int, int] | None:
        groups = self.plan.groups.rows
        return groups[invoke] if invoke < len(groups) and isinstance(leaf, fx.Node) and batched is not False else None

    # -- operations ----------------------------------------------------------------------------------------------

    def check(self, n: int, leaves: list, expected: tuple) -> None:
        for leaf, want in zip(leaves, expected, strict=False):
            fake = leaf.meta.get("example_value") if isinstance(leaf, fx.Node) else None
            if fake is not None and want is not None and (fake.dtype != want[1] or fake.dim() != len(want[0])):
                raise CutHere  # not what was guessed: the live read says so

    def perform(self, n: int, firing: Firing | None) -> None:
        if self.plan.ops[n].kind == "read" and (n, -1) in self.plan.last_use:
            raise CutHere
        super().perform(n, firing)

    def execute(self, n: int, op: Op) -> Any:
        args, kwargs = self.arguments(op)
        leave = self._enter(op.ambient)
        if op.kind == MODULE:
            node = self._module(op.target, args, kwargs)
        else:
            fn = op.target.obj if isinstance(op.target, Identity) else op.target
            kind, target, lead = fx_target(fn)
            target = target if kind == "call_method" or _printable(target) else FunctionCall(target)
            node = self._emit(kind, target, (*args, *lead), kwargs)
        leave()
        return n, node

    def _enter(self, ambient: Any) -> Callable[[], None]:
        """Emit the switch to an operation's own modes; the return emits the way back."""
        if ambient is None:
            return lambda: None
        base, undo = self.job.modes, []
        grad = ambient.grad and not ambient.inference
        if grad != base.grad:
            self._emit("call_function", torch._C._set_grad_enabled, (grad,))
            undo.append(lambda: self._emit("call_function", torch._C._set_grad_enabled, (base.grad,)))
        for (device, enabled, dtype), was in zip(ambient.autocast, base.autocast, strict=True):
            if (device, enabled, dtype) != was:
                token = self._emit(
                    "call_function", torch.amp.autocast_mode._enter_autocast, (device, dtype, enabled, True)
                )
                undo.append(lambda t=token: self._emit("call_function", torch.amp.autocast_mode._exit_autocast, (t,)))

        def leave() -> None:
            for step in reversed(undo):
                step()

        return leave

    def _module(self, path: str, args: tuple, kwargs: dict) -> fx.Node:
        """A module of the model called on values: its structure, on the model's own parameters."""
        assert self.job.skeleton is not None
        module = self.job.skeleton(path)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        given = {name: self._source(("parameter", path, name), parameter, (path, name)) for name in tensors}
        return self._emit("call_function", ModuleCall(path, module), (given, args, kwargs))

    def split(self, result: Any) -> tuple[list, Any]:
        n, node = result
        return [LeafOf(self, node, path) for path in _paths(self.plan.specs[n])], None

    def _keep(self, n: int, leaves: list, spec: Any) -> None:
        for j, leaf in enumerate(leaves):
            if (n, j) in self.plan.last_use or not self.closed:
                self.env[(n, j)] = leaf() if isinstance(leaf, LeafOf) else leaf
                self.made.add((n, j))

    def wanted(self) -> list[tuple[int, int]]:
        """The values made here that leave the segment: saved, used by what is still to come, or, while the plan may grow, any."""
        used = {v for n, needed in enumerate(self.plan.needs) if n not in self.done for v in needed}
        return sorted(v for v in self.made if v in self.plan.saved or v in used or not self.closed)

    def _release(self, n: int) -> None:
        pass


class LeafOf:
    """A leaf of an operation's result, taken out when something uses it."""

    def __init__(self, weaver: Weaver, node: fx.Node, path: tuple):
        self.weaver, self.node, self.path = weaver, node, path

    def __call__(self) -> fx.Node:
        import operator

        node = self.node
        for step in self.path:
            node = self.weaver._emit("call_function", operator.getitem, (node, step))
        return node


def _paths(spec: Any) -> list[tuple]:
    """The indices that lead to each leaf of a result."""
    if spec is None:
        return [()]
    kind, _, keys, specs = spec
    steps = keys if kind in ("dict", "dataclass") else range(len(specs))
    return [(step, *rest) for step, s in zip(steps, specs, strict=True) for rest in _paths(s)]


def _printable(fn: Callable) -> bool:
    """Does `fx`'s generated code find this function by its name?"""
    import sys

    module = sys.modules.get(getattr(fn, "__module__", None) or "")
    return module is None or getattr(module, getattr(fn, "__name__", ""), None) is fn


class FunctionCall:
    """A function that has no importable name: a bound method, a local function."""

    def __init__(self, fn: Callable):
        self.fn = fn
        self.__name__ = self.__qualname__ = f"call_{getattr(fn, '__name__', 'function')}"
        self.__module__ = __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)


class ModuleCall:
    """A module as a function of its parameters. Holds structure only, on fake tensors."""

    def __init__(self, path: str, module: torch.nn.Module):
        self.module = module
        self.__name__ = self.__qualname__ = "module_" + (path.replace(".", "_") or "root")
        self.__module__ = __name__

    def __call__(self, tensors: dict, args: tuple, kwargs: dict) -> Any:
        return torch.func.functional_call(self.module, dict(tensors), args, dict(kwargs))  # fx gives immutable ones


__all__ = ["Weaver", "gather", "splice"]
