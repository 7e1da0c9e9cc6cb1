"""Small models, built the same every time. Each takes one tensor.

The text of this file also runs on the peer's side, so it needs nothing but torch and transformers.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn as nn
import transformers as hf


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act, self.pool, self.head = nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Linear(128, 5)

    def forward(self, x):
        return self.head(self.pool(self.b(self.act(self.a(x)))).flatten(1))


class Recurrent(nn.Module):
    """The LSTM returns `(o, (h, c))`, and both halves matter."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.lstm, self.head = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        o, (h, c) = self.lstm(self.a(x))
        return self.head(self.b(o + h[-1][:, None] * c[-1][:, None]))


class Shared(nn.Module):
    """`a` runs twice: its plain `.output` is the first call's."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b, self.head = nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.b(self.a(self.act(self.a(x)))))


class Breaks(nn.Module):
    """A graph break in the middle, where what follows depends on the values."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        y = self.a(x)
        y = y * 2 if y.sum().item() > 0 else y * -3 + 1
        return self.head(self.b(y))


class BatchNorm(nn.Module):
    """In train mode: every forward moves its statistics."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv1d(7, 7, 1), nn.BatchNorm1d(7), nn.Conv1d(7, 7, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.b(self.bn(self.a(x)).relu()))


class MoE(nn.Module):
    """Each token goes to 2 of 4 experts; how many rows an expert gets depends on the values."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.router = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.experts, self.head = nn.ModuleList(nn.Linear(16, 16) for _ in range(4)), nn.Linear(16, 5)

    def forward(self, x):
        x = self.a(x)
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        mixed = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == i)
            if len(token):
                mixed.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return self.head(self.b(x + mixed.view_as(x)))


@dataclasses.dataclass
class State:
    h: torch.Tensor
    skip: torch.Tensor
    step: int


class Returns(nn.Module):
    """`part` gives two tensors and a number in a container, and takes keywords only."""

    def __init__(self, pack: Callable):
        super().__init__()
        self.a, self.part, self.b, self.head = nn.Linear(16, 16), Part(pack), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        got = self.part(x=self.a(x), scale=2.0)
        h, skip, step = got.values() if isinstance(got, dict) else vars(got).values() if isinstance(got, State) else got
        return self.head(self.b(h) + skip * step)


class Part(nn.Module):
    def __init__(self, pack: Callable):
        super().__init__()
        self.up, self.pack = nn.Linear(16, 16), pack

    def forward(self, *, x, scale):
        return self.pack(self.up(x) * scale, x, 3)


class Alias(nn.Module):
    """`same` returns its argument, and the caller goes on to use both names of it."""

    def __init__(self):
        super().__init__()
        self.a, self.same, self.b = nn.Linear(16, 16), nn.Identity(), nn.Linear(16, 16)

    def forward(self, x):
        y = self.a(x)
        z = self.same(y)
        return self.b(z) + y


class InPlace(nn.Module):
    """`act` changes in place what `a` returned."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 16)

    def forward(self, x):
        return self.b(self.act(self.a(x)))


class Views(nn.Module):
    """`view` returns half of `a`'s output: a change of it is a change of the whole."""

    def __init__(self):
        super().__init__()
        self.a, self.view, self.b = nn.Linear(16, 16), nn.Identity(), nn.Linear(16, 16)

    def forward(self, x):
        whole = self.a(x)
        half = self.view(whole.chunk(2, -1)[0])
        return self.b(whole) + half.sum(-1, keepdim=True)


def as_dict(h, skip, step):
    return {"h": h, "skip": skip, "step": step}


def as_tuple(h, skip, step):
    return h, skip, step


SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def gpt2():
    config = hf.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return hf.GPT2LMHeadModel(config)


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2))


def neox():
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, intermediate_size=64, bos_token_id=0, eos_token_id=0))


def bert():
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL, intermediate_size=64))


@dataclasses.dataclass
class Spec:
    """A model, and three of its modules: `a` runs before `b` and gives the same shape; `head` takes what `a` gives."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] | None = None  # of the input; `None`: token ids
    a: str = "a"
    b: str = "b"
    head: str = "b"


MODELS = {
    "gpt2": Spec(gpt2, None, "transformer.h.0", "transformer.h.2", "lm_head"),
    "llama": Spec(llama, None, "model.layers.0", "model.layers.2", "lm_head"),
    "neox": Spec(neox, None, "gpt_neox.layers.0", "gpt_neox.layers.2", "lm_head"),
    "bert": Spec(bert, None, "bert.encoder.layer.0", "bert.encoder.layer.2", "cls"),
    "mlp": Spec(MLP, (3, 7, 16), "blocks.0", "blocks.2", "head"),
    "cnn": Spec(CNN, (3, 3, 8, 8)),
    "lstm": Spec(Recurrent, (3, 7, 16)),
    "shared": Spec(Shared, (3, 7, 16)),
    "breaks": Spec(Breaks, (3, 7, 16)),
    "batchnorm": Spec(BatchNorm, (3, 7, 16)),
    "moe": Spec(MoE, (3, 7, 16)),
    "tuple": Spec(lambda: Returns(as_tuple), (3, 7, 16)),
    "dict": Spec(lambda: Returns(as_dict), (3, 7, 16)),
    "dataclass": Spec(lambda: Returns(State), (3, 7, 16)),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = MODELS[name].make().requires_grad_(False)
    if hasattr(module, "config"):
        module.config.use_cache = False
    return module.train(name == "batchnorm")


def inputs(name: str, seed: int = 0) -> torch.Tensor:
    draw, shape = torch.Generator().manual_seed(seed), MODELS[name].shape
    return torch.randn(shape, generator=draw) if shape else torch.randint(1, 100, (3, 7), generator=draw)
