"""One program text on every engine, against hooks written by hand.

Bit-equal on hooks and on the captured graph run as it is; to rounding where a compiler rewrites it. Each program runs
twice on a wrapped model, which all programs of a model share: the first time may compile, the second may not.
"""

import contextlib
import copy
import functools
from types import SimpleNamespace

import pytest
import torch

from nnsight_fx import assert_max_compiles, assert_no_fallback

from .harness import EXACT, same, wrap
from .models import MODELS, build, inputs
from .programs import PROGRAMS

ENGINES = (*EXACT, "aot_eager", "inductor")
FUSED = {("gpt2", "steer")}
UNTRACED = {"breaks", "moe"}  # their Python looks at values, so that no symbolic capture holds them
TRACED = {("llama", "skip"), ("lstm", "steer"), ("dataclass", "read"), ("cnn", "train_a_vector")}
QUICK = {
    *FUSED,
    *(("llama", "patch_across_invokes"), ("mlp", "positions"), ("lstm", "patch_across_invokes")),
    *(("neox", "promptless"), ("bert", "skip"), ("cnn", "train_a_vector"), ("breaks", "steer"), ("shared", "read")),
}


def cases():
    """Ordered by model and engine, so that a wrapped model is captured once."""
    for name in MODELS:
        for engine in ENGINES:
            for program in PROGRAMS:
                if name not in program.models or (engine == "inductor" and not program.fused):
                    continue
                marks: list = [pytest.mark.inductor] if engine == "inductor" else []
                if engine == "symbolic" and name != "mlp" and (name, program.name) not in TRACED:
                    marks.append(pytest.mark.slow)
                if engine not in EXACT and (name, program.name) not in (FUSED if marks else QUICK):
                    marks.append(pytest.mark.slow)  # minutes in all: `make test-slow`, `make test-inductor`
                marks.append(pytest.mark.xdist_group(f"{name}-{engine}"))  # one worker: one capture
                yield pytest.param(name, engine, program, id=f"{name}-{engine}-{program.name}", marks=marks)


@pytest.fixture(autouse=True)
def _same_start_for_every_test():
    """In place of the suite's own, which makes Dynamo forget the wrapped model after every test."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small to share
    yield
    torch.set_num_threads(threads)


@functools.cache
def wrapped(name, engine):
    """One for all programs: a fixture of two parameters is made anew for each test, or the tests leave their order."""
    return wrap(build(name), engine)


@pytest.fixture(scope="module", autouse=True)
def _captures_are_of_this_file():
    yield
    wrapped.cache_clear()
    torch._dynamo.reset()


def outcome(program, model, name):
    """What a program leaves: its results, its input, the model's buffers."""
    module = getattr(model, "_module", model)
    find = model.get_submodule if module is model else model.get
    sites = SimpleNamespace(**{k: find(getattr(MODELS[name], k)) for k in ("a", "b", "head")})
    out, x = {}, inputs(name)
    program(model, sites, x, out)
    return out | {"x": x, "buffers": {k: v.clone() for k, v in module.named_buffers()}}


@pytest.mark.parametrize(("name", "engine", "program"), list(cases()))
def test_it_equals_its_reference(name, engine, program):
    model = wrapped(name, engine)
    module, exact = model._module, engine in EXACT
    start = copy.deepcopy(module.state_dict())
    want = outcome(program.by_hand, build(name), name)
    for again in (False, True):
        module.load_state_dict(start)
        falls = engine == "hooks" or name in program.falls_back or (engine == "symbolic" and name in UNTRACED)
        whole = contextlib.nullcontext() if falls else assert_no_fallback()
        with whole, assert_max_compiles(0 if again else 99):
            got = outcome(program.run, model, name)
        same(got, want, exact and (engine == "hooks" or name not in program.rounds))
    module.load_state_dict(start)
    same(module(inputs(name)), build(name)(inputs(name)), True)  # nothing stays behind
    module.load_state_dict(start)
    assert not any("nnsight" in repr((m._forward_hooks, m._forward_pre_hooks)) for m in module.modules())
