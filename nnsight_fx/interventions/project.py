"""Projection onto, or out of, a subspace."""

from __future__ import annotations

import torch
import torch.nn as nn


class Projection(nn.Module):
    """Keep what lies in a subspace, or remove it.

    ```python
    forget = Projection(refusal)                     # directional ablation: that direction is gone
    only = Projection(torch.stack([a, b]), onto=True)
    h.output = forget(h.output)
    ```

    Args:
        directions: (features,) or (k, features), of any length and not necessarily orthogonal; their span is the
            subspace. Linearly dependent ones count once.
        onto: keep the subspace, and not its complement.

    `forward(base)`: (..., features) to the same shape. The orthonormal `basis` (rank, features) is a buffer: in the
    `state_dict`, not trained.

    Raises:
        ValueError: the directions span nothing.

    Source: Ravfogel et al. 2020 (arXiv:2004.07667); Arditi et al. 2024 (arXiv:2406.11717).
    """

    basis: torch.Tensor

    def __init__(self, directions: torch.Tensor, onto: bool = False):
        super().__init__()
        rows = directions.detach()[None] if directions.dim() == 1 else directions.detach()
        if rows.dim() != 2:
            raise ValueError(f"`directions` has shape {tuple(rows.shape)}; give (features,) or (k, features)")
        _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
        smallest = sizes.max() * max(rows.shape) * torch.finfo(sizes.dtype).eps
        basis = basis[sizes > smallest]
        if not len(basis):
            raise ValueError("`directions` are all zero: they span nothing to project on")
        self.register_buffer("basis", basis)
        self.onto = onto

    def forward(self, base: torch.Tensor) -> torch.Tensor:
        inside = (base.to(self.basis.dtype) @ self.basis.T) @ self.basis
        return (inside if self.onto else base - inside).to(base.dtype)
