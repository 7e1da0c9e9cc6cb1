"""`model.vjp`, `model.jvp` and `model.jacobian` against hand-written hooks and a loop of `torch.autograd.grad`."""

import contextlib
import copy

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight, assert_no_fallback
from tests.derivatives.families import ENGINES, FAMILIES, IDS, built, by_hand, looped, read, rows_of

engines = pytest.mark.parametrize("engine", ENGINES)
with_inductor = pytest.mark.parametrize(
    "engine", [*ENGINES, pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])]
)
CLOSE = {torch.double: {"rtol": 1e-10, "atol": 1e-10}, torch.float: {"rtol": 1e-4, "atol": 1e-4}}
# Their norms compute in single precision whatever the model's is: two orders of one sum differ by that.
SINGLE = {"rtol": 1e-4, "atol": 1e-4}


def wrap(module, engine):
    model = NNsight(copy.deepcopy(module))
    if engine != "hooks":
        model.compile(backend=engine)
    return model


def captured(engine):
    return contextlib.nullcontext() if engine == "hooks" else assert_no_fallback()


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x))), x.sum()


class Net(nn.Module):
    """Three blocks that return tuples, behind an embedding. It counts its forwards."""

    def __init__(self, width=6):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 5)
        self.blocks, self.drop = nn.ModuleList(Block(width) for _ in range(3)), nn.Dropout(0.5)
        self.forwards = 0

    def forward(self, ids):
        self.forwards += 1
        x = self.embed(ids)
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.drop(x))


def net(dtype=torch.double):
    torch.manual_seed(0)
    return Net().to(dtype).eval()


X = torch.arange(6).view(2, 3)


def from_block(n, module, by=None):
    """The rest of the model behind block `n`, as a function of its output."""

    def rest(h):
        for block in module.blocks[n + 1 :]:
            h = block(h)[0] if by is None else block(h)[0] + by
        return module.head(h)

    return rest


def output_of(n, module):
    x = module.embed(X)
    for block in module.blocks[: n + 1]:
        x = block(x)[0]
    return x.detach()


# -- families --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "engine"), rows_of([(name, name) for name in FAMILIES]))
def test_families(name, engine):
    module = built(name)
    target, sources = by_hand(name, module)
    cotangents = torch.randn(3, *target.shape, dtype=torch.double)
    want = looped(target, sources, cotangents)
    model = wrap(module, engine)
    whole = contextlib.nullcontext() if name in ("mixtral", "qwen3_moe") else captured(engine)
    with whole:
        values, pull = model.vjp(lambda tracer: read(name, model), FAMILIES[name].inputs)
    torch.testing.assert_close(values, target.detach(), **CLOSE[torch.double])
    got = pull(cotangents)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **CLOSE[torch.double])
    assert all(type(g) is torch.Tensor and not g.requires_grad for g in got)
    if engine != "hooks" and name not in ("gpt2", "llama"):
        return
    tangents = [torch.randn(2, *w.shape[1:], dtype=torch.double) for w in want]
    moved = pull.push(tangents)
    across = sum(torch.einsum("nbld,mbld->nm", w, t) for w, t in zip(want, tangents, strict=True))
    torch.testing.assert_close(torch.einsum("nbv,mbv->nm", cotangents, moved), across, **SINGLE)


@with_inductor
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_families_in_single_precision(name, engine):
    module = built(name, torch.float)
    target, sources = by_hand(name, module)
    cotangents = torch.randn(3, *target.shape)
    model = wrap(module, engine)
    _, pull = model.vjp(lambda tracer: read(name, model), FAMILIES[name].inputs)
    for g, w in zip(pull(cotangents), looped(target, sources, cotangents), strict=True):
        torch.testing.assert_close(g, w, **CLOSE[torch.float])


# -- against torch.func ----------------------------------------------------------------------------------------------------


@engines
def test_a_jacobian_is_jacrevs(engine):
    module = net()
    model = wrap(module, engine)
    with captured(engine):
        got = model.jacobian(lambda tracer: (model.head.output, model.blocks[0].output[0]), X, chunk=7, progress=False)
    want = torch.func.jacrev(from_block(0, module))(output_of(0, module))
    assert got.shape == (2, 3, 5, 2, 3, 6)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@engines
