"""The models of test_same_text.py. Their text runs on the peer's side too, so it needs nothing but torch and transformers."""

import torch


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8)

    def forward(self, x, scale=1.0):
        return x + scale * self.down(self.act(self.up(x)))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = torch.nn.LayerNorm(8), torch.nn.Linear(8, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(self.norm(x))


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.twice, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.twice(torch.tanh(self.twice(x))))


class Ops(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, x):
        h = self.inner(x)
        return torch.relu(h) + h


class HasOps(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.ops, self.head = Ops(), torch.nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.ops(x))


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = torch.nn.LSTM(8, 8, batch_first=True), torch.nn.Linear(8, 5)

    def forward(self, x):
        out, (h, c) = self.rnn(x)
        return self.head(out + h[-1][:, None] + c[-1][:, None])


def gpt2():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=10, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=9, eos_token_id=9
    )
    return transformers.GPT2LMHeadModel(config).eval()


def tokenizer():
    """Words `a` to `h`, unknown and end: what both libraries need to take text."""
    import tokenizers
    import transformers

    words = {**{letter: i for i, letter in enumerate("abcdefgh")}, "<unk>": 8, "<end>": 9}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="<end>", pad_token="<end>", padding_side="left"
    )
