"""`model.edit()`: what is recorded once holds in every later trace, on every engine, before the trace's own operations."""

import dataclasses

import pytest
import torch
import torch.nn as nn

import nnsight_fx
from nnsight_fx import (
    InvokeError,
    NestedTraceError,
    NNsight,
    NotRecordableError,
    assert_max_compiles,
    assert_no_fallback,
)

ENGINES = ["hooks", "eager", pytest.param("aot_eager", marks=pytest.mark.slow)]  # `make test-slow`


@dataclasses.dataclass
class Pair:
    a: torch.Tensor
    b: torch.Tensor


class Splits(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.pack = pack

    def forward(self, h, scale=1.0):
        return self.pack(h * scale, h - 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.tuple, self.dict, self.pair = (
            Splits(lambda a, b: (a, b)),
            Splits(lambda a, b: {"a": a, "b": b}),
            Splits(Pair),
        )

    def forward(self, x):
        h = torch.tanh(self.a(x))
        first, second = self.tuple(h, scale=2.0)
        named = self.dict(self.b(first) + second)
        pair = self.pair(named["a"] * named["b"])
        return self.c(pair.a + pair.b)


def net():
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def wrap(engine, module=None):
    model = NNsight(module or net())
    if engine != "hooks":
        model.compile(backend=engine, fullgraph=True)
    return model


def x(rows=3, seed=0):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def same(got, want, engine):
    exact = engine in ("hooks", "eager")
    torch.testing.assert_close(got, want, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


def by_hand(module, hooks, x):
    """The module's output under forward hooks: `{path: change of the output}` and `{path + ":in": change of the first input}`."""
    handles = []
    for path, change in hooks:
        if path.endswith(":in"):

            def before(m, args, change=change):
                new = change(args[0])
                return None if new is None else (new, *args[1:])

            handles.append(module.get_submodule(path[:-3]).register_forward_pre_hook(before))
        else:
            handles.append(
                module.get_submodule(path).register_forward_hook(lambda m, a, out, change=change: change(out))
            )
    try:
        return module(x)
    finally:
        for handle in handles:
            handle.remove()


# -- what can be written in an edit: the edit, and the same on hooks ---------------------------------------------------


def in_place(h):
    h[:, 0] = 2
    h[..., -1] *= 3


def half_of_columns(h):
    h[:, : h.shape[1] // 2] = torch.ones(h.shape[0], h.shape[1] // 2)


def set_row(out):
    out[0][:, 1] = 5


def dict_item(out):
    out["a"] = out["a"] * 2
    out["b"][:] = 1


def field(out):
    out.a = out.b * 3


def e_in_place(m):
    m.a.output[:, 0] = 2
    m.a.output[..., -1] *= 3


def e_replace(m):
    m.a.output = m.a.output * 2 + 1


def e_half(m):
    h = m.a.output
    h[:, : h.shape[1] // 2] = torch.ones(h.shape[0], h.shape[1] // 2)


def e_view(m):
    h = m.a.output
    m.a.output = h.view(*h.shape[:1], 2, 2).flip(1).reshape(h.shape)


def e_input(m):
    m.c.input = m.c.input.relu()


def e_input_in_place(m):
    m.b.input[:] = 0.5


def e_tuple(m):
    m.tuple.output[0][:, 1] = 5


def e_whole_tuple(m):
    out = m.tuple.output
    m.tuple.output = (out[1], out[0])


def e_dict(m):
    m.dict.output["a"] = m.dict.output["a"] * 2
    m.dict.output["b"][:] = 1


def e_field(m):
    m.pair.output.a = m.pair.output.b * 3


def e_functional(m):
    m.a.output = nn.functional.layer_norm(torch.cat([m.a.output[:, 1:], m.a.output[:, :1]], -1), (4,))


def e_module(m):
    m.c.output = m.c.output + m.c(m.b(m.a.output))


def e_skip(m):
    m.b.skip(m.b.input * 0.5)


def e_no_grad(m):
    with torch.no_grad():
        h = m.a.output * 2
    m.a.output = h


EDITS = {
    "in place": (e_in_place, [("a", in_place)]),
    "replace": (e_replace, [("a", lambda h: h * 2 + 1)]),
    "sizes": (e_half, [("a", half_of_columns)]),
    "views": (e_view, [("a", lambda h: h.view(*h.shape[:1], 2, 2).flip(1).reshape(h.shape))]),
    "input": (e_input, [("c:in", torch.relu)]),
    "input in place": (e_input_in_place, [("b:in", lambda h: h.fill_(0.5))]),
    "tuple": (e_tuple, [("tuple", set_row)]),
    "whole tuple": (e_whole_tuple, [("tuple", lambda out: out[::-1])]),
    "dict": (e_dict, [("dict", dict_item)]),
    "field": (e_field, [("pair", field)]),
    "functions": (e_functional, [("a", lambda h: nn.functional.layer_norm(torch.cat([h[:, 1:], h[:, :1]], -1), (4,)))]),
    "no_grad": (e_no_grad, [("a", lambda h: h * 2)]),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_edit_is_what_hooks_do(engine, name):
    edit, hooks = EDITS[name]
    module = net()
    model = wrap(engine, module)
    with model.edit() as (_, edited):
        edit(edited)
    for rows in (3, 5):
        want = by_hand(module, hooks, x(rows))
        assert not torch.equal(want, module(x(rows)))
        for again in (False, True):
            with assert_no_fallback(), assert_max_compiles(0 if again else 9), edited.trace(x(rows)):
                out = edited.output.save()
            same(out, want, engine)
        with model.trace(x(rows)):
            clean = model.output.save()
        same(clean, module(x(rows)), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_skips_and_calls_of_modules(engine):
    module = net()
    model = wrap(engine, module)
    with model.edit() as (_, edited):
        e_skip(edited)
    with assert_no_fallback(), edited.trace(x()):
        out = edited.output.save()
    kept, module.b.forward = module.b.forward, lambda h: h * 0.5
    same(out, module(x()), engine)
    module.b.forward = kept
    with model.edit() as (_, edited):
        e_module(edited)
    with assert_no_fallback(), edited.trace(x()):
        out = edited.output.save()
    same(out, module(x()) + module.c(module.b(module.a(x()))), engine)


# -- which model has it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_edits_stack_in_place_and_are_cleared(engine):
    module = net()
    model = wrap(engine, module)
    with model.edit(inplace=True):
        model.a.output[:] = 0
    with model.edit(inplace=True) as tracer:
        tracer.a.output = model.a.output + 1
    with model.edit() as edited:
        edited.a.output = edited.a.output * 5

    def run(m):
        with m.trace(x()):
            a, out = m.a.output.save(), m.output.save()
        return a, out

    for want, m in ((1, model), (5, edited)):
        a, out = run(m)
        assert (a == want).all()
        same(out, by_hand(module, [("a", lambda h, want=want: torch.full_like(h, want))], x()), engine)
    model.clear_edits()
    same(run(model)[1], module(x()), engine)
    assert (run(edited)[0] == 5).all()


def test_both_spellings_give_the_copy_and_iteration_is_left_alone():
    model = NNsight(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    with model.edit() as (tracer, edited):
        assert tracer is not edited and [e.path for e in edited] == ["model.0", "model.1"]
    with model.edit() as other:
        for layer in other:
            layer.output[:] = 0
    for each in (edited, other):
        assert type(each) is NNsight and each is not model
        first, second = each
        assert (first.path, second.path) == ("model.0", "model.1")
    with other.trace(x()):
        out = other.output.save()
    assert (out == 0).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_and_captures_are_shared(engine):
    model = wrap(engine)
    with model.edit() as (_, edited):
        edited.b.output[:] = 0
    assert all(p is q for p, q in zip(model._module.parameters(), edited._module.parameters(), strict=True))
    with torch.no_grad():
        model._module.c.bias.fill_(7)
        model._module.c.weight.fill_(0)
    for m in (model, edited):
        with m.trace(x()):
            out = m.output.save()
        assert (out == 7).all()
    if engine != "hooks":
        assert model._host.compiled is edited._host.compiled and model._host.compiled.captures == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_edit_holds_is_read_when_a_trace_runs(engine):
    """A vector that is trained, a parameter of the model: the value of the run, and no new plan for a new one."""
    model, vector = wrap(engine), torch.zeros(4, requires_grad=True)
    with model.edit() as (_, edited):
        edited.a.output = edited.a.output * 0 + vector + edited.b.bias
    seen = []
    for step in range(3):
        with assert_no_fallback(), assert_max_compiles(1 if step == 0 else 0), edited.trace(x()):
            a, out = edited.a.output.save(), edited.output.save()
        seen.append(a[0].detach().clone())
        (grad,) = torch.autograd.grad(out.sum(), vector)
        with torch.no_grad():
            vector += grad
            model._module.b.bias += 1
    assert all((later - earlier - 1).abs().sum() > 0 for earlier, later in zip(seen, seen[1:], strict=False))
    torch.testing.assert_close(seen[0], model._module.b.bias - 3)


# -- where it acts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_edits_come_before_invokes_and_see_the_whole_batch(engine):
    module = net()
    model = wrap(engine, module)
    with model.edit() as (_, edited):
        h = edited.a.output
        h[:] = h - h.mean(0)  # over all rows of the batch
    with assert_no_fallback(), edited.trace() as tracer:
        with tracer.invoke(x(2)):
            first = edited.a.output.clone().save()
            edited.a.output *= 2
        with tracer.invoke(x(3, 1)):
            second = edited.a.output.clone().save()
            out = edited.output.save()
        with tracer.invoke():
            after = edited.a.output.save()
    whole = module.a(torch.cat([x(2), x(3, 1)]))
    whole = whole - whole.mean(0)
    same(torch.cat([first, second]), whole, engine)
    same(after, torch.cat([whole[:2] * 2, whole[2:]]), engine)
    want = by_hand(module, [("a", lambda h: after)], torch.cat([x(2), x(3, 1)]))
    same(out, want[2:], engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_edits_hold_in_every_forward_of_a_trace(engine):
    """A later layer of one invoke into an earlier layer of another is two forwards; a look at a value is two waves."""
    module = net()
    model = wrap(engine, module)
    with model.edit() as (_, edited):
        edited.a.output = edited.a.output + 1
    with assert_no_fallback(), edited.trace() as tracer:
        with tracer.invoke(x(3)):
            late = edited.b.output
        with tracer.invoke(x(3, 1)):
            edited.a.output = edited.a.output + late
            split = edited.output.save()
    b = []
    by_hand(module, [("a", lambda h: h + 1), ("b", b.append)], x(3))
    same(split, by_hand(module, [("a", lambda h: h + 1 + b[0])], x(3, 1)), engine)
    with edited.trace() as tracer:
        with tracer.invoke(x(3)):
            total = edited.a.output.sum().item()
        with tracer.invoke(x(2, 1)):
            out = edited.output.save()
    assert total == pytest.approx((module.a(x(3)) + 1).sum().item())
    same(out, by_hand(module, [("a", lambda h: h + 1)], x(2, 1)), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_edit_is_in_output_hidden_states_and_in_trace_false(engine):
    from tests.equivalence.test_contract import ids, llama

    module = llama()
    model = wrap(engine, module)
    with model.edit() as (_, edited):
        edited.model.layers[1].output[:] = 0
    with torch.no_grad():
        for _ in range(2):
            with assert_no_fallback(), edited.trace(ids(), output_hidden_states=True) as tracer:
                hidden = nnsight_fx.save(tracer.result.hidden_states)
            assert (hidden[2] == 0).all() and (hidden[1] != 0).any()
        assert (edited.trace(ids(), output_hidden_states=True, trace=False).hidden_states[2] == 0).all()
        assert (model.trace(ids(), output_hidden_states=True, trace=False).hidden_states[2] != 0).any()
        assert (module(ids(), output_hidden_states=True).hidden_states[2] != 0).any()


def test_an_edit_that_changes_the_shape_holds_in_scans():
    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Identity()

        def forward(self, x):
            return self.b(self.a(x) * 2)

    model = NNsight(Pools())
    with model.edit() as (_, edited):
        edited.a.output = edited.a.output[:, :2].double()
    with edited.scan(x()):
        b = edited.b.input
        assert (tuple(b.shape), b.dtype) == ((3, 2), torch.float64)
    with edited.trace(x()):
        kept = edited.b.output.save()
    assert torch.equal(kept, x()[:, :2].double() * 2)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_skip_in_an_edit_and_in_the_invokes(engine):
    """The invokes come later, so theirs is the last word."""
    module = net()
    model = wrap(engine, module)
    with model.edit() as (_, edited):
        edited.b.skip(edited.b.input * 0)
    with assert_no_fallback(), edited.trace() as tracer:
        with tracer.invoke(x(2)):
            edited.b.skip(edited.b.input + 1)
            first = edited.b.output.save()
        with tracer.invoke(x(1, 1)):
            edited.b.skip(edited.b.input + 2)
            second = edited.b.output.save()
    into_b = []
    by_hand(module, [("b:in", into_b.append)], torch.cat([x(2), x(1, 1)]))
    same(first, into_b[0][:2] + 1, engine)
    same(second, into_b[0][2:] + 2, engine)
    with assert_no_fallback(), edited.trace() as tracer:
        with tracer.invoke(x(2)):
            alone = edited.b.output.save()
        with tracer.invoke(x(1, 1)):
            pass
    assert (alone == 0).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_stop_in_an_edit(engine):
    model = wrap(engine)
    with model.edit(inplace=True) as tracer:
        model.a.output[:] = 1
        tracer.stop()
    with model.trace(x()):
        a = model.a.output.save()
    assert (a == 1).all()


# -- what cannot be in one --------------------------------------------------------------------------------------------

REFUSED = {
    "if": (lambda m: bool(m.a.output.sum() > 0), "torch.where"),
    "item": (lambda m: m.a.output.sum().item(), "item"),
    "unpacking": (lambda m: tuple(m.tuple.output), r"out\[0\]"),
    "save": (lambda m: m.a.output.save(), "no values to save"),
    "len": (lambda m: len(m.a.output), "length"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_the_line(name):
    write, text = REFUSED[name]
    model = wrap("hooks")
    with pytest.raises(NotRecordableError, match=rf"test_edits.py:\d+.*(\n.*)*{text}"), model.edit(inplace=True):
        write(model)
    assert not model._host.edits and model.tracer is None


def test_no_invokes_and_no_trace_inside():
    model = wrap("hooks")
    with pytest.raises(InvokeError, match="no invokes"), model.edit() as (tracer, _):
        tracer.invoke(x())
    with pytest.raises(NestedTraceError, match="made before the trace"), model.trace(x()), model.edit():
        pass
    with pytest.raises(NestedTraceError), model.edit() as (_, edited), edited.trace(x()):
        pass
    with model.edit() as (_, edited):
        edited.a.output[:] = 0
    with pytest.raises(NestedTraceError), model.trace(x()), edited.trace(x()):  # one module: one trace at a time
        pass


def test_what_a_trace_refuses_names_the_line_of_the_edit():
    model = wrap("hooks")
    with model.edit(inplace=True):
        model.a.output = model.a.output @ torch.ones(7, 2)
    with pytest.raises(RuntimeError) as caught, model.trace(x()):
        pass
    assert any("in the edit at" in note and "test_edits.py" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_whose_inside_the_traces_see(engine):
    module = net()
    model = wrap(engine, module)
    model.a.adapter = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4)).requires_grad_(False)
    with model.edit() as (_, edited):
        edited.a.output = edited.a.adapter(edited.a.output, hook=True)
    with edited.trace(x()):
        inner, out = edited.a.adapter[0].output.save(), edited.output.save()
    adapter = module.a.adapter
    same(inner, adapter[0](module.a(x())), engine)
    same(out, by_hand(module, [("a", lambda h: adapter(h))], x()), engine)


def test_an_edited_copy_of_a_model_without_weights_loads_them_once(tmp_path):
    from tests.equivalence.test_contract import ids, llama

    llama().save_pretrained(tmp_path)
    model = nnsight_fx.LanguageModel(tmp_path, tokenizer=nn.Identity())
    with model.edit() as (_, edited):
        edited.model.layers[0].output[:] = 0
    assert not model.dispatched and not edited.dispatched
    with torch.no_grad(), edited.trace(ids()):
        h = edited.model.layers[0].output.save()
    loaded = edited._module
    with torch.no_grad(), model.trace(ids()):
        clean = model.model.layers[0].output.save()
    assert model.dispatched and model._module is loaded and (h == 0).all() and (clean != 0).any()
