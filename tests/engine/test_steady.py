"""A model that is captured whole runs without hooks from then on, and sees all the same what the user changes between traces."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight, assert_max_compiles, assert_no_fallback
from nnsight_fx.capture import markers
from nnsight_fx.engine.captured.steady import Steady


def wrapped(backend="eager"):
    torch.manual_seed(0)
    model = NNsight(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    model.compile(backend=backend)
    return model


def traced(model, x):
    with model.trace(x):
        model[0].output[:, 0] = 1.0
        inner, out = model[0].output.save(), model.output.save()
    return inner, out


def by_hand(model, x):
    got = []

    def change(_, __, out):
        out = out.clone()
        out[:, 0] = 1.0
        got.append(out)
        return out

    handle = model[0]._module.register_forward_hook(change)
    got.append(model._module(x))
    handle.remove()
    return tuple(got)


@pytest.fixture
def put(monkeypatch):
    """The modules that got our hooks."""
    found = []
    real = markers.put
    monkeypatch.setattr(markers, "put", lambda module, *hooks: (found.append(module), real(module, *hooks)))
    return found


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_no_module_gets_a_hook(put, backend):
    model = wrapped(backend)
    traced(model, torch.randn(2, 4))
    assert len(put) == 4
    put.clear()
    for _ in range(2):
        x = torch.randn(2, 4)
        with assert_no_fallback(), assert_max_compiles(0):
            got = traced(model, x)
        torch.testing.assert_close(got, by_hand(model, x), rtol=0, atol=0)
    assert not put


def test_another_plan_needs_no_hook_either(put):
    model = wrapped()
    traced(model, torch.randn(2, 4))
    put.clear()
    x = torch.randn(2, 4)
    with model.trace(x):
        value = model[0].output.save()
        doubled = (value * 2).save()
        if value.sum() > -1e9:  # a sync point
            model[0].output = -value
        out = model.output.save()
    plain = model._module
    torch.testing.assert_close(value, plain[0](x), rtol=0, atol=0)
    torch.testing.assert_close(doubled, 2 * plain[0](x), rtol=0, atol=0)
    torch.testing.assert_close(out, plain[2](plain[1](-plain[0](x))), rtol=0, atol=0)
    assert not put


@pytest.mark.parametrize("where", ["forward", "forward_pre"])
def test_a_hook_of_the_users_comes_and_goes(where):
    model, x, seen = wrapped(), torch.randn(2, 4), []

    def hook(module, *values):
        seen.append(1)
        value = values[-1]
        return tuple(v + 1 for v in value) if isinstance(value, tuple) else value + 1

    for _ in range(2):
        traced(model, x)
    for _ in range(2):  # the second time nothing is captured any more
        handle = getattr(model[0]._module, f"register_{where}_hook")(hook)
        for _ in range(3):
            seen.clear()
            got = traced(model, x)
            assert len(seen) == 1
            torch.testing.assert_close(got, by_hand(model, x), rtol=0, atol=0)
        handle.remove()
        got = traced(model, x)
        torch.testing.assert_close(got, by_hand(model, x), rtol=0, atol=0)


def test_hooks_of_one_code_with_other_values():
    model, x = wrapped(), torch.randn(2, 4)

    def adds(n):
        return lambda module, args, out: out + n

    for n in (1, 1, 5, 1, 5):
        handle = model[0]._module.register_forward_hook(adds(n))
        got = traced(model, x)
        torch.testing.assert_close(got, by_hand(model, x), rtol=0, atol=0)
        handle.remove()


def test_two_hooks_that_write_to_their_own_lists():
    """Dynamo finds what a hook holds by its place among the hooks."""
    model, x, first, second = wrapped(), torch.randn(2, 4), [], []
    model[0]._module.register_forward_hook(lambda module, args, out: first.append(out.detach().clone()))
    model[0]._module.register_forward_hook(lambda module, args, out: second.append(-out.detach()))
    for n in range(1, 4):
        traced(model, x)
        assert (len(first), len(second)) == (n, n)
        torch.testing.assert_close(second[-1], -first[-1], rtol=0, atol=0)


def test_what_changes_in_the_model_is_seen():
    torch.manual_seed(0)
    model = NNsight(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)))
    model.compile(backend="eager")
    x = torch.randn(2, 4)

    def check(exact=True):
        with model.trace(x):
            out = model.output.save()
        torch.testing.assert_close(out, model._module(x), rtol=0, atol=0)

    model.eval()
    check()
    check()
    model._module[1].p = 0.25
    check()
    model._module[0].weight = nn.Parameter(torch.randn(4, 4))
    check()
    model._module[2] = nn.Linear(4, 4)
    check()
    model._module.double()
    x = x.double()
    check()
    model.train()
    torch.manual_seed(3)
    with model.trace(x):
        out = model.output.save()
    torch.manual_seed(3)
    torch.testing.assert_close(out, model._module(x), rtol=0, atol=0)


def test_a_global_hook_is_seen():
    model, x = wrapped(), torch.randn(2, 4)
    traced(model, x)
    traced(model, x)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out + 1 if isinstance(module, nn.ReLU) else None
    )
    try:
        for _ in range(2):
            got = traced(model, x)
            torch.testing.assert_close(got, by_hand(model, x), rtol=0, atol=0)
    finally:
        handle.remove()
    torch.testing.assert_close(traced(model, x), by_hand(model, x), rtol=0, atol=0)


class Registers(nn.Module):
    """Puts hooks on a submodule while it runs, the first time, as transformers does with its collectors."""

    def __init__(self, where: str):
        super().__init__()
        self.inner, self.where, self.done = nn.Linear(4, 4), where, False

    def forward(self, x):
        if not self.done:
            self.register()
        return self.inner(x)

    @torch.compiler.disable
    def register(self):
        self.done = True
        if self.where == "_forward_pre_hooks":
            self.inner.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
        else:
            self.inner.register_forward_hook(lambda module, args, out: out * 2.0)


@pytest.mark.parametrize("where", ["_forward_hooks", "_forward_pre_hooks"])
@pytest.mark.parametrize("engine", ["hooks", "eager", "aot_eager"])
def test_hooks_registered_while_the_model_runs_are_called(engine, where):
    torch.manual_seed(0)
    model, x = NNsight(nn.Sequential(nn.ReLU(), Registers(where), nn.ReLU())), torch.randn(2, 4)
    if engine != "hooks":
        model.compile(backend=engine)
    reads = []
    for _ in range(3):
        with model.trace(x):
            model[0].output += 1.0
            entered = model[1].inner.input.save()
            left = model[1].inner.output.save()
            out = model.output.save()
        reads.append((entered, left, out))
    inner = model._module[1].inner
    weight, bias = inner.weight, inner.bias
    with torch.no_grad():
        doubled = torch.relu(x) + 1.0
        before, behind = (1.0, 2.0) if where == "_forward_hooks" else (2.0, 1.0)
        left = (before * doubled @ weight.T + bias) * behind
    for i, (entered, now, out) in enumerate(reads):
        torch.testing.assert_close(entered, doubled)
        torch.testing.assert_close(out, torch.relu(left))
        if i:  # in the first run it came behind ours
            torch.testing.assert_close(now, left)


def test_what_python_runs_in_between_is_left_alone():
    """A callback of the garbage collector may run while Dynamo looks for a capture."""
    model, seen = wrapped(), []
    traced(model, torch.randn(2, 4))

    def collected(phase, info):
        seen.append(phase)

    threshold = gc.get_threshold()
    gc.callbacks.append(collected)
    gc.set_threshold(1, 10**6, 10**6)  # at nearly every allocation, of the youngest alone
    try:
        for _ in range(3):
            x = torch.randn(2, 4)
            torch.testing.assert_close(traced(model, x), by_hand(model, x), rtol=0, atol=0)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(collected)
    assert seen


@pytest.fixture
def calls(monkeypatch):
    """The plans that ran as a call."""
    found = []
    real = Steady.__call__
    monkeypatch.setattr(Steady, "__call__", lambda self, *args: (real(self, *args), found.append(self.plan))[0])
    return found


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_plan_seen_before_runs_as_a_call(calls, backend):
    model = wrapped(backend)

    def steered(x, vector, at, by):
        with model.trace(x):
            model[0].output[:, at] += by * vector
            inner, out = model[0].output.save(), model.output.save()
        return inner, out

    for n in range(4):
        x, vector, at, by = torch.randn(2, 4), torch.randn(2), n % 3, 0.5 + n
        with assert_no_fallback():
            inner, out = steered(x, vector, at, by)
        plain = model._module
        expected = plain[0](x)
        expected[:, at] += by * vector
        torch.testing.assert_close(inner, expected, rtol=0, atol=0)
        torch.testing.assert_close(out, plain[2](plain[1](expected)), rtol=0, atol=0)
    assert len(calls) == 3
    assert "1 segments ran, 0 compiled for it, 1 cache hits" in str(model.explain())


def test_a_call_gives_an_autograd_graph_and_values_of_their_own():
    model, x = wrapped("aot_eager"), torch.randn(2, 4)
    for _ in range(3):
        inner, out = traced(model, x)
        model.zero_grad()
        out.sum().backward()
        got = model[0]._module.bias.grad.clone()
        model.zero_grad()
        by_hand(model, x)[1].sum().backward()
        torch.testing.assert_close(got, model[0]._module.bias.grad)
        inner.detach().zero_()
    torch.testing.assert_close(traced(model, x), by_hand(model, x), rtol=0, atol=0)


def test_inputs_modes_and_options_have_calls_of_their_own(calls):
    model = wrapped()
    inputs = [torch.randn(2, 4), torch.randn(3, 4), torch.randn(2, 4, requires_grad=True)]
    for _ in range(4):
        calls.clear()
        for x in inputs:
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    got = traced(model, x)
                assert got[1].requires_grad is grad
                torch.testing.assert_close(got, by_hand(model, x), rtol=0, atol=0)
    assert len(calls) == 6
    calls.clear()
    with model.trace(inputs[0], compile=False):
        out = model.output.save()
    assert not calls
    torch.testing.assert_close(out, model._module(inputs[0]))


def test_what_looks_at_values_is_no_call(calls):
    model, x = wrapped(), torch.randn(2, 4)
    for _ in range(3):
        with model.trace(x) as tracer:
            out = model[0].output.save()
            big = (model[1].output.sum() > -1e9).save()
            if big:  # a sync point
                tracer.log("seen")
        torch.testing.assert_close(out, model._module[0](x))
    assert not calls


def test_a_call_that_fails_names_the_write():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.ids, self.table = nn.Identity(), nn.Embedding(4, 2)

        def forward(self, x):
            return self.table(self.ids(x))

    model, x = NNsight(Looks()), torch.tensor([1, 2])
    model.compile(backend="eager")
    for _ in range(3):
        with model.trace(x):
            model.ids.output = model.ids.output + torch.tensor([0, 1])
            out = model.output.save()
        torch.testing.assert_close(out, model._module.table(torch.tensor([1, 3])))
    with pytest.raises(IndexError) as error, model.trace(x):
        model.ids.output = model.ids.output + torch.tensor([0, 9])
        out = model.output.save()
    assert any("the model failed after `ids.output` was written at" in note for note in error.value.__notes__)
    with model.trace(x):
        model.ids.output = model.ids.output + torch.tensor([0, 1])
        out = model.output.save()
    torch.testing.assert_close(out, model._module.table(torch.tensor([1, 3])))


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile", "fail_on_recompile"])
@pytest.mark.filterwarnings("ignore:nnsight_fx. nothing of the model ran captured")
def test_what_was_captured_under_another_stance(stance):
    model, x = wrapped(), torch.randn(2, 4)
    program = model.program(lambda tracer: model[0].output * 2)
    for _ in range(3):
        traced(model, x)
        program(x)
    with torch.compiler.set_stance(stance):
        torch.testing.assert_close(traced(model, x), by_hand(model, x), rtol=0, atol=0)
        torch.testing.assert_close(program(x), 2 * model._module[0](x), rtol=0, atol=0)
    torch.testing.assert_close(traced(model, x), by_hand(model, x), rtol=0, atol=0)
