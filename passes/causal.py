"""In a causal model a change at position p leaves earlier positions as they were: only the others are computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.fx as fx

from nnsight_fx import compat
from nnsight_fx.capture.marker import marker_of, pass_through, site

from .demand import take
from .job import Job
from .tokens import attend, choose, expect_causal, pack, repack, spread, unpack

SCORES = "scores"
APART = {pack, unpack, repack, spread, attend, choose, expect_causal}  # run as they are, between compiled regions
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class Fact(NamedTuple):
    """What is known of a value that differs from row to row.

    `kind`: "" holds positions in dimension `position` and rows in dimension `rows` (in one dimension, where they are
    equal); "many" is a tuple of such; "scores" belongs to attention that is written out (queries next to last, keys
    last); "one" holds one position of each row. `lifted`: arguments of the clean run that must be laid out alike.
    """

    kind: str = ""
    position: int = -1
    rows: int = -1
    lifted: tuple[fx.Node, ...] = ()


class Facts(NamedTuple):
    """The number of positions, and a `Fact` for each node whose value differs from row to row."""

    tokens: int | torch.SymInt
    of: dict[fx.Node, Fact]


def causal(gm: fx.GraphModule, job: Job | None = None, *, facts: Facts) -> int:
    """Lay out what differs from row to row as tokens, `(rows, positions, ...)` -> `(tokens, 1, ...)`; return how many attentions.

    ```
    s = site(h, "l.0", "output", 0, True)           p = pack(h, 0, 1, layout, count)
    q = linear(s, wq).view(n, 14, 9, 64)            s = site(p, "l.0", "output", 0, True)
    ...                                     ->      q = linear(s, wq).view(count, 1, 9, 64)
    a = sdpa(q, k, v, is_causal=True)               ...
    o = linear(a, wo) + s                           a = attend(q, k, v, None, layout, count, True)
                                                    o = linear(a, wo) + s
    ```

    A row that joins the batch (pass `fork`) then has the tokens from its first changed position on; attention takes the
    keys and values of earlier positions from the clean run's tokens. `%layout` (a `Layout`) and `%count` (how many tokens
    there are) are inputs behind the graph's own. `facts` say which values these are, as `sweep.positions` finds them; the
    mask is looked at when the graph runs, and `NotCausal` raised where a position sees a later one.

    Does not fire when: `facts` hold no value. `ValueError` where an operation has the number of positions in its
    arguments in a place that the facts do not explain.
    """
    if not facts.of:
        return 0
    return _Rewriting(gm, facts).run()


def is_attention(node: fx.Node) -> bool:
    """Is a node `scaled_dot_product_attention` without dropout?"""
    return node.target is torch.nn.functional.scaled_dot_product_attention and not _argument(node, "dropout_p", 0.0)


def is_softmax(node: fx.Node) -> bool:
    """Is a node a softmax over the last dimension of four?"""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return name == "softmax" and dim in (-1, 3)


def _argument(node: fx.Node, name: str, default: object = None) -> object:
    at = _ARGUMENTS.index(name)
    return node.args[at] if len(node.args) > at else node.kwargs.get(name, default)


class _Rewriting:
    def __init__(self, gm: fx.GraphModule, facts: Facts):
        self.gm, self.graph, self.facts = gm, gm.graph, facts
        self.packed: dict[tuple, fx.Node] = {}  # what of the clean run is laid out as tokens, since the last seam

    def run(self) -> int:
        self._hoist()
        nodes = list(self.graph.nodes)
        sources = [n for n in nodes if n.op == "placeholder"]
        counts = {n for n in sources if n.meta.get("rows") == "count"}
        with self.graph.inserting_after(sources[-1]):
            self.layout = self.graph.placeholder("layout")
        with self.graph.inserting_after(self.layout):
            self.count = self.graph.placeholder("count")
        known = next((n.meta["example_value"] for n in counts), None)
        first = next(n for n in self.facts.of if n.target is site)
        value = _value(marker_of(first).value)
        self.mode = getattr(value, "fake_mode", None) or contextlib.nullcontext()
        number = value.shape[self.facts.of[first].rows] if known is None else known
        self.count.meta = {"rows": "count", "example_value": number}
        attentions = 0
        for n in nodes:
            fact = self.facts.of.get(n)
            if fact is None:
                if n.meta.get("rows") is not None and n not in counts:
                    n.meta["clean"] = True
            elif n.target is site:
                self._site(n, fact)
            elif n.target is take:
                self._choose(n)
            elif is_attention(n):
                attentions += 1
                self._attend(n)
            elif fact.kind != SCORES and any(self._kind(a) == SCORES for a in n.all_input_nodes):
                attentions += 1
                self._weighed(n)
            elif fact.kind != SCORES:
                self._alone(n, fact, counts)
        return attentions

    def _kind(self, n: fx.Node) -> str | None:
        fact = self.facts.of.get(n)
        return None if fact is None else fact.kind

    def _hoist(self) -> None:
        """What does not differ from row to row moves up, behind what it needs: it is not computed among the tokens."""
        place = {n: i for i, n in enumerate(self.graph.nodes)}
        first = min(place[n] for n in self.facts.of)
        late = [n for n in place if place[n] > first and n not in self.facts.of and n.op.startswith("call")]
        anchor = next(n for n in place if place[n] == first)
        while anchor.prev.target is site and not marker_of(anchor.prev).last:
            anchor = anchor.prev
        moved = {n for n, i in place.items() if i < place[anchor]}
        for n in late:
            if n.target is not site and moved.issuperset(n.all_input_nodes):
                anchor.prepend(n)
                moved.add(n)
            elif n.target is not site and (n.meta.get("rows") is not None or n.meta.get("mixed")):
                raise ValueError(f"`{n.name}` is computed of the clean run among what differs from it")

    # -- the nodes -----------------------------------------------------------------------------------------------------

    def _add(self, before: fx.Node, target: Callable, args: tuple, like: fx.Node | None, **meta: object) -> fx.Node:
        with self.graph.inserting_before(before):
            new = self.graph.call_function(target, args)
        new.meta = {"flops": 0, "bytes": 0} | ({} if like is None else dict(like.meta)) | meta
        return new

    def _pack(self, x: fx.Node, like: Fact, rank: int, before: fx.Node) -> fx.Node:
        """What of the clean run stands beside tokens whose rows and positions are where `like` says."""
        value = _value(x)
        pad = rank - value.dim()
        args = (x, like.rows, like.position, pad, self.layout, self.count)
        known = self.packed.get(args)
        if known is None:
            shape = [1] * pad + list(value.shape)
            made = self._made(
                value, [{like.position: 1, like.rows: self._number()}.get(i, d) for i, d in enumerate(shape)]
            )
            known = self._add(before, pack, args, x, rows=like.rows, example_value=made, flops=0)
            known.meta.pop("clean", None)
            known.meta.pop("mixed", None)
            known.meta["packed"] = like.position
            self.packed[args] = known
        return known

    def _number(self) -> object:
        return self.count.meta["example_value"]

    def _site(self, n: fx.Node, fact: Fact) -> None:
        source = marker_of(n).value
        if source not in self.facts.of:
            source = self._pack(source, fact, _value(source).dim(), n)
            pass_through(n, source)
        if fact.kind == "":
            n.meta |= self._meta(n, fact) | {"example_value": _value(source)}
        self.packed.clear()

    def _meta(self, n: fx.Node, fact: Fact) -> dict:
        """Of a value as tokens: where they are, and what one of them costs."""
        facts: dict = {"rows": fact.rows, "packed": fact.position, "mixed": None}
        return facts | {k: n.meta[k] / self.facts.tokens for k in ("flops", "bytes") if k in n.meta}

    def _made(self, like: torch.Tensor, shape: list) -> torch.Tensor:
        """What stands for a new contiguous value."""
        with self.mode:
            return torch.empty(shape, dtype=like.dtype, device=like.device)

    def _evaluate(self, n: fx.Node, fact: Fact) -> None:
        """The example value as tokens: the operation tells shape and strides, and that it does what it did."""
        args, kwargs = fx.map_arg((n.args, n.kwargs), lambda a: a.meta["example_value"])  # type: ignore[arg-type, misc]
        with self.mode, torch.no_grad():
            made = (
                getattr(args[0], n.target)(*args[1:], **kwargs)
                if isinstance(n.target, str)
                else n.target(*args, **kwargs)
            )  # type: ignore[operator]
        old = n.meta.get("example_value")
        if isinstance(made, torch.Tensor) and isinstance(old, torch.Tensor):
            sizes = {fact.position: 1, fact.rows: self._number()}
            want = [sizes.get(i, d) for i, d in enumerate(old.shape)]
            if list(map(str, made.shape)) != list(map(str, want)):
                raise ValueError(f"`{n.name}` has the number of positions in its arguments")
        n.meta["example_value"] = made

    def _alone(self, n: fx.Node, fact: Fact, counts: set[fx.Node]) -> None:
        swap: dict[fx.Node, fx.Node] = {}
        beside = next((a for a in n.all_input_nodes if self._kind(a) == ""), None)
        for x in fact.lifted:
            assert beside is not None
            swap[x] = self._pack(x, self.facts.of[beside], _rank(beside), n)
        one = fact.kind == "one"
        if one and any(a in counts for a in n.all_input_nodes):
            raise ValueError(f"`{n.name}` uses the number of rows behind the choice of one position")
        args, kwargs = self._sizes(n, fact)
        args, kwargs = fx.map_arg((args, kwargs), lambda a: self.count if a in counts else swap.get(a, a))  # type: ignore[misc, return-value]
        n.args, n.kwargs = args, kwargs
        if not one:
            n.meta |= self._meta(n, fact)
            self._evaluate(n, fact)

    def _sizes(self, n: fx.Node, fact: Fact) -> tuple[tuple, dict]:
        """Its arguments with 1 for the number of positions, in the sizes of a view."""
        name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
        if name not in ("view", "reshape", "expand") or fact.position == fact.rows:
            return n.args, dict(n.kwargs)
        sizes: object = n.args[1:]
        if len(sizes) == 1 and not isinstance(sizes[0], int):
            sizes = sizes[0]
        if isinstance(sizes, fx.Node):
            if sizes.target is not torch.Size:
                return n.args, dict(n.kwargs)
            sizes = sizes.args[0]
        new: list[object] = list(sizes)
        size = new[fact.position]
        size = size.meta.get("example_value") if isinstance(size, fx.Node) else size
        if isinstance(size, int | torch.SymInt) and compat.symbols.same_size(size, self.facts.tokens):
            new[fact.position] = 1
        return (n.args[0], tuple(new)), dict(n.kwargs)

    def _choose(self, n: fx.Node) -> None:
        x, positions = n.args
        fact = self.facts.of[x]  # type: ignore[index]
        if (fact.kind, fact.rows, fact.position) != ("", 0, 1):
            raise ValueError(f"`{n.name}` does not choose among positions in dimension 1")
        n.target, n.args = choose, (x, positions, self.layout, self.count)
        value = _value(x)
        n.meta["example_value"] = self._made(value, list(value.shape))

    def _attend(self, n: fx.Node) -> None:
        q, k, v = n.args[:3]
        mask, sees = _argument(n, "attn_mask"), _argument(n, "is_causal", False)
        rest = {x: n.kwargs[x] for x in ("scale", "enable_gqa") if n.kwargs.get(x) is not None}
        clean = tuple(x not in self.facts.of for x in (q, k, v))
        new = self._add(n, attend, (q, k, v, mask, self.layout, self.count, bool(sees), clean), None)
        new.kwargs = rest
        queries, values = _value(q), _value(v)
        shape = [self._number(), queries.shape[1], 1, values.shape[-1]]
        new.meta = n.meta | self._meta(n, self.facts.of[n]) | {"example_value": self._made(queries, shape)}
        self._replace(n, new)

    def _weighed(self, n: fx.Node) -> None:
        """Attention that is written out runs on whole rows, and its weights are looked at."""
        scores: dict[fx.Node, None] = {}
        left = [a for a in n.all_input_nodes if self._kind(a) == SCORES]
        while left:
            x = left.pop()
            scores[x] = None
            left += [a for a in x.all_input_nodes if self._kind(a) == SCORES and a not in scores]
        group = [x for x in self.graph.nodes if x in scores]
        for x in group:
            n.prepend(x)
        whole: dict[fx.Node, fx.Node] = {}
        for x in [*group, n]:
            for a in x.all_input_nodes:
                if self._kind(a) != SCORES and a not in whole:
                    whole[a] = self._whole(a, x)
            x.args, x.kwargs = fx.map_arg((x.args, x.kwargs), lambda a: whole.get(a, a))  # type: ignore[arg-type, misc]
        for x in [*(x for x in group if is_softmax(x)), n.args[0]]:
            seen = self._add(n if x is n.args[0] else x.next, expect_causal, (x,), x, flops=0)  # type: ignore[union-attr, arg-type]
            x.replace_all_uses_with(seen, delete_user_cb=lambda u, seen=seen: u is not seen)  # type: ignore[union-attr]
        fact = self.facts.of[n]
        tokens = self._add(n.next, repack, (n, fact.position, self.layout, self.count), n, flops=0)
        tokens.meta |= self._meta(tokens, fact)
        value = _value(n)
        sizes = {fact.position: 1, 0: self._number()}
        tokens.meta["example_value"] = self._made(value, [sizes.get(i, d) for i, d in enumerate(value.shape)])
        n.replace_all_uses_with(tokens, delete_user_cb=lambda u: u is not tokens)
        self.facts.of[tokens] = self.facts.of.pop(n)

    def _whole(self, a: fx.Node, before: fx.Node) -> fx.Node:
        """An argument with all positions of each row."""
        fact = self.facts.of.get(a)
        if fact is None:
            rows = a.meta.get("rows")
            if rows is None and not a.meta.get("mixed"):
                return a
            if rows != 0:
                raise ValueError(f"`{a.name}` is no value of each row")
            made = self._add(before, spread, (a, self.layout, self.count), a, flops=0)
            made.meta.pop("clean", None)
            return made
        value = _value(a)
        sizes = {fact.position: self.facts.tokens, 0: self._number()}
        made = self._add(before, unpack, (a, fact.position, self.layout, self.count), a, flops=0, packed=None)
        made.meta["example_value"] = self._made(value, [sizes.get(i, d) for i, d in enumerate(value.shape)])
        return made

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new)
        self.facts.of[new] = self.facts.of.pop(old)
        self.graph.erase_node(old)


def _value(node: fx.Node) -> torch.Tensor:
    while node.target is site and "example_value" not in node.meta:
        node = marker_of(node).value
    return node.meta["example_value"]


def _rank(node: fx.Node) -> int:
    return _value(node).dim()
