"""`tracer.cache(...)`: on every engine what hooks see, after every intervention, in the rows of its invoke."""

import pickle
import warnings

import pytest
import torch
import torch.nn as nn

from nnsight_fx import (
    FallbackError,
    NNsight,
    OutsideTraceError,
    UnknownModuleError,
    assert_max_compiles,
    assert_no_fallback,
)
from tests.equivalence.models import Shared as CalledTwice
from tests.equivalence.models import build, inputs

ENGINES = ["hooks", "eager", pytest.param("aot_eager", marks=pytest.mark.slow)]  # `make test-slow`


def wrap(engine, module, **options):
    model = NNsight(module, **options)
    if engine != "hooks":
        model.compile(backend=engine)
    return model


def same(got, want, engine):
    exact = engine in ("hooks", "eager")
    torch.testing.assert_close(got, want, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)


def seen_by_hooks(module, x):
    """`{path: [(args, kwargs, output) of each call]}`, in the order in which the calls end."""
    found, handles = {}, []
    for path, m in module.named_modules():

        def after(m, args, kwargs, out, path=path):
            found.setdefault(".".join(p for p in ("model", path) if p), []).append((args, kwargs, out))

        handles.append(m.register_forward_hook(after, with_kwargs=True))
    module(x)
    for handle in handles:
        handle.remove()
    return found


def tensors(value):
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def fields(value):
    return tensors(vars(value) if hasattr(value, "__dataclass_fields__") and not isinstance(value, dict) else value)


@pytest.mark.parametrize(
    "name", ["gpt2", "bert", "mlp", "lstm", "shared", "tuple", "dict", "dataclass", "moe", "breaks"]
)
@pytest.mark.parametrize("engine", ENGINES)
def test_everything_is_what_hooks_see(engine, name):
    if engine == "aot_eager" and name in ("gpt2", "bert"):
        pytest.skip("seconds each; the small models do")
    module, x = build(name), inputs(name)
    model = wrap(engine, module)
    want = seen_by_hooks(module, x)
    for again in (False, True):
        with assert_max_compiles(0 if again else 99), model.trace(x) as tracer:
            cache = tracer.cache(include_inputs=True)
    with model.trace(x) as tracer:
        outputs = tracer.cache()
    assert outputs.keys() == list(want) or name in ("moe", "breaks")
    assert sorted(cache.keys()) == sorted(want)
    for path, calls in want.items():
        assert len(cache[path]) == len(calls)
        for entry, (args, kwargs, out) in zip(cache[path].visits, calls, strict=True):
            same(fields(entry.output), fields(out), engine)
            # no masks: transformers leaves one out where it can, which it does not know while Dynamo traces
            got, given = (
                [t for t in tensors(each) if t.dtype != torch.bool] for each in (entry.inputs, (args, kwargs))
            )
            same(got, given, engine)
            assert type(entry.output) is type(out) and list(entry.inputs[1]) == list(kwargs)
    if engine != "hooks":  # where data decides what runs, hooks look at all of it, and it is said
        (capture,) = model.explain().to_dict()["captures"]
        assert len(capture["fallbacks"]) == (name in ("moe", "breaks"))


@pytest.mark.parametrize("engine", ENGINES)
def test_values_are_those_after_every_intervention(engine):
    module = build("mlp")
    model, x = wrap(engine, module), inputs("mlp")
    with assert_no_fallback(), model.trace() as tracer:
        with tracer.invoke(x):
            first = tracer.cache(["model.blocks.0", model.blocks[1]], include_inputs=True)
            model.blocks[0].output[:, 0] = 1
        with tracer.invoke(x[:2]):
            second = tracer.cache([model.blocks[0]])
            model.blocks[0].output = model.blocks[0].output * 2
        with tracer.invoke():
            whole = tracer.cache(["blocks.0"])
            model.blocks[0].output += 10
    clean = module.blocks[0](x)
    one, two = clean.clone(), clean[:2] * 2
    one[:, 0] = 1
    same(first.model.blocks[0].output, one + 10, engine)
    same(first.model.blocks[1].input, one + 10, engine)
    same(second.blocks[0].output, two + 10, engine)
    same(whole["model.blocks.0"].output, torch.cat([one, two]) + 10, engine)
    assert (first.keys(), second.keys()) == (["model.blocks.0", "model.blocks.1"], ["model.blocks.0"])


