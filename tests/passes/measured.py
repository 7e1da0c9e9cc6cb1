"""`python tests/passes/measured.py` writes measured.json: what each pass changes in a program that it is for.

Counts, no times: what a backend gets and runs of a small model, without the pass and with it. Of a pass that every plan
needs, what it does to the graph.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.fx as fx
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight_fx import LanguageModel, NNsight

FIGURES = Path(__file__).with_name("measured.json")


PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += func in PRODUCTS
        return func(*args, **(kwargs or {}))


class Counting:
    """A backend that runs graphs as they are. It counts their operations, and what their runs do."""

    def __init__(self, watches: bool) -> None:
        self.watches = watches
        self.operations = self.flops = self.products = 0

    def __call__(self, gm: fx.GraphModule, inputs: list) -> Callable:
        self.operations += sum(n.op.startswith("call") for n in gm.graph.nodes)
        if not self.watches:
            return gm

        def call(*args: Any) -> Any:
            with FlopCounterMode(display=False) as counter, Products() as products:
                out = gm(*args)
            self.flops += counter.get_total_flops()
            self.products += products.count
            return out

        return call


LAYERS, WIDTH, VOCAB = 6, 32, 96
IDS, X = torch.arange(1, 9)[None], torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def stack() -> Any:
    torch.manual_seed(0)
    return NNsight(nn.Sequential(*[Block() for _ in range(LAYERS)]).requires_grad_(False))


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=2, vocab_size=VOCAB, n_positions=32, bos_token_id=None, eos_token_id=None
    )
    return LanguageModel(GPT2LMHeadModel(config).eval().requires_grad_(False))


def steers(m: Any) -> None:
    with m.trace(X):
        m[1].output += torch.ones(WIDTH)
        m.output.save()


def steers_gpt2(m: Any) -> None:
    with m.trace(IDS):
        m.transformer.h[1].output += torch.ones(WIDTH)
        m.lm_head.output.save()


def reads_the_first_block(m: Any) -> None:
    with m.trace(X):
        m[0].output.save()


def skips_a_block(m: Any) -> None:
    with m.trace(X):  # captures the graph of all plans
        m.output.save()
    with m.trace(X):
        m[2].skip(m[1].output)
        m.output.save()


def stops(m: Any) -> None:
    with m.trace(X):
        m.output.save()
    with m.trace(X) as tracer:
        m[0].output.save()
        tracer.stop()


def two_invokes(m: Any) -> None:
    with m.trace() as tracer:
        with tracer.invoke(X):
            m[1].output *= 2
        with tracer.invoke(X):
            m.output.save()


def decides(m: Any) -> None:
    with m.trace(X) as tracer:
        with tracer.cond(m[0].output.sum() > 1e9):
            m[1].output = m[1].output @ torch.ones(WIDTH, WIDTH)
        m.output.save()


def differentiates(m: Any) -> None:
    with torch.enable_grad(), m.trace(X.clone().requires_grad_()):
        m[2].output.grad.save()
        m.output.sum().backward()


def linearizes(m: Any) -> None:
    m.vjp(lambda tracer: (m.output, m[2].output), X)


def reads_the_last_logits(m: Any) -> None:
    with m.trace(IDS):
        m.lm_head.output[:, -1].save()


def lens(m: Any) -> None:
    with m.trace(IDS):
        for block in m.transformer.h:
            m.lm_head(m.transformer.ln_f(block.output[:, -1])).save()


def patches(m: Any) -> None:
    with m.session():
        for layer in range(LAYERS):
            for position in (5, 6, 7):
                with m.trace(IDS):
                    m.transformer.h[layer].output[:, position] = 0
                    m.lm_head.output[:, -1].save()


RUN = ("FLOPs", "matrix products run")  # counted while graphs run; the others when they are compiled


class Effect(NamedTuple):
    """A program that a pass is for, and what is counted with the pass and without it; of what cannot go, what it does."""

    program: Callable[[Any], None]
    model: Callable[[], Any]
    told: str
    counts: str = ""
    options: dict = {}


EFFECTS = {
    "skip": Effect(skips_a_block, stack, "a block skipped, in a captured graph", "graphs captured"),
    "splice": Effect(steers, stack, "one block steered"),
    "truncate": Effect(stops, stack, "a stop behind the first block, in a captured graph", "graphs captured"),
    "narrow": Effect(two_invokes, stack, "two invokes, one changes its rows"),
    "lift_constants": Effect(steers, stack, "one block steered"),
    "expose": Effect(steers, stack, "one value saved"),
    "blocks": Effect(
        steers_gpt2, gpt2, "one of six blocks steered, compiled by blocks", "operations compiled", {"regional": True}
    ),
    "erase": Effect(steers, stack, "one block steered", "operations compiled"),
    "prune": Effect(reads_the_first_block, stack, "the first block's output saved", "operations compiled"),
    "read_positions": Effect(reads_the_last_logits, gpt2, "the last position's logits saved", "FLOPs"),
    "conditional": Effect(decides, stack, "a condition that does not hold, around a matrix product"),
    "batch_linears": Effect(lens, gpt2, "a logit lens", "matrix products run"),
    "differentiate": Effect(differentiates, stack, "a gradient of a block's output"),
    "linearize": Effect(linearizes, stack, "the derivative of the output by a block's"),
    "demand": Effect(patches, gpt2, "a session: 6 layers x 3 positions patched, one logit read", "FLOPs"),
    "causal": Effect(patches, gpt2, "a session: 6 layers x 3 positions patched, one logit read", "FLOPs"),
}


def count(effect: Effect, disable: set[str]) -> tuple[dict[str, int], str]:
    """What is counted, and what `explain()` says."""
    counting, m = Counting(effect.counts in RUN), effect.model()
    m.compile(backend=counting, disable=disable, **effect.options)
    with torch.no_grad():
        effect.program(m)
    told = str(m.explain())
    counts = {
        "operations compiled": counting.operations,
        "FLOPs": counting.flops,
        "matrix products run": counting.products,
    }
    captured = re.search(r"(\d+) segments captured", told)
    return counts | {"graphs captured": int(captured[1]) if captured else 0}, told


def measure(name: str) -> dict[str, Any]:
    """The cells of a pass."""
    effect = EFFECTS[name]
    with_it, told = count(effect, set())
    if effect.counts:
        without = count(effect, {name})[0][effect.counts]
        return {"program": effect.told, "counts": effect.counts, "without": without, "with": with_it[effect.counts]}
    found = re.search(rf"pass \d+ {name}: (\d+) rewrites, \d+ nodes \(([+-]\d+)\)", told)
    assert found is not None, f"{name} does not fire:\n{told}"
    return {"program": effect.told, "counts": "", "without": "", "with": f"{found[1]} rewrites, {found[2]} nodes"}


if __name__ == "__main__":
    FIGURES.write_text(json.dumps({name: measure(name) for name in EFFECTS}, indent=1) + "\n")
