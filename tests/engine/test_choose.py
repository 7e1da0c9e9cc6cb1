"""How each kind of program runs: which engine, whose graph, what is left out, and why."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from transformers import GPT2Config, GPT2LMHeadModel

import nnsight_fx
from nnsight_fx import LanguageModel, NNsight
from nnsight_fx.engine.how import CHANGES, FIRST, INSIDE, NOTICED, UNCOMPILED, How

SHARED = How("captured", "shared", unread=True)
READ = How("captured", "shared")  # the model's result is somebody's
OWN = How("captured", "own", why=CHANGES)
LEFT_OUT = How("captured", "shared", leaves_out=True, unread=True)


class Pair(nn.Module):
    """Returns a tuple, and takes a keyword."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, scale=1.0):
        return self.a(x) * scale, self.b(x)


class Looks(nn.Module):
    """Its Python looks at a value."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.a(x)
        if h.sum() > -1e9:
            h = h + 1
        return self.b(h)


class Asks(nn.Module):
    """Its Python asks what a module gave."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.a(x)
        return self.b(h) if h.shape[0] > 1 else h


class Counts(nn.Module):
    """Its Python counts its calls."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.b(self.a(x))


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
    "pair": Pair,
    "looks": Looks,
    "asks": Asks,
    "trainable": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).requires_grad_(True),
    "counts": Counts,
}


class Subclass(torch.Tensor):
    """A tensor of the user's own class."""


# name: the model, the body of a trace, and how it runs once the model has run.
PROGRAMS = {
    # What any plan shares.
    "save": ("mlp", lambda m, t: m[0].output.save(), SHARED),
    "save the input": ("mlp", lambda m, t: m[2].input.save(), SHARED),
    "save the result": ("mlp", lambda m, t: t.result.save(), SHARED),
    "save the model's output": ("mlp", lambda m, t: m.output.save(), SHARED),
    "add": ("mlp", lambda m, t: (m[0].output.add_(1), m[2].output.save()), SHARED),
    "set a part": ("mlp", lambda m, t: (m[0].output.__setitem__((slice(None), 0), 0), m[2].output.save()), SHARED),
    "write": ("mlp", lambda m, t: (setattr(m[1], "output", m[0].output * 2), m[2].output.save()), SHARED),
    "write the input": ("mlp", lambda m, t: (setattr(m[2], "input", m[0].output), m[2].output.save()), SHARED),
    "steer by a vector": ("mlp", lambda m, t: (m[0].output.add_(torch.ones(4)), m[2].output.save()), SHARED),
    "a random draw": ("mlp", lambda m, t: (m[0].output.add_(torch.randn(4)), m[2].output.save()), SHARED),
    "two sites": ("mlp", lambda m, t: (m[0].output.save(), m[2].output.save()), SHARED),
    "a module called beside": ("mlp", lambda m, t: m[2](m[0].output).save(), SHARED),
    "a container": ("mlp", lambda m, t: nnsight_fx.save([m[0].output, m[2].output]), SHARED),
    "a condition": (
        "mlp",
        lambda m, t: (cond(t, m[0].output.sum() > 0, lambda: m[1].output.mul_(2)), m[2].output.save()),
        SHARED,
    ),
    "a cache": ("mlp", lambda m, t: t.cache(), SHARED),
    "part of a tuple": ("pair", lambda m, t: (m.a.output.mul_(2), m.output[0].save()), SHARED),
    "the keyword of a call": ("pair", lambda m, t: m.inputs[0][0].save(), SHARED),
    "asks, read": ("asks", lambda m, t: (m.a.output.mul_(2), m.b.output.save()), SHARED),
    # What is left out of the shared graph.
    "skip": ("mlp", lambda m, t: (m[1].skip(m[0].output), m[2].output.save()), LEFT_OUT),
    "skip the first": ("mlp", lambda m, t: (m[0].skip(torch.zeros(2, 4)), m[2].output.save()), LEFT_OUT),
    "skip one of a pair": ("pair", lambda m, t: (m.b.skip(m.a.output), m.output[1].save()), LEFT_OUT),
    "stop": ("mlp", lambda m, t: (m[0].output.save(), t.stop()), LEFT_OUT),
    # A graph of its own.
    "fewer rows": ("mlp", lambda m, t: (setattr(m[0], "output", m[0].output[:1]), m[2].output.save()), OWN),
    "more rows": ("mlp", lambda m, t: (setattr(m[0], "output", m[0].output.repeat(2, 1)), m[2].output.save()), OWN),
    "another dtype": (
        "mlp",
        lambda m, t: (setattr(m[2], "output", m[2].output.double()), m[2].output.save()),
        OWN,
    ),
    "another structure": (
        "pair",
        lambda m, t: (setattr(m, "output", [*m.output, m.a.output]), t.result[2].save()),
        OWN,
    ),
    "skip with another shape": ("mlp", lambda m, t: (m[1].skip(m[0].output[:1]), m[2].output.save()), OWN),
    "fewer rows where Python asks": (
        "asks",
        lambda m, t: (setattr(m.a, "output", m.a.output[:1]), t.result.save()),
        OWN,
    ),
    # Into a module.
    ".source": (
        "pair",
        lambda m, t: next(iter(m.source)).output.save(),
        How("captured", "source", unread=True),
    ),
    ".source and a skip": (
        "pair",
        lambda m, t: (next(iter(m.source)).output.save(), m.b.skip(m.a.output), m.output[1].save()),
        How("captured", "own", why=INSIDE),
    ),
    "a skip where Python counts": (
        "counts",
        lambda m, t: (m.a.skip(m.a.input), m.b.output.save()),
        How("captured", "own", why=FIRST),
    ),
    # A look at a value.
    "a look": ("mlp", lambda m, t: (float(m[0].output.sum()), m[2].output.save()), READ),
    "a look, then a write": (
        "mlp",
        lambda m, t: (float(m[0].output.sum()), m[1].output.mul_(2), m[2].output.save()),
        READ,
    ),
    "apply": ("mlp", lambda m, t: (t.apply(torch.sum, m[0].output), m[2].output.save()), READ),
    # A model that Dynamo breaks.
    "a graph break": ("looks", lambda m, t: (m.a.output.mul_(2), m.b.output.save()), READ),
    "a skip in front of a break": (
        "looks",
        lambda m, t: (m.a.skip(torch.zeros(2, 4)), m.b.output.save()),
        How("captured", "own", why=NOTICED),
    ),
    # Backwards.
    "a gradient": ("trainable", lambda m, t: gradient(m), SHARED),
    "retain_grad": ("trainable", lambda m, t: (m[0].output.retain_grad(), m[2].output.save()), READ),
    # On hooks.
    "a condition that skips": (
        "mlp",
        lambda m, t: (cond(t, m[0].output.sum() > 0, lambda: m[1].skip(m[0].output)), m[2].output.save()),
        How(why="a `tracer.cond` decides whether the model skips a call"),
    ),
    "a condition that stops": (
        "mlp",
        lambda m, t: cond(t, m[0].output.sum() > 0, t.stop),
        How(why="a `tracer.cond` decides"),
    ),
}


