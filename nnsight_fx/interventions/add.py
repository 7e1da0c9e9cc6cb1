"""Interventions that add to a value."""

from __future__ import annotations

import torch
import torch.nn as nn


class Add(nn.Module):
    """Steering: `base + scale * vector`.

    ```python
    steer = Add(768)                   # a trainable vector, zero at first
    steer = Add(happy - sad)           # one that is known; also trainable
    h.output = steer(h.output, scale=-2.0)
    ```

    Args:
        vector: the number of features, or the vector itself, of a shape that broadcasts to the values'
            (features,) or (tokens, features), say.

    `forward(base, scale=1.0)`: `base` (..., features) to the same shape. `scale` is a number or a tensor that
    broadcasts; another scale is no recompile.

    Source: activation addition, Turner et al. 2023 (arXiv:2308.10248); pyvene's `AdditionIntervention`.
    """

    def __init__(self, vector: int | torch.Tensor):
        super().__init__()
        start = torch.zeros(vector) if isinstance(vector, int) else vector.detach().clone()
        self.vector = nn.Parameter(start)

    def forward(self, base: torch.Tensor, scale: float | torch.Tensor = 1.0) -> torch.Tensor:
        return (base + self.vector * scale).to(base.dtype)


class Noise(nn.Module):
    """Corruption: `base + std * n`, with `n` drawn from N(0, 1) when the model gets there.

    Args:
        std: the noise's standard deviation. Causal tracing takes three times that of the embeddings.

    `forward(base)`: (..., features) to the same shape. Nothing is trainable; `std` is in the `state_dict`.

    Source: causal tracing, Meng et al. 2022 (arXiv:2202.05262); pyvene's `NoiseIntervention`.
    """

    std: torch.Tensor

    def __init__(self, std: float | torch.Tensor):
        super().__init__()
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.get_default_dtype()))

    def forward(self, base: torch.Tensor) -> torch.Tensor:
        return (base + torch.randn_like(base) * self.std).to(base.dtype)
