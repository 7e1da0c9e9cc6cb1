"""Models, inputs and the loops of traces that a session may run together."""

import torch
import torch.nn as nn

from nnsight_fx import save

torch.manual_seed(0)
X = torch.randn(4, 1, 7, 16)


class Block(nn.Module):
    """Mixes positions (each sees those before it) and features, as a transformer's block does."""

    def __init__(self):
        super().__init__()
        self.mix, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        causal = torch.tril(torch.ones(x.shape[1], x.shape[1], device=x.device)) / x.shape[1]
        x = x + self.mix(causal @ x)
        return x + self.down(torch.relu(self.up(x)))


class MLP(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm, self.head, self.unused = nn.LayerNorm(16), nn.Linear(16, 5), nn.Linear(1, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Mixing(MLP):
    """Each row is seen by the others."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


class Breaks(MLP):
    """A graph break in the middle, where what follows depends on the values."""

    def forward(self, x):
        x = self.blocks[0](x)
        x = x * 2 if x.sum().item() > 0 else x * -3 + 1
        return self.head(self.norm(self.blocks[2](self.blocks[1](x))))


class Dropout(MLP):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Noise(MLP):
    def forward(self, x):
        return super().forward(x) + torch.rand(5)


class Counting(MLP):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def mlp(cls=MLP, **options):
    torch.manual_seed(1)
    return cls(**options).eval().requires_grad_(False)


def same(got, want, exact=False):
    assert type(got) is torch.Tensor
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got.detach(), want.detach(), **tolerance)


# -- loops: each gives its results as a list; the clean values are saved, so that they run without a session, too --------


def patching(model):
    """The sweep that a researcher writes: every layer and position, in place."""
    scores = []
    with model.trace(X[0]):
        cached = [block.output.save() for block in model.blocks]
    for layer in range(len(model.blocks)):
        for position in (0, 3, -1):
            with model.trace(X[1]):
                model.blocks[layer].output[:, position] = cached[layer][:, position]
                scores.append(model.head.output[:, -1].save())
    return [*scores, *cached]


def several(model):
    """Several saves, reads before and after a write, a view changed in place, and a value of an input."""
    found = []
    for scale in (0.5, 2.0, -1.0):
        with model.trace(X[0]):
            early = model.blocks[0].output.save()
            h = model.blocks[1].output.clone()
            h[:, 2] *= scale
            model.blocks[1].output = h
            row = model.blocks[2].input[:, 2]
            row += 1
            found += [early, h.save(), model.blocks[2].output.save(), model.output.mean().save(), row.save()]
    return found


def inputs(model):
    """Other inputs, one structure."""
    found = []
    for x in X:
        with model.trace(x):
            model.blocks[1].output = model.blocks[1].output * 2
            found.append(model.head.output.save())
    return found


def mixed(model):
    """Structures that differ: reads alone, writes, in-place changes, at inputs and at outputs, over two inputs."""
    found = save([]) if False else []
    for x in X[:2]:
        for layer in range(3):
            with model.trace(x):
                found.append(model.blocks[layer].output.save())
            with model.trace(x):
                model.blocks[layer].input = model.blocks[layer].input + 1
                found.append(model.head.output[:, 1:3].save())
            with model.trace(x):
                model.blocks[layer].up.output[..., :4] = 0
                found.append(model.head.output.save())
    return found


def stops(model):
    """The forward ends where nothing behind it is wanted."""
    found = []
    for position in range(3):
        with model.trace(X[0]) as tracer:
            model.blocks[0].output[:, position] = 0
            found.append(model.blocks[1].output.save())
            tracer.stop()
    return found


def chained(model):
    """Each trace takes what the one before it made."""
    found, h = [], X[3]
    for _ in range(3):
        with model.trace(X[0]):
            model.blocks[0].output = model.blocks[0].output + h
            h = model.blocks[2].output.save()
        found.append(h)
    return found


def vectors(model):
    """A vector of your own, and a number, that change between the traces."""
    found, v = [], torch.ones(16)
    for scale in (0.1, 0.2, 0.3):
        with model.trace(X[0]):
            model.blocks[1].output += scale * v
            found.append(model.head.output.save())
        v = v + 1
    return found


PROGRAMS = [patching, several, inputs, mixed, stops, chained, vectors]


class InPlace(MLP):
    """Changes a value that no site has, as `nn.ReLU(inplace=True)` does, and with `late` one that a site has."""

    late = False

    def forward(self, x):
        h = self.blocks[0](x)
        h = (h * 2).relu_()
        h = self.blocks[1](h)
        return self.head(self.norm(h.add_(1) if self.late else h))


class Late(InPlace):
    late = True
