"""What is told of a run in a researcher's first hour: what a symbolic capture needs, which lengths a graph serves, what ran."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight_fx import LanguageModel
from nnsight_fx.errors import FallbackWarning

IDS = torch.tensor([[5, 7, 11, 2]])


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50}
    return LanguageModel(GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)).eval())


def test_a_cache_under_symbolic_capture_names_the_cure_and_it_works():
    model = gpt2()
    model.compile(backend="eager", capture="symbolic")
    with pytest.warns(FallbackWarning, match="returns a DynamicCache.*`use_cache=False` among the keywords"):
        with torch.no_grad(), model.trace(IDS) as tracer:
            hooks = model.lm_head.output.save()
    assert tracer.explain().engine == "hooks"
    with torch.no_grad(), model.trace(IDS, use_cache=False) as tracer:
        captured = model.lm_head.output.save()
    assert tracer.explain().engine == "spliced"
    torch.testing.assert_close(hooks, captured)


def test_a_symbolic_sweep_on_hooks_is_not_called_compiled():
    model = gpt2()
    model.compile(backend="eager", capture="symbolic")

    def body(tracer: Any, layer: int) -> torch.Tensor:
        model.transformer.h[layer].output[:] = 0
        return model.lm_head.output[0, -1, :3]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        model.sweep(body, IDS, over={"layer": range(2)}, progress=False)
    text = str(model.explain())
    assert "hooks: the model is compiled and could not be captured; why stands below" in text
    assert "not estimated" not in text
    model.sweep(body, IDS, over={"layer": range(2)}, progress=False, use_cache=False)
    assert "compiled: this backend's compiling is not estimated" in str(model.explain())


def test_a_random_sweep_of_several_lengths_says_so():
    model = gpt2()
    model.compile(backend="eager")

    def body(tracer: Any, layer: int) -> torch.Tensor:
        h = model.transformer.h[layer].output
        h += torch.randn_like(h)
        return model.lm_head.output[0, -1, :3]

    prompts = [torch.arange(1, n) for n in (3, 4, 5, 6, 7)]
    model.sweep(body, prompts, over={"layer": range(2)}, progress=False, seed=1)
    spent = model.explain().to_dict()["captures"][0]["spent"]
    assert [row["shape"] for row in spent] == ["1 x any"] and spent[0]["captures"] == 1
    (group,) = model.explain().to_dict()["run"]["groups"]
    assert group["structures"] == 2 and group["compiles"] == 2 and group["waited"] > 0 and "plans" not in group["ran"]
    assert "10 forward(s), 2 structures, 2 graphs compiled for it (" in str(model.explain())


def test_labels_stand_beside_the_numbers_of_an_axis():
    pytest.importorskip("xarray")
    model = gpt2()

    def body(tracer: Any, by: Any) -> torch.Tensor:
        return model.lm_head.output[0, -1, 0]

    axis = ["a", 2, torch.zeros(200), torch.ones(1), torch.ones(1), (model.lm_head, "x")]
    found = model.sweep(body, IDS, over={"by": axis}, progress=False)
    names = found.array.coords["by"].values.tolist()
    assert names == ["a", "2", "Tensor 2", "Tensor 3", "Tensor 4", "(lm_head, x)"]
    found.labels["by"] = list("uvwxyz")
    assert found.array.coords["by_label"].values.tolist() == list("uvwxyz")
    assert found.to_dataframe()["by_label"].tolist() == list("uvwxyz") and found.mean("by").labels == {
        "by": list("uvwxyz")
    }
