"""The small verbs on every engine: modules called on values, seen or unseen; attached ones; `log`, `update`, `constant`."""

import pytest
import torch
import torch.nn as nn

import nnsight_fx
from nnsight_fx import (
    NNsight,
    NotRecordableError,
    OutOfOrderError,
    UnsavedValueError,
    assert_max_compiles,
    assert_no_fallback,
    save,
)

D = 6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 4)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(self.norm(x))


class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(D, 9), nn.Linear(9, D)

    def forward(self, x):
        return self.outer(torch.relu(self.inner(x)))


@pytest.fixture(params=["hooks", "eager", "aot_eager"])
def model(request):
    model = NNsight(Net())
    if request.param != "hooks":
        model.compile(backend=request.param)
    with torch.no_grad(), assert_no_fallback():
        yield model


def outputs(net, x, *names, **changed):
    """What modules return, by hooks; `changed` gives a module's output another value."""
    seen, handles = {}, []
    for name in {*names, *changed}:

        def hook(module, args, out, name=name):
            out = changed[name](out) if name in changed else out
            seen[name] = out
            return out

        handles.append(net.get_submodule(name.replace("__", ".")).register_forward_hook(hook))
    seen["out"] = net(x)
    for handle in handles:
        handle.remove()
    return seen


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


# -- modules called on values --------------------------------------------------------------------------------------


def test_a_call_beside_the_models_own(model):
    net, x = model._module, torch.randn(2, 3, D)
    called = []
    handle = net.head.register_forward_hook(lambda *_: called.append(1))
    with model.trace(x):
        lens = model.head(model.norm(model.layers[0].output)).save()
        own = model.head.output.save()
    handle.remove()
    want = outputs(net, x, "layers.0", "head")
    close(lens, net.head(net.norm(want["layers.0"])))
    close(own, want["head"])
    assert len(called) == 1  # `hook=False` is `forward`: nobody's hooks fire


def test_arguments_of_a_call_may_be_real_and_by_keyword(model):
    net, x, other = model._module, torch.randn(2, D), torch.randn(5, D)
    with model.trace(x):
        of_real = model.head(input=model.norm(other)).save()
        model.layers[0].output  # the model runs on
    close(of_real, net.head(net.norm(other)))
    close(model.head(other), net.head(other))  # outside of a trace: the module


def test_a_call_in_sight_is_an_occurrence(model):
    net, x = model._module, torch.randn(2, 3, D)
    with model.trace(x):
        h = model.layers[0].output
        lens = model.head(h, hook=True).save()
        seen_in, seen = model.head.input.save(), model.head.output.save()
        out = model.output.save()
    want = outputs(net, x, "layers.0")
    close(lens, net.head(want["layers.0"]))
    close(seen, lens)
    close(seen_in, want["layers.0"])
    close(out, want["out"])  # the model's own call is not touched


def test_an_attached_module_is_seen_inside(model):
    net, x = model._module, torch.randn(2, 3, D)
    adapter = model.layers[1].adapter = Adapter()
    assert net.layers[1].adapter is adapter and model.layers[1].adapter.path == "model.layers.1.adapter"
    for again in (False, True):
        x = torch.randn(2, 3, D)
        with assert_max_compiles(0 if again else 9), model.trace(x):
            layer = model.layers[1]
            layer.output = layer.adapter(layer.output, hook=True)
            inner = layer.adapter.inner.output.save()
            inputs = layer.adapter.inputs[0][0].save()
            out = model.output.save()
        del net.layers[1].adapter
        want = outputs(net, x, "layers.1")
        close(inner, adapter.inner(want["layers.1"]))
        close(inputs, want["layers.1"])
        close(out, outputs(net, x, layers__1=adapter)["out"])
        net.layers[1].adapter = adapter


def test_a_later_invoke_changes_a_call_of_an_earlier_one(model):
    net, x = model._module, torch.randn(2, 3, D)
    adapter = model.adapter = Adapter()
    with model.trace() as tracer:
        with tracer.invoke(x):
            h = model.layers[1].output
            model.layers[1].output = model.adapter(h, hook=True)
            behind = model.adapter.inner.output.save()
            changed = model.output.save()
        with tracer.invoke(x * 2):
            before = model.adapter.inner.output.save()
            model.adapter.inner.output = before * 0 + 1
            other = model.output.save()
        with tracer.invoke():
            whole = model.output.save()
    inner = adapter.inner(outputs(net, x, "layers.1")["layers.1"])
    close(before, inner)
    close(behind, torch.ones_like(inner))  # a read behind the call sees what the other invoke made of it
    close(changed, outputs(net, x, layers__1=lambda h: adapter.outer(torch.ones_like(inner)))["out"])
    close(other, net(x * 2))
    close(whole, torch.cat([changed, other]))


