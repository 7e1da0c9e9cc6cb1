"""What leaves a trace: saved values are plain tensors wherever they are held, and lie where later gradients find them."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
import torch.nn as nn
from transformers.modeling_outputs import BaseModelOutput

import nnsight_fx
from nnsight_fx import NNsight

ENGINES = ["hooks", "eager", "aot_eager"]
on_all = pytest.mark.parametrize("engine", ENGINES)

Pair = collections.namedtuple("Pair", "a b")


@dataclasses.dataclass
class Box:
    a: object
    b: object = 3


class Block(nn.Module):
    """Gives back its value in a container of one kind."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(3, 3)

    def forward(self, x):
        h = self.linear(x)
        if self.kind == "tuple":
            return h, x
        if self.kind == "list":
            return [h, x]
        if self.kind == "dict":
            return {"a": h, "b": x}
        if self.kind == "namedtuple":
            return Pair(h, x)
        if self.kind == "dataclass":
            return Box(h, x)
        return BaseModelOutput(last_hidden_state=h, hidden_states=(x, h))


class Holder(nn.Module):
    """A block, then a sum of what it gave."""

    def __init__(self, kind: str):
        super().__init__()
        self.block = Block(kind)

    def forward(self, x):
        got = self.block(x)
        if isinstance(got, Box):
            return got.a + got.b
        values = list(got.values()) if isinstance(got, dict) else list(got)
        return values[0] * 2


