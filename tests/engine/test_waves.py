"""SEMANTICS D12: what one forward cannot hold runs as several."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from nnsight_fx import InvokeError, NNsight


def wrapped(engine: str) -> NNsight:
    torch.manual_seed(0)
    model = NNsight(nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]).requires_grad_(False))
    if engine != "hooks":
        model.compile(backend=engine)
    return model


A, B = torch.ones(1, 4), torch.ones(2, 4) * 2


@pytest.mark.parametrize("how", ["write", "in place"])
@pytest.mark.parametrize("engine", ["hooks", "eager", "aot_eager"])
def test_a_late_value_of_one_invoke_used_early_in_the_next(engine, how):
    model = wrapped(engine)
    with model.trace() as tracer:
        with tracer.invoke(A):
            late = model[3].output
        with tracer.invoke(B):
            if how == "write":
                model[0].output = late.expand(2, 4) * 2
            else:
                model[0].output[:] = late * 2
            out = model.output.save()
    module = model._module
    want = late_out = module(A) * 2
    for layer in list(module)[1:]:
        want = layer(want)
    torch.testing.assert_close(out, want.expand(2, 4))
    assert late_out.shape == (1, 4)


def test_a_value_that_fits_one_forward_takes_one():
    model = wrapped("hooks")
    with model.trace() as tracer:
        with tracer.invoke(A):
            h = model[1].output
        with tracer.invoke(A * 2):
            model[2].output = h * 3
            out = model.output.save()
    assert not tracer.waves[0].done
    torch.testing.assert_close(out, model._module[3](model._module[1](model._module[0](A)) * 3))


def test_train_mode_refuses_a_second_forward():
    model = NNsight(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).train())
    with pytest.raises(InvokeError, match=r"`1` is in train mode"), model.trace() as tracer:
        with tracer.invoke(B):
            late = model[2].output
        with tracer.invoke(B):
            model[0].output = late
    with pytest.raises(InvokeError, match=r"tracer\.batch"), model.trace() as tracer:
        with tracer.invoke(B):
            model[0].output.sum().item()
        with tracer.invoke(B):
            model[0].output.save()


def test_prompts_given_first_sync_inside_one_forward():
    model, seen = wrapped("hooks"), []
    handle = model._module.register_forward_hook(lambda *_: seen.append(1))
    with model.trace() as tracer:
        a, b = tracer.batch(A, B)
        with a:
            total = model[0].output.sum().item()
        with b:
            out = model[1].output.save()
    handle.remove()
    assert seen == [1] and out.shape == (2, 4)
    assert total == pytest.approx(model._module[0](A).sum().item())
