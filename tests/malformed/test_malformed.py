"""Programs that are wrong: each gives a named error at the user's line, and leaves the model as it was, on both engines."""

from __future__ import annotations

import threading
import traceback
import warnings

import pytest
import torch

import nnsight_fx

from . import control, language, order, tools, values  # noqa: F401
from .table import INPUTS, MODELS, ROWS, wrap

ENGINES = ("hooks", "eager")


@pytest.fixture(scope="module")
def models():
    """One model an engine for all programs: what one of them left behind, the next would meet."""
    return {(engine, kind): wrap(engine, kind) for engine in ENGINES for kind in MODELS}


def state(model) -> dict:
    """All of a model and of torch that a program could have left changed."""
    module = model._module
    return {
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "flags": [(p.requires_grad, p._version) for p in module.parameters()],
        "training": [m.training for m in module.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in module.modules()],
        "rng": torch.get_rng_state(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "stacks": (
            torch.overrides._get_current_function_mode_stack(),
            torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
        ),
        "open": (model.tracer, list(nnsight_fx.tracing.saving._open.stack), len(model._host.edits)),
        "threads": [t.name for t in threading.enumerate() if t.name != "tqdm_monitor"],  # `fx.Interpreter` has a bar
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def cases():
    """Every program on hooks, the short ones on captured graphs; there the others are in `make test-slow`."""
    for name, row in ROWS.items():
        short = row.body.__module__.rpartition(".")[2] == "values"
        yield pytest.param(name, "hooks", id=f"{name}-hooks")
        yield pytest.param(name, "eager", id=f"{name}-eager", marks=() if short else pytest.mark.slow)


@pytest.mark.parametrize(("name", "engine"), list(cases()))
def test_a_malformed_program(name, engine, models, tmp_path, monkeypatch):
    row = ROWS[name]
    model = models[engine, row.model]
    monkeypatch.chdir(tmp_path)
    before = state(model)

    with pytest.raises(row.error) as error:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row.body(model)

    assert type(error.value) is row.error
    text = "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])
    for part in row.parts:
        assert part in text, text
    if issubclass(row.error, nnsight_fx.NNsightFXError):
        assert not row.line or row.named(text), text
    frames = traceback.extract_tb(error.value.__traceback__)
    assert any(f.filename == row.body.__code__.co_filename for f in frames)
    assert not list(tmp_path.iterdir()), "a file was left behind"

    model._module.zero_grad()  # a first backward may have filled them
    after = state(model)
    for what in before:
        assert same(after[what], before[what]), f"{what}: {after[what]} is not {before[what]}"
    x = INPUTS[row.model]
    with torch.no_grad(), model.trace(x):
        got = nnsight_fx.save(model.output)
    with torch.no_grad():
        plain = model._module(x)
    assert torch.equal(*(out if isinstance(out, torch.Tensor) else out.logits for out in (got, plain)))


def test_there_are_many():
    assert len(ROWS) >= 200
