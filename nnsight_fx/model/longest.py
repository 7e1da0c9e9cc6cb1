"""How long a prompt may be: learned tables of positions end, where rotary models go on."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch.nn as nn

from .padding import innermost

TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)$")


class Positions(NamedTuple):
    """A learned table of positions."""

    path: str
    count: int  # how many tokens a prompt has at most


def positions_of(module: nn.Module) -> Positions | None:
    """A language model's learned table of positions, where its size is what the configuration says.

    `None` for other models, and for tables of a class of their own, which may grow (FSMT), or clamp the positions (ProphetNet).
    """
    config = getattr(innermost(module)[0], "config", None)
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(most, int):
        return None
    for path, table in module.named_modules():
        plain = type(table) is nn.Embedding or "Learned" in type(table).__name__
        if not plain or not isinstance(table, nn.Embedding) or not TABLE.search(path):
            continue
        begin = table.padding_idx + 1 if table.padding_idx is not None else table.num_embeddings - most
        if 0 <= begin <= 2:  # the rows in front of the first position
            return Positions(path, table.num_embeddings - begin)
    return None