class InPlace(nn.Module):
    """`first`, whose output the model itself changes in place afterwards."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x):
        h = self.first(x)
        h = self.act(h)
        return self.last(h)


def wrap(module: nn.Module, engine: str, grad: bool = False) -> NNsight:
    model = NNsight(module.requires_grad_(grad))
    if engine != "hooks":
        model.compile(backend=engine)
    return model


def mlp(engine: str, grad: bool = False) -> NNsight:
    torch.manual_seed(0)
    return wrap(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), engine, grad)


def x() -> torch.Tensor:
    return torch.arange(6.0).view(2, 3)


def plain(value: object) -> bool:
    return type(value) is torch.Tensor and not vars(value)


# -- where a saved value is held -----------------------------------------------------------------------------------------


@on_all
def test_a_saved_value_is_a_plain_tensor_wherever_it_is_held(engine):
    model, self_like = mlp(engine), Box(None)
    in_list, in_dict = [], {}
    with model.trace(x()):
        h = model[0].output
        assert h.save() is h
        in_list.append(h)
        in_dict["h"] = (h, {"deep": h})
        self_like.a = h
        kept = lambda: h  # noqa: E731
    want = model._module[0](x())
    for found in (h, in_list[0], in_dict["h"][0], in_dict["h"][1]["deep"], self_like.a, kept()):
        assert found is h and plain(found)
    assert torch.equal(h, want)
    assert torch.equal(h + 1, want + 1) and h.numpy().shape == (2, 4)


@on_all
def test_a_value_saved_in_a_function_that_has_returned(engine):
    def look(model):
        return model[0].output.save(), nnsight_fx.save(model[1].output * 2)

    model = mlp(engine)
    with model.trace(x()):
        h, twice = look(model)
    assert plain(h) and plain(twice) and torch.equal(twice, torch.relu(h) * 2)


# -- containers ----------------------------------------------------------------------------------------------------------


@on_all
def test_a_saved_container_is_resolved_with_what_is_put_in_it_later(engine):
    model = mlp(engine)
    with model.trace(x()):
        kept = nnsight_fx.save({})
        rows = nnsight_fx.save([])
        kept["first"] = model[0].output
        rows += [h for h in model[1].output]
        kept["more"] = [rows, (model[2].output, 7, "seven", None)]
        kept["box"] = Box(model[2].output.argmax(-1))
    module = model._module
    first = module[0](x())
    assert plain(kept["first"]) and torch.equal(kept["first"], first)
    assert type(rows) is list and all(map(plain, rows)) and torch.equal(torch.stack(rows), torch.relu(first))
    out, *rest = kept["more"][1]
    assert plain(out) and torch.equal(out, module(x())) and rest == [7, "seven", None]
    assert kept["more"][0] is rows
    assert type(kept["box"]) is Box and torch.equal(kept["box"].a, out.argmax(-1)) and kept["box"].b == 3


@on_all
def test_what_was_taken_out_of_a_saved_container_is_not_saved(engine):
    model = mlp(engine)
    with model.trace(x()):
        kept = nnsight_fx.save([model[0].output])
        gone = kept.pop()
        kept.append(model[1].output)
    assert plain(kept[0])
    with pytest.raises(nnsight_fx.UnsavedValueError):
        gone + 1


@on_all
def test_a_container_that_holds_itself_is_saved(engine):
    model = mlp(engine)
    with model.trace(x()):
        kept = nnsight_fx.save([])
        kept += [model[0].output, kept]
    assert plain(kept[0]) and kept[1] is kept


@on_all
@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "namedtuple", "dataclass", "ModelOutput"])
def test_a_saved_value_has_the_models_own_type(engine, kind):
    torch.manual_seed(0)
    model = wrap(Holder(kind), engine)
    with model.trace(x()):
        got = nnsight_fx.save(model.block.output)
        out = model.output.save()
    want = model._module.block(x())
    assert type(got) is type(want)
    torch.testing.assert_close(
        vars(got) if kind == "dataclass" else got, vars(want) if kind == "dataclass" else want, rtol=0, atol=0
    )
    leaves = list(vars(got).values()) if kind == "dataclass" else list(got.values()) if kind == "dict" else list(got)
    if kind != "ModelOutput":
        assert all(map(plain, leaves))
    else:
        assert plain(got.last_hidden_state) and plain(got["last_hidden_state"]) and plain(got.hidden_states[0])
    assert torch.equal(out, model._module(x()))


@on_all
def test_leaves_that_are_no_tensors(engine):
    class Sizes(nn.Module):
        def forward(self, x, scale=2.0):
            return x * scale, x.shape[0], "name", None

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Sizes()

        def forward(self, x):
            return self.inner(x, scale=3.0)[0]

    model = wrap(Outer(), engine)
    with model.trace(x()):
        inputs = nnsight_fx.save(model.inner.inputs)
        got = nnsight_fx.save(model.inner.output)
        shape = nnsight_fx.save(list(got[0].shape))
    assert got[1:] == (2, "name", None) and torch.equal(got[0], x() * 3)
    assert inputs[1] == {"scale": 3.0} and plain(inputs[0][0]) and shape == [2, 3]


# -- storage -------------------------------------------------------------------------------------------------------------


@on_all
def test_two_saves_of_one_tensor_share_storage(engine):
    model = mlp(engine)
    with model.trace(x()):
        one, two = model[0].output.save(), model[1].input.save()
        view = model[0].output[:, :1].save()
        again = model[0].output.save()
    assert again is one
    assert one is not two and one.data_ptr() == two.data_ptr() == view.data_ptr()
    one.fill_(5)
    assert (two == 5).all() and (view == 5).all()


@on_all
@pytest.mark.parametrize("grad", [False, True])
def test_a_later_in_place_operation_of_the_model_shows(engine, grad):
    torch.manual_seed(0)
    model = wrap(InPlace(), engine, grad)
    with model.trace(x()):
        h = model.first.output.save()
        copy = model.first.output.clone().save()
    want = model._module.first(x())
    assert (want < 0).any()
    torch.testing.assert_close(h, torch.relu(want))
    torch.testing.assert_close(copy, want)


@on_all
@pytest.mark.parametrize("grad", [False, True])
def test_the_users_own_tensors_are_never_swapped(engine, grad):
    model = mlp(engine)
    mine, vector = x().requires_grad_(grad), torch.ones(4, requires_grad=grad)
    before = id(mine), mine.data_ptr(), id(vector), vector.data_ptr()
    with model.trace(mine):
        given = model.input.save()
        model[0].output = model[0].output + vector
        out = model.output.save()
    assert (id(mine), mine.data_ptr(), id(vector), vector.data_ptr()) == before
    assert plain(mine) and plain(vector) and plain(given) and given is not mine
    assert mine.is_leaf and vector.is_leaf and mine.requires_grad is grad
    assert given.data_ptr() == mine.data_ptr() and torch.equal(mine, x())
    assert out.requires_grad is grad


@on_all
def test_what_the_model_keeps_stays_the_models(engine):
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.seen = nn.Linear(3, 3), []

        def forward(self, x, log):
            h = self.linear(x)
            log.append(h)
            return h * 2

    model, log = wrap(Keeps(), engine, grad=True), []
    with model.trace(x(), log):
        h = model.linear.output.save()
    assert len(log) == 1 and log[0] is not h and plain(log[0]) and plain(h)
    assert torch.equal(log[0], h) and torch.equal(h, model._module.linear(x()))


def test_no_tensor_outlives_its_last_name():
    """Reference counts alone free what a trace held: no cycle keeps activations until the next collection."""
    import gc
    import weakref

    model, seen = mlp("hooks"), []
    model._module[0].register_forward_hook(lambda m, args, out: seen.append(weakref.ref(out)))
    gc.collect()
    gc.disable()
    try:
        for sync in (False, True):
            with model.trace(x()):
                h = model[0].output * 2
                model[1].output[:] = model[1].output + 1
                if sync:
                    assert h.sum().item() is not None
                out = model.output.save()
            del h
            assert seen.pop()() is None and plain(out)
    finally:
        gc.enable()


# -- ways out ------------------------------------------------------------------------------------------------------------


@on_all
def test_stop_delivers_what_was_saved_before_it(engine):
    model = mlp(engine)
    with model.trace(x()) as tracer:
        kept = nnsight_fx.save([])
        kept.append(model[0].output)
        h = model[0].output.save()
        tracer.stop()
        kept.append(model[1].output)
    assert len(kept) == 1 and plain(kept[0]) and torch.equal(h, model._module[0](x()))


@on_all
def test_an_exception_delivers_nothing_and_says_so(engine):
    model = mlp(engine)
    with pytest.raises(KeyError):
        with model.trace(x()):
            h = model[0].output.save()
            raise KeyError("mine")
    with pytest.raises(nnsight_fx.UnsavedValueError, match="trace"):
        h + 1


@on_all
def test_a_break_out_of_the_body_runs_the_model(engine):
    model = mlp(engine)
    for _ in range(2):
        with model.trace(x()):
            h = model[0].output.save()
            break
    assert plain(h) and torch.equal(h, model._module[0](x()))


# -- gradients after the trace (SEMANTICS D5) ----------------------------------------------------------------------------


def by_hooks(module: nn.Module, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of a submodule and of the model, by a plain forward hook."""
    seen = []
    handle = module.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append(out))
    out = module(x())
    handle.remove()
    return seen[0], out