def test_tuples_of_targets_and_sources(engine):
    module = net()
    model = wrap(module, engine)

    def body(tracer):
        sources = {"first": model.blocks[0].output[0], "up": model.blocks[1].up.output}
        return (model.blocks[1].output[0], model.head.output[:, -1]), sources

    got = model.jacobian(body, X)
    h = output_of(0, module)
    want = torch.func.jacrev(lambda h: (module.blocks[1](h)[0], from_block(0, module)(h)[:, -1]))(h)
    assert type(got) is tuple and set(got[0]) == {"first", "up"}
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g["first"], w, rtol=1e-10, atol=1e-12)
    assert got[1]["up"].shape == (2, 5, 2, 3, 12)

    (_, _), pull = model.vjp(body, X)
    rows = torch.randn(4, 2, 5, dtype=torch.double)
    one = pull((None, rows))  # `None` is zero
    torch.testing.assert_close(one["first"], torch.einsum("nbv,bvcld->ncld", rows, want[1]), rtol=1e-10, atol=1e-12)


@engines
def test_jvp_is_the_jacobian_times_the_tangents(engine):
    module = net()
    model = wrap(module, engine)
    h = output_of(0, module)
    tangents = torch.randn(5, *h.shape, dtype=torch.double)
    values, moved = model.jvp(
        lambda tracer: (model.head.output, model.blocks[0].output[0]), X, tangents, chunk=2, progress=False
    )
    whole = torch.func.jacrev(from_block(0, module))(h)  # torch's own jvp warns of the TorchScript that it loads
    want = torch.einsum("btvcld,ncld->nbtv", whole, tangents)
    torch.testing.assert_close(moved, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(values, from_block(0, module)(h).detach(), rtol=1e-10, atol=1e-12)


@engines
def test_an_intervention_in_the_body_is_part_of_what_is_differentiated(engine):
    """A steered model's Jacobian: a written value, one changed in place, and one that the body makes of the source itself."""
    module, v = net(), torch.linspace(-1, 1, 6, dtype=torch.double)
    model = wrap(module, engine)

    def body(tracer):
        h = model.blocks[0].output[0]
        h += v
        steered = model.blocks[1].up.output * 1.5
        model.blocks[1].up.output = steered
        return model.head.output.softmax(-1), (h, steered)

    def by_hand(h):
        block = module.blocks[1]
        x = h + block.down(torch.tanh(block.up(h) * 1.5))
        return module.head(module.blocks[2](x)[0]).softmax(-1)

    got = model.jacobian(body, X)
    want = torch.func.jacrev(by_hand)(output_of(0, module) + v)
    torch.testing.assert_close(got[0], want, rtol=1e-10, atol=1e-12)
    assert got[1].shape == (2, 3, 5, 2, 3, 12) and got[1].any()


@engines
def test_edits_are_part_of_it(engine):
    module = net()
    model = wrap(module, engine)
    with model.edit() as (_, edited):
        edited.blocks[1].output[0][:] = edited.blocks[1].output[0] * 2
    got = edited.jacobian(lambda tracer: (edited.head.output, edited.blocks[0].output[0]), X)

    def by_hand(h):
        return module.head(module.blocks[2](2 * module.blocks[1](h)[0])[0])

    torch.testing.assert_close(got, torch.func.jacrev(by_hand)(output_of(0, module)), rtol=1e-10, atol=1e-12)


# -- one forward -----------------------------------------------------------------------------------------------------------


@engines
def test_the_forward_runs_once_however_many_chunks(engine):
    module = net()
    model = wrap(module, engine)
    body = lambda tracer: (model.head.output, model.blocks[0].output[0])  # noqa: E731
    model.vjp(body, X)  # captures
    calls = []
    handle = model._module.head.register_forward_pre_hook(lambda *_: calls.append(1)) if engine == "hooks" else None
    before = model._module.forwards
    _, pull = model.vjp(body, X)
    for _ in range(2):
        pull(torch.randn(9, 2, 3, 5, dtype=torch.double), chunk=2)
    if handle is not None:
        handle.remove()
        assert len(calls) == 1 and model._module.forwards == before + 1
    assert "1 forward," in str(model.explain())


@engines
def test_the_backward_ends_at_the_lowest_source(engine):
    """Below it nothing is recorded: a function there that refuses a backward is not asked."""

    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            raise AssertionError("below the lowest source")

    class Below(Net):
        def forward(self, ids):
            x = Refuses.apply(self.embed(ids))
            for block in self.blocks:
                x, _ = block(x)
            return self.head(x)

    torch.manual_seed(0)
    module = Below().double().eval()
    model = wrap(module, engine)
    got = model.jacobian(lambda tracer: (model.head.output, model.blocks[0].output[0]), X)
    torch.testing.assert_close(
        got, torch.func.jacrev(from_block(0, module))(output_of(0, module)), rtol=1e-10, atol=1e-12
    )


@engines
def test_nothing_of_the_model_changes(engine):
    module = net()
    module.blocks[0].requires_grad_(False)
    model = wrap(module, engine)
    flags = [(p.requires_grad, p.grad) for p in model._module.parameters()]
    model._module.drop.train(False)
    with torch.no_grad():  # whatever the grad mode around it
        model.jacobian(lambda tracer: (model.head.output, model.blocks[1].output[0]), X)
    assert [(p.requires_grad, p.grad) for p in model._module.parameters()] == flags
    for a, b in zip(model._module.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not model._module.training and not torch.is_grad_enabled() or torch.is_grad_enabled()


@engines
def test_prompts_of_another_length_and_number(engine):
    module = net()
    model = wrap(module, engine)
    for x in (X, torch.arange(4).view(1, 4), torch.arange(9).view(3, 3)):
        got = model.jacobian(lambda tracer: (model.head.output[:, -1], model.blocks[1].output[0]), x)
        h = module.blocks[1](module.blocks[0](module.embed(x))[0])[0].detach()
        want = torch.func.jacrev(lambda h: from_block(1, module)(h)[:, -1])(h)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# -- chunks ----------------------------------------------------------------------------------------------------------------


@engines
def test_chunks_give_the_same_rows(engine, capsys):
    module = net()
    model = wrap(module, engine)
    _, pull = model.vjp(lambda tracer: (model.head.output, model.blocks[0].output[0]), X)
    cotangents = torch.randn(7, 2, 3, 5, dtype=torch.double)
    whole = pull(cotangents)
    assert "row" not in capsys.readouterr().err
    for chunk in (1, 3, 100):
        torch.testing.assert_close(pull(cotangents, chunk=chunk), whole, rtol=1e-12, atol=1e-12)
    assert "7/7" in capsys.readouterr().err


def test_out_of_memory_halves_the_chunk():
    module = net()
    model = NNsight(module)
    _, pull = model.vjp(lambda tracer: (model.head.output, model.blocks[0].output[0]), X, progress=False)
    cotangents = torch.randn(8, 2, 3, 5, dtype=torch.double)
    want, run, asked = pull(cotangents), pull.found.linear.pull, []

    def small(given):
        asked.append(len(given[0]))
        if len(given[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(given)

    pull.found.linear.pull = small
    torch.testing.assert_close(pull(cotangents), want)
    assert asked == [8, 4, 2, 2, 2, 2]


def test_a_backward_that_no_vmap_takes_goes_one_by_one():
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 3

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (3 if gradient.sum().item() > -1e9 else 0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(Odd.apply(self.a(x)))

    torch.manual_seed(0)
    model = NNsight(Model().double())
    got = model.jacobian(lambda tracer: (model.b.output, model.a.output), torch.ones(1, 4, dtype=torch.double))
    torch.testing.assert_close(got[0, :, 0], 3 * model._module.b.weight.detach())


def test_what_it_says_of_itself():
    model = NNsight(net())
    _, pull = model.vjp(lambda tracer: (model.head.output, model.blocks[0].output[0]), X)
    assert repr(pull) == "Pullback(from head.output (2, 3, 5) to blocks.0.output (2, 3, 6))"
    assert IDS.shape == (2, 4)
