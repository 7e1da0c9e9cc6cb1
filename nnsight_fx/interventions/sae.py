"""A sparse autoencoder spliced into a site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn


class SAESplice(nn.Module):
    """The values through an autoencoder, whose features can be edited on the way; by default with its error added.

    ```python
    splice = SAESplice(sae)                              # any module with `encode` and `decode`
    features = splice.encode(h.output).save()
    h.output = splice(h.output, edit=lambda f: f.index_fill(-1, feature, 0.0))
    ```

    With `error` the result is `decode(edit(f)) + (base - decode(f))`: unedited, the model's own values, so that only
    the edit shows. The reconstruction in the error carries no gradient: the gradient of a later loss at `f` is the
    feature's own effect.

    Args:
        sae: maps (..., features) to (..., latents) by `encode` and back by `decode`. It is a submodule: its weights are
            in the `state_dict` and trainable.
        error: add what the autoencoder does not explain.

    `forward(base, edit=None)`: (..., features) to the same shape; `edit` gets the latents and returns new ones.

    Raises:
        TypeError: `sae` has no `encode` and `decode`.

    Source: Marks et al. 2024 (arXiv:2403.19647); SAELens' `use_error_term`.
    """

    def __init__(self, sae: nn.Module, error: bool = True):
        super().__init__()
        missing = [name for name in ("encode", "decode") if not callable(getattr(sae, name, None))]
        if missing:
            raise TypeError(f"`{type(sae).__name__}` has no `{'` and no `'.join(missing)}`: give it both")
        self.sae: Any = sae
        self.error = error

    def encode(self, base: torch.Tensor) -> torch.Tensor:
        """The features of `base`: (..., latents)."""
        return self.sae.encode(base)

    def forward(self, base: torch.Tensor, edit: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        features = self.encode(base)
        made = self.sae.decode(features if edit is None else edit(features))
        if self.error:
            with torch.no_grad():
                explained = self.sae.decode(features)
            made = made + (base - explained)
        return made.to(base.dtype)
