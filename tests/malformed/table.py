"""The model of the malformed programs, and how a row is written down."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from nnsight_fx import LanguageModel, NNsight

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


def language_model() -> LanguageModel:
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(["<eos>", "<unk>", *"abcdefgh"])}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    names = {"eos_token": "<eos>", "unk_token": "<unk>", "padding_side": "left"}
    module = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=2, n_positions=32)).eval()
    return LanguageModel(module, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, **names))


MODELS: dict[str, Callable[[], NNsight]] = {"net": lambda: NNsight(Net()), "language": language_model}
INPUTS: dict[str, torch.Tensor] = {"net": X, "language": torch.tensor([[3, 4, 5]])}


def wrap(engine: str, kind: str = "net") -> NNsight:
    torch.manual_seed(0)
    model = MODELS[kind]()
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
    model: str

    def lines(self) -> range:
        code = self.body.__code__
        last = max(line for *_, line in code.co_lines() if line is not None)
        return range(code.co_firstlineno, max(last, *_inner(code)) + 1)

    def named(self, text: str) -> bool:
        """Is a line of the program in `text`?"""
        found = re.findall(re.escape(self.body.__code__.co_filename) + r":(\d+)", text)
        return any(int(n) in self.lines() for n in found)


def _inner(code) -> list[int]:
    return [
        line for c in code.co_consts if hasattr(c, "co_lines") for *_, line in c.co_lines() if line is not None
    ] or [0]


ROWS: dict[str, Row] = {}


def row(error: type[BaseException], *parts: str, line: bool = True, model: str = "net") -> Callable:
    """Put a program into the table. Not `line`: it names the line in its traceback alone, or a file."""

    def put(body: Callable) -> Callable:
        name = body.__name__.strip("_")
        assert name not in ROWS, name
        ROWS[name] = Row(body, error, parts, line, model)
        return body

    return put
