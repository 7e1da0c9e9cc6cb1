"""Prompts of several lengths are captured and compiled once, and have the numbers that each has on hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from nnsight_fx import LanguageModel, NNsight, assert_max_compiles, assert_no_fallback
from nnsight_fx.batching import rowgraph
from nnsight_fx.passes.cost import Cost
from nnsight_fx.report.runs import Report
from nnsight_fx.sweep.choice import Choice
from nnsight_fx.sweep.job import SweepJob

from ..engine.test_lengths import ONE
from ..engine.test_lengths import wrap as with_tokenizer
from .programs import X, mlp
from .test_causal import LLAMA, gpt2, llama, neox, qwen, seeded

LENGTHS = [5, 9, 4, 7]
V = torch.linspace(-2, 3, 32).sin()


def gemma():
    """Sliding and full attention by turns, soft-capped: attention that is written out."""
    config = tf.Gemma2Config(**LLAMA, num_key_value_heads=2, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
    config._attn_implementation = "eager"
    return seeded(tf.Gemma2ForCausalLM(config)), "model.layers"


MODELS = {
    "llama": llama,
    "llama, written out": lambda: llama("eager"),
    "gpt2": gpt2,
    "neox": neox,
    "qwen, a sliding window": qwen,
    "gemma": gemma,
}


def ids(length, seed=0):
    return torch.randint(0, 61, (1, length), generator=torch.Generator().manual_seed(seed + length))


def wrap(made, backend=None, **options):
    module, path = made
    model = LanguageModel(module)
    if backend is not None:
        model.compile(backend=backend, **options)
    return model, model.get(path), model.get("embed_out" if hasattr(module, "embed_out") else "lm_head")


def programs(model, layers, head, prompt, clean):
    """Patches by layer and position, steering, heads ablated; whole sequences and last positions."""
    found = []
    out = {"llama": "self_attn.o_proj", "gpt2": "attn.c_proj", "gpt_neox": "attention.dense"}
    name = next((v for k, v in out.items() if k == model.config.model_type), "self_attn.o_proj")
    with model.trace(clean):
        cached = [layer.output for layer in layers]
    for n, layer in enumerate(layers):
        for position in (0, 2, -1):
            with model.trace(prompt):
                layer.output[:, position] = cached[n][:, position]
                found.append(head.output[:, -1].save())
        with model.trace(prompt):
            layer.output += 0.3 * V
            found += [layer.output.save(), head.output.save()]
        with model.trace(prompt):
            layer.get(name).input[:, :, 8:16] = 0
            found += [layer.output[:, -1].save(), head.output[:, -2:].save()]
    return found


def session(wrapped, lengths, seed=0):
    model, layers, head = wrapped
    found = []
    with torch.no_grad(), model.session() as ran:
        for n in lengths:
            found.append(programs(model, layers, head, ids(n, seed), ids(n, seed + 50)))
    return [torch.cat([x.flatten() for x in each]) for each in found], ran


def same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def row_graphs(model):
    """Of what inputs the graphs for many rows are."""
    (facts,) = model.explain().to_dict()["captures"]
    return [graph["shape"] for graph in facts["row_graphs"]]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama", "eager"),
        *(
            pytest.param(n, "eager", marks=pytest.mark.slow)
            for n in ("llama, written out", "gpt2", "qwen, a sliding window", "neox", "gemma")
        ),
        *(pytest.param(n, "aot_eager", marks=pytest.mark.slow) for n in ("llama", "gpt2", "gemma")),
    ],
)
def test_one_capture_for_all_lengths(name, backend):
    """What four lengths need is compiled by the first; others that come later find it."""
    made = MODELS[name]()
    wrapped = wrap(made, backend)
    want, _ = session(wrap(made), LENGTHS)
    with assert_no_fallback():
        got, ran = session(wrapped, LENGTHS)
    same(got, want)
    groups = [g for g in ran.explain().to_dict()["groups"] if g["strategy"] == "forked"]
    assert sum(g["traces"] for g in groups) == 11 * len(LENGTHS)
    assert row_graphs(wrapped[0]) == ["any x any"]
    others = [6, 12, 3]
    want, _ = session(wrap(made), others, seed=7)
    with assert_max_compiles(0), assert_no_fallback():
        got, _ = session(wrapped, others, seed=7)
    same(got, want)
    assert row_graphs(wrapped[0]) == ["any x any"]


def test_text_has_any_length_from_the_start():
    model, hooks = with_tokenizer(), with_tokenizer()
    hooks._host.compiled = None

    def scored(model, text):
        found = []
        with torch.no_grad(), model.session():
            for layer in model.model.layers:
                for position in (0, -1):
                    with model.trace(text):
                        layer.output[:, position] *= 2
                        found.append(model.lm_head.output[:, -1].save())
        return torch.stack(found)

    for n, text in enumerate(ONE):
        with assert_no_fallback(), assert_max_compiles(0 if n else 99):
            got = scored(model, text)
        same([got], [scored(hooks, text)])
    assert row_graphs(model) == ["any x any"]


def test_ids_have_one_length_until_there_is_another():
    made = llama()
    wrapped, plain = wrap(made, "eager"), wrap(made)
    for lengths, shapes in (
        ([5], ["any x 5"]),
        ([5], ["any x 5"]),
        ([8], ["any x 5", "any x any"]),
        ([6, 3], ["any x 5", "any x any"]),
    ):
        got, _ = session(wrapped, lengths)
        same(got, session(plain, lengths)[0])
        assert row_graphs(wrapped[0]) == shapes
    assert not hasattr(ids(5), "_dynamo_weak_dynamic_indices")


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dynamic_is_the_users_word(dynamic):
    made = llama()
    wrapped = wrap(made, "eager", dynamic=dynamic)
    lengths = [5, 4] if not dynamic else [5]
    got, _ = session(wrapped, lengths)
    same(got, session(wrap(made), lengths)[0])
    assert row_graphs(wrapped[0]) == (["any x any"] if dynamic else ["any x 5", "any x 4"])


def test_one_token_has_a_graph_of_its_own():
    """Dynamo takes sizes of 1 for what they are."""
    made = gpt2()

    def steered(wrapped):
        model, layers, head = wrapped
        found = []
        with torch.no_grad(), model.session():
            for n in (4, 1, 6, 1):
                for layer in layers:
                    with model.trace(ids(n)):
                        layer.output[:, -1] += V
                        found.append(head.output.save())
        return found

    wrapped = wrap(made, "eager")
    with assert_no_fallback():
        same(steered(wrapped), steered(wrap(made)))
    assert sorted(row_graphs(wrapped[0])) == ["any x 1", "any x any"]


@pytest.mark.slow
def test_as_many_rows_as_tokens_and_as_wide_as_a_head():
    """Sizes that happen to be equal are not one size."""
    made = llama()
    lengths = [2, 4, 8, 32]
    wrapped = wrap(made, "eager")

    def patched(wrapped):
        model, layers, head = wrapped
        found = []
        with torch.no_grad(), model.session():
            for n in lengths:
                rows = torch.cat([ids(n, seed) for seed in range(n if n < 32 else 2)])
                for layer in layers:
                    for position in range(2):
                        with model.trace(rows):
                            layer.output[:, position] = V
                            found.append(head.output.save())
        return found

    same(patched(wrapped), patched(wrap(made)))
    assert row_graphs(wrapped[0]) == ["any x any"]


# -- models that are not one graph for any length ------------------------------------------------------------------------


class Looks(tf.GPT2LMHeadModel):
    """Its Python takes the number of tokens for a number."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        out: Any = super().forward(input_ids, **kwargs)
        out.logits = out.logits * {n: n / 4 for n in range(40)}[input_ids.shape[1]]
        return out


