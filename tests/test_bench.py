"""`nnsight-fx bench`: which backend pays for a model."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nnsight_fx import NNsight, UnknownModuleError
from nnsight_fx.cli import bench, command
from nnsight_fx.cli.bench import Row

from .test_demo import tiny_model

ROWS = [
    Row("bare model, eager", 0.1, 8.0, math.inf, 0.0, 0),
    Row("hooks", 0.1, 10.0, math.inf, 0.0, 0),
    Row("eager", 1.1, 12.0, math.inf, 1e-7, 1),
    Row("inductor", 8.1, 5.0, 1600.0, 1e-6, 1, ("hook engine: a reason",)),
]


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
        tie_word_embeddings=False,
    )
    return NNsight(LlamaForCausalLM(config).eval())


def test_every_way_runs_the_same_trace():
    rows = bench.compare(llama(), torch.arange(6)[None], backends=("eager", "aot_eager"), runs=2)
    assert [r.name for r in rows] == ["bare model, eager", "hooks", "eager", "aot_eager"]
    assert all(r.ms > 0 and r.first_s > 0 for r in rows) and all(r.difference < 1e-5 for r in rows)
    assert [r.compiles for r in rows] == [0, 0, 1, 1] and not any(r.fallbacks for r in rows)


def test_the_text_says_which_pays():
    text = bench.text(ROWS)
    assert "never" in text and "1600 traces" in text and "fell back: hook engine: a reason" in text
    assert text.splitlines()[-1].startswith('`model.compile(backend="inductor")` pays from 1600 traces')
    assert bench.text(ROWS[:3]).splitlines()[-1].startswith("No backend pays")


def test_a_model_of_an_unknown_family():
    with pytest.raises(UnknownModuleError):
        bench.compare(NNsight(torch.nn.Sequential(torch.nn.Linear(4, 4))), torch.ones(1, 4))


def test_the_command(tmp_path, capsys):
    model, tokenizer = tiny_model()
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "model")
    given = ["--model", str(tmp_path / "model"), "--prompt", "When Mary saw John", "--backends", "eager", "--runs", "1"]
    assert command.main(["bench", *given]) == 0
    out = capsys.readouterr().out
    assert "hooks" in out and "eager" in out and "difference" in out
    assert command.main(["bench", "--model", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize("wrong", [["bench", "--runs", "x"], ["bench", "--backends", "tvm"]])
def test_wrong_options(wrong, capsys):
    with pytest.raises(SystemExit):
        command.main(wrong)
    assert "usage" in capsys.readouterr().err
