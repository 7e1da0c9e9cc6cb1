"""What is measured: each workload as one text, which ours and nnsight run, by hand-written hooks, and as a plain function.

A text is `def run(model, ids, vector)` over `blocks`, the list of the model's blocks, `norm` and `steps`; it returns tensors. The
plain function does without interventions what comes nearest, and is what `torch.compile` compiles: the limit.

Where a text leaves logits unread our captured graphs do without them, and the peers' forwards do not. `all_logits` is the same text
with all of them saved as well: the same work as theirs, in a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Shape = tuple[int, int]  # rows x tokens
STEPS = 16  # new tokens

SHORT = ((1, 14), (8, 64))
MORE = "# here all logits are saved too"


@dataclass(frozen=True)
class Workload:
    name: str
    what: str
    text: str
    hooks: Callable  # (parts, ids, vector) -> list
    plain: Callable | None  # parts -> a function of ids
    lens: str | None = None  # the same in TransformerLens, where it can say it: lines over `bridge`, `ids`, `vector`
    shapes: tuple[Shape, ...] = SHORT
    grad: bool = False

    @property
    def all_logits(self) -> str | None:
        return self.text.replace(MORE, "logits = model.lm_head.output.save()") if MORE in self.text else None


@dataclass(frozen=True)
class Parts:
    """A model taken apart."""

    module: Any
    blocks: Any
    norm: Any
    head: Any


def forward(parts: Parts) -> Callable:
    return lambda ids: parts.module(input_ids=ids, use_cache=False).logits


def last_logits(parts: Parts) -> Callable:
    return lambda ids: parts.module(input_ids=ids, use_cache=False).logits[:, -1]


def with_layers(parts: Parts) -> Callable:
    """The blocks' outputs and nothing else, by the model's own means; the last is behind its norm."""
    return lambda ids: parts.module(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[1:]


def hooked(parts: Parts, after: Callable, ids: torch.Tensor) -> Any:
    """The model's logits, with `after(i, output)` behind each block."""

    def hook(i: int) -> Callable:
        def behind(_: Any, __: Any, out: Any) -> Any:
            new = after(i, out[0] if isinstance(out, tuple) else out)
            return None if new is None else (new, *out[1:]) if isinstance(out, tuple) else new

        return behind

    handles = [block.register_forward_hook(hook(i)) for i, block in enumerate(parts.blocks)]
    try:
        return parts.module(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


# -- trace ---------------------------------------------------------------------------------------------------------------

TRACE = """
def run(model, ids, vector):
    with torch.no_grad(), model.trace(input_ids=ids, use_cache=False):
        saved = model.lm_head.output.save()
    return [saved]
"""


def trace_hooks(parts: Parts, ids: torch.Tensor, vector: torch.Tensor) -> list:
    kept: list = []
    handle = parts.head.register_forward_hook(lambda _, __, out: kept.append(out))
    try:
        parts.module(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return kept


LAST = """
def run(model, ids, vector):
    with torch.no_grad(), model.trace(input_ids=ids, use_cache=False):
        saved = model.lm_head.output[:, -1].save()
        # here all logits are saved too
    return [saved]
"""


def last_hooks(parts: Parts, ids: torch.Tensor, vector: torch.Tensor) -> list:
    return [each[:, -1] for each in trace_hooks(parts, ids, vector)]


# -- steer ---------------------------------------------------------------------------------------------------------------

STEER = """
def run(model, ids, vector):
    with torch.no_grad(), model.trace(input_ids=ids, use_cache=False):
        saved = nnsight.save([])
        for i, block in enumerate(blocks):
            if i == len(blocks) // 2:
                block.output = block.output + vector
            saved.append(block.output[:, -1])
        # here all logits are saved too
    return saved
"""


def steer_hooks(parts: Parts, ids: torch.Tensor, vector: torch.Tensor) -> list:
    kept: list = []

    def after(i: int, h: torch.Tensor) -> Any:
        new = h + vector if i == len(parts.blocks) // 2 else h
        kept.append(new[:, -1])
        return None if new is h else new

    hooked(parts, after, ids)
    return kept


STEER_LENS = """
kept = {}
def after(h, hook):
    i = int(hook.name.split(".")[1])
    new = h + vector if i == layers // 2 else h
    kept[i] = new[:, -1]
    return new
logits = bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.{i}.hook_out", after) for i in range(layers)], return_type="logits")
last = [*kept.values()]
"""

# -- all layers ----------------------------------------------------------------------------------------------------------

SAVES = """
def run(model, ids, vector):
    with torch.no_grad(), model.trace(input_ids=ids, use_cache=False):
        saved = nnsight.save([block.output for block in blocks])
        # here all logits are saved too
    return saved
"""

CACHE = """
def run(model, ids, vector):
    with torch.no_grad(), model.trace(input_ids=ids, use_cache=False) as tracer:
        cache = tracer.cache(modules=[block for block in blocks])
        # here all logits are saved too
    return [cache[name].output for name in cache.keys()]
"""


def saves_hooks(parts: Parts, ids: torch.Tensor, vector: torch.Tensor) -> list:
    kept: list = []
    hooked(parts, lambda i, h: kept.append(h), ids)
    return kept


SAVES_LENS = """
names = [f"blocks.{i}.hook_out" for i in range(layers)]
_, cache = bridge.run_with_cache(ids, names_filter=lambda name: name in names, return_type="logits")
last = [cache[name] for name in names]
"""

# -- gradients -----------------------------------------------------------------------------------------------------------

GRADIENTS = """
def run(model, ids, vector):
    with model.trace(input_ids=ids, use_cache=False):
        blocks[0].input.requires_grad_()
        outputs = [block.output for block in blocks]
        loss = model.lm_head.output[:, -1].sum()
        # here all logits are saved too
        with loss.backward():
            saved = nnsight.save([h.grad for h in outputs[::-1]])
    return saved[::-1]
"""


def gradients_hooks(parts: Parts, ids: torch.Tensor, vector: torch.Tensor) -> list:
    kept: list = []

    def begin(_: Any, args: tuple) -> None:
        args[0].requires_grad_()

    first = parts.blocks[0].register_forward_pre_hook(begin)
    try:
        logits = hooked(parts, lambda i, h: kept.append(h), ids)
    finally:
        first.remove()
    return list(torch.autograd.grad(logits[:, -1].sum(), kept))


# -- logit lens ----------------------------------------------------------------------------------------------------------

LENS = """
def run(model, ids, vector):
    with torch.no_grad(), model.trace(input_ids=ids, use_cache=False):
        saved = nnsight.save([model.lm_head(norm(block.output[:, -1])) for block in blocks])
        # here all logits are saved too
    return saved
"""


def lens_hooks(parts: Parts, ids: torch.Tensor, vector: torch.Tensor) -> list:
    kept: list = []
    hooked(parts, lambda i, h: kept.append(parts.head(parts.norm(h[:, -1]))), ids)
    return kept


def lens_plain(parts: Parts) -> Callable:
    run = with_layers(parts)

    def plain(ids: torch.Tensor) -> Any:
        return [parts.head(parts.norm(h[:, -1])) for h in run(ids)]

    return plain


# -- generation ----------------------------------------------------------------------------------------------------------

GENERATE = """
def run(model, ids, vector):
    kinds = dict(max_new_tokens=steps, do_sample=False, use_cache=True, pad_token_id=0)
    with torch.no_grad(), model.generate(ids, **kinds) as tracer:
        for _ in tracer.iter[0:steps]:
            blocks[len(blocks) // 2].output = blocks[len(blocks) // 2].output + vector
        made = tracer.result.save()
    return [made]
"""


def generate_hooks(parts: Parts, ids: torch.Tensor, vector: torch.Tensor) -> list:
    def after(_: Any, __: Any, out: Any) -> Any:
        return (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

    handle = parts.blocks[len(parts.blocks) // 2].register_forward_hook(after)
    try:
        return [parts.module.generate(ids, **GENERATES)]
    finally:
        handle.remove()


GENERATES = {"max_new_tokens": STEPS, "do_sample": False, "use_cache": True, "pad_token_id": 0}


def generate_plain(parts: Parts) -> Callable:
    """HF's `generate` as it is; `torch.compile` gets the forward that it calls."""
    return lambda ids: parts.module.generate(ids, **GENERATES)


WORKLOADS = {
    w.name: w
    for w in (
        Workload(
            "trace",
            "the logits saved",
            TRACE,
            trace_hooks,
            forward,
            'last = [bridge(ids, return_type="logits")]',
            shapes=((1, 14), (8, 64), (1, 1024)),
        ),
        Workload("last", "the logits of the last position saved", LAST, last_hooks, last_logits, shapes=((1, 14),)),
        Workload(
            "steer",
            "a vector added in the middle, the last position of every block saved",
            STEER,
            steer_hooks,
            forward,
            STEER_LENS,
        ),
        Workload("saves", "every block's output saved", SAVES, saves_hooks, with_layers, SAVES_LENS),
        Workload("cache", "`tracer.cache` of all blocks", CACHE, saves_hooks, with_layers, SAVES_LENS, ((8, 64),)),
        Workload(
            "gradients",
            "the gradient of the last position's logits to every block's output; the first block's input requires grad",
            GRADIENTS,
            gradients_hooks,
            None,
            grad=True,
            shapes=((1, 14),),
        ),
        Workload(
            "logit lens",
            "norm and unembedding of every block's last position",
            LENS,
            lens_hooks,
            lens_plain,
            shapes=((1, 14),),
        ),
        Workload(
            "generate",
            f"{STEPS} new tokens, a vector added at every step",
            GENERATE,
            generate_hooks,
            generate_plain,
            shapes=((1, 14),),
        ),
    )
}