def test_a_sync_point_inside_a_call_in_sight(model):
    net, x = model._module, torch.randn(2, 3, D)
    adapter = model.adapter = Adapter()
    with model.trace() as tracer:
        a, b = tracer.batch(x, x * 2)
        with a:
            model.layers[1].output = model.adapter(model.layers[1].output, hook=True)
            out = model.output.save()
        with b:
            v = model.adapter.inner.output
            model.adapter.inner.output = v + 1
            v[:] *= 2  # too late for what was written
            assert model.adapter.inner.output.sum() > -1e9
    with torch.no_grad():
        inner = adapter.inner(outputs(net, x, "layers.1")["layers.1"])
    close(out, outputs(net, x, layers__1=lambda h: adapter.outer(torch.relu(inner + 1)))["out"])


def test_a_trainable_adapter_in_sight_trains(model):
    net, x = model._module.requires_grad_(False), torch.randn(2, 3, D)
    adapter = model.adapter = Adapter()
    with torch.enable_grad():
        with model.trace(x):
            model.norm.output = model.adapter(model.norm.output, hook=True)
            loss = model.output.sum().save()
        loss.backward()
        got = [p.grad for p in adapter.parameters()]
        outputs(net, x, norm=adapter)["out"].sum().backward(inputs=list(adapter.parameters()))
        # accumulated on top: twice the gradient
    for p, first in zip(adapter.parameters(), got, strict=True):
        assert first is not None and p.grad.abs().sum() > 0
        close(p.grad, first)