@pytest.mark.parametrize("engine", ["hooks", "eager"])
@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("path", ["0", "1"])
def test_gradients_with_respect_to_a_saved_value(engine, sync, path):
    model = mlp(engine, grad=True)
    with model.trace(x()):
        h = model.get(path).output
        if sync:
            assert h.sum().item() is not None
        h.save()
        out = model.output.save()
    h_want, out_want = by_hooks(model._module, path)
    assert plain(h) and torch.equal(h, h_want)
    (want,) = torch.autograd.grad(out_want.pow(2).sum(), h_want, retain_graph=True)
    (got,) = torch.autograd.grad(out.pow(2).sum(), h, retain_graph=True)
    assert torch.equal(got, want) and got.abs().sum() > 0
    h.retain_grad()
    out.pow(2).sum().backward()
    assert torch.equal(h.grad, want)
    mine = [p.grad.clone() for p in model._module.parameters()]
    model._module.zero_grad()
    out_want.pow(2).sum().backward()
    assert all(map(torch.equal, mine, [p.grad for p in model._module.parameters()]))


def test_gradients_with_respect_to_an_input_and_to_what_was_written():
    model = mlp("hooks", grad=True)
    with model.trace(x().requires_grad_()):
        given = model.input.save()
        h = (model[0].output * 2).save()
        model[0].output = h
        out = model.output.save()
    assert [g.abs().sum() > 0 for g in torch.autograd.grad(out.sum(), [given, h])] == [True, True]


def test_each_site_of_one_tensor_has_an_alias_of_its_own():
    model = wrap(nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 1)), "hooks", grad=True)
    with model.trace(x()):
        a, b, c = model[0].output.save(), model[1].output.save(), model[2].input.save()
        out = model.output.save()
    grads = torch.autograd.grad(out.sum(), [a, b, c])
    assert len({t.data_ptr() for t in (a, b, c)}) == 1 and all(torch.equal(g, grads[0]) for g in grads)


def test_an_in_place_change_of_the_model_is_in_the_gradient():
    torch.manual_seed(0)
    model = wrap(InPlace(), "hooks", grad=True)
    with model.trace(x()):
        h = model.first.output.save()
        out = model.output.save()
    seen, want_out = by_hooks(model._module, "first")
    assert torch.equal(torch.autograd.grad(out.sum(), h)[0], torch.autograd.grad(want_out.sum(), seen)[0])


def test_a_steering_vector_trains_through_a_saved_output():
    model, vector = mlp("hooks"), torch.zeros(4, requires_grad=True)
    with model.trace(x()):
        model[0].output += vector
        out = model.output.save()
    out.sum().backward()
    assert vector.grad is not None and vector.grad.abs().sum() > 0


def test_compiled_a_later_gradient_of_an_intermediate_raises():
    """One compiled function has no inner autograd graph: torch refuses, rather than give a wrong number."""
    model = mlp("aot_eager", grad=True)
    with model.trace(x()):
        h, out = model[0].output.save(), model.output.save()
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(out.sum(), h)
    with model.trace(x(), compile=False):
        h, out = model[0].output.save(), model.output.save()
    assert torch.autograd.grad(out.sum(), h)[0].abs().sum() > 0
