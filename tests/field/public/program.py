"""One program: what a user wanted to do, as nnsight_fx has it and with plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn as nn


@dataclass(frozen=True)
class Program:
    what: str  # the user did, in few words
    source: str  # the thread or page
    model: str  # a name of `models`
    ours: Callable[[Any], Any]
    plain: Callable[[nn.Module], Any]
    exact: bool = True  # to the bit where the engine promises the model's bits; else the arithmetic is another
    fails: str = ""  # why, where it is known to fail
