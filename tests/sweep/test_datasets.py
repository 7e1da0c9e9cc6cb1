"""Sweeps over many prompts: each has the numbers that it has alone, prompts of one length share forwards, and means have errors."""

from __future__ import annotations

import functools
import statistics

import pytest
import torch
import transformers as tf

from nnsight_fx import LanguageModel, NNsight, patching

from .programs import X, mlp

LENGTHS = [4, 6, 4, 3, 6, 4, 3]
LAYERS, SCALES = range(2), [0.5, 2.0]


@functools.cache
def raw():
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return tf.GPT2LMHeadModel(config).eval().requires_grad_(False)


@functools.cache
def wrap(engine="hooks"):
    model = LanguageModel(raw())
    if engine != "hooks":
        model.compile(backend=engine)
    return model


@pytest.fixture(autouse=True)
def _same_start_for_every_test():
    """In place of the suite's own, which makes Dynamo forget the shared models after every test."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _captures_are_of_this_file():
    yield
    wrap.cache_clear()
    raw.cache_clear()
    torch._dynamo.reset()


def prompts(seed=1):
    made = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (n,), generator=made) for n in LENGTHS]


def body(model):
    def scale(tracer, layer, by):
        h = model.transformer.h[layer].output
        h[:, -1] = h[:, -1] * by
        return model.lm_head.output[0, -1, :3]

    return scale


def by_hand(ids, layer, by):
    def change(module, args, out):
        h = out[0] if isinstance(out, tuple) else out
        h[:, -1] = h[:, -1] * by

    with raw().transformer.h[layer].register_forward_hook(change), torch.no_grad():
        return raw()(ids[None], use_cache=False).logits[0, -1, :3]


@functools.cache
def wanted():
    return torch.stack(
        [torch.stack([torch.stack([by_hand(ids, i, by) for by in SCALES]) for i in LAYERS]) for ids in prompts()]
    )


@pytest.mark.parametrize(("engine", "chunk"), [("hooks", 3), ("hooks", 64), ("eager", 64)])
def test_a_list_of_prompts_is_an_axis(engine, chunk):
    model = wrap(engine)
    forwards = []
    count = lambda m, a, kw: forwards.append(kw["input_ids"].shape)  # noqa: E731  (hooks alone: it would be captured)
    handle = raw().register_forward_pre_hook(count, with_kwargs=True) if engine == "hooks" else None
    some = 7 if engine == "hooks" else 3  # each length is a capture
    found = model.sweep(body(model), prompts()[:some], {"layer": LAYERS, "by": SCALES}, chunk=chunk, progress=False)
    if handle is not None:
        handle.remove()
    torch.testing.assert_close(found["result"], wanted()[:some])
    assert found.array.dims[:3] == ("prompt", "layer", "by") and found.array.shape == (some, 2, 2, 3)
    if engine == "hooks" and chunk == 64:  # a forward for each length, which is nobody's padding
        assert sorted(shape[1] for shape in forwards) == [3, 4, 6] and sum(rows for rows, _ in forwards) == 7 * 4


def test_the_mean_and_its_standard_error():
    model = wrap()
    found = model.sweep(body(model), prompts(), {"layer": LAYERS, "by": SCALES}, reduce="mean", progress=False)
    assert list(found.over) == ["layer", "by"] and found["result"].shape == (2, 2, 3)
    column = wanted()[:, 1, 0, 2].double().tolist()
    torch.testing.assert_close(found["result"][1, 0, 2].item(), statistics.mean(column))
    torch.testing.assert_close(found.errors["result"][1, 0, 2].item(), statistics.stdev(column) / 7**0.5)
    assert {"result", "result_stderr"} <= set(found.to_dataframe().columns)
    assert found.array.shape == (2, 2, 3)
    whole = model.sweep(body(model), prompts(), {"layer": LAYERS, "by": SCALES}, progress=False)
    assert torch.equal(whole.mean().values["result"], found["result"]) and whole.mean("by").over.keys() == {
        "prompt",
        "layer",
    }
    one = model.sweep(body(model), prompts()[:1], {"layer": LAYERS, "by": SCALES}, reduce="mean", progress=False)
    assert one.errors["result"].isnan().all()


def test_the_body_may_ask_for_the_prompt():
    model, answers = wrap(), [3, 1, 4, 1, 5, 9, 2]

    def logit(tracer, prompt, layer):
        model.transformer.h[layer].output[:] = 0
        return model.lm_head.output[0, -1, answers[prompt]]

    found = model.sweep(logit, prompts(), {"layer": LAYERS}, progress=False)
    assert found["result"].shape == (7, 2)
    alone = model.sweep(lambda t, prompt: model.lm_head.output[0, -1, answers[prompt]], prompts(), {}, progress=False)
    want = [raw()(ids[None]).logits[0, -1, a] for ids, a in zip(prompts(), answers, strict=True)]
    torch.testing.assert_close(alone["result"], torch.stack(want))


def test_what_a_list_is():
    model = wrap()
    read = lambda tracer: model.lm_head.output[:, -1]  # noqa: E731
    as_ids = model.sweep(lambda t, i: read(t), [3, 4, 5], {"i": [0]}, progress=False)  # one prompt's ids
    assert as_ids["result"].shape == (1, 1, 50)
    rows = model.sweep(lambda t, i: read(t), torch.tensor([[3, 4], [5, 6]]), {"i": [0]}, progress=False)  # one batch
    assert rows["result"].shape == (1, 2, 50)
    plain = NNsight(mlp())
    found = plain.sweep(lambda t, i: plain.head.output[:, -1], list(X), {"i": [0]}, progress=False)
    assert found["result"].shape == (4, 1, 1, 5)
    own = plain.sweep(lambda t, prompt: plain.head.output * prompt, X[0], {"prompt": [1, 3]}, progress=False)
    torch.testing.assert_close(own["result"][1], own["result"][0] * 3)  # an axis of the user's by that name
    for wrong, over, text in [
        ([], {"i": [0]}, r"prompt: 0 values"),
        (list(X), {"prompt": [0]}, r"`prompt` is the axis of the list of inputs"),
    ]:
        with pytest.raises(ValueError, match=rf"test_datasets\.py:\d+: .*{text}"):
            plain.sweep(lambda t, i: plain.head.output, wrong, over, progress=False)
    with pytest.raises(ValueError, match=r'test_datasets\.py:\d+: `reduce="mean"` averages over a list of inputs'):
        plain.sweep(lambda t, i: plain.head.output, X[0], {"i": [0]}, reduce="mean", progress=False)


def test_what_is_prepared_for_a_chunk():
    model, asked, held = wrap(), [], {}

    def prepare(wanted):
        assert torch.is_grad_enabled() is False
        asked.append(wanted)
        held.clear()
        for i in wanted:
            with model.trace(prompts(2)[i]):
                held[i] = model.transformer.h[0].output.save()

    def patch(tracer, prompt, by):
        model.transformer.h[0].output[:, -1] = held[prompt][:, -1] * by
        return model.lm_head.output[0, -1]

    found = model.sweep(patch, prompts(), {"by": SCALES}, prepare=prepare, chunk=4, progress=False)
    assert sorted(i for some in asked for i in some) == list(range(7)) and asked[0] == [0, 2]  # both of four tokens
    other = model.sweep(patch, prompts(), {"by": SCALES}, prepare=prepare, chunk=64, progress=False)
    torch.testing.assert_close(found["result"], other["result"])


# -- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "engine"), [("residual", "hooks"), ("z", "hooks"), pytest.param("z", "eager", marks=pytest.mark.slow)]
)
def test_patching_pairs(engine, part):
    """Each pair as alone; the metric is of the pair's own answers."""
    model, clean, corrupted, answers = wrap(engine), prompts(2), prompts(3), [3, 1, 4, 1, 5, 9, 2]
    options = {"part": part, "positions": [-1, -2, 0], "progress": False}
    options["over"] = ("layer", "position") if part == "residual" else ("layer", "position", "head")

    def metric(logits, prompt):
        return logits[0, -1, answers[prompt]]

    found = patching.patch(model, clean, corrupted, metric, **options)
    for i in (1, 3, 5):  # one of each length
        alone = patching.patch(wrap(), clean[i], corrupted[i], lambda logits, i=i: logits[0, -1, answers[i]], **options)
        torch.testing.assert_close(found["result"][i], alone["result"])
    mean = patching.patch(model, clean, corrupted, metric, reduce="mean", **options)
    torch.testing.assert_close(mean["result"], found["result"].double().mean(0))