@pytest.mark.parametrize("engine", ENGINES)
def test_detached_moved_cast_and_of_this_run(engine):
    class Indices(nn.Module):
        def forward(self, x):
            return x.exp(), x.argmax(-1), 3

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), Indices()

        def forward(self, x):
            return self.b(self.a(x))[0]

    torch.manual_seed(0)
    model = wrap(engine, Net())
    with assert_no_fallback(), model.trace(torch.ones(2, 4)) as tracer:
        cast = tracer.cache(dtype=torch.float64)
    with assert_no_fallback(), model.trace(torch.ones(2, 4)) as tracer:
        attached = tracer.cache(detach=False, device=None)
    values, where, number = cast.b.output
    assert (values.dtype, where.dtype, number) == (torch.float64, torch.float64, 3)
    assert not values.requires_grad and attached.b.output[0].requires_grad
    assert attached.b.output[1].dtype is torch.int64
    attached.a.output.sum().backward()
    assert model._module.a.bias.grad is not None or engine != "hooks"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_module_that_runs_twice_has_two_visits(engine):
    torch.manual_seed(0)
    module, x = CalledTwice().requires_grad_(False), torch.randn(2, 16)
    model = wrap(engine, module)
    with assert_no_fallback(), model.trace(x) as tracer:
        cache = tracer.cache(include_inputs=True)
    first, second = cache.a.output
    same([first, second], [module.a(x), module.a(module.act(module.a(x)))], engine)
    assert len(cache.a) == 2 and cache.a[1].output is second and cache.a[-1].input is cache.a.input[1]
    assert len(cache.b) == 1 and isinstance(cache.b.output, torch.Tensor)
    with pytest.raises(IndexError, match="visited 2 times"):
        cache.a[2]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_does_not_run_is_not_there(engine):
    model, x = wrap(engine, build("mlp")), inputs("mlp")
    with assert_no_fallback(), model.trace(x) as tracer:
        cache = tracer.cache(include_inputs=True)
        model.blocks[1].output *= 2
        tracer.stop()
    assert cache.keys() == [
        *("model", "model.blocks.0", "model.blocks.0.up", "model.blocks.0.act", "model.blocks.0.down"),
        *("model.blocks.1", "model.blocks.1.up", "model.blocks.1.act", "model.blocks.1.down"),
    ]
    assert cache.model.output is None and cache.model.input is not None
    with assert_no_fallback(), model.trace(x) as tracer:
        cache = tracer.cache()
        model.blocks[1].skip(model.blocks[1].input)
    assert "model.blocks.1" in cache and "model.blocks.1.up" not in cache and "model.blocks.2.up" in cache
    with pytest.warns(UserWarning, match=r"missed: `blocks.1.up` did not run"), model.trace(x) as tracer:
        tracer.cache(["model.blocks.1.up", "model.blocks.0"])
        model.blocks[1].skip(model.blocks[1].input)


@pytest.mark.parametrize("engine", ENGINES)
def test_with_a_look_at_values_in_the_body(engine):
    module = build("mlp")
    model, x = wrap(engine, module), inputs("mlp")
    with assert_no_fallback(), model.trace(x) as tracer:
        cache = tracer.cache()
        if model.blocks[1].output.abs().sum() > 0:
            model.blocks[1].output = model.blocks[1].output * 0
    same(cache.blocks[0].output, module.blocks[0](x), engine)
    assert (cache.blocks[1].output == 0).all()


def test_only_what_was_asked_for_is_observed():
    model, x = wrap("eager", build("mlp")), inputs("mlp")
    with model.trace(x) as tracer:
        tracer.cache([model.blocks[0]])
        assert [op.verb.subject for op in tracer.tape.ops if op.verb.name == "observe"] == [("blocks.0", "output", 0)]
    assert model._host.compiled.segments[-1].variants
    (variant,) = [v for vs in model._host.compiled.segments[-1].variants.values() for v in vs]
    assert len(variant.gives) == 1


def test_a_scan_gives_shapes():
    model = wrap("hooks", build("mlp"))
    with model.scan(inputs("mlp")) as tracer:
        cache = tracer.cache(dtype=torch.float64)
        model.blocks[0].output *= 2
    kept = cache.blocks[0].up.output
    assert (kept.device.type, kept.dtype, tuple(kept.shape)) == ("meta", torch.float64, (3, 7, 32))


# -- finding things in it ---------------------------------------------------------------------------------------------


def eleven(**options):
    model = NNsight(nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(12)]), **options)
    with model.trace(torch.ones(1, 2)) as tracer:
        cache = tracer.cache(include_inputs=True)
    return model, cache


