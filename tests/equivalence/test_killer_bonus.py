"""The killer cases' bonus: what a cache of compiled programs must notice, and what must leave it alone.

B1 new constants, B2 another site, B3 new weights, B4 `eval`, `train` and `no_grad`, B5 other dtypes, B6 copies, B7 the
user's own hooks, B8 two wrappers, B9 exceptions, B10 threads.
"""

import contextlib
import copy
import pickle
import threading

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight, assert_max_compiles, assert_no_fallback, save

from .harness import ENGINES, EXACT, data, same, wrap
from .models import MLP
from .programs import after, run

engines = pytest.mark.parametrize("engine", (*ENGINES, pytest.param("symbolic", marks=pytest.mark.slow)))


def made():
    torch.manual_seed(0)
    return MLP().requires_grad_(False)


def steer(model, x, vector, at="blocks.1", falls=False):
    with contextlib.nullcontext() if falls else assert_no_fallback(), model.trace(x) as tracer:
        model.get(at).output = model.get(at).output * 2 + vector
        y = save(tracer.result)
    return y


def steered(module, x, vector, at="blocks.1"):
    return run(module, x, after(module.get_submodule(at), lambda h: h * 2 + vector))


@engines
def test_b1_new_constants_compile_nothing(engine):
    module, plain = made(), made()
    model = wrap(module, engine)
    for seed in range(4):
        x, vector = data(3, 7, 16)(seed), data(16)(seed)
        with assert_max_compiles(0 if seed else 9):
            same(steer(model, x, vector), steered(plain, x, vector), engine in EXACT)


@engines
def test_b2_another_site_is_another_program(engine):
    module, plain, x, vector = made(), made(), data(3, 7, 16)(0), data(16)(0)
    model = wrap(module, engine)
    for again in range(2):
        for at in ("blocks.0", "blocks.1", "blocks.2.act", "norm"):
            v = vector if at != "blocks.2.act" else vector.repeat(2)
            with assert_max_compiles(0 if again else 9):
                same(steer(model, x, v, at), steered(plain, x, v, at), engine in EXACT)


@engines
def test_b3_new_weights_are_used(engine):
    module, plain, x, vector = made(), made(), data(3, 7, 16)(0), data(16)(0)
    model = wrap(module, engine)
    first = steer(model, x, vector)
    for net in (module, plain):
        net.head.weight.mul_(3)  # in place
        net.load_state_dict({**net.state_dict(), "norm.bias": torch.ones(16)})
        net.blocks[0].up.weight.data = net.blocks[0].up.weight.data * -1  # another tensor under the same parameter
    with assert_max_compiles(0):
        second = steer(model, x, vector)
    same(second, steered(plain, x, vector), engine in EXACT)
    assert not torch.equal(first, second)
    for net in (module, plain):
        torch.manual_seed(3)
        net.head = nn.Linear(16, 5).requires_grad_(False)  # another module
    same(steer(model, x, vector), steered(plain, x, vector), engine in EXACT)


class Modes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.drop, self.b = nn.Linear(16, 16), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(16, 16)

    def forward(self, x):
        return self.b(self.drop(self.bn(self.a(x))))


@pytest.mark.parametrize("engine", EXACT)
def test_b4_modes_are_looked_at(engine):
    """`eval`, `train`, `no_grad`, the flags of parameters: each as eager has it, and coming back compiles nothing."""
    torch.manual_seed(0)
    module = Modes()
    plain = copy.deepcopy(module)
    model, x = wrap(module, engine), data(3, 7, 16)(0)
    for turn in range(2):
        for train in (False, True):
            for grad in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
                for net in (module, plain):
                    net.train(train)
                with assert_max_compiles(0 if turn else 99), grad():
                    torch.manual_seed(1)
                    got = steer(model, x, 1.0, "a")
                    torch.manual_seed(1)
                    want = steered(plain, x, 1.0, "a")
                assert (got.is_inference(), got.requires_grad) == (want.is_inference(), want.requires_grad)
                same(got.detach(), want.detach(), True)
                same(dict(module.named_buffers()), dict(plain.named_buffers()), True)


@engines
def test_b5_another_dtype_after_the_capture(engine):
    module, plain, x, vector = made(), made(), data(3, 7, 16)(0), data(16)(0)
    model = wrap(module, engine)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        module.to(dtype), plain.to(dtype)
        got = steer(model, x.to(dtype), vector.to(dtype))
        assert got.dtype is dtype
        same(got, steered(plain, x.to(dtype), vector.to(dtype)), engine in EXACT)


