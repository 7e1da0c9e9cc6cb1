"""Cut a graph at sites, and make equal pieces one submodule."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Hashable

import torch
import torch.fx as fx

from nnsight_fx.capture.marker import marker_of, site
from nnsight_fx.compat.graphs import OpOverload
from nnsight_fx.plan.verbs import Site

from .effects import changes
from .job import Job


def outline(
    gm: fx.GraphModule,
    job: Job | None = None,
    *,
    at: Collection[Site] = (),
    before: Collection[fx.Node] = (),
    apart: Collection[Callable] = (),
    alike: Callable[[fx.Node], Hashable] | None = None,
    spare: bool = False,
) -> int:
    """Put what lies between the sites `at`, or in front of the nodes `before`, into submodules; return how many calls of them
    there are.

    ```
    h0 = relu(linear(x, w0))                  r0 = region_0(x, w0);   h0 = r0[0]
    s0 = site(h0, "l.0", "output", 0, True)   s0 = site(h0, "l.0", "output", 0, True)
    h1 = relu(linear(s0, w1))           ->    r1 = region_0(s0, w1);  h1 = r1[0]
    s1 = site(h1, "l.1", "output", 0, True)   s1 = site(h1, "l.1", "output", 0, True)
    return (s1,)                              return (s1,)
    ```

    Parameters are inputs of a region, and so is every value from outside; its outputs are what is used behind it. Regions
    that call the same functions on inputs of the same shapes are one submodule, to be compiled once. Other markers than
    those `at` are erased: what tells equal blocks apart is the path in them. Calls of functions that are `apart` stay, too.
    `alike` tells of what kind an input is, where not as capture saw it. With `spare` a region may give more than is used
    behind it, if as many others compute the same and give that: the last block, whose output is only looked at, is none of
    its own.

    Does not fire when: no region would have a tensor to give, or one would have to give something else (a size, a tuple).
    """
    pieces = _pieces(gm, set(at), before, apart)
    regions = [_Region(piece, alike or _facts) for piece in pieces]
    if not regions or any(not _gives_tensors(r) for r in regions):
        return 0
    unmark(gm, at)
    pieces = _pieces(gm, set(at), before, apart)
    gives = _joined([_Region(piece, alike or _facts) for piece in pieces]) if spare else {}
    known: dict[Hashable, str] = {}
    for piece in pieces:
        region = _Region(piece, alike or _facts)
        region.gives = gives.get(region.key, region.gives)
        if region.key not in known:
            known[region.key] = f"region_{len(known)}"
            gm.add_submodule(known[region.key], region.build(gm))
        region.replace(gm, known[region.key])
    return len(regions)


def _joined(regions: list[_Region]) -> dict[Hashable, tuple[int, ...]]:
    """By key, what regions give that can be calls of others: of those that give all of it, the most."""
    count = Counter(region.key for region in regions)
    found = {}
    for key in count:
        computes, gives = key
        wider = [k for k in count if k[0] == computes and set(k[1]) > set(gives) and count[k] >= count[key]]
        if wider:
            found[key] = max(wider, key=lambda k: (count[k], len(k[1])))[1]
    return found


def sink_views(gm: fx.GraphModule, before: list[fx.Node]) -> int:
    """Take views of what another piece has made, or been given, in each piece that uses them; return how many are taken anew.
    Pieces begin with the nodes `before`, which becomes those with which they begin now.

    ```
    h = mm(x, w);  v = view(h, [2, 3])            h = mm(x, w)
    a = sin(v)                             ->     v0 = view(h, [2, 3]);  a = sin(v0)
    ------------------------------------          ------------------------------------
    b = cos(v)                                    v1 = view(h, [2, 3]);  b = cos(v1)
    ```

    A view costs nothing where it is used, and something as an output beside its base: compilers make it anew at each call.

    Does not fire when: what the view is of is changed in place, which another time to take it would tell.
    """
    pieces = _pieces(gm, set(), before, ())
    where = {node: i for i, piece in enumerate(pieces) for node in piece}
    firsts = [piece[0] for piece in pieces]
    count = 0
    for node in reversed(gm.graph.nodes):
        if not _view(node) or node not in where:
            continue
        base = node.all_input_nodes[0]
        if any(changes(user) for n in (node, base) for user in n.users):
            continue
        home: dict[int, fx.Node] = {}
        for user in list(node.users):
            at = where.get(user)
            if at is None or at == where[node]:
                continue
            if at not in home:
                with gm.graph.inserting_before(firsts[at]):
                    home[at] = gm.graph.node_copy(node)
                before[:] = [home[at] if n is firsts[at] else n for n in before]
                firsts[at] = home[at]
                where[home[at]] = at
                count += 1
            user.replace_input_with(node, home[at])
        if not node.users:
            gm.graph.erase_node(node)
    return count


def _view(node: fx.Node) -> bool:
    """Does a node give a view, as its target says: an operation of aten, or an index without a tensor in it?"""
    if node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        kinds = {type(i) for i in index}
        return slice in kinds and kinds <= {slice, int, type(None), type(...)} and len(node.all_input_nodes) == 1
    return isinstance(node.target, OpOverload) and node.target.is_view


def seams(gm: fx.GraphModule) -> list[tuple[Site, list[fx.Node]]]:
    """The sites whose markers are in a graph, in order, each with its markers."""
    counts: dict[tuple[str, str], int] = {}
    found, group = [], []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is site:
            group.append(node)
            marker = marker_of(node)
            if marker.last:
                name = marker.name
                found.append(((*name, node.meta.get("call", counts.get(name, 0))), group))
                counts[name] = counts.get(name, 0) + 1
                group = []
    return found


def _pieces(
    gm: fx.GraphModule, at: set[Site], before: Collection[fx.Node], apart: Collection[Callable]
) -> list[list[fx.Node]]:
    """The nodes between the markers of the sites `at`, the calls that are `apart` and the nodes that begin a piece, in order."""
    cuts = {node for where, group in seams(gm) if where in at for node in group}
    pieces: list[list[fx.Node]] = [[]]
    for node in gm.graph.nodes:
        if node in cuts or node in before or node.op == "output" or node.target in apart:
            pieces.append([])
        if node in cuts or node.op == "output" or node.target in apart:
            continue
        if node.op not in ("placeholder", "get_attr"):
            pieces[-1].append(node)
    return [p for p in pieces if any(n.target is not site for n in p)]


def unmark(gm: fx.GraphModule, at: Collection[Site]) -> None:
    """Erase all markers but those of the sites `at`, which keep the number of their call."""
    for where, group in seams(gm):
        for node in group:
            if where in at:
                node.meta["call"] = where[2]
            else:
                node.replace_all_uses_with(marker_of(node).value)
                gm.graph.erase_node(node)


class _Region:
    """Nodes that follow one another, as a function."""

    def __init__(self, nodes: list[fx.Node], alike: Callable[[fx.Node], Hashable]):
        self.nodes, inside = nodes, set(nodes)
        inputs = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside)
        self.inputs = list(inputs)
        numbers = {n: i for i, n in enumerate([*self.inputs, *nodes])}
        self.computes: Hashable = (
            tuple(alike(n) for n in self.inputs),
            tuple((n.op, n.target, _described(n.args, numbers), _described(n.kwargs, numbers)) for n in nodes),
        )
        self.gives = tuple(i for i, n in enumerate(nodes) if any(u not in inside for u in n.users))

    @property
    def key(self) -> tuple[Hashable, tuple[int, ...]]:
        return self.computes, self.gives

    def build(self, root: fx.GraphModule) -> fx.GraphModule:
        graph = fx.Graph()
        mapped: dict[fx.Node, fx.Node] = {}
        for n in self.inputs:
            mapped[n] = graph.placeholder(n.name)
            mapped[n].meta = dict(n.meta)
        for n in self.nodes:
            mapped[n] = graph.node_copy(n, lambda a: mapped[a])
        graph.output(tuple(mapped[self.nodes[i]] for i in self.gives))
        return fx.GraphModule(root, graph)

    def replace(self, gm: fx.GraphModule, name: str) -> None:
        inside = set(self.nodes)
        with gm.graph.inserting_before(self.nodes[0]):
            call = gm.graph.call_module(name, tuple(self.inputs))
            for i, old in enumerate(self.nodes[n] for n in self.gives):
                if any(user not in inside for user in old.users):
                    new = gm.graph.call_function(operator.getitem, (call, i))
                    new.meta = dict(old.meta)
                    old.replace_all_uses_with(new)
        for node in reversed(self.nodes):
            gm.graph.erase_node(node)


def _gives_tensors(region: _Region) -> bool:
    """As far as capture could tell: of what a plan put there, it told nothing."""
    given = [region.nodes[i] for i in region.gives]
    return all(isinstance(_value(n), torch.Tensor) for n in given if "example_value" in n.meta)


def _value(node: fx.Node) -> object:
    while node.target is site:
        node = marker_of(node).value
    return node.meta.get("example_value")


def _facts(node: fx.Node) -> Hashable:
    value = _value(node)
    if isinstance(value, torch.Tensor):
        sizes = (*map(str, value.shape), "|", *map(str, value.stride()))
        return (sizes, value.dtype, value.device, value.requires_grad, node.meta.get("rows"))
    return str(value)


def _described(arg: fx.node.Argument, numbers: dict[fx.Node, int]) -> Hashable:
    """An argument by structure: nodes by their number, literals by type and value."""
    if isinstance(arg, fx.Node):
        return ("node", numbers[arg])
    if isinstance(arg, list | tuple):
        return (type(arg).__name__, *(_described(a, numbers) for a in arg))
    if isinstance(arg, dict):
        return ("dict", *((k, _described(v, numbers)) for k, v in arg.items()))
    if isinstance(arg, slice):
        return ("slice", *(_described(a, numbers) for a in (arg.start, arg.stop, arg.step)))
    try:
        hash(arg)
    except TypeError:
        return (type(arg), id(arg))
    return (type(arg), repr(arg) if isinstance(arg, float) else arg)
