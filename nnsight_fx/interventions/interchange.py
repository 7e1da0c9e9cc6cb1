"""Interchange interventions: part of one run's values put into another's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch.nn.utils.parametrizations import orthogonal

Features = slice | Sequence[int] | torch.Tensor


class Interchange(nn.Module):
    """Activation patching: the values of another run, or some features of them.

    ```python
    patch = Interchange()
    with model.trace() as tracer:
        with tracer.invoke(clean):
            source = model.transformer.h[3].output[:, -1]
        with tracer.invoke(corrupted):
            h = model.transformer.h[3].output
            h[:, -1] = patch(h[:, -1], source)
    ```

    Args:
        features: which of the last dimension to take (a slice, indices, or a mask); all by default.

    `forward(base, source)`: `base` (..., features), `source` of a shape that broadcasts to it; the same shape as `base`.

    Source: Geiger et al. 2021 (arXiv:2106.02997); pyvene's `VanillaIntervention`.
    """

    def __init__(self, features: Features | None = None):
        super().__init__()
        self.features = features

    def forward(self, base: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        if self.features is None:
            return source.expand_as(base).to(base.dtype, copy=True)
        made = base.clone()
        made[..., self.features] = source[..., self.features].to(base.dtype)
        return made


class _Rotation(nn.Linear):
    """`rank` orthonormal directions of `features`: `weight` is (rank, features), its rows orthonormal, trainable."""

    def __init__(self, features: int, rank: int):
        if not 0 < rank <= features:
            raise ValueError(f"rank {rank} of {features} features: it must be 1 to {features}")
        super().__init__(features, rank, bias=False)
        nn.init.orthogonal_(self.weight)
        orthogonal(self)


class LowRankInterchange(nn.Module):
    """Distributed interchange in a learned subspace: `base + (source - base) R^T R`, the rows of `R` orthonormal.

    ```python
    das = LowRankInterchange(768, rank=1)
    adam = torch.optim.Adam(das.parameters(), lr=1e-3)
    for base, source, target in pairs:                  # compiled once, for all steps
        with model.trace(base):
            h = model.transformer.h[8].output
            model.transformer.h[8].output = das(h, source)
            logits = model.lm_head.output[:, -1].save()
        ...
    ```

    Args:
        features: size of the last dimension.
        rank: dimensions of the subspace.

    `forward(base, source)`: (..., features) both; the same shape. `rotation.weight` is `R`, (rank, features),
    kept orthonormal by `torch.nn.utils.parametrizations.orthogonal`.

    Raises:
        ValueError: a rank that is not 1 to `features`.

    Source: distributed alignment search, Geiger et al. 2023 (arXiv:2303.02536); pyvene's `LowRankRotatedSpaceIntervention`.
    """

    def __init__(self, features: int, rank: int):
        super().__init__()
        self.rotation = _Rotation(features, rank)

    def forward(self, base: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return _exchange(base, source, self.rotation.weight)


class RotatedInterchange(nn.Module):
    """Distributed interchange with a whole learned rotation: some coordinates of the rotated space are exchanged.

    Equal to `LowRankInterchange` on its first `rank` directions; the rest of the rotation is there for other
    coordinates to be asked for, several hypotheses in one rotation.

    Args:
        features: size of the last dimension.
        coordinates: which rotated coordinates to exchange; a number for the first so many.

    `forward(base, source, coordinates=None)`: (..., features) both; the same shape. `rotation.weight` is the rotation,
    (features, features), a row a coordinate.

    Source: Geiger et al. 2023 (arXiv:2303.02536); pyvene's `RotatedSpaceIntervention`.
    """

    def __init__(self, features: int, coordinates: int | Features):
        super().__init__()
        self.coordinates = slice(coordinates) if isinstance(coordinates, int) else coordinates
        self.rotation = _Rotation(features, features)

    def forward(self, base: torch.Tensor, source: torch.Tensor, coordinates: Features | None = None) -> torch.Tensor:
        rows = self.coordinates if coordinates is None else coordinates
        return _exchange(base, source, self.rotation.weight[rows])


class BoundlessInterchange(nn.Module):
    """Distributed interchange that learns how many coordinates it needs: the first ones, by a soft boundary.

    Args:
        features: size of the last dimension.
        temperature: how soft the boundary is, in coordinates. A buffer: lower it while training,
            `boundless.temperature.fill_(t)`.

    `forward(base, source)`: (..., features) both; the same shape. `mask()` is (features,), in (0, 1); `boundary`, the
    share of the coordinates inside, and the rotation are trainable. Add `boundary` to the loss to make it small.

    Source: Wu et al. 2023 (arXiv:2305.08809); pyvene's `BoundlessRotatedSpaceIntervention`.
    """

    temperature: torch.Tensor

    def __init__(self, features: int, temperature: float = 50.0):
        super().__init__()
        self.rotation = _Rotation(features, features)
        self.boundary = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("temperature", torch.tensor(temperature))

    def mask(self) -> torch.Tensor:
        """How much of each rotated coordinate is exchanged."""
        at = torch.arange(self.rotation.in_features, device=self.boundary.device)
        end = self.boundary.clamp(1e-3, 1) * self.rotation.in_features
        return torch.sigmoid(at / self.temperature) * torch.sigmoid((end - at) / self.temperature)

    def forward(self, base: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return _exchange(base, source, self.rotation.weight, self.mask())


class SigmoidMask(nn.Module):
    """Interchange of softly chosen features: `(1 - m) base + m source`, with `m = sigmoid(logits / temperature)`.

    Args:
        features: size of the last dimension.
        temperature: a buffer; lower it while training to make `m` hard.

    `forward(base, source)`: (..., features) both; the same shape. `logits` (features,) is trainable, zero at first.

    Source: pyvene's `SigmoidMaskIntervention`.
    """

    temperature: torch.Tensor

    def __init__(self, features: int, temperature: float = 1.0):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(features))
        self.register_buffer("temperature", torch.tensor(temperature))

    def mask(self) -> torch.Tensor:
        """How much of each feature is exchanged."""
        return torch.sigmoid(self.logits / self.temperature)

    def forward(self, base: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return (base + (source - base) * self.mask()).to(base.dtype)


def _exchange(
    base: torch.Tensor, source: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`base` with its part along orthonormal `rows` taken from `source`, a `mask`ed share of each."""
    along = (source - base).to(rows.dtype) @ rows.T
    along = along if mask is None else along * mask
    return (base + along @ rows).to(base.dtype)
