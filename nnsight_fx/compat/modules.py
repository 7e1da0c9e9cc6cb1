"""Hooks on all modules."""

from __future__ import annotations

import torch


def hooked_everywhere() -> bool:
    """Has anybody put a hook on all modules?"""
    return bool(torch.nn.modules.module._has_any_global_hook())
