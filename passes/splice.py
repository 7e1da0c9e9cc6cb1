"""Copy each recorded operation to its place among the model's nodes."""

from __future__ import annotations

import torch
import torch.fx as fx

from nnsight_fx.capture.marker import Marker, anchor, marker_of, site, supply
from nnsight_fx.errors import MissedSiteError, PlanMismatchError
from nnsight_fx.plan.interleave import Cut, Firing
from nnsight_fx.plan.keys import Keep, Value
from nnsight_fx.plan.plan import Op
from nnsight_fx.plan.verbs import Skip, Write

from ..plan.skips import skip_of
from .emit import Emitter
from .job import CutSite, Job, Unfit


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
        marker = marker_of(node)
        if weaver.stopping and (node.target is site or marker.site not in weaver.supplied):
            continue  # behind the stop: what the site that stops is written with belongs to it still
        if node.target is supply:
            weaver.written[node] = weaver.supplied_leaf(node, marker)
            node.replace_all_uses_with(weaver.written[node])
            gm.graph.erase_node(node)
            rewrites += 1
            continue
        group.append(node)
        if marker.last:
            rewrites += weaver.pass_site(group, index)
            if weaver.stopping:
                job.stop = node
            if job.cut is not None:
                break
            group = []
    job.exit = weaver
    needed = weaver.wanted()
    for value in needed:
        found = weaver.env.get(value)
        if isinstance(found, fx.Node):
            job.exports[value] = found
    return rewrites


class Weaver(Emitter):
    """The plan's schedule over the sites of a graph."""

    def pass_site(self, group: list[fx.Node], index: int) -> int:
        """One site, all its tensor leaves at once, behind the last marker."""
        markers = [marker_of(node) for node in group]
        path, kind = markers[0].name
        here = (path, kind, self.count(path, kind))
        leaves: list = [None] * (max(marker.leaf for marker in markers) + 1)
        for node, marker in zip(group, markers, strict=True):
            if marker.value.target is not anchor:
                leaves[marker.leaf] = node
        before = list(leaves)
        emitted = len(self.job.emitted)
        with self.graph.inserting_before(group[-1].next):
            try:
                self.fire(Firing(here, leaves, None))
            except Cut:
                self.job.cut = CutSite(here, index, leaves, self.written)
        if self.stopping and self.job.begun:
            self.job.cut = CutSite(here, index, leaves, self.written)
        if here in self.supplied and here not in self.job.half:
            n = next(n for n in self.plan.touches[here] if isinstance(self.plan.ops[n].verb, Write))
            raise PlanMismatchError(
                f"{self.job.lines[n] if n < len(self.job.lines) else 'a write'}: `{'.'.join(p for p in here[:2] if p)}` is written with "
                "another shape, dtype or structure after a sync point has begun the captured run, which cannot take it any more. "
                "Write it before the sync point, or trace with `compile=False`."
            )
        if here not in self.supplied and self.job.cut is None:
            self._take_over({old: new for old, new in zip(before, leaves, strict=True) if new is not old})
        return len(self.job.emitted) - emitted

    def _take_over(self, new: dict[fx.Node, object]) -> None:
        """The model goes on with the written leaves: all at once, since they may be each other's (a swap)."""
        self.written.update(new)
        for user in {u: None for old in new for u in old.users if u not in self.job.emitted}:
            user.args = fx.map_arg(user.args, lambda n: new.get(n, n))
            user.kwargs = fx.map_arg(user.kwargs, lambda n: new.get(n, n))

    def _write(self, op: Op, verb: Write, firing: Firing) -> None:
        new = list(self.arguments(op)[0][0])
        if verb.fits:
            for i, value in enumerate(new):
                if not (isinstance(value, Keep) and value.index == i):
                    new_leaf = self.put_rows(firing.leaves[i], value, op.invoke, firing.batched(i, verb.batched))
                    firing.leaves[i] = self.select(op, new_leaf, firing.leaves[i])
        else:
            self.supplied[firing.site] = self.merged(op, verb, firing, new)

    def supplied_leaf(self, node: fx.Node, marker: Marker) -> object:
        """The value of a `supply` node: a leaf of a written or skipped output."""
        here = marker.site
        if here not in self.supplied:
            with self.graph.inserting_before(node):
                self.supplied[here] = self._gathered(self._parts(here[0], here[2]))
        return self.supplied[here][marker.leaf]

    def _parts(self, path: str, call: int) -> dict[int, tuple]:
        at = (path, "output", call)
        parts = self.skip_parts(at, self.job.lines)
        if parts is None:
            if self.job.removes:
                raise Unfit
            n = next(n for n in self.plan.touches[at] if isinstance(self.plan.ops[n].verb, Skip))
            raise MissedSiteError(
                f"{self.job.lines[n] if n < len(self.job.lines) else 'a skip'}: `{path}` is skipped, but the skip value is not "
                "there yet when the model calls it: an earlier line waits for a later site. Move the skip in front of it."
            )
        return {
            i: (spec, [self._from_before(x, skip_of(self.plan, at, i), j) for j, x in enumerate(leaves)], batched)
            for i, (spec, leaves, batched) in parts.items()
        }

    def _from_before(self, leaf: object, n: int, j: int) -> object:
        """A leaf of a skip value, which an earlier segment or a live site may have made."""
        value = Value(n, j)
        return leaf if value in self.env or not isinstance(leaf, torch.Tensor) else self.lookup(value)

    def _gathered(self, parts: dict[int, tuple]) -> list:
        """A skipped module's output: each invoke's rows, concatenated."""
        ordered = [parts[i] for i in sorted(parts)]
        if len(ordered) == 1:
            return ordered[0][1]
        columns = zip(*(p[1] for p in ordered), strict=True)
        return [
            self._emit("call_function", torch.cat, (list(c),)) if isinstance(c[0], fx.Node) else c[0] for c in columns
        ]
