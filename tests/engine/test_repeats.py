"""Equal blocks are captured once. What makes a block different is seen, then and later: the numbers are always those of hooks."""

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import nnsight_fx
from nnsight_fx import NNsight, assert_no_fallback

D, N = 6, 5
SCALE = 0.5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.scale, self.index = nn.Linear(D, D), nn.Linear(D, D), 0.5, 0

    def forward(self, x):
        return x + self.down(self.up(x).relu()) * self.scale


class ByIndex(Block):
    def forward(self, x):
        return x + self.down(self.up(x)) * self.index


class Counting(Block):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.down(self.up(x)) * self.calls


class InPlace(Block):
    def forward(self, x):
        x += self.down(self.up(x))
        return x


class Views(Block):
    def forward(self, x):
        up = self.up(x)
        half, rest = up[..., :3], up[..., 3:]
        half *= 2
        rest.mul_(3)
        return x + self.down(up)


class Shorter(Block):
    def forward(self, x):
        return self.down(self.up(x))[:, :-1]


class Pair(Block):
    def forward(self, x):
        h = self.up(x)
        return x + self.down(h), h, None


class Global(Block):
    def forward(self, x):
        return x + self.down(self.up(x)) * SCALE


class Dropout(Block):
    def forward(self, x):
        return x + nn.functional.dropout(self.down(self.up(x)), 0.5, self.training)


class Normed(Block):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(x) + self.down(self.up(x))


class Modes(Block):
    def forward(self, x):
        with torch.no_grad():
            h = self.up(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = self.down(h)
        return x + y.float()


class Dims(Block):
    def forward(self, x):
        h = self.down(self.up(x))
        return x + h if x.requires_grad else x - h


class Experts(Block):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        return x + self.down(self.up(x)) + sum(e(x) for e in self.experts)


class Kept(Block):
    """Puts what it made on itself."""

    def forward(self, x):
        self.last = self.up(x)
        return x + self.down(self.last)


class Stack(nn.Module):
    def __init__(self, kind, n=N):
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(n))
        self.head = nn.Linear(D, D)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x)


def stack(kind, n=N, change=None, frozen=True, train=False):
    torch.manual_seed(0)
    model = Stack(kind, n)
    for i, block in enumerate(model.blocks):
        block.index = i
    model.requires_grad_(not frozen).train(train)
    if change is not None:
        change(model)
    return model.requires_grad_(not frozen)


def first(x):
    return x[0] if isinstance(x, tuple) else x


def outcome(model, x, seed=1):
    """What a trace saves that looks into all blocks and changes two of them."""
    torch.manual_seed(seed)
    with model.trace(x):
        saved = nnsight_fx.save([])
        for i, block in enumerate(model.blocks):
            saved.append(block.up.input.clone())
            if i == 1:
                block.up.output = block.up.output * 2
            if i == 3:
                block.down.output[:1] += 1
            saved.append(first(block.output).clone())
        out = model.output.save()
    return [*saved, out]


