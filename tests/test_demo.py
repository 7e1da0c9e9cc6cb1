"""The demo on a tiny random Llama: right numbers, all of its outputs, texts for what cannot be patched."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nnsight_fx import LanguageModel, assert_max_compiles
from nnsight_fx.cli import command, demo
from nnsight_fx.cli.weights import WeightsError

TASK = demo.Task("When Mary and John met, John saw", "When Mary and John met, Mary saw", " Mary", " John")
WORDS = ["When", "Mary", "and", "John", "met", ",", "saw"]


def tiny_model():
    vocabulary = ["[UNK]", "[PAD]", *WORDS, *(" " + word for word in WORDS)]
    rules = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|,"), "isolated")
    rules.decoder = decoders.Fuse()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        pad_token_id=1,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="[UNK]", pad_token="[PAD]")
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture
def module_and_tokenizer():
    return tiny_model()


@pytest.fixture
def patching(module_and_tokenizer):
    module, tokenizer = module_and_tokenizer
    return demo.Patching(LanguageModel(module, tokenizer=tokenizer), TASK)


@pytest.fixture
def by_hand(module_and_tokenizer):
    """The whole grid by `register_forward_hook`, without this library."""
    module, tokenizer = module_and_tokenizer
    clean, corrupt = (tokenizer(text, return_tensors="pt").input_ids for text in (TASK.clean, TASK.corrupt))
    answer, wrong = tokenizer.convert_tokens_to_ids([TASK.answer, TASK.wrong])
    layers, stream = module.model.layers, {}

    def score(ids, layer, hook):
        handle = layer.register_forward_hook(hook)
        with torch.no_grad():
            logits = module(ids).logits[0, -1]
        handle.remove()
        return (logits[answer] - logits[wrong]).item()

    def cell(i, position):
        def patch(_module, _args, output):
            output = output.clone()
            output[:, position] = stream[i][:, position]
            return output

        return score(corrupt, layers[i], patch)

    for i, layer in enumerate(layers):
        score(clean, layer, lambda _module, _args, output, i=i: stream.update({i: output.clone()}))
    return torch.tensor([[cell(i, position) for position in range(corrupt.shape[1])] for i in range(len(layers))])


def test_one_cell_equals_plain_forward_hooks(patching, by_hand):
    assert patching.shape == by_hand.shape == (3, 8)
    got = torch.tensor([patching.one(*cell) for cell in patching.cells]).view(3, 8)
    assert torch.equal(got, by_hand)
    assert by_hand.unique().numel() == 6, "three layers at the last token, two at the one before"


@pytest.mark.parametrize("chunk", [7, None])
def test_the_compiled_grid_equals_plain_forward_hooks(patching, by_hand, chunk):
    patching.model.compile(backend="eager")
    torch.testing.assert_close(patching.grid(chunk), by_hand, rtol=0, atol=1e-5)
    with assert_max_compiles(0):
        torch.testing.assert_close(patching.grid(chunk), by_hand, rtol=0, atol=1e-5)


def test_cells_batched_by_hand_equal_plain_forward_hooks(patching, by_hand):
    torch.testing.assert_close(patching.many(patching.cells).view(3, 8), by_hand, rtol=0, atol=1e-5)


def test_the_ends_of_the_scale(patching):
    last = patching.one(2, 7)  # the last layer at the last position is the clean run's end
    assert last == pytest.approx(patching.clean, abs=1e-5)
    ends = patching.recovered(torch.tensor([patching.corrupt, patching.clean]))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0]))


def test_tokens_show_both_prompts_where_they_differ(patching):
    assert patching.tokens() == ["When", "Mary", "and", "John", "met", ",", "John / Mary", "saw"]


def test_run_writes_a_picture_and_the_scores_and_ends_with_one_line(patching, by_hand, tmp_path, capsys):
    out = tmp_path / "deep" / "folder"
    report = demo.run(patching.model, TASK, backend="eager", out=out, chunk=5, sample=4)
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "scores.json").read_text(encoding="utf-8")) == report
    torch.testing.assert_close(torch.tensor(report["logit_difference"]), by_hand, rtol=0, atol=1e-5)
    assert report["tokens"][6] == "John / Mary" and report["layers"][2] == "model.layers.2"
    assert report["versions"]["torch"] == torch.__version__ and report["hardware"]["threads"] >= 1
    assert len(report["sampled_cells"]) == 4 and report["largest_difference"] < 1e-5
    assert 0 < report["seconds"]["compiled"] < report["seconds"]["compiled_with_compile_time"]

    printed = capsys.readouterr().out
    assert "strongest cells" in printed
    last = printed.splitlines()[-1]
    assert last.startswith("24 cells: ") and "with compile time" in last
    assert "(4 cells timed, scaled)" in last and "ratio" in last and "largest difference" in last


@pytest.mark.parametrize(
    "change, text",
    [
        (
            {"corrupt": "When Mary and John met, Mary and John saw"},
            "the clean prompt has 8 tokens and the corrupted one 10",
        ),
        ({"corrupt": TASK.clean}, "both prompts are 'When Mary and John met, John saw'"),
        ({"clean": "", "corrupt": ""}, "the clean prompt has 0 tokens"),
        ({"answer": " Mary and"}, r"`answer` ' Mary and' is 2 tokens, \[' Mary', ' and'\]"),
        ({"wrong": ""}, "`wrong` '' is 0 tokens"),
        ({"wrong": " Mary"}, "same logit difference"),
    ],
)
def test_a_task_that_cannot_be_patched_is_named(patching, change, text):
    with pytest.raises(demo.DemoError, match=text):
        demo.Patching(patching.model, demo.Task(**{**vars(TASK), **change}))


def test_the_command_runs_on_a_folder(module_and_tokenizer, tmp_path, capsys):
    for part in module_and_tokenizer:
        part.save_pretrained(tmp_path / "model")
    assert command.main(_arguments(tmp_path, "--model", str(tmp_path / "model"))) == 0
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["model"] == str(tmp_path / "model")
    assert capsys.readouterr().out.splitlines()[-1].startswith("24 cells: ")


def test_the_command_says_what_is_wrong_without_a_traceback(tmp_path, monkeypatch, capsys):
    def missing():
        raise WeightsError("the demo's weights need `gguf`")

    monkeypatch.setattr(demo.weights, "smollm2", missing)
    assert command.main(_arguments(tmp_path)) == 2
    assert capsys.readouterr().err.strip() == "nnsight-fx: the demo's weights need `gguf`"


def test_an_output_folder_that_cannot_be_made_fails_before_any_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").touch()
    monkeypatch.setattr(demo, "load", lambda model: pytest.fail("loaded a model"))
    assert command.main(_arguments(tmp_path)) == 2
    assert "Name another folder with --out" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["load", "heatmap", "_last_line"])
def test_a_demo_that_fails_leaves_nothing(where, module_and_tokenizer, tmp_path, monkeypatch):
    module, tokenizer = module_and_tokenizer
    model = LanguageModel(module, tokenizer=tokenizer)
    monkeypatch.setattr(demo, "load", lambda given: (given, "tiny"))

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, where, fail)
    with pytest.raises(KeyboardInterrupt):
        demo.run(model, TASK, backend="eager", out=tmp_path / "deep" / "out", sample=1)
    if where == "_last_line":  # all is written
        assert {p.name for p in (tmp_path / "deep" / "out").iterdir()} == {"heatmap.png", "scores.json"}
    else:
        assert list(tmp_path.iterdir()) == []


def test_the_command_without_arguments_shows_its_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main([])
    assert "demo" in capsys.readouterr().err


def _arguments(tmp_path, *more):
    task = ["--clean", TASK.clean, "--corrupt", TASK.corrupt, "--answer", TASK.answer, "--wrong", TASK.wrong]
    return ["demo", *task, "--backend", "eager", "--out", str(tmp_path / "out"), *more]
