"""Ready-made sweeps against loops of plain hooks."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import transformers as tf

from nnsight_fx import LanguageModel, NNsight, Parts, UnknownModuleError, patching
from nnsight_fx.analysis.parts import FAMILIES
from nnsight_fx.plan.tree import first

from ..test_demo import tiny_model

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
CLEAN, CORRUPTED = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[1, 9, 3, 4], [5, 6, 11, 8]])


@functools.cache
def raw(name):
    torch.manual_seed(0)
    made = {
        "gpt2": lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=16)
        ),
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=2)),
    }[name]()
    return made.eval()


@functools.cache
def wrap(name, engine="hooks"):
    model = LanguageModel(raw(name))
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


def metric(logits):
    return logits[:, -1, 3] - logits[:, -1, 4]


# the module and the side of it, the columns of a head
PLACES = {
    ("gpt2", "residual"): ("transformer.h.{}", "output", None),
    ("gpt2", "residual_pre"): ("transformer.h.{}", "input", None),
    ("gpt2", "attention"): ("transformer.h.{}.attn", "output", None),
    ("gpt2", "mlp"): ("transformer.h.{}.mlp", "output", None),
    ("gpt2", "z"): ("transformer.h.{}.attn.c_proj", "input", lambda h: slice(4 * h, 4 * h + 4)),
    ("gpt2", "k"): ("transformer.h.{}.attn.c_attn", "output", lambda h: slice(16 + 4 * h, 16 + 4 * h + 4)),
    ("llama", "residual"): ("model.layers.{}", "output", None),
    ("llama", "z"): ("model.layers.{}.self_attn.o_proj", "input", lambda h: slice(4 * h, 4 * h + 4)),
    ("llama", "q"): ("model.layers.{}.self_attn.q_proj", "output", lambda h: slice(4 * h, 4 * h + 4)),
    ("llama", "v"): ("model.layers.{}.self_attn.v_proj", "output", lambda h: slice(4 * h, 4 * h + 4)),
}


def run(module, ids, path=None, side="output", change=None, seen=None):
    """A forward with one value changed, by plain hooks."""

    def act(value):
        h = first(value)
        if seen is not None:
            seen.append(h.detach().clone())
        if change is not None:
            h[change[0]] = change[1][change[0]]

    def before(m, args, kwargs):
        act(args[0] if args else next(iter(kwargs.values())))

    def after(m, args, out):
        act(out)

    target = module.get_submodule(path) if path else None
    handle = None
    if target is not None:
        handle = (
            target.register_forward_pre_hook(before, with_kwargs=True)
            if side == "input"
            else target.register_forward_hook(after)
        )
    try:
        with torch.no_grad():
            return metric(module(ids, use_cache=False).logits)
    finally:
        if handle is not None:
            handle.remove()


def by_hand(name, part, value_of=None):
    module = raw(name)
    path, side, head = PLACES[(name, part)]
    heads = (2 if name == "llama" and part in "kv" else 4) if head else 0
    rows = []
    for layer in range(2):
        seen = []
        run(module, CLEAN, path.format(layer), side, seen=seen)
        source = seen[0] if value_of is None else value_of(seen[0])
        places = (
            [(slice(None), slice(None), head(h)) for h in range(heads)]
            if head
            else [(slice(None), p) for p in range(4)]
        )
        rows.append(torch.stack([run(module, CORRUPTED, path.format(layer), side, (at, source)) for at in places]))
    return torch.stack(rows)


@pytest.mark.parametrize("engine", ["hooks", "eager"])
@pytest.mark.parametrize(("name", "part"), PLACES)
def test_patching_is_the_loop(name, part, engine):
    found = patching.patch(wrap(name, engine), CLEAN, CORRUPTED, metric, part=part, progress=False)
    assert list(found.over) == ["layer", "head" if PLACES[(name, part)][2] else "position"]
    torch.testing.assert_close(found["result"], by_hand(name, part))


def test_axes_that_are_chosen():
    model = wrap("gpt2")
    layers = patching.patch(model, CLEAN, CORRUPTED, metric, over=("layer",), progress=False)
    assert layers["result"].shape == (2, 2)
    torch.testing.assert_close(layers["result"][1], run(raw("gpt2"), CLEAN))  # the whole last layer
    every = patching.patch(
        model,
        CLEAN,
        CORRUPTED,
        metric,
        part="z",
        over=("layer", "position", "head"),
        positions=[1, 3],
        layers=[1],
        progress=False,
    )
    assert every["result"].shape == (1, 2, 4, 2) and every.array.coords["position"].values.tolist() == [1, 3]


@pytest.mark.parametrize("by", ["zero", "mean", "resample"])
def test_ablations(by):
    model = wrap("gpt2")
    found = patching.ablate(model, CORRUPTED, metric, by=by, reference=None if by == "zero" else CLEAN, progress=False)
    value_of = {
        "zero": torch.zeros_like,
        "mean": lambda h: h.mean((0, 1), keepdim=True).expand_as(h),
        "resample": lambda h: h,
    }[by]
    torch.testing.assert_close(found["result"], by_hand("gpt2", "z", value_of))


@pytest.mark.parametrize("part", ["residual", "z"])
def test_attribution_is_the_gradient(part):
    model, module = wrap("gpt2"), raw("gpt2")
    found = patching.attribution(model, CLEAN, CORRUPTED, metric, part=part)
    path, side, head = PLACES[("gpt2", part)]
    for layer in range(2):
        clean, kept = [], []
        run(module, CLEAN, path.format(layer), side, seen=clean)

        def hook(m, args, out=None, kept=kept):
            h = args[0] if side == "input" else first(out)
            h.retain_grad()
            kept.append(h)

        target = module.get_submodule(path.format(layer))
        handle = target.register_forward_pre_hook(hook) if side == "input" else target.register_forward_hook(hook)
        metric(module(CORRUPTED, use_cache=False).logits).sum().backward()
        handle.remove()
        module.zero_grad()
        score = ((clean[0] - kept[0].detach()) * kept[0].grad).sum(0)
        want = score.unflatten(-1, (4, 4)).sum((0, -1)) if head else score.sum(-1)
        torch.testing.assert_close(found["result"][layer], want)
    assert all(p.grad is None for p in module.parameters())


def test_integrated_gradients_come_closer():
    """More steps: nearer to what patching the whole embedding changes."""
    model, module = wrap("gpt2"), raw("gpt2")
    real = (run(module, CLEAN) - run(module, CORRUPTED)).sum()
    errors = [
        abs(
            patching.attribution(model, CLEAN, CORRUPTED, metric, part="residual_pre", steps=n)["result"][0].sum()
            - real
        )
        for n in (1, 8)
    ]
    assert errors[1] < errors[0]


def test_the_lens_and_steering():
    model, module = wrap("llama"), raw("llama")
    lens = patching.logit_lens(model, CLEAN, position=None)
    with torch.no_grad():
        torch.testing.assert_close(lens["result"][-1], module(CLEAN).logits)
        embedded = module.lm_head(module.model.norm(module.model.embed_tokens(CLEAN)))
        torch.testing.assert_close(lens["result"][0], embedded)
    lens = patching.logit_lens(model, CLEAN)
    assert lens["result"].shape == (3, 2, 50) and lens.array.sel(layer="embedding").shape == (2, 50)
    vector = torch.randn(16)
    found = patching.steering(model, CLEAN, metric, vector, [0.0, 2.0], positions=-1, progress=False)
    torch.testing.assert_close(found["result"][:, 0], run(module, CLEAN).expand(2, 2))
    seen = []
    run(module, CLEAN, "model.layers.0", seen=seen)
    moved = seen[0].clone()
    moved[:, -1] += 2.0 * vector
    torch.testing.assert_close(
        found["result"][0, 1], run(module, CLEAN, "model.layers.0", "output", ((slice(None), -1), moved))
    )


def test_the_table_fits_the_models():
    for name in ("gpt2", "llama"):
        FAMILIES[name].check(wrap(name))
    with pytest.raises(
        UnknownModuleError, match="no module `.*It is `.*` in this table of parts for `GPT2LMHeadModel`"
    ):
        Parts("h", "attn", "mlp", None, "norm", "head").check(wrap("gpt2"))


def test_paths_may_begin_at_the_model():
    model = wrap("gpt2")
    own = FAMILIES["gpt2"]
    given = dataclasses.replace(own, layers="model.transformer.h", unembed="model.lm_head")
    assert given.check(model) == own
    found = patching.patch(model, CLEAN, CORRUPTED, metric, parts=given, progress=False)
    assert torch.equal(found["result"], patching.patch(model, CLEAN, CORRUPTED, metric, progress=False)["result"])


def test_a_metric_of_one_element_adds_no_axis():
    model = wrap("gpt2")
    for measure in (metric, lambda logits: metric(logits).sum(), lambda logits: metric(logits)[:1]):
        found = patching.patch(model, CLEAN[:1], CORRUPTED[:1], measure, progress=False)
        assert found["result"].shape == (2, 4) and found.heatmap()._repr_png_()[:4] == b"\x89PNG"
    found = patching.patch(model, CLEAN, CORRUPTED, metric, progress=False)
    with pytest.raises(ValueError, match=r"`results\.dataset\['result'\]\.mean\('result_0'\)"):
        found.heatmap()
    found.dataset["result"].mean("result_0")


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_a_heat_map_has_the_baselines_and_the_tokens(engine):
    module, tokenizer = tiny_model()
    model = LanguageModel(module, tokenizer=tokenizer)
    if engine != "hooks":
        model.compile(backend=engine)
    texts = "When Mary met John", "When Mary met Mary"
    measure = lambda logits: logits[:, -1, 2]  # noqa: E731
    found = patching.patch(model, *texts, measure, positions=[1, -1], progress=False)
    with torch.no_grad():
        clean, corrupted = (measure(module(**tokenizer(text, return_tensors="pt")).logits) for text in texts)
    torch.testing.assert_close(found.baselines, {"clean": clean[0], "corrupted": corrupted[0]})
    figure = found.heatmap()
    axes = figure.axes[0]
    assert figure.get_suptitle() == f"clean {clean.item():+.3f}, corrupted {corrupted.item():+.3f}"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["Mary", "John / Mary"]
    assert sum(axes.images[0].get_clim()) / 2 == pytest.approx(corrupted.item(), abs=1e-5)
    assert found.heatmap(title="mine", x=["a", "b"], center=0.0).get_suptitle() == "mine"
    zero = patching.ablate(model, texts[0], measure, part="mlp", progress=False)
    assert zero.heatmap().get_suptitle() == f"intact {clean.item():+.3f}"
    assert [t.get_text() for t in zero.heatmap().axes[0].get_xticklabels()] == ["When", "Mary", "met", "John"]
    steered = patching.steering(model, texts[0], measure, torch.ones(16), [0.0, 1.0], progress=False)
    assert steered.heatmap().get_suptitle() == f"unsteered {clean.item():+.3f}"


def test_the_baselines_of_pairs_are_their_mean():
    model, pairs = wrap("gpt2"), ([CLEAN[:1], CLEAN[1:]], [CORRUPTED[:1], CORRUPTED[1:]])
    found = patching.patch(model, *pairs, metric, progress=False)
    torch.testing.assert_close(found.baselines["corrupted"], run(raw("gpt2"), CORRUPTED))
    shown = found.mean().heatmap()
    assert shown.get_suptitle().startswith(f"clean {run(raw('gpt2'), CLEAN).mean().item():+.3f}")
    assert [t.get_text() for t in shown.axes[0].get_xticklabels()] == ["0", "1", "2", "3"]


def test_bad_input():
    model = wrap("gpt2")
    with pytest.raises(ValueError, match=r"test_patching\.py:\d+: `part` is one of residual"):
        patching.patch(model, CLEAN, CORRUPTED, metric, part="neurons")
    short, ran = CLEAN[:, :3], []
    handle = model._module.register_forward_pre_hook(lambda *_: ran.append(True))
    for verb, run in {
        "`patch` goes": lambda: patching.patch(model, short, CORRUPTED, metric),
        '`ablate(by="resample")` goes': lambda: patching.ablate(model, CLEAN, metric, by="resample", reference=short),
        "`attribution` goes": lambda: patching.attribution(model, short, CORRUPTED, metric),
        "pair 1 of prompts differs": lambda: patching.patch(model, [CLEAN, short], [CLEAN, CLEAN], metric),
    }.items():
        with pytest.raises(ValueError, match=r"test_patching\.py:\d+: .* in length, 3 tokens and 4") as error:
            run()
        assert verb in str(error.value) and model.tracer is None and not ran
    handle.remove()
    with pytest.raises(TypeError, match="`strore=` is no keyword of `patch` .* did you mean `store`"):
        patching.patch(model, CLEAN, CORRUPTED, metric, strore="runs")
    with pytest.raises(TypeError, match=r"test_patching\.py:\d+: `positons=` is no keyword of `ablate` .* `positions`"):
        patching.ablate(model, CLEAN, metric, positons=[0])
    with pytest.raises(ValueError, match="`over` is `layer`, with"):
        patching.patch(model, CLEAN, CORRUPTED, metric, over=("layer", "head"))
    with pytest.raises(ValueError, match="give `reference=`"):
        patching.ablate(model, CLEAN, metric, by="resample")
    with pytest.raises(UnknownModuleError, match="no table of parts for the family `None`"):
        patching.patch(NNsight(torch.nn.Linear(2, 2)), torch.ones(1, 2), torch.ones(1, 2), metric)