def same(made, x=None, backend="eager", **options):
    """Captured as on hooks, on models made twice; gives the captured one."""
    x = torch.randn(2, 4, D) if x is None else x
    wanted, model = NNsight(made()), NNsight(made())
    model.compile(backend=backend, **options)
    for _ in range(2):
        for a, b in zip(outcome(wanted, x.clone()), outcome(model, x.clone()), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    return model


def repeated(model):
    return [s["repeated"] for s in model.explain().to_dict()["captures"][-1]["segments"]] or [0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [Block, InPlace, Views, Pair, Global, Dropout, Normed, Modes, Experts])
def test_equal_blocks_are_captured_once(kind, backend):
    with assert_no_fallback():
        model = same(lambda: stack(kind), backend=backend)
    assert repeated(model)[0] >= N - 2


@pytest.mark.parametrize("kind", [ByIndex, Counting, Shorter, Kept])
def test_blocks_that_differ_are_captured_each(kind):
    x = torch.randn(2, 4 if kind is not Shorter else 9, D)
    model = same(lambda: stack(kind), x)
    assert repeated(model)[0] == 0


@pytest.mark.parametrize("kind", [Block, InPlace, Views, Pair, Dropout, Normed, Dims, Modes])
def test_training(kind):
    model = same(lambda: stack(kind, frozen=False, train=True))
    assert repeated(model)[0] >= N - 3


def _dtype(model):
    model.blocks[3].up.weight = nn.Parameter(model.blocks[3].up.weight.t().contiguous().t())


def _scale(model):
    model.blocks[3].scale = 3.0


def _kinds(model):
    for i in (1, 3):
        model.blocks[i].scale = -1.0


def _trained(model):
    model.blocks[3].train()


def _bias(model):
    model.blocks[3].up.bias = None


def _slope(model):
    for i, block in enumerate(model.blocks):
        block.up = nn.Sequential(nn.Linear(D, D), nn.LeakyReLU(0.1 * i))


def _class(model):
    model.blocks[3] = Global()


def _forward(model):
    block = model.blocks[3]
    block.forward = lambda x: x + block.down(block.up(x)) * 2


def _hook(model):
    model.blocks[3].up.register_forward_hook(lambda m, args, out: out * 3)


def _pre_hook(model):
    model.blocks[2].register_forward_pre_hook(lambda m, args: (args[0] * 3,))


def _norm(model):
    for i, block in enumerate(model.blocks):
        block.up = nn.LayerNorm(D, eps=0.5 * i + 0.1)


CHANGES = [_scale, _kinds, _trained, _bias, _slope, _class, _forward, _hook, _pre_hook, _norm, _dtype]


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_unlike_the_others(change):
    kind = Dropout if change is _trained else Block
    model = same(lambda: stack(kind, change=change, n=7))
    assert repeated(model)[0] < 6


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_becomes_unlike_the_others(change):
    kind = Dropout if change is _trained else Block
    wanted, model, x = NNsight(stack(kind)), NNsight(stack(kind)), torch.randn(2, 4, D)
    model.compile(backend="eager")
    outcome(model, x)
    assert repeated(model)[0] == N - 1
    for each in (wanted, model):
        torch.manual_seed(2)
        change(each._module)
    for a, b in zip(outcome(wanted, x), outcome(model, x), strict=True):
        assert torch.allclose(a, b)


def test_a_global_that_changes(monkeypatch):
    model, x = same(lambda: stack(Global)), torch.randn(2, 4, D)
    monkeypatch.setitem(globals(), "SCALE", 4.0)
    for a, b in zip(outcome(NNsight(stack(Global)), x), outcome(model, x), strict=True):
        assert torch.allclose(a, b)


def _one_module(model):
    for block in model.blocks:
        block.up = model.blocks[0].up


def _one_weight(model):
    for block in model.blocks[2:]:
        block.up.weight = model.blocks[1].up.weight


def _of_the_model(model):
    for block in model.blocks:
        block.down = model.head


@pytest.mark.parametrize("change", [_one_module, _one_weight, _of_the_model])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_blocks_share(change, backend):
    x = torch.randn(2, 4, D)
    wanted, model = NNsight(stack(Block, change=change)), NNsight(stack(Block, change=change))
    model.compile(backend=backend)
    for each in (wanted, model):
        with each.trace(x):
            each.blocks[2].output[:] *= 2
            saved = nnsight_fx.save([block.output for block in each.blocks])
        each.kept = saved
    assert all(torch.allclose(a, b) for a, b in zip(wanted.kept, model.kept, strict=True))


class Looped(Stack):
    """One block, called again and again."""

    def forward(self, x):
        for _ in range(4):
            x = self.blocks[0](x)
        return self.head(x)


def test_one_block_many_times():
    x, results = torch.randn(2, 4, D), []
    for backend in (None, "eager"):
        torch.manual_seed(0)
        model = NNsight(Looped(Block))
        if backend:
            model.compile(backend=backend)
        with model.trace(x):
            seen = nnsight_fx.save([])
            for _ in range(4):
                seen.append(model.blocks[0].output)
                model.blocks[0].output[:] += 1
                model.blocks[0].next()
            out = model.output.save()
        results.append([*seen, out])
    assert repeated(model)[0] >= 2
    assert all(torch.allclose(a, b) for a, b in zip(*results, strict=True))


class Given(Stack):
    """Blocks get other things beside the stream."""

    def forward(self, x, scale=1.0, mask=None):
        kept = []
        for i, block in enumerate(self.blocks):
            x = block(x, x if i == 2 else x * 2, (mask, scale), flag=i == 3, kept=kept)
        return self.head(x + len(kept))


class Takes(Block):
    def forward(self, x, y, several, flag, kept=None):
        mask, scale = several
        h = self.up(x) * scale if flag else self.up(y)
        if mask is not None:
            h = h * mask
        return x + self.down(h)


class Appends(Takes):
    def forward(self, x, y, several, flag, kept):
        kept.append(x)
        return super().forward(x, y, several, flag)


@pytest.mark.parametrize("kind", [Takes, Appends])
def test_other_arguments(kind):
    torch.manual_seed(0)
    x, mask, results = torch.randn(2, 4, D), torch.rand(2, 4, 1), []
    for backend in (None, "eager"):
        torch.manual_seed(0)
        model = NNsight(Given(kind, 7))
        if backend:
            model.compile(backend=backend)
        for given in (dict(scale=2.0), dict(mask=mask), dict(mask=mask, scale=3.0), {}):
            with model.trace(x, **given):
                model.blocks[4].up.output[:] += 1
                results.append((backend, nnsight_fx.save([block.output for block in model.blocks] + [model.output])))
    wanted, got = ([r for b, r in results if b == which] for which in (None, "eager"))
    for one, other in zip(wanted, got, strict=True):
        assert all(torch.allclose(a, b) for a, b in zip(one, other, strict=True))


class Checkpointed(Stack):
    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def test_checkpointed_blocks_and_gradients():
    x, results = torch.randn(2, 4, D), []
    for whole in (Stack, Checkpointed):
        for backend in (None, "aot_eager"):
            torch.manual_seed(0)
            model = NNsight(whole(Block))
            if backend:
                model.compile(backend=backend)
            with model.trace(x):
                h = model.blocks[3].output
                with model.output.sum().backward():
                    grad = h.grad.save()
            results.append([grad, *(p.grad for p in model._module.parameters())])
    assert all(torch.allclose(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_lengths_that_vary():
    wanted, model = NNsight(stack(Block)), NNsight(stack(Block))
    model.compile(backend="eager", dynamic=True)
    for n in (4, 7, 9):
        x = torch.randn(2, n, D)
        assert all(torch.allclose(a, b) for a, b in zip(outcome(wanted, x), outcome(model, x), strict=True))
    assert repeated(model)[0] >= N - 2


class Broken(Stack):
    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 2:
                torch._dynamo.graph_break()
        return self.head(x)


def test_a_graph_break_between_blocks():
    x, results = torch.randn(2, 4, D), []
    for backend in (None, "eager"):
        torch.manual_seed(0)
        model = NNsight(Broken(Block, 7))
        if backend:
            model.compile(backend=backend)
        results.append(outcome(model, x))
    assert all(torch.allclose(a, b) for a, b in zip(*results, strict=True))


def test_explain_tells():
    model = same(lambda: stack(Block))
    assert "4 blocks repeat another's capture" in str(model.explain())


class Told:
    """What is not a module, and is shared by all blocks."""

    def __init__(self):
        self.calls, self.seen = 0, []


TOLD = Told()


class CountsTogether(Block):
    told = TOLD

    def forward(self, x):
        self.told.calls += 1
        return x + self.down(self.up(x)) * self.told.calls


class AppendsTogether(Block):
    told = TOLD

    def forward(self, x):
        self.told.seen.append(1)
        return x + self.down(self.up(x)) * len(self.told.seen)


class ReadsTogether(Block):
    told = TOLD

    def forward(self, x):
        return x + self.down(self.up(x)) * (self.told.calls + len(self.told.seen))


class CountsBetween(Stack):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            TOLD.calls += 1
        return self.head(x)


class AppendsBetween(Stack):
    def forward(self, x):
        TOLD.seen = []
        for block in self.blocks:
            x = block(x)
            TOLD.seen.append(1)
        return self.head(x)


class ModeBetween(Stack):
    def forward(self, x):
        for i, block in enumerate(self.blocks):
            with torch.autocast("cpu", torch.bfloat16, enabled=i == 3):
                x = block(x).float()
        return self.head(x)


@pytest.mark.parametrize(
    "whole, kind",
    [
        (Stack, CountsTogether),
        (Stack, AppendsTogether),
        (CountsBetween, ReadsTogether),
        (AppendsBetween, ReadsTogether),
        (CountsBetween, Block),
        (ModeBetween, Block),
    ],
)
def test_what_changes_while_the_model_runs(whole, kind):
    x, results = torch.randn(2, 4, D), []
    for backend in (None, "eager"):
        TOLD.__init__()
        torch.manual_seed(0)
        model = NNsight(whole(kind, 7))
        if backend:
            model.compile(backend=backend)
        for _ in range(2):
            with model.trace(x):
                model.blocks[4].up.output[:] += 1
                kept = nnsight_fx.save([block.output for block in model.blocks] + [model.output])
            results.append((backend, kept, TOLD.calls, len(TOLD.seen)))
    for one, other in zip(results[:2], results[2:], strict=True):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one[1], other[1], strict=True))
        assert one[2:] == other[2:]