def test_ablating_many():
    model, many, others = wrap(), prompts(2), prompts(3)
    metric = lambda logits: logits[0, -1, 7]  # noqa: E731
    options = {"part": "mlp", "over": ("layer",), "progress": False}
    for by in ("zero", "resample"):
        given = {"by": by} if by == "zero" else {"by": by, "reference": others}
        found = patching.ablate(model, many, metric, **given, **options)
        for i in (1, 3):
            one = {"by": by} if by == "zero" else {"by": by, "reference": others[i]}
            torch.testing.assert_close(
                found["result"][i], patching.ablate(model, many[i], metric, **one, **options)["result"]
            )
    found = patching.ablate(model, many, metric, by="mean", **options)
    values = [patching.activations(model, ids, "mlp")[1] for ids in many]
    mean = torch.cat([v.flatten(0, 1) for v in values]).mean(0)
    with raw().transformer.h[1].mlp.register_forward_hook(lambda m, a, out: mean.expand_as(out)), torch.no_grad():
        want = [raw()(ids[None]).logits[0, -1, 7] for ids in many]
    torch.testing.assert_close(found["result"][:, 1], torch.stack(want))


def test_pairs_that_are_none():
    model = wrap()
    metric = lambda logits: logits[0, -1, 7]  # noqa: E731
    with pytest.raises(ValueError, match=r"test_datasets\.py:\d+: the prompts have 3 to 6 tokens, so that a position"):
        patching.patch(model, prompts(2), prompts(3), metric, progress=False)
    with pytest.raises(
        ValueError, match=r"test_datasets\.py:\d+: 6 prompts to take values from, and 7 to run; give pairs"
    ):
        patching.patch(model, prompts(2)[:6], prompts(3), metric, progress=False)
