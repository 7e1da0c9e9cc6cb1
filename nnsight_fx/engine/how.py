"""How one forward runs, or ran: the engine, whose graph, what is left out, and why."""

from __future__ import annotations

from dataclasses import dataclass

UNCOMPILED = "the model is not compiled"
CHANGES = "it changes the shape, dtype or structure of a value, which the model's Python can see"
FIRST = "no graph that all plans share is captured yet"
INSIDE = "it leaves something out, and looks inside a module"
NOTICED = "the model's Python can notice what it leaves out"
TOGETHER = {
    "batched": "on hooks, in one forward with other traces",
    "forked": "captured, in one forward with other traces",
}


@dataclass(frozen=True)
class How:
    """The engine of one forward, and what it leaves out."""

    # "hooks" or "captured"; of a session's traces that share a forward "batched" (on hooks) or "forked" (captured); else
    # "one by one".
    engine: str = "hooks"
    entry: str = ""  # whose graph: "shared" (all plans'), "source" (all plans' that look into these modules), "own"
    leaves_out: bool = False  # do passes take what the plan skips or stops out of the shared graph
    unread: bool = False  # is the model's result not computed, since nobody takes it
    why: str = ""  # why it is on hooks, alone, or needs a graph of its own

    def __str__(self) -> str:
        if self.engine in TOGETHER:
            return TOGETHER[self.engine]
        if self.engine != "captured":
            reason = self.why.removeprefix("hook engine: ")
            return f"{'on hooks' if self.engine == 'hooks' else self.engine}{': ' * bool(reason)}{reason}"
        graph = {
            "shared": "in the graph that all plans share",
            "source": "in a graph that has the operations inside modules",
            "own": f"in a graph of its own: {self.why}",
        }[self.entry]
        more = ["what it leaves out is not computed"] * self.leaves_out
        more += ["the model's result is not computed"] * self.unread
        return "; ".join([f"captured, {graph}", *more])
