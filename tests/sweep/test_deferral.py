"""What a session puts off, what it runs at once, and that nobody can tell the difference by the numbers."""

import contextlib

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight, OutOfOrderError, OutsideTraceError
from nnsight_fx import save as keep

from .programs import MLP, Counting, Dropout, Noise, X, mlp, same


def strategies(session):
    return [g["strategy"] for g in session.explain().to_dict()["groups"]]


def test_nothing_runs_before_a_value_is_needed():
    module, ran = mlp(), []
    module.register_forward_hook(lambda *_: ran.append(1))
    model = NNsight(module)
    with model.session() as session:
        with model.trace(X[0]):
            a = model.blocks[0].output
        with model.trace(X[1]):
            b = model.head.output.save()
        assert ran == [] and "LazyTensor" in repr(b)
        with model.trace(X[0]):
            model.blocks[1].output = a + 1
            c = model.head.output.save()
        assert float(b.sum()) == module(X[1]).sum().item() and len(ran) == 2
        assert type(b) is torch.Tensor and type(c) is not torch.Tensor
    assert type(c) is torch.Tensor
    assert strategies(session) == ["one by one"]
    with pytest.raises(OutsideTraceError):
        keep([])


LOOKS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 100).any()),
    "print": lambda x: str(x),
    "format": lambda x: f"{x.sum():.3f}",
    "numpy": lambda x: x.numpy().tolist(),
    "operation": lambda x: (x * 2).tolist(),
    "index": lambda x: torch.arange(5)[x.argmax().item() % 5].item(),
    "real tensor": lambda x: (torch.ones(()) + x).tolist(),
}


@pytest.mark.parametrize("look", LOOKS)
def test_looking_runs_what_it_depends_on_and_no_more(look):
    module = mlp()
    model, ran = NNsight(module), []
    with model.session():
        with model.trace(X[0]):
            h = model.blocks[0].output
        with model.trace(X[1]):
            other = model.head.output.save()
        with model.trace(X[2]):
            model.blocks[1].output = h
            out = model.head.output.save()
        module.register_forward_pre_hook(ran_hook := lambda m, a: ran.append(a[0]))
        handle = next(iter(module._forward_pre_hooks))
        del module._forward_pre_hooks[handle]
        got = LOOKS[look](out)
        assert type(out) is torch.Tensor and type(other) is not torch.Tensor
    want = module.head(module.norm(module.blocks[2](module.blocks[0](X[0]))))
    assert got == LOOKS[look](want) and ran_hook is not None
    same(other, module(X[1]))


def test_a_value_looked_at_inside_another_trace():
    module = mlp()
    model = NNsight(module)
    with model.session():
        with model.trace(X[0]):
            h = model.blocks[0].output.mean()
        with model.trace(X[1]):
            if h > -100:
                model.blocks[0].output[:] = 0
            out = model.head.output.save()
            early = model.blocks[0].output.sum().item()  # and a sync point of its own
    assert early == 0.0
    same(out, module.head(module.norm(module.blocks[2](module.blocks[1](torch.zeros(1, 7, 16))))))


def test_traces_keep_what_they_were_recorded_with():
    """Small tensors and inputs are copied, flags are put back, grad mode is the trace's."""
    module = mlp()
    model, x, v, outs = NNsight(module), X[0].clone(), torch.ones(16), []
    with model.session():
        for i in range(3):
            with model.trace(x):
                model.blocks[0].output = model.blocks[0].output + v
                outs.append(model.head.output.save())
            x += 1
            v *= 2
            if i == 1:
                module.train()
    assert module.training
    for i, out in enumerate(outs):
        h = module.blocks[0](X[0] + i) + torch.ones(16) * 2**i
        same(out, module.head(module.norm(module.blocks[2](module.blocks[1](h)))))
    trained = Dropout().eval()
    model = NNsight(trained)
    with model.session():
        with model.trace(X[0]):
            quiet = model.output.save()
        trained.train()
    same(quiet, trained.eval()(X[0]))