def test_what_a_call_in_sight_does_not_take(model):
    x = torch.randn(2, D)
    model.adapter = Adapter()
    with pytest.raises(OutOfOrderError, match=r"`adapter.inner.output` was passed by the call at .*test_small_verbs"):
        with model.trace(x):
            model.adapter(model.layers[0].output, hook=True)
            model.adapter.inner.output = torch.zeros(2, 9)
    with pytest.raises(NotRecordableError, match="same shape, dtype and structure"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.adapter(model.layers[0].output, hook=True)
            with tracer.invoke(x):
                model.adapter.output = torch.zeros(2, 3)
    with model.trace(x):  # nothing stays behind
        assert model.output.shape == (2, 4)


# -- the tree changes ----------------------------------------------------------------------------------------------


def test_an_assigned_module_replaces_and_recaptures(model):
    net, x = model._module, torch.randn(2, D)
    kept, inner = model.layers[0], model.layers
    with model.trace(x):
        model.layers[1].output.save()
    setattr(model.layers, "1", nn.Sequential(nn.Linear(D, 3), nn.Linear(3, D)))
    with model.trace(x):
        narrow = model.layers[1][0].output.save()
        out = model.output.save()
    want = outputs(net, x, "layers.1.0")
    close(narrow, want["layers.1.0"])
    close(out, want["out"])
    assert model.layers[0] is kept and model.layers is inner and len(model.layers) == 3


# -- apply, log, update, constants ----------------------------------------------------------------------------------------


def test_apply_calls_python_on_real_values(model):
    """Any function, between two parts of the captured model; what it returns is a value like others, or an object."""
    net, seen = model._module, []

    def by_numpy(h, scale):
        seen.append(type(h))
        return torch.from_numpy(h.numpy() * scale), {"sum": float(h.sum())}

    for seed in range(2):
        x = torch.randn(2, D, generator=torch.Generator().manual_seed(seed))
        with model.trace(x) as tracer:
            h, facts = tracer.apply(by_numpy, model.layers[1].output, scale=seed + 2.0)
            model.layers[1].output = h
            behind = model.layers[2].input.save()
            out, facts = model.output.save(), save(facts)
        want = outputs(net, x, "layers.1", layers__1=lambda h, seed=seed: h * (seed + 2.0))
        close(out, want["out"])
        close(facts["sum"], outputs(net, x, "layers.1")["layers.1"].sum().item())
        assert behind.shape == (2, D)
    assert seen == [torch.Tensor] * 2


def test_log_prints_real_values_when_the_model_gets_there(model, capsys):
    x = torch.randn(2, D)
    with model.trace(x) as tracer:
        tracer.log("first", model.layers[0].output.sum(), {"mean": model.layers[1].output.mean()})
        assert capsys.readouterr().out == ""  # not yet: nothing has run
        model.layers[2].output = model.layers[2].output * 0
        out = model.output.save()
    want = outputs(model._module, x, "layers.0")["layers.0"]
    text = capsys.readouterr().out
    assert text.startswith(f"first {want.sum()!s} {{'mean': tensor(") and text.count("\n") == 1
    close(out, outputs(model._module, x, layers__2=lambda h: h * 0)["out"])


def test_update_rebinds_a_value(model):
    x = torch.randn(2, D)
    with model.trace(x):
        total = model.layers[0].output.sum().save()
        alias, before = total, (total * 2).save()
        for layer in model.layers[1:]:
            total.update(total + layer.output.sum())
        count = model.norm.output.mean()
        assert count.update(5) is count
        after = (count + 1).save()
    want = outputs(model._module, x, "layers.0", "layers.1", "layers.2")
    close(total, sum(want[f"layers.{i}"].sum() for i in range(3)))
    assert alias is total and type(total) is torch.Tensor
    close(before, want["layers.0"].sum() * 2)
    assert after == 6
    with pytest.raises(UnsavedValueError):
        count.update(1)


def test_constants_never_recompile(model):
    x = torch.randn(2, D)
    for n, exponent in enumerate((2.0, 3.0, 0.5)):
        with assert_max_compiles(0 if n else 9), model.trace(x) as tracer:
            power = model.norm.output.abs().pow(tracer.constant(exponent)).save()
            picked = model.norm.output.index_select(-1, tracer.constant([n, 0])).save()
        want = outputs(model._module, x, "norm")["norm"]
        close(power, want.abs() ** exponent)
        close(picked, want[..., [n, 0]])


# -- navigation ----------------------------------------------------------------------------------------------------


def test_navigation(model):
    assert [e.path for e in model.layers] == [f"model.layers.{i}" for i in range(3)] and len(model.layers) == 3
    assert model.layers[-1] is model.layers[2] and model.layers[:2] == [model.layers[0], model.layers[1]]
    assert model.get("layers.1") is model.layers[1] and model.layers.get("1") is model.layers[1]
    assert [p for p, _ in model.named_modules()][-3:] == ["model.norm", "model.head", "model"]
    assert model.modules(lambda e: isinstance(e._module, nn.LayerNorm)) == [model.norm]
    assert model.named_modules(lambda e: e is model.head) == [("model.head", model.head)]
    assert model.layers[1].parent is model.layers and model.layers.parent is model and model.parent is None
    assert model.layers[1].root is model
    assert model.head.weight is model._module.head.weight
    assert model.device == torch.device("cpu") and model.layers.devices == {torch.device("cpu")}
    assert model.to(torch.float64) is model and model._module.head.weight.dtype == torch.float64
    with model.trace(torch.randn(2, D, dtype=torch.float64)):
        assert model.get("layers.0.output").dtype == torch.float64


class Routed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = Gate()

    def forward(self, x):
        found = self.gate(x)
        assert isinstance(found, tuple)  # as models of transformers ask
        return found[0] * found[1].sum()


class Gate(torch.nn.Module):
    def forward(self, x):
        return x * 2, x.softmax(-1)


@pytest.mark.parametrize("engine", ["hooks", "eager", "aot_eager"])
@pytest.mark.parametrize("looks", [False, True])
def test_a_list_written_where_a_tuple_was_is_a_tuple(engine, looks):
    model = NNsight(Routed())
    if engine != "hooks":
        model.compile(backend=engine)
    x = torch.randn(2, 3)
    with model.trace(x):
        if looks:
            float(model.gate.input.sum())
        model.gate.output = [h * 3 for h in model.gate.output]
        kept = nnsight_fx.save(model.gate.output)
        out = model.output.save()
    assert type(kept) is tuple
    torch.testing.assert_close(out, x * 6 * (x.softmax(-1) * 3).sum())
