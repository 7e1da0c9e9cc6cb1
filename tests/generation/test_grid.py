"""Generations as the rows of one, against plain transformers with hand-written hooks, each by itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import transformers as hf
from transformers import GenerationConfig

from nnsight_fx import LanguageModel
from nnsight_fx.errors import NotRecordableError

from .test_generate import gpt2, llama

STEPS, D, VOCAB = 8, 32, 100
SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": D,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
}


def small(model: type, config: type, **more) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return model(config(**{**SMALL, **more})).eval().requires_grad_(False)

    return make


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_layers": 3, "d_model": D, "d_ff": 64, "num_heads": 4, "d_kv": 8, "vocab_size": VOCAB}
    config = hf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    return hf.T5ForConditionalGeneration(config).eval().requires_grad_(False)


def bart() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 3, "d_model": D, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": VOCAB}
    config = hf.BartConfig(**sizes, max_position_embeddings=64, forced_eos_token_id=None, decoder_start_token_id=2)
    return hf.BartForConditionalGeneration(config).eval().requires_grad_(False)


GQA = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "llama": llama,
    "qwen3": small(hf.Qwen3ForCausalLM, hf.Qwen3Config, **GQA),
    "gemma2": small(hf.Gemma2ForCausalLM, hf.Gemma2Config, **GQA, sliding_window=6),
    "gemma3": small(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, **GQA, sliding_window=6),
    "mistral": small(hf.MistralForCausalLM, hf.MistralConfig, **GQA, sliding_window=6),
    "phi3": small(hf.Phi3ForCausalLM, hf.Phi3Config, num_key_value_heads=2, pad_token_id=0),
    "gpt_neox": small(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig),
    "opt": small(hf.OPTForCausalLM, hf.OPTConfig, ffn_dim=64, word_embed_proj_dim=D, max_position_embeddings=64),
    "falcon": small(hf.FalconForCausalLM, hf.FalconConfig),
    "olmo2": small(hf.Olmo2ForCausalLM, hf.Olmo2Config, num_key_value_heads=2),
    "t5": t5,
    "bart": bart,
}
ALONE = {"mixtral": small(hf.MixtralForCausalLM, hf.MixtralConfig, **GQA, num_local_experts=4)}


def blocks(module: nn.Module) -> nn.ModuleList:
    """The layers that make the tokens."""
    inner = (
        getattr(module, "model", None) or getattr(module, "transformer", None) or getattr(module, "gpt_neox", module)
    )
    inner = getattr(inner, "decoder", inner)
    return next(getattr(inner, name) for name in ("layers", "h", "block") if hasattr(inner, name))


def path(module: nn.Module, layer: int) -> str:
    wanted = blocks(module)[layer]
    return next(name for name, each in module.named_modules() if each is wanted)


def options(**more) -> dict:
    return {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}


def vectors() -> torch.Tensor:
    return torch.randn(3, D, generator=torch.Generator().manual_seed(1))


def adding(vector: torch.Tensor, start: int = 0) -> Callable:
    """A hook that adds a vector to what a block returns, from a forward on."""
    count = itertools.count()

    def hook(module: nn.Module, args: tuple, out: object) -> object:
        if next(count) < start:
            return out
        return (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

    return hook


def by_hand(
    module: nn.Module, ids: torch.Tensor, layer: int, vector: torch.Tensor, start: int = 0, **more
) -> torch.Tensor:
    """The new tokens of one steered generation of transformers'."""
    begun = 1 if module.config.is_encoder_decoder else ids.shape[1]
    hook = blocks(module)[layer].register_forward_hook(adding(vector, start))
    try:
        return module.generate(ids, attention_mask=torch.ones_like(ids), **options(**more))[:, begun:]
    finally:
        hook.remove()


def swept(model: LanguageModel, prompts: list, over: dict, start: int = 0, **more):
    """The same generations as a sweep."""
    found, made = vectors(), [model.get(path(model._module, layer)) for layer in range(len(blocks(model._module)))]

    def body(tracer, layer, strength):
        seen = []
        for step in tracer.iter[:]:
            out = made[layer].output
            h = out[0] if isinstance(out, tuple) else out
            if step >= start:
                h += strength * found[layer]
            seen.append(h[:, -1].norm(dim=-1))
        return {"norms": seen}

    return model.sweep(body, prompts, over=over, generate=options(**more), progress=False)


def cut(row: torch.Tensor) -> torch.Tensor:
    return row[: int((row >= 0).sum())]


PROMPTS = [[5, 7, 11, 3, 2], [9, 8, 2, 1, 4], [1, 2, 3]]
OVER = {"layer": [0, 1], "strength": [0.0, 1.0, 6.0]}


