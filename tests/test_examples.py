"""The scripts in `examples/`, on a tiny random Llama: they run, and compiled they find what they find on hooks."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from nnsight_fx import LanguageModel, assert_no_fallback

from .test_demo import tiny_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PROMPT = "When Mary and John met , John saw"
ARGUMENTS = {
    "logit_lens": (PROMPT,),
    "steering": (PROMPT, 1, " Mary met John", " John saw Mary", (-1.0, 0.0, 1.0), 3),
    "attribution": (PROMPT, " Mary", " John"),
}


def found(name: str, backend: str | None) -> object:
    module, tokenizer = tiny_model()
    model = LanguageModel(module, tokenizer=tokenizer)
    if backend:
        model.compile(backend=backend)
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](model, *ARGUMENTS[name])


def test_every_example_is_tried():
    assert {p.stem for p in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_it_finds_the_same_captured_and_on_hooks(name, capsys):
    hooks = found(name, None)
    with assert_no_fallback():
        captured = found(name, "eager")
    assert capsys.readouterr().out
    if isinstance(hooks, torch.Tensor):
        assert hooks.shape[0] == 3 and hooks.abs().sum() > 0
        torch.testing.assert_close(captured, hooks)
    elif name == "steering":
        assert captured == hooks and len(hooks) == 3
    else:
        assert [token for token, _ in captured] == [token for token, _ in hooks]
        torch.testing.assert_close([p for _, p in captured], [p for _, p in hooks])
