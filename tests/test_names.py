"""One name for a site: every way to write a module's path leads to it, in every verb, and one form is printed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from nnsight_fx import LanguageModel, NNsight, Parts, names, patching
from nnsight_fx.errors import UnknownModuleError

IDS = torch.tensor([[5, 7, 11, 2]])
WAYS = ["layers.1", "model.layers.1", "model.model.layers.1", "model.model.layers[1]", "layers[1]", "model.layers[1]"]


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return LanguageModel(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval())


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def refuses(text: str, call: Callable[[], object]) -> None:
    with pytest.raises((UnknownModuleError, KeyError), match=text):
        call()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_leads_there_in_every_verb(model, tmp_path, way):
    assert model.get(way) is model.model.layers[1]
    assert model.get(f"{way}.mlp") is model.model.layers[1].mlp
    with torch.no_grad(), model.trace(IDS) as tracer:
        cache = tracer.cache(modules=[way])
        value = model.get(f"{way}.output").save()
    assert cache.keys() == ["model.model.layers.1"] and torch.equal(cache[way].output, value) and way in cache
    found = model.harvest([[5, 7, 11, 2]], [way, f"{way}.mlp.input"], tmp_path / "h", progress=False)
    assert found.sites == ("model.layers.1", "model.layers.1.mlp.input")
    assert found[way].only == "model.layers.1" and found[f"{way}.mlp.input"].only == "model.layers.1.mlp.input"
    torch.testing.assert_close(found[way][:], value[0])


@pytest.mark.parametrize("compile", [None, "eager", "aot_eager"])
def test_an_intervention_at_a_short_path(compile):
    model, told = llama(), []
    if compile is not None:
        model.compile(backend=compile)
    for path in ("layers.1.mlp.output", "model.model.layers.1.mlp.output"):
        with torch.no_grad(), model.trace(IDS):
            model.get(path)[:] = 0
            told.append(model.get("norm").output.save())
    with torch.no_grad(), model.trace(IDS):
        model.model.layers[1].mlp.output[:] = 0
        told.append(model.model.norm.output.save())
    assert torch.equal(told[0], told[2]) and torch.equal(told[1], told[2])


def test_an_end_that_several_have_is_refused_with_their_names(model, tmp_path):
    text = "`mlp` is the end of 3 modules, `model.layers.0.mlp`, `model.layers.1.mlp`, .*; write more of the path"
    refuses(text, lambda: model.get("mlp"))
    refuses(
        text.replace("`mlp` is", "`mlp.output` is").replace(".mlp`", ".mlp.output`"), lambda: model.get("mlp.output")
    )
    refuses(text, lambda: model.harvest([[3, 4]], "mlp", tmp_path / "m", progress=False))

    def cached() -> Any:
        with model.trace(IDS) as tracer:
            tracer.cache(modules=["mlp"])

    refuses(text, cached)


@pytest.mark.parametrize("wrong", ["layers.7", "model.layers.7", "model.model.layers.7"])
def test_one_text_of_error_in_every_verb(model, tmp_path, wrong):
    text = rf"test_names\.py:\d+: there is no module `{wrong}`; did you mean `model.layers.\d`"
    refuses(text, lambda: model.get(wrong))
    refuses(text, lambda: model.harvest([[3, 4]], wrong, tmp_path / "h", progress=False))
    with torch.no_grad(), model.trace(IDS) as tracer:
        cache = tracer.cache()
    refuses(text, lambda: cache[wrong])

    def cached() -> Any:
        with model.trace(IDS) as tracer:
            tracer.cache(modules=[wrong])

    refuses(text, cached)
    refuses(text, lambda: patching.activations(model, IDS, parts=Parts(wrong, "a", None, None, "norm", "lm_head")))


def test_what_is_no_module(model, tmp_path):
    refuses(
        "`layers.1.output` is no module: a cache takes modules, here `model.layers.1`",
        lambda: _cached(model, "layers.1.output"),
    )
    refuses("`lm_head.weight` is no module's output", lambda: model.harvest([[3]], "lm_head.weight", tmp_path / "w"))
    refuses("no module `layers.1.outptu`; did you mean `model.layers.1.output`", lambda: model.get("layers.1.outptu"))


def _cached(model: Any, *modules: str) -> Any:
    with torch.no_grad(), model.trace(IDS) as tracer:
        cache = tracer.cache(modules=list(modules))
    return cache


def test_a_cache_finds_what_it_has_by_its_end(model):
    cache = _cached(model, "layers.1.mlp", "layers.2")
    assert cache["mlp"].output is cache.model.model.layers[1].mlp.output is cache.model["layers.1.mlp"].output
    assert cache["layers"].keys() == ["model.model.layers.1.mlp", "model.model.layers.2"]
    assert repr(cache) == "CacheView(the cache: model.layers.1.mlp, model.layers.2)"
    refuses(
        "`model.layers.0` module path was never cached; the nearest that was is `model.layers",
        lambda: cache["layers.0"],
    )
    assert "layers.0" not in cache and "layers.2" in cache


def test_an_attribute_that_stands_deeper_is_told_as_code(model):
    refuses("`model` has no module `layers`; it is `model.model.layers`", lambda: model.layers)


def test_parts_by_short_paths(model):
    short = Parts("layers", "self_attn", "mlp", "o_proj", "norm", "lm_head").check(model)
    assert short == Parts("model.layers", "self_attn", "mlp", "self_attn.o_proj", "model.norm", "lm_head")


def test_renames_by_any_of_the_names():
    rename = {"model.model.layers": "blocks", "model.lm_head": "head", "lm_head": "unembed", "model.layers[0]": "first"}
    model = LanguageModel(llama()._module, rename=rename)
    assert model.blocks is model.model.layers and model.head is model.unembed is model.lm_head
    assert model.get("blocks.1.mlp") is model.model.layers[1].mlp and model.first is model.model.layers[0]


def test_names_that_modules_share_with_values():
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    bert = NNsight(BertModel(BertConfig(vocab_size=50, **sizes)).eval())
    assert bert.get("layer.0.output") is bert.encoder.layer[0].E_output
    assert bert.get("layer.0.output.dense") is bert.encoder.layer[0].E_output.dense
    with torch.no_grad(), bert.trace(IDS):
        value = bert.get("layer.0.output.output").save()
        same = bert.encoder.layer[0].E_output.output.save()
    assert torch.equal(value, same)


def test_own_names_go_before_ends_and_keys_before_own_names_in_a_cache():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential()
            self.model.norm = nn.Linear(3, 3)
            self.norm = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.model(x))

    net = NNsight(Net())
    assert (
        net.get("norm") is net.norm
        and net.get("model.norm") is net.model.norm
        and net.get("model.model.norm") is net.model.norm
    )
    with net.trace(torch.ones(1, 3)) as tracer:
        cache = tracer.cache()
    assert all(cache[key].output is value.output for key, value in cache.items())
    assert cache["model.norm"].output is cache.model.norm.output


def test_a_module_at_two_paths_is_one():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(3, 3))
            self.b = nn.Sequential(nn.ReLU(), self.a[0])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    net = NNsight(Net())
    net._module.a.proj = net._module.b.proj = nn.Identity()
    net.clear_cache()
    assert net.get("proj") is net.a.proj


def test_matches():
    paths = ["", "model", "model.layers", "model.layers.0", "model.layers.10", "lm_head"]
    assert names.matches("0", paths) == ["model.layers.0"] and names.matches("layers.1", paths) == []
    assert names.matches("model.lm_head", paths) == ["lm_head"] and names.matches('["lm_head"]', paths) == ["lm_head"]
    assert names.refused("layers.0", ["a"]) == "there is no module `layers.0`; there is `a`"


def test_the_axis_of_a_sweep_is_named_by_paths(model, tmp_path: Path):
    def body(tracer: Any, layer: Any) -> torch.Tensor:
        layer.mlp.output[:] = 0
        return model.lm_head.output[0, -1, 0]

    found = model.sweep(body, IDS, over={"layer": model.model.layers}, store=tmp_path / "s", progress=False)
    own = ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert found.array.coords["layer"].values.tolist() == own and found.to_dataframe()["layer"].tolist() == own
    assert found.manifest["over"] == {"layer": own}
    assert float(found.array.sel(layer="model.layers.1")) == float(found["result"][1])