class Even(tf.GPT2LMHeadModel):
    """One graph for even numbers of tokens and one for odd ones: too little is known of each to prove anything."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        out: Any = super().forward(input_ids, **kwargs)
        if input_ids.shape[1] % 2 == 0:
            out.logits = out.logits * 2
        return out


class Long(tf.GPT2LMHeadModel):
    """One graph for short prompts, one for long ones: each for any length that is."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        out: Any = super().forward(input_ids, **kwargs)
        if input_ids.shape[1] > 6:
            out.logits = out.logits * 2
        return out


def of(cls):
    config = tf.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=61, use_cache=False, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return seeded(cls(config)), "transformer.h"


def test_a_model_that_looks_at_the_length_has_a_graph_for_each():
    made = of(Looks)
    wrapped = wrap(made, "eager")
    with assert_no_fallback():
        got, ran = session(wrapped, [5, 4])
    same(got, session(wrap(made), [5, 4])[0])
    assert row_graphs(wrapped[0]) == ["any x 5", "any x 4"]
    assert "captured for 5 tokens alone: the model's Python looks at their number" in str(ran.explain())


@pytest.mark.slow
def test_what_no_proof_is_found_for_at_any_length_has_a_graph_for_each():
    made = of(Even)
    wrapped = wrap(made, "eager")
    with assert_no_fallback():
        got, ran = session(wrapped, [6, 4])
    same(got, session(wrap(made), [6, 4])[0])
    assert {"any x 6", "any x 4"} < set(row_graphs(wrapped[0]))
    assert "captured for 6 tokens alone: its guards allow too few numbers of tokens" in str(ran.explain())
    assert all(g["strategy"] == "forked" for g in ran.explain().to_dict()["groups"] if g["traces"] > 4)