def cond(tracer, value, then):
    with tracer.cond(value):
        then()


def gradient(model):
    h = model[0].output
    found = h.grad.save()
    model[2].output.sum().backward()
    return found


def how(name, compiled=True, x=None, **options):
    """The way a program went."""
    kind, program, _ = PROGRAMS[name]
    torch.manual_seed(0)
    module = MODELS[kind]()
    model = NNsight(module if kind == "trainable" else module.requires_grad_(False))
    if compiled:
        model.compile(backend="eager")
        with model.trace(torch.randn(2, 4)):  # a first trace: the graph that all plans share
            nnsight_fx.save([model.output])
    with model.trace(torch.randn(2, 4) if x is None else x, **options) as tracer:
        program(model, tracer)
    (found,) = tracer.explain().hows
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program(name):
    want = PROGRAMS[name][2]
    found = how(name)
    assert (found.engine, found.entry, found.leaves_out, found.unread) == (
        *(want.engine, want.entry, want.leaves_out, want.unread),
    ), str(found)
    assert want.why in found.why and bool(want.why) == bool(found.why), found.why


@pytest.mark.parametrize("name", ["save", "fewer rows", "skip", "a look"])
def test_uncompiled(name):
    assert how(name, compiled=False) == how(name, compile=False) == How(why=UNCOMPILED)


def test_a_tensor_of_ones_own_class():
    found = how("save", x=torch.randn(2, 4).as_subclass(Subclass))
    assert found.engine == "hooks" and "a Subclass, a tensor of a class of its own" in found.why


def test_a_hook_that_always_runs_sees_what_is_left_out():
    model = NNsight(MODELS["mlp"]())
    model[1]._module.register_forward_hook(lambda *_: None, always_call=True)
    model.compile(backend="eager")
    with model.trace(torch.randn(2, 4)):
        model.output.save()
    with model.trace(torch.randn(2, 4)) as tracer:
        model[1].skip(model[0].output)
        model[2].output.save()
    assert tracer.explain().hows == [How("captured", "own", why=NOTICED)]


@pytest.mark.parametrize(("compiled", "engine"), [(False, "batched"), (True, "forked")])
def test_traces_of_a_session(compiled, engine):
    model = NNsight(MODELS["mlp"]().requires_grad_(False))
    if compiled:
        model.compile(backend="eager")
    with model.session():
        tracers = []
        for i in range(2):
            with model.trace(torch.randn(2, 4)) as tracer:
                model[0].output[:] += i
                model[2].output.save()
            tracers.append(tracer)
    assert model._host.told.ran.groups[0].strategy == engine
    assert str(How(engine)).endswith("in one forward with other traces")


@pytest.mark.parametrize(("compiled", "want"), [(False, How(why=UNCOMPILED)), (True, READ)])
def test_a_generation(compiled, want):
    """What comes behind the last forward (`tracer.result`) is no forward, and has no engine."""
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 50}
    config = GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)
    model = LanguageModel(GPT2LMHeadModel(config).eval().requires_grad_(False))
    if compiled:
        model.compile(backend="eager")
    with model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3) as tracer:
        model.transformer.h[0].output[:] *= 2
        tracer.result.save()
    assert tracer.explain().hows == [want]


def test_the_first_trace_of_a_model():
    model = NNsight(MODELS["mlp"]().requires_grad_(False))
    model.compile(backend="eager")
    found = []
    for _ in range(3):
        with model.trace(torch.randn(2, 4)) as tracer:
            model[1].skip(model[0].output)
            model[2].output.save()
        found.append(tracer.explain().hows)
    assert found == [[How("captured", "own", why=FIRST)]] * 3  # its own graph is there by then
    assert f"how: captured, in a graph of its own: {FIRST}" in str(model.explain())


def test_there_are_forty():
    assert len(PROGRAMS) >= 40