def same(module: nn.Module, found, prompts: list, **more) -> None:
    for p, prompt in enumerate(prompts):
        for layer, strength in itertools.product(OVER["layer"], OVER["strength"]):
            ids = torch.tensor([prompt])
            expected = by_hand(module, ids, layer, strength * vectors()[layer], **more)
            got = cut(found["tokens"][p, OVER["layer"].index(layer), OVER["strength"].index(strength)])
            assert torch.equal(got, expected[0]), (prompt, layer, strength)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_grid_gives_the_tokens_of_each_generation_alone(family):
    module = FAMILIES[family]()
    model = LanguageModel(module)
    found = swept(model, PROMPTS, OVER)
    same(module, found, PROMPTS)
    told = str(model.explain())
    assert "18 trace(s)" in told and "batched on hooks" in told and "one by one" not in told
    forwards = STEPS + module.config.is_encoder_decoder  # the encoder's
    assert f"{2 * forwards} forward(s)" in told  # prompts of two lengths
    assert found["norms"].shape == (3, 2, 3, STEPS, 1) and not found["norms"].isnan().any()


@pytest.mark.parametrize("family", ALONE)
def test_rows_that_meet_are_generated_alone_and_that_is_told(family):
    module = ALONE[family]()
    model = LanguageModel(module)
    same(module, swept(model, PROMPTS, OVER), PROMPTS)
    assert "one by one" in str(model.explain())


@pytest.mark.parametrize(
    "more",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 4, "eos_token_id": list(range(50))},
        {"eos_token_id": list(range(0, 100, 3))},
        {"eos_token_id": 50, "bad_words_ids": [[7]]},
        {"suppress_tokens": [1, 2, 3]},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=lambda more: "-".join(more),
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_options_of_generate(family, more):
    module = FAMILIES[family]()
    model = LanguageModel(module)
    same(module, swept(model, PROMPTS, OVER, **more), PROMPTS, **more)
    assert "batched on hooks" in str(model.explain())


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_each_cell_may_begin_at_another_step(family):
    module = FAMILIES[family]()
    model = LanguageModel(module)
    found, made = vectors(), [model.get(path(module, layer)) for layer in range(2)]

    def body(tracer, start, layer):
        for _step in tracer.iter[start : start + 3]:
            made[layer].output[:] += 6 * found[layer]

    result = model.sweep(
        body, torch.tensor([PROMPTS[0]]), over={"start": range(5), "layer": [0, 1]}, generate=options(), progress=False
    )
    for start, layer in itertools.product(range(5), range(2)):
        count = itertools.count()

        def hook(module, args, out, start=start, layer=layer, count=count):
            return out + 6 * found[layer] if start <= next(count) < start + 3 else out

        handle = blocks(module)[layer].register_forward_hook(hook)
        expected = module.generate(torch.tensor([PROMPTS[0]]), **options())[0, 5:]
        handle.remove()
        assert torch.equal(result["tokens"][start, layer], expected)
    assert "10 trace(s)" in str(model.explain()) and "batched" in str(model.explain())


def test_values_of_earlier_steps_and_numbers_of_theirs():
    module = llama()
    model = LanguageModel(module)

    def body(tracer, factor):
        first = total = None
        for _step in tracer.iter[:]:
            h = model.model.layers[0].output
            if first is None:
                first = h[:, -1]
                total = first.sum()
            elif float(total) > 0:  # of a forward that has run: no sync point
                model.model.layers[1].output[:] += factor * first
            else:
                model.model.layers[1].output[:] -= factor * first
        return first

    found = model.sweep(body, [5, 7, 11], over={"factor": [0.0, 1.0, 3.0]}, generate=options(), progress=False)
    assert "batched" in str(model.explain())
    for n, factor in enumerate([0.0, 1.0, 3.0]):
        with model.generate([5, 7, 11], compile=False, **options()) as tracer:
            body(tracer, factor)
            ids = tracer.result.save()
        assert torch.equal(found["tokens"][n], ids[0, 3:])


def test_a_body_that_looks_into_its_own_forward_runs_alone():
    model = LanguageModel(llama())

    def body(tracer, n):
        if model.model.layers[0].output.sum() > n:
            model.model.layers[1].output[:] = 0

    found = model.sweep(body, [5, 7], over={"n": [-1e6, 1e6]}, generate=options(), progress=False)
    told = str(model.explain())
    assert "it looks at a value of the forward that it is in" in told and "one by one" in told
    assert not torch.equal(found["tokens"][0], found["tokens"][1])


