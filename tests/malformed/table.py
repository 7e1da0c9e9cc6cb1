"""The model of the malformed programs, and how a row is written down."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn

from nnsight_fx import NNsight

X = torch.linspace(-1, 1, 6).reshape(2, 3)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, h):
        return h + self.fc(h)


class Pair(nn.Module):
    def forward(self, h):
        return h, h * 2


class Net(nn.Module):
    """Two blocks, a tuple, a module that nothing calls and one whose weight alone is used."""

    def __init__(self):
        super().__init__()
        self.first, self.layers, self.pair = nn.Linear(3, 4), nn.ModuleList([Block(), Block()]), Pair()
        self.unused, self.tied, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, scale=1.0):
        h = self.first(x)
        for layer in self.layers:
            h = layer(h)
        a, b = self.pair(h)
        return self.last(nn.functional.linear(a + b * scale, self.tied.weight))

    def encode(self, x):
        return self.first(x)


def wrap(engine: str) -> NNsight:
    torch.manual_seed(0)
    model = NNsight(Net())
    if engine != "hooks":
        model.compile(backend=engine)
    return model


@dataclass(frozen=True)
class Row:
    """A program, the error that it gives, and parts of its text. `line`: does it name a line of the program."""

    body: Callable
    error: type[BaseException]
    parts: tuple[str, ...]
    line: bool

    def lines(self) -> range:
        code = self.body.__code__
        last = max(line for *_, line in code.co_lines() if line is not None)
        return range(code.co_firstlineno, max(last, *_inner(code)) + 1)

    def named(self, text: str) -> bool:
        """Is a line of the program in `text`?"""
        found = re.findall(re.escape(self.body.__code__.co_filename) + r":(\d+)", text)
        return any(int(n) in self.lines() for n in found)


def _inner(code) -> list[int]:
    return [line for c in code.co_consts if hasattr(c, "co_lines") for *_, line in c.co_lines() if line is not None] or [0]


ROWS: dict[str, Row] = {}


def row(error: type[BaseException], *parts: str, line: bool = True) -> Callable:
    """Put a program into the table. torch's own errors name the line in their traceback, ours in their text, too."""
    def put(body: Callable) -> Callable:
        name = body.__name__.strip("_")
        assert name not in ROWS, name
        ROWS[name] = Row(body, error, parts, line)
        return body

    return put
