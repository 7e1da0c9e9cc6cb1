"""Interventions that take what a value says away."""

from __future__ import annotations

import torch
import torch.nn as nn


class Zero(nn.Module):
    """Zero ablation: zeros in place of the values.

    `forward(base)`: (..., features) to zeros of the same shape, which no gradient passes.

    Source: pyvene's `ZeroIntervention`.
    """

    def forward(self, base: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(base)


class Mean(nn.Module):
    """Mean ablation: the same values for every input.

    ```python
    ablate = Mean(saved.mean((0, 1)))  # saved: (rows, tokens, features)
    h.output = ablate(h.output)
    ```

    Args:
        mean: of a shape that broadcasts to the values': (features,), or (tokens, features) for a mean by position.
            A buffer: in the `state_dict`, not trained.

    `forward(base)`: (..., features) to the same shape, which no gradient passes.

    Source: Wang et al. 2022 (arXiv:2211.00593).
    """

    mean: torch.Tensor

    def __init__(self, mean: torch.Tensor):
        super().__init__()
        self.register_buffer("mean", mean.detach().clone())

    def forward(self, base: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(base) + self.mean.to(base.dtype)


class Resample(nn.Module):
    """Resample ablation: each row gets another input's values, drawn when the model gets there.

    Args:
        samples: (n, ...), each of a shape that broadcasts to one row's values; every row draws one of them, with
            replacement. `None`: the rows of the batch (of the invoke) are shuffled.

    `forward(base)`: (rows, ..., features) to the same shape. `samples` is a buffer: in the `state_dict`, not trained.

    Source: causal scrubbing, Chan et al. 2022.
    """

    samples: torch.Tensor | None

    def __init__(self, samples: torch.Tensor | None = None):
        super().__init__()
        self.register_buffer("samples", None if samples is None else samples.detach().clone())

    def forward(self, base: torch.Tensor) -> torch.Tensor:
        if self.samples is None:
            return base[torch.randperm(base.shape[0], device=base.device)]
        drawn = self.samples[torch.randint(len(self.samples), (base.shape[0],), device=base.device)]
        return torch.zeros_like(base) + drawn.to(base.dtype)