@engines
def test_b6_copies_stand_on_their_own(engine):
    """A copied or pickled module, wrapped, is another model; what was captured of the first stays the first's."""
    module, x, vector = made(), data(3, 7, 16)(0), data(16)(0)
    model = wrap(module, engine)
    want = steer(model, x, vector)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        other.head.weight *= 2
        reference = steered(copy.deepcopy(other), x, vector)
        same(steer(wrap(other, engine), x, vector), reference, engine in EXACT)
        assert not torch.equal(reference, want)
    with assert_max_compiles(0):
        same(steer(model, x, vector), want, engine in EXACT)


@engines
def test_b7_the_users_hooks_fire_once(engine):
    """Also those that change something; ours come first at an input and last at an output."""
    module, x, vector, fired = made(), data(3, 7, 16)(0), data(16)(0), []

    def doubled(_module, _args, output):
        fired.append(1)
        return output * 2

    plain = made()
    handles = [net.blocks[1].register_forward_hook(doubled) for net in (module, plain)]
    ours = plain.blocks[1].register_forward_hook(lambda _module, _args, h: h * 2 + vector)  # behind theirs
    want = plain(x)
    ours.remove()
    model = wrap(module, engine)
    for _ in range(2):
        fired.clear()
        same(steer(model, x, vector, falls=engine == "symbolic"), want, engine in EXACT)
        assert len(fired) == 1
    assert ("`blocks.1` has hooks" in str(model.explain())) == (engine == "symbolic")
    for handle in handles:
        handle.remove()
    same(steer(model, x, vector), steered(plain, x, vector), engine in EXACT)


@engines
def test_b8_two_wrappers_of_one_module(engine):
    """Each with its own captures; both work on the one module, one after the other and one inside the other's block."""
    module, x, vector = made(), data(3, 7, 16)(0), data(16)(0)
    want = steered(made(), x, vector)
    first, second = wrap(module, engine), wrap(module, engine)
    for model in (first, second, first, second):
        same(steer(model, x, vector), want, engine in EXACT)
    with first.trace(x) as tracer:
        inner = steer(second, x, vector)
        first.blocks[1].output = first.blocks[1].output * 2 + vector
        y = save(tracer.result)
    same([inner, y], [want, want], engine in EXACT)


@engines
@pytest.mark.parametrize("where", ["before", "between", "after a sync", "in the model"])
def test_b9_an_exception_leaves_nothing(engine, where):
    module, x, vector = made(), data(3, 7, 16)(0), data(16)(0)
    model, want = wrap(module, engine), steered(made(), x, vector)
    same(steer(model, x, vector), want, engine in EXACT)
    with pytest.raises(RuntimeError if where == "in the model" else KeyError):
        with model.trace(x):
            if where == "before":
                raise KeyError("mine")
            model.blocks[0].output[:] = 0
            if where == "between":
                raise KeyError("mine")
            if where == "after a sync":
                model.blocks[1].output.sum().item()
                raise KeyError("mine")
            model.blocks[1].output = torch.ones(3, 7, 15)
    with assert_max_compiles(0):
        same(steer(model, x, vector), want, engine in EXACT)
    same(module(x), made()(x), True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert not any("forward" in vars(m) for m in module.modules())


@pytest.mark.parametrize("engine", EXACT)
def test_b10_threads_with_models_of_their_own(engine):
    """Two models, a thread each, at the same time: each gets its own values, every time."""
    vectors = [data(16)(seed) for seed in range(2)]
    models, failures = [wrap(made(), engine) for _ in vectors], []
    x = data(3, 7, 16)(0)
    wants = [steered(made(), x, vector) for vector in vectors]
    for model, vector in zip(models, vectors, strict=True):
        steer(model, x, vector)
    start = threading.Barrier(len(models))

    def work(model, vector, want):
        start.wait()
        for _ in range(20):
            with torch.no_grad(), model.trace(x) as tracer:
                model.blocks[1].output = model.blocks[1].output * 2 + vector
                if model.blocks[0].output.sum().item() > -1e9:  # a sync point: the other thread may run meanwhile
                    y = save(tracer.result)
            if not torch.equal(y, want):
                failures.append((y - want).abs().max().item())

    threads = [threading.Thread(target=work, args=each) for each in zip(models, vectors, wants, strict=True)]
    with assert_no_fallback():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    compiled = torch.compile(lambda t: t.sin() if torch.compiler.is_compiling() else t.cos(), backend="eager")
    assert torch.equal(compiled(x), x.sin())  # the process's stance is what it was
    assert all(isinstance(model, NNsight) and model.tracer is None for model in models)