def test_one_cell_apart_and_the_others_together():
    module = llama()
    model = LanguageModel(module)

    def body(tracer, n):
        h = model.model.layers[0].output
        if n == 2 and h.sum() > 0:
            pass
        h[:] += n

    found = model.sweep(body, [5, 7], over={"n": range(5)}, generate=options(), progress=False)
    told = str(model.explain())
    assert "4 trace(s)" in told and "batched" in told and "1 trace(s)" in told
    for n in range(5):
        count = itertools.count()

        def hook(module, args, out, n=n, count=count):
            return out + n * (next(count) == 0)

        handle = blocks(module)[0].register_forward_hook(hook)
        assert torch.equal(found["tokens"][n], module.generate(torch.tensor([[5, 7]]), **options())[0, 2:])
        handle.remove()


def test_an_error_of_one_cell_is_at_its_line_and_leaves_nothing_behind():
    model = LanguageModel(llama())

    def body(tracer, n):
        model.model.layers[0].output[:] += torch.zeros(D if n != 5 else D - 1)  # here

    with pytest.raises(RuntimeError) as told:
        model.sweep(body, [5, 7], over={"n": range(8)}, generate=options(), progress=False)
    assert "n=5" in "".join(told.value.__notes__) and "test_grid.py" in "".join(told.value.__notes__)
    with model.generate([5, 7], **options()) as tracer:
        assert tracer.result.save().shape == (1, 2 + STEPS)
    assert not any("_compiled_call_impl" in vars(m) for m in model._module.modules())


@pytest.mark.parametrize(
    "more", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"prompt_lookup_num_tokens": 2}]
)
def test_what_is_no_row_runs_alone(more):
    model = LanguageModel(llama())
    model.sweep(lambda tracer, n: None, [5, 7, 5, 7], over={"n": range(2)}, generate=options(**more), progress=False)
    assert "one by one" in str(model.explain())


def test_draws_do_not_depend_on_the_batch():
    model = LanguageModel(llama())
    sampled = options(do_sample=True, temperature=1.5, top_k=30, top_p=0.9, max_new_tokens=12)

    def body(tracer, n):
        model.model.layers[0].output[:] += 0.1 * n

    def tokens(chunk: int | None, looks: bool = False, seed: int = 3):
        def own(tracer, n):
            if looks and model.model.layers[0].output.sum() > 1e9:
                raise AssertionError
            body(tracer, n)

        run = model.sweep(
            own, [5, 7, 9], over={"n": range(7)}, generate=sampled, chunk=chunk, seed=seed, progress=False
        )
        return run["tokens"]

    state = torch.get_rng_state()
    together = tokens(None)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(together, tokens(2)) and torch.equal(together, tokens(3))
    assert torch.equal(together, tokens(None, looks=True))  # each alone
    assert not torch.equal(together, tokens(None, seed=4))
    assert len({tuple(row.tolist()) for row in together}) == 7


def test_what_a_body_draws_is_its_own():
    """Bodies take turns: each draws from its own stream, as if it ran alone."""
    model = LanguageModel(llama())

    def body(tracer, n):
        drawn = []
        for _step in tracer.iter[:]:
            noise = torch.randn(D)
            model.model.layers[0].output[:] += noise
            drawn.append(model.model.layers[0].output[0, -1] * 0 + noise)
        return {"drawn": drawn}

    def run(chunk):
        return model.sweep(
            body, [5, 7, 9], over={"n": range(4)}, generate=options(), chunk=chunk, seed=1, progress=False
        )

    one, other = run(1), run(None)
    assert torch.equal(one["drawn"], other["drawn"]) and torch.equal(one["tokens"], other["tokens"])
    assert len({float(x) for x in one["drawn"][:, :, 0].flatten()}) == 4 * STEPS


def test_prompts_of_several_rows():
    module = llama()
    model = LanguageModel(module)
    ids = torch.tensor([PROMPTS[0], PROMPTS[1]])
    more = {"eos_token_id": list(range(0, 100, 5))}

    def body(tracer, n):
        model.model.layers[0].output[:, -1] += n * vectors()[0]
        return {"last": model.lm_head.output[:, -1]}

    found = model.sweep(body, ids, over={"n": range(3)}, generate=options(**more), progress=False)
    assert found["tokens"].shape == (3, 2, STEPS) and found["last"].shape == (3, 2, VOCAB)
    for n in range(3):
        with model.generate(ids, **options(**more)) as tracer:
            body(tracer, n)
            result = tracer.result.save()
        got = found["tokens"][n]
        assert torch.equal(got[:, : result.shape[1] - 5], result[:, 5:]) and bool(
            (got[:, result.shape[1] - 5 :] == -1).all()
        )


