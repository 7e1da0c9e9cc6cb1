"""What transformers does lazily in the middle of a forward, done before a capture: Dynamo cannot trace the locks it takes."""

from __future__ import annotations

import torch.nn as nn


def settle(module: nn.Module) -> None:
    """Install transformers' output-collecting hooks, which it would install at the first call that asks for them."""
    try:
        from transformers import PreTrainedModel
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:  # an older transformers installs nothing lazily
        return
    for each in module.modules():
        if isinstance(each, PreTrainedModel):
            maybe_install_capturing_hooks(each)
