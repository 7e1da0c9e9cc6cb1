"""Modules that a copy on tensors without data does not stand for: quantised weights, weights that are elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn as nn


def odd(module: nn.Module) -> str | None:
    """What a module holds that its copy cannot have, if anything: a call of it on values needs the real one."""
    return next(_odd(module), None)


def _odd(module: nn.Module) -> Iterator[str]:
    for path, m in module.named_modules():
        where = f" in `{path}`" if path else ""
        if "_hf_hook" in vars(m):
            yield f"weights that accelerate loads when it runs (offloaded){where}"
        for name, t in (*m._parameters.items(), *m._buffers.items()):
            if t is None:
                continue
            if type(t) not in (torch.Tensor, nn.Parameter, nn.Buffer) or t.is_quantized:
                yield f"a {type(t).__name__}, a tensor of a class of its own: `{name}`{where}"
            elif t.is_meta:
                yield f"weights that are not loaded: `{name}`{where}"
        for name, value in vars(m).items():
            if isinstance(value, torch.ScriptObject):
                yield f"packed weights: `{name}`{where}"
            elif isinstance(value, torch.Tensor):
                yield f"a tensor that is no parameter and no buffer: `{name}`{where}"