def test_edits_take_place_in_every_row():
    module = llama()
    model = LanguageModel(module)
    found = vectors()
    with model.edit() as edited:
        edited.model.layers[1].output[:] += 3 * found[1]

    def body(tracer, n):
        edited.model.layers[0].output[:] += n * found[0]

    made = edited.sweep(body, [5, 7, 9], over={"n": range(3)}, generate=options(), progress=False)
    assert "batched" in str(edited.explain())
    for n in range(3):
        with edited.generate([5, 7, 9], **options()) as tracer:
            body(tracer, n)
            result = tracer.result.save()
        assert torch.equal(made["tokens"][n], result[0, 3:])


def test_stored_and_resumed(tmp_path):
    model = LanguageModel(llama())
    mark = tmp_path / "mark"

    def body(tracer, n):
        if n == 3 and mark.exists():
            raise KeyboardInterrupt
        model.model.layers[0].output[:] += n * vectors()[0]

    def run(folder):
        over = {"n": range(6)}
        sampled = options(do_sample=True)
        return model.sweep(body, [5, 7, 9], over=over, generate=sampled, store=folder, chunk=2, seed=5, progress=False)

    whole = run(tmp_path / "whole")
    mark.touch()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part")
    mark.unlink()
    assert torch.equal(run(tmp_path / "part")["tokens"], whole["tokens"])
    assert not any("_compiled_call_impl" in vars(m) for m in model._module.modules())


class Letters:
    """A tokenizer of numbers."""

    pad_token_id, eos_token_id, padding_side = 0, None, "left"

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


def test_texts_and_frames():
    pytest.importorskip("pandas")
    model = LanguageModel(llama(), tokenizer=Letters())
    found = swept(model, PROMPTS, OVER, eos_token_id=list(range(0, 100, 4)))
    assert found.text.shape == (3, 2, 3)
    assert found.text[1, 0, 2] == " ".join(map(str, cut(found["tokens"][1, 0, 2]).tolist()))
    frame = found.to_dataframe()
    assert len(frame) == 18 and set(frame.columns) == {"prompt", "layer", "strength", "text"}
    steps = found.to_dataframe(steps=True)
    assert len(steps) == 18 * STEPS and {"step", "tokens", "norms"} <= set(steps.columns)
    ended = found["tokens"] < 0
    assert bool(ended.any()) and torch.equal(found["norms"][..., 0].isnan(), ended)


def test_a_configuration_object():
    module = llama()
    model = LanguageModel(module)
    config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    found = model.sweep(
        lambda tracer, n: None, [5, 7], over={"n": [0]}, generate={"generation_config": config}, progress=False
    )
    assert torch.equal(found["tokens"][0], module.generate(torch.tensor([[5, 7]]), generation_config=config)[0, 2:])


@pytest.mark.parametrize(
    ("generate", "words"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": -1}, "at least 1"),
        ({"max_new_tokens": 2.5}, "at least 1"),
        ({"do_sample": False}, "max_new_tokens"),
        ({"max_new_tokens": 3, "temprature": 2.0}, "temperature"),
        (3, "a dict"),
    ],
)
def test_bad_options(generate, words):
    model = LanguageModel(llama())
    with pytest.raises((ValueError, TypeError)) as told:
        model.sweep(lambda tracer, n: None, [5, 7], over={"n": [0]}, generate=generate, progress=False)
    assert words in str(told.value) and "test_grid.py" in str(told.value)


def test_bad_bodies():
    model = LanguageModel(llama())
    with pytest.raises(NotRecordableError, match="holds a int"):
        model.sweep(lambda tracer, n: [1], [5, 7], over={"n": [0]}, generate=options(), progress=False)
    with pytest.raises(NotRecordableError, match="name of what was generated"):
        model.sweep(
            lambda tracer, n: {"tokens": model.lm_head.output},
            [5, 7],
            over={"n": [0]},
            generate=options(),
            progress=False,
        )
    with pytest.raises(NotRecordableError, match=r"tracer.stop\(\)"):
        model.sweep(lambda tracer, n: tracer.stop(), [5, 7], over={"n": [0, 1]}, generate=options(), progress=False)
    with pytest.raises(ValueError, match="stop=True"):
        model.sweep(lambda tracer, n: None, [5, 7], over={"n": [0]}, generate=options(), stop=True, progress=False)


def test_compiled_model_says_where_it_ran():
    model = LanguageModel(llama())
    model.compile(backend="eager")
    hooks = swept(model, PROMPTS[:1], OVER)
    assert "as rows of one loop" in str(model.explain())
    found, made = vectors(), model.model.layers

    def body(tracer, layer, strength):
        for _step in tracer.iter[:]:
            made[layer].output[:] += strength * found[layer]

    alone = model.sweep(body, PROMPTS[:1], over=OVER, generate=options(), engine="compiled", progress=False)
    assert torch.equal(alone["tokens"], hooks["tokens"])
