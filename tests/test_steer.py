"""`nnsight-fx steer` on a tiny random Llama: the texts of hand-written hooks, and its files."""

from __future__ import annotations

import pytest
import torch

from nnsight_fx import LanguageModel
from nnsight_fx.cli import command, demo, steer

from .test_demo import tiny_model

TOWARD, AWAY, PROMPTS = (
    ["When Mary met John", "Mary saw"],
    ["John and John", "met met Mary"],
    ["When Mary and", "John saw"],
)


def tiny(words: tuple[str, ...] = (" positive", " negative")) -> LanguageModel:
    """One whose words say what is positive."""
    module, tokenizer = tiny_model()
    tokenizer.add_tokens(list(words))
    module.resize_token_embeddings(len(tokenizer))
    return LanguageModel(module.requires_grad_(False), tokenizer=tokenizer)


def mean(model: LanguageModel, layer: int, texts: list[str]) -> torch.Tensor:
    found = []
    for text in texts:
        hook = model._module.model.layers[layer].register_forward_hook(lambda m, a, out: found.append(out[0, -1]))
        with torch.no_grad():
            model._module(**model.tokenizer(text, return_tensors="pt", return_token_type_ids=False))
        hook.remove()
    return torch.stack(found).mean(0)


def test_texts_are_those_of_hooks(tmp_path, capsys):
    model = tiny()
    report = steer.run(model, TOWARD, AWAY, PROMPTS, layers=[0, 2], strengths=[0.0, 3.0], tokens=5, out=tmp_path)
    assert report.scores.shape == (2, 2, 2) and report.scores.isfinite().all() and report.heat.shape == (2, 2)
    for p, prompt in enumerate(PROMPTS):
        ids = model.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        for i, layer in enumerate([0, 2]):
            direction = mean(model, layer, TOWARD) - mean(model, layer, AWAY)
            for j, strength in enumerate([0.0, 3.0]):
                hook = model._module.model.layers[layer].register_forward_hook(
                    lambda m, a, out, by=strength * direction: out + by
                )
                new = model._module.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
                hook.remove()
                assert report.texts[p][i][j] == model.tokenizer.decode(new, skip_special_tokens=True)
    frame = (tmp_path / "texts.csv").read_text().splitlines()
    assert len(frame) == 1 + 8 and frame[0].startswith("prompt,layer,strength")
    assert (tmp_path / "heatmap.png").read_bytes()[1:4] == b"PNG"
    said = capsys.readouterr().out
    assert "layers [0, 2]" in said and said.count("\n") > 6


def test_errors():
    with pytest.raises(demo.DemoError, match="one list is empty"):
        steer.run(tiny(), toward=[])
    with pytest.raises(demo.DemoError, match="layers 0 to 2, and not 7"):
        steer.run(tiny(), layers=[7])
    with pytest.raises(demo.DemoError, match="one token"):
        steer._score(tiny(("one",)), "Mary")


def test_the_command_names_its_options(capsys):
    with pytest.raises(SystemExit):
        command.main(["steer", "--help"])
    assert "--strengths" in capsys.readouterr().out