def test_a_change_that_it_cannot_copy_is_an_error_with_both_lines():
    module, large = mlp(), torch.zeros(2**19)
    model = NNsight(module)

    def weights():
        with torch.no_grad():
            module.head.weight.mul_(2)

    changes = {"weights": weights, "shape": lambda: large.add_(1), "hooks": lambda: module.register_forward_hook(print)}
    for what, change in changes.items():
        with (
            pytest.raises(OutOfOrderError, match=rf"test_deferral.py:\d+.*{what}.*test_deferral.py:\d+"),
            model.session(),
        ):
            with model.trace(X[0]):
                model.head.output = model.head.output + large[:5] + large.sum() * 0
                model.head.output = model.head.output + (large + model.head.output.sum())[:5]
                out = model.head.output.save()
            change()
        assert type(out) is not torch.Tensor
        module._forward_hooks.clear()


@pytest.mark.parametrize(
    ("module", "body", "why"),
    [
        (lambda: Dropout().train(), lambda m, t: None, "random numbers"),
        (Noise, lambda m, t: None, "random numbers"),
        (lambda: nn.Sequential(nn.BatchNorm1d(7)).train(), lambda m, t: None, "running statistics|buffer"),
        (Counting, lambda m, t: None, "sets `calls`"),
        (mlp, lambda m, t: torch.randn(2) + m.output.sum(), "random"),
        (mlp, lambda m, t: t.log(m.output), "function of yours"),
        (mlp, lambda m, t: m.output.sum().item(), "looked at a value"),
        (mlp, lambda m, t: t.cache(), "cache"),
        (mlp, lambda m, t: SCRATCH.add_(m.output.sum()), "tensor of yours in place"),
        (lambda: MLP(), lambda m, t: None, "differentiable"),
    ],
)
def test_what_does_more_than_compute_runs_at_once_and_in_order(module, body, why, capsys):
    module = module()
    if why != "differentiable":
        module.requires_grad_(False)
    model, want = NNsight(module), []
    for scope in (contextlib.nullcontext(), model.session()):
        torch.manual_seed(3)
        SCRATCH.zero_()
        state = {k: v.clone() for k, v in module.state_dict().items()}
        module.calls = 0
        outs = []
        with scope:
            for x in X:
                with model.trace(x) as tracer:
                    body(model, tracer)
                    outs.append(model.output.save())
                outs.append(torch.rand(1))
        assert all(type(x) is torch.Tensor for x in outs)
        want.append([*outs, *module.state_dict().values(), SCRATCH.clone()])
        module.load_state_dict(state)
    assert set(strategies(scope)) == {"at once"}
    import re

    assert re.search(why, str(scope.explain()))
    for got, expected in zip(*want, strict=True):
        same(got, expected, exact=True)


SCRATCH = torch.zeros(())


def test_an_error_names_its_trace_and_the_rest_is_delivered():
    module = mlp()
    model = NNsight(module)
    with pytest.raises(RuntimeError) as caught, model.session():
        with model.trace(X[0]):
            first = model.head.output.save()
        with model.trace(X[1]):
            wide = model.blocks[0].output[:, :3]
        with model.trace(X[1]):
            model.norm.output = wide  # line of the error
            second = model.head.output.save()
            model.blocks[0].input = torch.zeros(1, 7, 3)
        with model.trace(X[2]):
            third = model.head.output.save()
    (note,) = [n for n in caught.value.__notes__ if "in the trace at" in n]
    assert (
        f"test_deferral.py:{test_an_error_names_its_trace_and_the_rest_is_delivered.__code__.co_firstlineno + 8}"
        in note
    )
    same(first, module(X[0]))
    assert type(second) is not torch.Tensor
    assert third is not None and model.tracer is None


def test_a_missed_site_among_others():
    module = mlp()
    model = NNsight(module)
    outs = []
    with pytest.raises(OutOfOrderError, match="never reached it"), model.session():
        for i in range(3):
            with model.trace(X[i]):
                if i == 1:
                    model.unused.output = torch.zeros(1)
                outs.append(model.head.output.save())
    for i in range(2):  # what was saved of the one that missed, too
        same(outs[i], module(X[i]))


def test_an_exception_of_the_user_runs_what_was_recorded_but_an_interrupt_does_not():
    module = mlp()
    model = NNsight(module)
    for kind in (KeyError, KeyboardInterrupt):
        with pytest.raises(kind), model.session():
            with model.trace(X[0]):
                out = model.head.output.save()
            raise kind("mine")
        assert (type(out) is torch.Tensor) == (kind is KeyError)
