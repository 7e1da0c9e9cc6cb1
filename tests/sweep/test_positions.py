"""The last site read at one position: the sweep computes that one, however the body writes it; and all where it reads more."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nnsight_fx import LanguageModel

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
ONE = {
    "[:, -1][:, 5]": lambda x: x[:, -1][:, 5],
    "[:, -1, 5]": lambda x: x[:, -1, 5],
    "a difference": lambda x: x[0, -1, 5] - x[:, -1, 6],
    "[0, 3]": lambda x: x[0, 3],
    "[0][-1]": lambda x: x[0][-1],
    "[0][-1][5]": lambda x: x[0][-1][5],
    "[..., -1, :]": lambda x: x[..., -1, :],
    "[:, -1:]": lambda x: x[:, -1:],
    "[:, -1, [3, 4]]": lambda x: x[:, -1, [3, 4]],
    "[:, -1, 3:5]": lambda x: x[:, -1, 3:5],
}
MORE = {
    "whole": lambda x: x,
    "[:, -1] - [:, -2]": lambda x: x[:, -1] - x[:, -2],
    "[:, :2]": lambda x: x[:, :2],
    "[..., 5]": lambda x: x[..., 5],
    "[0]": lambda x: x[0],
    "[:, None, 3]": lambda x: x[:, None, 3],
    "[[0], -1]": lambda x: x[[0], -1],
    "a position, and the mean": lambda x: x[:, -1] + x.mean(1),
    "[()][:, 3]": lambda x: x[()][:, 3],
}
OUT = {"[:, 9]": lambda x: x[:, 9], "[:, -9, 5]": lambda x: x[:, -9, 5]}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    hf = LlamaForCausalLM(config).eval()
    hooks, captured = LanguageModel(hf), LanguageModel(hf)
    captured.compile(backend="eager")
    return hooks, captured


def swept(model, read):
    def body(tracer, layer):
        model.model.layers[layer].output[:, 2:4] = 0
        return read(model.lm_head.output)

    return model.sweep(body, IDS, over={"layer": range(3)}, progress=False)["result"]


@pytest.mark.parametrize("name", [*ONE, *MORE])
def test_what_is_read_is_what_hooks_read(models, name):
    hooks, captured = models
    read = {**ONE, **MORE}[name]
    torch.testing.assert_close(swept(captured, read), swept(hooks, read), rtol=0, atol=1e-6)
    assert ("computed at one position of a row" in str(captured.explain())) == (name in ONE)


@pytest.mark.parametrize("name", OUT)
def test_a_position_that_is_not_there_is_told_at_the_users_line(models, name):
    for model in models:
        with pytest.raises(IndexError, match="out of bounds for dimension 1 with size 7"):
            swept(model, OUT[name])
