"""A compiler that fails costs speed, never a result: the segment runs without it, and says so."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from nnsight_fx import FallbackError, NNsight, assert_no_fallback


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def fails(gm, inputs, **options):
    gm.graph.erase_node(gm.graph.output_node())  # what it has begun is no use to anybody
    raise NotImplementedError("no such instruction\nand much more")


def run(model, x, position):
    with model.trace(x):
        model[0].output[:, position] = 2.0
        out = model[2].output.save()
    return out


def by_hand(raw, x, position):
    h = raw[0](x).clone()
    h[:, position] = 2.0
    return raw[2](raw[1](h))


def test_it_runs_by_aot_eager():
    raw, x = net(), torch.randn(3, 4)
    model = NNsight(raw)
    model.compile(backend=fails)
    with pytest.warns(
        UserWarning,
        match="`fails` could not compile a segment, which runs with `aot_eager`: NotImplementedError: no such",
    ):
        out = run(model, x, 1)
    torch.testing.assert_close(out, by_hand(raw, x, 1))
    torch.testing.assert_close(run(model, x, 3), by_hand(raw, x, 3))  # compiled once, warned once
    assert "fallback: `fails` could not compile" in str(model.explain())
    out.sum().backward()
    assert all(p.grad is not None for p in raw.parameters())


def test_or_as_it_is(monkeypatch):
    from nnsight_fx import compat

    raw, x = net(), torch.randn(3, 4)
    model = NNsight(raw)
    model.compile(backend=fails)
    monkeypatch.setattr(compat.dynamo, "backend", lambda *_: fails)
    with pytest.warns(UserWarning, match="which runs with `eager`"):
        out = run(model, x, 1)
    torch.testing.assert_close(out, by_hand(raw, x, 1), rtol=0, atol=0)


def test_it_is_a_fallback():
    model = NNsight(net())
    model.compile(backend=fails)
    with pytest.warns(UserWarning), pytest.raises(FallbackError, match="could not compile"), assert_no_fallback():
        run(model, torch.randn(3, 4), 0)


@pytest.mark.inductor
@pytest.mark.slow
def test_inductor_too(monkeypatch):
    import torch._inductor.config as config

    raw, x = net(), torch.randn(3, 4)
    model = NNsight(raw)
    model.compile(backend="inductor")

    def broken(graph):
        raise AssertionError("a pass of the user's")

    with (
        config.patch(post_grad_custom_pre_pass=broken),
        pytest.warns(UserWarning, match="`inductor` could not compile"),
    ):
        out = run(model, x, 1)
    torch.testing.assert_close(out, by_hand(raw, x, 1))


def test_interrupts_and_memory_are_not_swallowed():
    def interrupted(gm, inputs, **options):
        raise KeyboardInterrupt

    def full(gm, inputs, **options):
        raise torch.OutOfMemoryError("out of memory")

    for backend, error in ((interrupted, KeyboardInterrupt), (full, torch.OutOfMemoryError)):
        raw, x = net(), torch.randn(3, 4)
        model = NNsight(raw)
        model.compile(backend=backend)
        with pytest.raises(error):
            run(model, x, 0)
        assert model.tracer is None and not any(m._forward_hooks for m in raw.modules())
        torch.testing.assert_close(raw(x), net()(x))


ELSEWHERE = """
import torch.nn as nn

STEPS = [1, 2]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        for step in STEPS:
            x = self.first(x) * step
        return self.last(x)
"""


def test_dynamo_itself_fails():
    """Here for a file that was run under a name that nobody can import."""
    names = {"__name__": "a_file_of_the_users_own"}
    exec(compile(ELSEWHERE, "a_file_of_the_users_own.py", "exec"), names)
    torch.manual_seed(0)
    model, x = NNsight(names["Net"]()), torch.randn(3, 4)
    model.compile(backend="eager")

    for _ in range(2):
        with model.trace(x) as tracer:
            model.last.input[:, 0] = 2.0
            out = model.output.save()
        want = model._module.first(model._module.first(x)) * 2
        want[:, 0] = 2.0
        torch.testing.assert_close(out, model._module.last(want), rtol=0, atol=0)
        told = str(tracer.explain())
        assert (
            ": hooks" in told
            and "fallback: hook engine" in told
            and "No module named 'a_file_of_the_users_own'" in told
        )
