"""`Rows` follows the rows of a batch, and refuses where they could meet. Checked against each row computed alone."""

import pytest
import torch
import torch.nn.functional as F

from nnsight_fx.batching.rows import Mixed, Rows

X, W = torch.linspace(-1, 1, 7 * 5 * 4).reshape(7, 5, 4), torch.linspace(0, 1, 16).reshape(4, 4)


def own_row(x):
    return x[torch.arange(x.shape[0], device=x.device)[:, None], torch.tensor([[0, 2]])]


def heads(x):
    return x.view(len(x), 5, 2, 2).transpose(1, 2).reshape(-1, 5, 2)


APART = {
    "linear": lambda x: F.linear(x, W, W[0]),
    "matmul": lambda x: x @ W,
    "norm": lambda x: F.layer_norm(x, (4,)),
    "softmax": lambda x: x.softmax(-1) + x.softmax(1),
    "heads": lambda x: heads(x).bmm(heads(x).transpose(1, 2)).view(len(x), 2, 5, 5),
    "attention": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True),
    "mask": lambda x: x.masked_fill(torch.ones(5, 5).tril()[:, :4] == 0, -1),
    "mean": lambda x: x.mean(1) * x.sum((1, 2), keepdim=True)[:, 0],
    "cat": lambda x: torch.cat([x, torch.zeros(len(x), 5, 1)], -1).flip(1),
    "filled": lambda x: x + x.new_ones(4),
    "in place": lambda x: x.clone().mul_(2).add_(x),
    "pick": own_row,
    "transposed": lambda x: x.transpose(0, 1).relu().permute(1, 2, 0),
    "expand": lambda x: x + torch.ones(1, 1, 4).expand(len(x), -1, -1),
    "truth": lambda x: x * 2 if (x > -5).all() else x,
    "embedding": lambda x: F.embedding((x * 0).long(), W),
    "split": lambda x: torch.stack(x.chunk(2, -1), 1).unbind(1)[0].unsqueeze(-1).squeeze(-1),
}


@pytest.mark.parametrize("name", APART)
def test_rows_that_are_apart(name):
    function = APART[name]
    follow = Rows(7, [X], {5, 4})
    with follow:
        got = function(X)
    dim = follow.dim(got)
    assert dim is not None
    want = [function(X[i : i + 1]) for i in range(7)]
    assert torch.allclose(got, torch.cat(want, dim), atol=1e-6)


MEET = {
    "roll over everything": lambda x: x.roll(1),
    "mean": lambda x: x - x.mean(0),
    "all dims": lambda x: x / x.sum(),
    "softmax": lambda x: x.softmax(0),
    "cumsum": lambda x: x.cumsum(0),
    "gram": lambda x: x.flatten(1) @ x.flatten(1).T,
    "attention over rows": lambda x: F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3),
    "flip": lambda x: x + x.flip(0),
    "roll": lambda x: x.roll(1, 0),
    "a row": lambda x: x + x[0],
    "some rows": lambda x: x[2:],
    "row number": lambda x: x * torch.arange(len(x))[:, None, None],
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "look": lambda x: x * 2 if x.sum().item() > 0 else x,
    "truth": lambda x: x * 2 if (x > 0).all() else x,
    "random": lambda x: F.dropout(x, 0.5),
    "shuffled": lambda x: x[torch.arange(6, -1, -1)],
    "into what is shared": lambda x: SHARED.copy_(x.mean((1, 2))),
    "unknown": lambda x: torch.linalg.qr(x)[0],
}
SHARED = torch.zeros(7)


@pytest.mark.parametrize("name", MEET)
def test_rows_that_meet(name):
    with pytest.raises(Mixed), Rows(7, [X], {5, 4}):
        MEET[name](X)