def test_a_model_with_a_graph_for_short_and_one_for_long_prompts():
    made = of(Long)
    wrapped = wrap(made, "eager")
    lengths = [9, 7, 8]
    got, _ = session(wrapped, lengths)
    same(got, session(wrap(made), lengths)[0])
    assert row_graphs(wrapped[0]) == ["any x any"]


def test_the_proof_does_not_depend_on_the_numbers_it_is_made_with(monkeypatch):
    """Where it did, each length has its own."""
    noted = rowgraph._noted

    def other(gm, segment, args, numbers, many):
        found = noted(gm, segment, args, numbers, many)
        if not many or min(numbers[s] for s in many) == 59:
            return found
        node = next(n for n, note in found.items() if note.rows == 0 and n.op != "placeholder")
        return found | {node: found[node]._replace(rows=1)}

    monkeypatch.setattr(rowgraph, "_noted", other)
    made = llama()
    wrapped = wrap(made, "eager")
    got, ran = session(wrapped, [5, 4])
    same(got, session(wrap(made), [5, 4])[0])
    assert "depends on the number of tokens" in str(ran.explain())
    assert {"any x 5", "any x 4"} < set(row_graphs(wrapped[0]))


def test_a_region_is_compiled_again_where_its_guards_do_not_hold():
    """A backend that looks at a size, as Inductor does at those of a softmax."""
    made, seen = llama(), []

    def backend(gm, inputs):
        sizes = [x.shape[1] for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 3]
        short = all(n < 6 for n in sizes)  # a guard where it is a symbol

        def run(*args):
            for x in args:
                if isinstance(x, torch.Tensor) and x.dim() == 3 and x.shape[1] not in (1, 8, 16, 32, 48, 61):
                    seen.append((short, x.shape[1]))
                    assert (x.shape[1] < 6) == short
            return gm.forward(*args)

        return run

    wrapped = wrap(made, backend)
    got, ran = session(wrapped, [5, 9, 4, 7])
    same(got, session(wrap(made), [5, 9, 4, 7])[0])
    assert {g["strategy"] for g in ran.explain().to_dict()["groups"]} == {"forked"}
    assert {short for short, _ in seen} == {True, False}
    with assert_max_compiles(0):
        session(wrapped, [3, 10])


# -- sweeps --------------------------------------------------------------------------------------------------------------


def test_a_sweep_over_prompts_of_several_lengths_is_captured_once():
    made = gpt2()
    (model, layers, head), (hooks, plain, last) = wrap(made, "eager"), wrap(made)
    prompts = [ids(n)[0] for n in LENGTHS]

    def patch(layers, head):
        def body(tracer, layer, position):
            layers[layer].output[:, position] = V
            return head.output[0, -1]

        return body

    over = {"layer": range(2), "position": [-1, -2, 0]}
    want = hooks.sweep(patch(plain, last), prompts, over, progress=False)
    got = model.sweep(patch(layers, head), prompts, over, progress=False, chunk=6)  # one length in each
    torch.testing.assert_close(got["result"], want["result"], rtol=1e-4, atol=1e-4)
    assert row_graphs(model) == ["any x any"]
    with assert_max_compiles(0):
        model.sweep(patch(layers, head), [ids(6)[0]], over, progress=False)


def test_lengths_that_share_a_graph_are_compiled_for_once():
    """What the choice of the engine takes compiling to cost."""
    model, *_ = wrap(gpt2(), "eager")
    inputs = [ids(5), ids(6), ids(5)]
    job = SweepJob(model, lambda tracer: None, inputs, {"prompt": [0, 1, 2]}, {}, many=True)
    job.shapes, job.texts = [((1, x.shape[1]),) for x in inputs], [(x.shape[1], False) for x in inputs]
    assert Choice(job, "auto", Report(), True).shapes == {(None, ((1, "any"),))}
    plain = NNsight(mlp())
    plain.compile(backend="eager")
    job = SweepJob(plain, lambda tracer: None, [X[0]], {"i": [0]}, {})
    job.shapes, job.texts = [((1, 7, 16),)], [(None, False)]
    assert Choice(job, "auto", Report(), True).shapes == {(None, ((1, 7, 16),))}


def test_what_an_operation_costs_at_another_length():
    linear, square, fixed = Cost.of((20, 2), (30, 3)), Cost.of((8, 2), (18, 3)), Cost.of((7, 2), (7, 3))
    assert (linear.at(10), square.at(5), fixed.at(9)) == pytest.approx((100, 50, 7))
    assert Cost.of((0, 2), (0, 3)).at(5) == 0 and (2 * linear / 4).at(2) == pytest.approx(10)