def test_paths_are_exact():
    _, cache = eleven()
    assert cache["model.1"].keys() == ["model.1", "model.1.0", "model.1.1"]
    assert cache.model[1].keys() == cache["model.1"].keys() and cache[1].keys() == cache["model.1"].keys()
    assert len(cache) == len(cache.keys()) == len(list(cache)) == 37
    assert cache["model.11.1"].output is cache.model[11][1].output is dict(cache.items())["model.11.1"].output
    assert [v.output.shape for v in cache["model.1"].values()] == [(1, 2)] * 3
    assert "model.1" in cache and "1.0" in cache and "model.12" not in cache and "0" in cache["model.1"]
    assert cache.model[0].input.tolist() == [[1, 1]] and cache.model[0].inputs[1] == {}


def test_what_is_not_there():
    model, cache = eleven()
    with pytest.raises(AttributeError, match=r"`model` has no module `nope`"):
        cache.nope  # noqa: B018
    with pytest.raises(KeyError, match="there is no module `model.12`; did you mean `2`"):
        cache["model.12"]
    with pytest.raises(IndexError, match="out of bounds"):
        cache.model[12]
    with model.trace(torch.ones(1, 2)) as tracer:
        few = tracer.cache([model[3]])
    with pytest.raises(KeyError, match="`4` module path was never cached; the nearest that was is `3`"):
        few["model.4"]
    with pytest.raises(KeyError, match="never cached"):
        few.model.output  # noqa: B018
    with (
        pytest.raises(UnknownModuleError, match="no module `model.33`; did you mean"),
        model.trace(torch.ones(1, 2)) as t,
    ):
        t.cache(["model.33"])


def test_by_alias():
    model, cache = eleven(rename={"1": "second", ".3": "third"})
    assert cache["model.second"].output is cache.model["1"].output is cache.second.output
    assert cache.third.output is cache["model.3"].output
    assert "model.third.0" in cache.keys(alias=True) and "model.third.0" not in list(cache)
    with model.trace(torch.ones(1, 2)) as tracer:
        few = tracer.cache(["model.third", model.second])
    assert few.keys() == ["model.1", "model.3"]


def test_it_can_be_pickled():
    _, cache = eleven()
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again["model.3.0"].output, cache["model.3.0"].output)
    assert again.model["3"].keys() == cache.model[3].keys()


# -- where it can be declared -----------------------------------------------------------------------------------------


def test_late_or_outside():
    model, x = wrap("hooks", build("mlp")), inputs("mlp")
    for touch in (lambda: model.blocks[0].output, lambda: model.blocks[0].output.zero_()):
        with pytest.raises(ValueError, match="must be declared before reading or modifying"), model.trace(x) as tracer:
            touch()
            tracer.cache()
    with pytest.raises(OutsideTraceError), model.trace() as tracer:
        with tracer.invoke(x):
            pass
        tracer.cache()
    with model.trace() as tracer:  # late in another invoke is another matter
        with tracer.invoke(x):
            model.blocks[0].output[:] = 0
        with tracer.invoke(x):
            cache = tracer.cache()
            again = tracer.cache([model.head])
    assert len(cache) == 15 and again.keys() == ["model.head"]


def test_objects_are_not_kept():
    from tests.equivalence.test_contract import ids, llama

    model = wrap("eager", llama())
    with warnings.catch_warnings(), assert_no_fallback(), torch.no_grad(), model.trace(ids(), use_cache=True) as tracer:
        cache = tracer.cache()
    assert cache.model.output.logits.shape == (2, 7, 100)
    with pytest.raises(ValueError, match="saved"):
        cache.model.output.past_key_values.get_seq_length()
    with pytest.raises(FallbackError), assert_no_fallback():
        breaks = wrap("eager", build("breaks"))
        with breaks.trace(inputs("breaks")) as tracer:
            tracer.cache()


class Holder(nn.Module):
    """Has a child called `model`, as Llama has."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("make, path", [(Holder, "model.1"), (lambda: Holder().model, "1")])
def test_a_path_with_and_without_the_model_in_front(make, path):
    model = NNsight(make())
    with model.trace(torch.ones(1, 3)) as tracer:
        cache = tracer.cache(modules=[path])
    assert list(cache.keys()) == [f"model.{path}"]
    assert cache[path].output is cache[f"model.{path}"].output and path in cache and f"model.{path}" in cache
    assert model.get(path) is model.get(f"model.{path}")
    with pytest.raises(KeyError, match="there is no module `nothing`; there is"):
        cache["nothing"]
    with pytest.raises((AttributeError, KeyError), match="there is no module `model.nothing`"):
        model.get("model.nothing")
