"""Which values of a graph hold the positions, and may a position be computed without those behind it?

From sites where rows change (`at`) the dimension of the positions is followed through every operation, as `Rows` follows
that of the rows. An operation works on each position alone, or it is attention, which is causal or not: its mask tells.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.fx as fx

from .. import compat
from ..capture.marker import marker_of, site
from ..passes.causal import SCORES, Fact, Facts, is_attention, is_softmax
from ..passes.demand import take
from ..passes.outline import seams
from ..plan.verbs import Site
from .rows import Mixed, Rows


def positions(gm: fx.GraphModule, at: Collection[tuple[Site, int]]) -> Facts:
    """What is known of the values that differ from row to row where the leaves `at` do.

    The positions are dimension 1 of these leaves. Shapes and the rows' dimension are those on the nodes
    (`meta["example_value"]`, `meta["rows"]`). `Mixed` where an operation lets one position see another and is no attention.

    Where the number of positions is a symbol, the graph is followed with each of the numbers in `gm.meta["lengths"]`, and
    what is found must be the same.
    """
    seeds = {n for where, group in seams(gm) for n in group if (where, marker_of(n).leaf) in at}
    if not seeds:
        raise Mixed("nothing changes a row")
    first = next(n for n in gm.graph.nodes if n in seeds)
    marker = marker_of(first)
    shape = _shape(marker.value)
    if len(shape) < 2 or marker.value.meta.get("rows") != 0:
        raise Mixed(f"`{'.'.join(marker.name)}` has no positions in dimension 1")
    found = [_followed(gm, seeds, shape[1], numbers) for numbers in gm.meta.get("lengths", [{}])]
    if any(facts != found[0] for facts in found):
        raise Mixed("which values hold the positions depends on their number")
    return Facts(shape[1], found[0])


def _followed(gm: fx.GraphModule, seeds: set[fx.Node], size: int | torch.SymInt, numbers: dict) -> dict[fx.Node, Fact]:
    """The facts, found with these numbers for the symbols of the positions."""
    count = compat.symbols.size_at(size, numbers)
    if count is None:
        raise Mixed("the number of positions is not known")
    mode = compat.fakes.FakeTensorMode(allow_non_fake_inputs=True)
    follow = Rows(count, [], {count})
    follow.paused = True
    with torch.no_grad(), mode, follow:
        found = _Following(gm, seeds, follow)
        found.run(*[_of_one_row(n, numbers) for n in gm.graph.nodes if n.op == "placeholder"])
    return found.facts


def _of_one_row(node: fx.Node, numbers: dict) -> object:
    value, dim = node.meta.get("example_value"), node.meta.get("rows")
    if dim == "count":
        return 1
    if not isinstance(value, torch.Tensor):
        return compat.symbols.size_at(value, numbers) if isinstance(value, torch.SymInt) else value
    sizes = [1 if i == dim else compat.symbols.size_at(n, numbers) for i, n in enumerate(value.shape)]
    known = [n for n in sizes if n is not None]
    if len(known) < len(sizes):
        return None  # the positions that are chosen: they only go where one is taken of each row
    return torch.empty(known, dtype=value.dtype, device=value.device)


class _Following(fx.Interpreter):
    """Runs a graph on fakes of one row, and notes a `Fact` for each value that may differ."""

    def __init__(self, gm: fx.GraphModule, seeds: set[fx.Node], follow: Rows):
        super().__init__(gm)
        self.seeds, self.follow = seeds, follow
        self.facts: dict[fx.Node, Fact] = {}

    def run_node(self, n: fx.Node) -> object:
        given = [a for a in n.all_input_nodes if a in self.facts]
        if n.op == "output":
            return None
        if n.target is site:
            return self._site(n, bool(given))
        if not given:
            return super().run_node(n)
        if n.target is take or any(self.facts[a].kind == "one" for a in given):
            return self._one(n, given)
        if is_attention(n):
            return self._attention(n)
        if any(self.facts[a].kind == SCORES for a in given) or n.target in (torch.matmul, operator.matmul):
            value = self._weights(n)
            if value is not None:
                return value
        return self._alone(n, given)

    def _site(self, n: fx.Node, tainted: bool) -> object:
        marker = marker_of(n)
        value = self.env[marker.value]
        if tainted:
            self.facts[n] = self.facts[marker.value]
        elif n in self.seeds:
            value = torch.empty_like(value)  # another tensor: the clean run's is used, too
            if value.dim() < 2 or value.shape[1] != self.follow.rows:
                raise Mixed(f"`{'.'.join(marker.name)}` has no positions in dimension 1")
            self._holds(n, value, 1)
        return value

    def _one(self, n: fx.Node, given: list[fx.Node]) -> object:
        """Behind the choice of one position of each row."""
        if any(a.meta.get("rows") is not None and a not in self.facts for a in n.all_input_nodes if not _count(a)):
            raise Mixed(f"`{n.name}` takes rows of the clean run to those of the others")
        if n.target is take and n.args[0] not in self.facts:
            raise Mixed("positions are chosen of what no row changes")
        self.facts[n] = Fact("one")
        return self.env[n.args[0]][:, :1] if n.target is take else super().run_node(n)  # type: ignore[index]

    def _alone(self, n: fx.Node, given: list[fx.Node]) -> torch.Tensor | list | tuple:
        """An operation on each position alone; what the clean run has for each position may be lifted to take part."""
        why: Mixed | None = None
        for lifted in self._liftings(n, given):
            old = {x: self.env[x] for x, _ in lifted}
            try:
                for x, place in lifted:
                    self.env[x] = torch.empty_like(old[x])
                    if place >= 0 and self.env[x].shape[place] == self.follow.rows:
                        self.follow.dims[self.env[x]] = place
                self.follow.paused = False
                value = super().run_node(n)
            except Mixed as error:
                why = why or error
                continue
            finally:
                self.follow.paused = True
                self.env.update(old)
            return self._note(n, value, tuple(x for x, _ in lifted))
        raise why or Mixed(f"`{n.name}` cannot be followed")

    def _note(self, n: fx.Node, value: object, lifted: tuple) -> torch.Tensor | list | tuple:
        if isinstance(value, torch.Tensor):
            self._holds(n, value, self.follow.dim(value), lifted)
        elif isinstance(value, list | tuple) and all(isinstance(x, torch.Tensor) for x in value):
            self.facts[n] = Fact("many", lifted=lifted)
        else:
            raise Mixed(f"`{n.name}` makes a number of what differs from row to row")
        return value

    def _holds(self, n: fx.Node, value: torch.Tensor, dim: int | None, lifted: tuple = (), kind: str = "") -> None:
        rows = (marker_of(n).value if n.target is site else n).meta.get("rows")
        if dim is None or value.shape[dim] != self.follow.rows:
            raise Mixed(f"`{n.name}` does not hold the positions in a dimension of their own")
        if n.meta.get("mixed"):
            rows = dim
        if not isinstance(rows, int):
            raise Mixed(f"`{n.name}` does not hold the rows")
        self.follow.dims[value] = dim
        self.facts[n] = Fact(kind, dim, rows, lifted)

    def _liftings(self, n: fx.Node, given: list[fx.Node]) -> Iterator[list[tuple[fx.Node, int]]]:
        """The values of the clean run to be laid out like those that differ: those with rows, then those with positions, too."""
        known = [(self.facts[a], self.env[a]) for a in given if isinstance(self.env[a], torch.Tensor)]
        clean = [a for a in n.all_input_nodes if a not in self.facts and isinstance(self.env[a], torch.Tensor)]
        rowed = [a for a in clean if a.meta.get("rows") is not None or a.meta.get("mixed")]
        if not known:
            if rowed:
                raise Mixed(f"`{n.name}` takes rows of the clean run to those of the others")
            yield []
            return
        fact, like = known[0]
        at, row = fact.position - like.dim(), fact.rows - like.dim()
        lifted: list[tuple[fx.Node, int]] = []
        for a in rowed:
            if at == row or a.meta.get("rows") != self.env[a].dim() + row:
                raise Mixed(f"`{n.name}` takes rows of the clean run to those of the others")
            lifted.append((a, self.env[a].dim() + at))
        if not lifted or all(p < 0 or self.env[a].shape[p] == 1 for a, p in lifted):
            yield lifted
        spread = [a for a in clean if self.env[a].dim() >= -at and self.env[a].shape[at] == self.follow.rows]
        if spread and at != row:
            yield [*lifted, *((a, self.env[a].dim() + at) for a in spread if a not in rowed)]

    # -- attention -----------------------------------------------------------------------------------------------------

    def _attention(self, n: fx.Node) -> object:
        """One operation: queries, keys and values hold the positions next to last, and no mask depends on them."""
        q, k, v = n.args[:3]
        rest = [a for a in n.all_input_nodes if a not in (q, k, v)]
        for x in (q, k, v):
            value, fact = self.env[x], self.facts.get(x)  # type: ignore[index, arg-type]
            own = fact is None or (fact.kind, fact.position, fact.rows) == ("", value.dim() - 2, 0)
            if value.dim() != 4 or value.shape[-2] != self.follow.rows or not own:
                raise Mixed(f"the queries, keys and values of `{n.name}` are not the positions'")
            if fact is None and x.meta.get("rows") != 0:  # type: ignore[union-attr]
                raise Mixed(f"`{n.name}` takes what is no row of the clean run")
        if any(a in self.facts for a in rest):
            raise Mixed(f"the mask of `{n.name}` differs from row to row")
        value = super().run_node(n)
        self._holds(n, value, value.dim() - 2, kind="")
        return value

    def _weights(self, n: fx.Node) -> object:
        """Attention written out: `matmul(q, k^T)`, what is done with its result, the softmax, `matmul(weights, v)`."""
        kinds = {a: self.facts[a].kind for a in n.all_input_nodes if a in self.facts}
        multiplies = n.target in (torch.matmul, operator.matmul, "matmul") and len(n.args) == 2
        if SCORES not in kinds.values():
            return self._scores(n) if multiplies else None
        if any(not self._inside(u) for a in kinds if kinds[a] == SCORES for u in a.users):
            raise Mixed(f"the attention weights of `{n.name}` are used outside of it")
        if any(_count(a) for a in n.all_input_nodes) or any(kind not in ("", SCORES) for kind in kinds.values()):
            raise Mixed(f"`{n.name}` cannot be followed")
        if multiplies:
            return self._values(n)
        if "" in kinds.values():
            raise Mixed(f"`{n.name}` takes more than the queries and keys to the weights")
        for dim in (-2, -1):
            if dim == -2 or not is_softmax(n):
                value = self._apart(n, dim)
        if value.shape[-2:] != (self.follow.rows,) * 2 or n.meta.get("rows") != 0:
            raise Mixed(f"`{n.name}` does something else with attention weights")
        self.facts[n] = Fact(SCORES, value.dim() - 2, 0)
        return value

    def _inside(self, n: fx.Node) -> bool:
        return n.target is not site and n.op != "output"

    def _apart(self, n: fx.Node, dim: int) -> Any:
        """Run it with queries (or keys) followed, a mask's too."""
        tensors = [a for a in n.all_input_nodes if isinstance(self.env[a], torch.Tensor)]
        held = [a for a in tensors if self.env[a].dim() >= 2 and self.env[a].shape[dim] == self.follow.rows]
        old = {a: self.env[a] for a in held}
        try:
            for a in held:
                self.env[a] = torch.empty_like(old[a])
                self.follow.dims[self.env[a]] = self.env[a].dim() + dim
            self.follow.paused = False
            value = super().run_node(n)
        finally:
            self.follow.paused = True
            self.env.update(old)
        if self.follow.dim(value) != value.dim() + dim:
            raise Mixed(f"`{n.name}` does something else with attention weights")
        return value

    def _scores(self, n: fx.Node) -> object:
        (q, k) = n.args
        places = [(2, q), (3, k)]
        for at, x in places:
            fact, value = self.facts.get(x), self.env[x]  # type: ignore[arg-type, index]
            own = x.meta.get("rows") == 0 if fact is None else (fact.kind, fact.position, fact.rows) == ("", at, 0)  # type: ignore[union-attr]
            if not own or value.dim() != 4 or value.shape[at] != self.follow.rows:
                return None
        value = super().run_node(n)
        self.facts[n] = Fact(SCORES, 2, 0)
        return value

    def _values(self, n: fx.Node) -> object:
        weights, v = n.args
        fact, value = self.facts.get(v), self.env[v]  # type: ignore[arg-type, index]
        own = v.meta.get("rows") == 0 if fact is None else (fact.kind, fact.position, fact.rows) == ("", 2, 0)  # type: ignore[union-attr]
        if self.facts.get(weights, Fact()).kind != SCORES or not own or value.dim() != 4:  # type: ignore[arg-type]
            raise Mixed(f"`{n.name}` does something else with attention weights")
        out = super().run_node(n)
        self._holds(n, out, 2)
        return out


def _count(node: fx.Node) -> bool:
    return node.meta.get("rows") == "count"


def _shape(node: object) -> tuple:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
