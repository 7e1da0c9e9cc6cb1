"""What a language model takes as a prompt, and how several prompts become one input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from cache_name import CACHE
from nnsight_fx import LanguageModel, ModelNotFoundError, NNsightFXError, PromptError
from nnsight_fx.model.inputs import Batch
from nnsight_fx.model.tokens import positions

WORDS = ["<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
SIZES: dict[str, Any] = dict(
    vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
)
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)),
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, pad_token_id=1)),
}
A, B = [2, 3, 4], [5, 6, 7, 8, 9]  # "a b c" and "d e f g h"


def make_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        **({"eos_token": "<eos>", "unk_token": "<unk>", "padding_side": "left"} | options),
    )


def make(name: str = "gpt2", tokenizer: Any = None) -> LanguageModel:
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    for p in module.parameters():  # far from the small initial values, with which all rows look alike
        torch.nn.init.normal_(p, std=0.3)
    return LanguageModel(module, tokenizer=tokenizer or make_tokenizer())


@pytest.fixture
def model() -> LanguageModel:
    return make()


def one(model: LanguageModel, *args: Any, pad_to: int | None = None, **kwargs: Any) -> Batch:
    return model._host.inputs.collate([model._host.inputs.prepare(args, kwargs)], pad_to)


def several(model: LanguageModel, *inputs: Any, pad_to: int | None = None) -> Batch:
    return model._host.inputs.collate([model._host.inputs.prepare((x,), {}) for x in inputs], pad_to)


def values(model: LanguageModel, batch: Batch) -> torch.Tensor:
    assert batch.args == ()
    with torch.no_grad():
        return model._module(**batch.kwargs)[0]


# -- one prompt, many spellings ----------------------------------------------------------------------------

ONE = {
    "string": lambda tok: "a b c",
    "list of one string": lambda tok: ["a b c"],
    "ids": lambda tok: A,
    "tuple of ids": lambda tok: tuple(A),
    "numpy integers": lambda tok: [np.int64(i) for i in A],
    "list of ids": lambda tok: [A],
    "1-D tensor": lambda tok: torch.tensor(A),
    "2-D tensor": lambda tok: torch.tensor([A]),
    "int32 tensor": lambda tok: torch.tensor([A], dtype=torch.int32),
    "list of tensors": lambda tok: [torch.tensor(A)],
    "list of numbers that are tensors": lambda tok: list(torch.tensor(A)),
    "numpy array": lambda tok: np.array(A),
    "2-D numpy array": lambda tok: np.array([A], dtype=np.int32),
    "list of arrays": lambda tok: [np.array(A)],
    "dict": lambda tok: {"input_ids": A},
    "dict with a string": lambda tok: {"input_ids": "a b c"},
    "dict of tensors": lambda tok: {
        "input_ids": torch.tensor([A]),
        "attention_mask": torch.ones(1, 3, dtype=torch.bool),
    },
    "encoding": lambda tok: tok("a b c"),
    "encoding of tensors": lambda tok: tok("a b c", return_tensors="pt"),
    "encoding of arrays": lambda tok: tok(["a b c"], return_tensors="np"),
}


@pytest.mark.parametrize("spelling", ONE)
@pytest.mark.parametrize("by_keyword", [False, True])
def test_every_spelling_is_one_input(model, spelling, by_keyword):
    given = ONE[spelling](model.tokenizer)
    if not by_keyword:
        batch = one(model, given)
    elif hasattr(given, "keys"):
        batch = one(model, **given)
    else:
        batch = one(model, input_ids=given)
    assert (batch.args, batch.rows, list(batch.kwargs)) == ((), 1, ["input_ids", "attention_mask"])
    for name, expected in {"input_ids": A, "attention_mask": [1, 1, 1]}.items():
        value = batch.kwargs[name]
        assert type(value) is torch.Tensor and value.dtype == torch.int64 and value.tolist() == [expected]


SEVERAL = {
    "strings": ["a b c", "d e f g h"],
    "tuple of strings": ("a b c", "d e f g h"),
    "lists": [A, B],
    "tensors": [torch.tensor(A), torch.tensor(B)],
    "arrays": [np.array(A), np.array(B)],
    "encoding": make_tokenizer()(["a b c", "d e f g h"]),
    "padded encoding": make_tokenizer(pad_token="<eos>")(["a b c", "d e f g h"], padding=True, return_tensors="pt"),
}


@pytest.mark.parametrize("spelling", SEVERAL)
def test_prompts_of_several_lengths_are_padded_on_the_left(model, spelling):
    batch = one(model, SEVERAL[spelling])
    assert batch.rows == 2
    assert {name: value.tolist() for name, value in batch.kwargs.items()} == {
        "input_ids": [[0, 0, *A], B],
        "attention_mask": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
        "position_ids": [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]],
    }


def test_a_tensor_of_ids_is_used_as_it_is(model):
    ids = torch.tensor([A])
    assert one(model, ids).kwargs["input_ids"] is ids


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, 0),  # eos
        ({"pad_token": "z"}, 27),
        ({"eos_token": None, "pad_token": None}, 0),
    ],
)
def test_what_padding_is_made_of(options, expected):
    assert one(make(tokenizer=make_tokenizer(**options)), [A, B]).kwargs["input_ids"][0, 0] == expected


def test_without_a_tokenizer_padding_is_zero_or_what_the_model_names():
    assert one(LanguageModel(MODELS["gpt2"]()), [A, B]).kwargs["input_ids"][0].tolist() == [0, 0, *A]
    assert one(LanguageModel(MODELS["roberta"]()), [A, B]).kwargs["input_ids"][0].tolist() == [1, 1, *A]


def test_the_tokenizer_of_the_user_keeps_its_side_and_its_tokens():
    tokenizer = make_tokenizer(padding_side="right")
    model = make(tokenizer=tokenizer)
    assert model.tokenizer is tokenizer and tokenizer.pad_token is None
    for batch in (one(model, [A, B]), several(model, A, B)):
        assert {name: value[0].tolist() for name, value in batch.kwargs.items()} == {
            "input_ids": [*A, 0, 0],
            "attention_mask": [1, 1, 1, 0, 0],
        }


# -- several invokes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs, pad_to, expected",
    [
        (("a b c", B), None, [[0, 0, *A], B]),
        ((B, torch.tensor(A)), None, [B, [0, 0, *A]]),
        (({"input_ids": [A]}, "a"), None, [A, [0, 0, 2]]),
        ((["a", "b c"], "a b c"), None, [[0, 0, 2], [0, 3, 4], A]),
        ((A,), 5, [[0, 0, *A]]),
        ((A, A), 4, [[0, *A], [0, *A]]),
        ((A, B), 5, [[0, 0, *A], B]),
        (([A, B], A), 6, [[0, 0, 0, *A], [0, *B], [0, 0, 0, *A]]),
    ],
)
def test_invokes_are_padded_and_stacked_in_order(model, inputs, pad_to, expected):
    batch = several(model, *inputs, pad_to=pad_to)
    mask = torch.tensor([[int(i != 0) for i in row] for row in expected])  # no prompt here has <eos>
    assert batch.rows == len(expected)
    assert batch.kwargs["input_ids"].tolist() == expected
    assert torch.equal(batch.kwargs["attention_mask"], mask)
    assert torch.equal(batch.kwargs["position_ids"], (mask.cumsum(-1) - 1).clamp(min=0))


def test_prepared_inputs_are_left_as_they_were(model):
    short, long = model._host.inputs.prepare((A,), {}), model._host.inputs.prepare((B,), {})
    model._host.inputs.collate([short, long], pad_to=9)
    assert short.kwargs["input_ids"].tolist() == [A] and list(short.kwargs) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pad_to", [None, 12])
def test_the_values_of_a_prompt_do_not_depend_on_its_batch(name, pad_to):
    model = make(name, make_tokenizer(pad_token="<unk>"))  # 1, which RoBERTa is built with
    prompts = ["a b c", [9, 8, 7, 6, 5, 4, 3], {"input_ids": [2]}, B]
    together = values(model, several(model, *prompts, pad_to=pad_to))
    for row, prompt in zip(together, prompts, strict=True):
        alone = values(model, one(model, prompt))[0]
        torch.testing.assert_close(row[-len(alone) :], alone, rtol=0, atol=1e-5)


def test_a_model_without_position_ids_gets_none():
    class Plain(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None):
            return (input_ids,)

    assert list(several(LanguageModel(Plain()), A, B).kwargs) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    "mask, length, expected",
    [
        ([[1, 1, 1]], 3, None),
        ([[1, 1, 0], [1, 0, 0]], 3, None),  # padding behind the prompt
        ([[1, 0, 1]], 3, None),
        ([[0, 0, 1, 1]], 4, [[0, 0, 0, 1]]),
        ([[0, 1, 1], [1, 1, 1], [1, 1, 0]], 3, [[0, 0, 1], [0, 1, 2], [0, 1, 2]]),
        ([[0, 1, 0, 1], [1, 1, 1, 1]], 4, [[0, 0, 1, 2], [0, 1, 2, 3]]),  # a gap: as `1 0 1` counts alone
        ([[0, 1, 1, 1], [1, 1, 1, 1]], 1, [[2], [3]]),  # three tokens lie in a cache
    ],
)
def test_positions_count_from_the_first_token(mask, length, expected):
    found = positions(torch.tensor(mask), length)
    assert (None if found is None else found.tolist()) == expected


def test_positions_that_are_given_stay(model):
    given = torch.tensor([[7, 7, 0, 1, 2]])
    batch = one(model, {"input_ids": [[0, 0, *A]], "attention_mask": [[0, 0, 1, 1, 1]]}, position_ids=given)
    assert torch.equal(batch.kwargs["position_ids"], given)


# -- the other keywords ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"labels": A}, [[-100, -100, *A], [-100, -100, *A]]),
        ({"labels": [A]}, [[-100, -100, *A], [-100, -100, *A]]),
        ({"labels": torch.tensor([A])}, [[-100, -100, *A], [-100, -100, *A]]),
        ({"labels": torch.tensor([1])}, [1, 1]),  # one class for each prompt
        ({"token_type_ids": [A]}, [[0, 0, *A], [0, 0, *A]]),
        ({"position_ids": A}, [[0, 0, *A], [0, 0, *A]]),
        ({"use_cache": False}, False),
        ({"logits_to_keep": torch.tensor(2)}, torch.tensor(2)),
        ({"past_key_values": None}, None),
        ({"options": {"names": ["x"], "scale": torch.ones(3)}}, {"names": ["x"], "scale": torch.ones(3)}),
    ],
)
def test_keywords_pass_through_and_merge(model, given, expected):
    (name,) = given
    batch = model._host.inputs.collate([model._host.inputs.prepare((A,), dict(given)) for _ in range(2)], 5)
    assert str(batch.kwargs[name]) == str(torch.tensor(expected) if isinstance(expected, list) else expected)


def test_ragged_labels_are_padded_with_what_losses_ignore(model):
    batch = one(model, [A, B], labels=[A, B])
    assert batch.kwargs["labels"].tolist() == [[-100, -100, *A], B]
    assert values(model, batch).item() > 0  # the loss comes first


@pytest.mark.parametrize("given", [[1, 2, 3], [[1, 2, 3]], torch.tensor([[1, 2, 3]])])
def test_one_row_of_positions_serves_all_prompts(model, given):
    assert one(model, [A] * 3, position_ids=given).kwargs["position_ids"].tolist() == [[1, 2, 3]] * 3


def test_a_keyword_of_one_invoke_is_for_the_forward(model):
    batch = model._host.inputs.collate(
        [model._host.inputs.prepare((A,), {}), model._host.inputs.prepare((A,), {"use_cache": False})]
    )
    assert batch.kwargs["use_cache"] is False


@pytest.mark.parametrize(
    "first, second, text",
    [
        ({"use_cache": True}, {"use_cache": False}, "`use_cache` differs between the invokes: True, False"),
        ({"labels": A}, {}, "`labels` is given in 1 of 2 invokes"),
        (
            {"past_key_values": DynamicCache()},
            {"past_key_values": DynamicCache()},
            "`past_key_values` differs",
        ),
        (
            {"encoder_hidden_states": torch.ones(1, 2, 16)},
            {"encoder_hidden_states": torch.ones(1, 3, 16)},
            r"`encoder_hidden_states` .* shapes \(1, 2, 16\), \(1, 3, 16\) differ",
        ),
        (
            {"cache_position": torch.arange(3)},
            {"cache_position": torch.arange(3) + 1},
            r"`cache_position` differs .* a tensor of shape \(3,\)",
        ),
    ],
)
def test_keywords_that_conflict_are_named(model, first, second, text):
    batches = [model._host.inputs.prepare((A,), first), model._host.inputs.prepare((A,), second)]
    with pytest.raises(ValueError, match=text):
        model._host.inputs.collate(batches)


def test_embeddings_are_padded_too():
    model = make("llama")
    table = model._module.get_parameter("model.embed_tokens.weight").detach()
    by_id = values(model, several(model, A, B))
    a, b = (model._host.inputs.prepare((), {"inputs_embeds": table[torch.tensor(x)]}) for x in (A, B))
    batch = model._host.inputs.collate([a, b])
    assert batch.kwargs["inputs_embeds"].shape == (2, 5, 16) and batch.rows == 2
    torch.testing.assert_close(values(model, batch)[:, -3:], by_id[:, -3:])


def test_a_cache_with_tokens_gets_no_mask_of_the_new_ones_alone(model):
    cache = DynamicCache()
    assert one(model, A, **{CACHE: cache}).kwargs[CACHE] is cache
    assert one(model, A, **{CACHE: cache}).kwargs["attention_mask"].tolist() == [[1, 1, 1]]
    first = one(model, A, **{CACHE: cache}, use_cache=True)
    values(model, first)
    batch = one(model, [5], **{CACHE: cache})
    assert batch.kwargs["attention_mask"] is None
    whole = values(model, one(model, [*A, 5]))
    torch.testing.assert_close(values(model, batch)[0, -1], whole[0, -1])
    with pytest.raises(PromptError, match="padded to 4 and has no `attention_mask`"):
        one(model, [5], **{CACHE: cache}, pad_to=4)


def test_generation_goes_on_from_a_padded_cache(model):
    cache = DynamicCache()
    start = one(model, [A, B], **{CACHE: cache})
    values(model, start)
    mask = torch.cat([start.kwargs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    batch = one(model, torch.tensor([[5], [5]]), **{CACHE: cache}, attention_mask=mask)
    assert batch.kwargs["position_ids"].tolist() == [[3], [5]]
    whole = values(model, one(model, [[*A, 5], [*B, 5]]))
    torch.testing.assert_close(values(model, batch)[:, -1], whole[:, -1])


def test_inputs_that_are_no_tokens_go_to_the_model_as_they_are(model):
    pixels = torch.ones(2, 3, 4, 4)
    batch = one(model, pixel_values=pixels)
    assert batch.rows == 2 and batch.kwargs["pixel_values"] is pixels and len(batch.kwargs) == 1


# -- what the engines ask ----------------------------------------------------------------------------------


def test_rows_and_length_of_every_leaf(model):
    kwargs = {"labels": torch.tensor([[1, 2, 3]]), "scale": torch.ones(3), "use_cache": False}
    batch = model._host.inputs.prepare((A,), kwargs)
    assert model._host.inputs.length(batch) == 3
    assert dict(zip(batch.kwargs, model._host.inputs.unknown_dims(batch), strict=True)) == {
        "input_ids": (0, 1),
        "attention_mask": (0, 1),
        "labels": (0, 1),
        "scale": (None, None),
        "use_cache": (None, None),
    }


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({}, False),
        ({"use_cache": False, "max_new_tokens": 3}, False),
        ({"input_ids": A}, True),
        ({"inputs_embeds": [[0.5]]}, True),
        ({"pixel_values": torch.ones(1)}, True),
    ],
)
def test_which_keywords_are_an_input(model, kwargs, expected):
    assert model._host.inputs.has_input(kwargs) is expected


@pytest.mark.gpu
def test_inputs_come_on_the_model_device(model):
    model._module.cuda()
    batch = several(model, "a b c", torch.tensor(B))
    assert {value.device.type for value in batch.kwargs.values()} == {"cuda"}
    assert values(model, batch).shape == (2, 5, 32)


# -- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, kwargs, text",
    [
        (("",), {}, "prompt 0 has no tokens"),
        ((["a", ""],), {}, "prompt 1 has no tokens"),
        (([],), {}, "prompt 0 has no tokens"),
        (([[1], []],), {}, "prompt 1 has no tokens"),
        ((torch.empty(0, dtype=torch.long),), {}, "prompt 0 has no tokens"),
        ((torch.empty(2, 0, dtype=torch.long),), {}, "prompt 0 has no tokens"),
        ((torch.empty(0, 3, dtype=torch.long),), {}, "there is no prompt"),
        ((5,), {}, "`input_ids` cannot be 5.* Give a string, a list of strings"),
        ((torch.tensor(5),), {}, r"`input_ids` cannot be a tensor of shape \(\)"),
        (([0.5],), {}, r"whole numbers .* torch.float32 .* `inputs_embeds=`"),
        (([True],), {}, "whole numbers .* torch.bool"),
        ((torch.ones(1, 2, 3).long(),), {}, r"whole numbers .* shape \(1, 2, 3\)"),
        (([[[1, 2]]],), {}, r"a row of `input_ids` has shape \(1, 2\)"),
        ((["a", 5],), {}, r"a row of `input_ids` has shape \(\)"),
        (([{"role": "user", "content": "a"}],), {}, "`input_ids` cannot be {'role': 'user'"),
        ((object(),), {}, "`input_ids` cannot be <object"),
        ((A, B), {}, "2 inputs given by position; a model takes one"),
        ((A,), {"input_ids": A}, "`input_ids` given by position and again by keyword"),
        (({"input_ids": A, "labels": A},), {"labels": A}, "`labels` given by position and again by keyword"),
        (
            ({"input_ids": [A, B], "attention_mask": [[1], [1]]},),
            {},
            r"`attention_mask` have \[1, 1\] tokens",
        ),
        (([A, A],), {"labels": torch.ones(3, 3)}, "`labels` has 3 rows, the prompts are 2"),
        ((A,), {"attention_mask": "x"}, None),  # the model's own matter
    ],
)
def test_prompts_that_make_no_tokens_are_errors(model, args, kwargs, text):
    if text is None:
        assert model._host.inputs.prepare(args, kwargs).kwargs["attention_mask"] == "x"
        return
    with pytest.raises(PromptError, match=text) as caught:
        model._host.inputs.prepare(args, kwargs)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, NNsightFXError)
    assert Path(__file__).name in str(caught.value), "the user's line comes first"


def test_text_needs_a_tokenizer():
    with pytest.raises(PromptError, match=r"no tokenizer. Give it one, `LanguageModel\(module, tokenizer=tok\)`"):
        LanguageModel(MODELS["gpt2"]())._host.inputs.prepare(("a b c",), {})


@pytest.mark.parametrize("inputs", [(B,), (A, B), ([A, B],)])
def test_a_prompt_longer_than_pad_to_is_an_error(model, inputs):
    with pytest.raises(ValueError, match="has 5 tokens, more than `pad_to=4`. Give `pad_to=5`"):
        several(model, *inputs, pad_to=4)


# -- loading -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("as_text", [True, False])
def test_loading_a_folder(folder, as_text):
    make_tokenizer(padding_side="right").save_pretrained(folder)
    model = LanguageModel(str(folder) if as_text else folder, dtype=torch.bfloat16, rename={"lm_head": "head"})
    assert isinstance(model._module, LlamaForCausalLM) and not model._module.training
    assert model._module.dtype == torch.bfloat16
    assert model.config is model._module.config
    assert model.head is model.lm_head
    assert (model.tokenizer.padding_side, model.tokenizer.pad_token) == ("left", "<eos>")
    assert one(model, ["a b c", B]).kwargs["input_ids"].tolist() == [[0, 0, *A], B]


def test_loading_a_folder_with_a_tokenizer_of_ones_own(folder):
    tokenizer = make_tokenizer(padding_side="right")
    model = LanguageModel(folder, tokenizer=tokenizer)
    assert model.tokenizer is tokenizer and tokenizer.padding_side == "right"


def test_a_folder_without_tokenizer_says_how_to_give_one(folder):
    with pytest.raises(ModelNotFoundError, match="has a model and no tokenizer .*tokenizer=tok"):
        LanguageModel(folder)


def test_a_folder_without_weights_or_config(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"`{folder}` gave no model .*model.safetensors"):
        LanguageModel(folder, dispatch=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no config.json; it has nothing"):
        LanguageModel(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="has no config.json; it has empty, llama"):
        LanguageModel(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "a/b/c", Path("missing"), "~/no-such-folder"])
def test_a_missing_folder_names_it_and_gives_the_command(name):
    with pytest.raises(ModelNotFoundError) as caught:
        LanguageModel(name)
    where = Path(name).expanduser()
    text = str(caught.value)
    assert text.startswith(f"there is no folder `{where}`. Give one")
    assert f"\n    hf download openai-community/gpt2 --local-dir {where}\n" in text and "`make demo`" in text
    assert isinstance(caught.value, FileNotFoundError) and isinstance(caught.value, NNsightFXError)


def test_a_hub_id_without_a_network_gives_the_command():
    with pytest.raises(ModelNotFoundError) as caught:
        LanguageModel("openai-community/gpt2-not-here")
    text = str(caught.value)
    assert text.startswith("`openai-community/gpt2-not-here` gave no model (")
    assert "hf download openai-community/gpt2-not-here --local-dir openai-community/gpt2-not-here" in text


def test_code_of_a_model_runs_only_when_asked(monkeypatch, folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = []

    def load(where, **options):
        asked.append(options)
        return MODELS["gpt2"]()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda where, **o: asked.append(o) or make_tokenizer())
    LanguageModel("some/model", revision="r", dtype="auto", dispatch=True)
    LanguageModel("some/model", trust_remote_code=True, dispatch=True)
    assert asked == [
        {"trust_remote_code": False, "revision": "r", "dtype": "auto"},
        {"trust_remote_code": False, "revision": "r"},
        {"trust_remote_code": True},
        {"trust_remote_code": True},
    ]


def test_a_loaded_module_takes_no_loading_options():
    with pytest.raises(TypeError, match="got `dtype`, which are for loading, and this model is loaded"):
        LanguageModel(MODELS["gpt2"](), dtype=torch.bfloat16)
