"""What the tasks share: the model, a clock, and plain torch hooks to check against."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from nnsight_fx import LanguageModel
from nnsight_fx.cli import weights

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
TOLERANCE = 2e-4  # float32, absolute: rows that run together round otherwise than one alone


def smollm2(**options: Any) -> LanguageModel:
    """SmolLM2-135M in float32, from the cache of `make demo`; where it is not there a message says how to get it.

    It is on hooks: `model.compile()` is all that captured graphs take, and costs a compile.
    """
    try:
        with timed("compile: 0.0 s, on hooks; load"):
            return LanguageModel(str(weights.smollm2()), dtype=torch.float32, dispatch=True, **options)
    except weights.WeightsError as error:
        sys.exit(f"{sys.argv[0]}: {error}")


def plain(model: LanguageModel) -> Any:
    """The torch module that was wrapped, for hooks of one's own."""
    return model._module


def token(model: LanguageModel, text: str) -> int:
    """The id of a text that is one token."""
    (found,) = model.tokenizer(text, add_special_tokens=False).input_ids
    return found


def tokens(model: LanguageModel, prompt: str) -> list[str]:
    """The text of each token, for the labels of an axis."""
    return [model.tokenizer.decode([i]) for i in model.tokenizer(prompt).input_ids]


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print the seconds of a block, on the clock and of the processor."""
    start, busy = time.perf_counter(), time.process_time()
    yield
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    print(f"{what}: {seconds:.1f} s ({busy:.1f} s of CPU)", flush=True)


@contextmanager
def hooks(after: dict[Any, Callable], before: dict[Any, Callable] | None = None) -> Iterator[None]:
    """Plain torch hooks while the block runs: `f(module, args, output)` after, `f(module, args)` before a module."""
    with ExitStack() as stack:
        for module, hook in after.items():
            stack.callback(module.register_forward_hook(hook).remove)
        for module, hook in (before or {}).items():
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


def record(module: torch.nn.Module, ids: torch.Tensor, sites: list[torch.nn.Module]) -> list[torch.Tensor]:
    """What modules return on a prompt, by plain hooks."""
    found: dict[torch.nn.Module, torch.Tensor] = {}
    with torch.no_grad(), hooks({site: lambda m, args, out: found.update({m: out.clone()}) for site in sites}):
        module(ids)
    return [found[site] for site in sites]


def check(ours: torch.Tensor, by_hand: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """The same as plain hooks found, or an `AssertionError`."""
    torch.testing.assert_close(ours.float().cpu(), by_hand.float().cpu(), rtol=0, atol=tolerance)
    print(f"equal to plain hooks: {by_hand.numel()} numbers, largest difference {(ours - by_hand).abs().max():.1e}")
