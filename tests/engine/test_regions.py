"""Equal blocks are compiled once: the numbers are those of the graph as a whole, and of hooks."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import nnsight_fx
from nnsight_fx import LanguageModel, NNsight, assert_max_compiles, assert_no_fallback
from nnsight_fx.engine.captured.regions import Whole, regional

LAYERS = 8


def llama(frozen=True, layers=LAYERS):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(not frozen)


def gpt2(frozen=True):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=LAYERS, n_head=4, vocab_size=64, n_positions=32, use_cache=False)
    return GPT2LMHeadModel(config).eval().requires_grad_(not frozen)


def layers_of(m):
    return m.model.layers if hasattr(m, "model") else m.transformer.h


def hidden(layer):
    out = layer.output
    return out[0] if isinstance(out, tuple) else out


def nothing(m, ids, v):
    with m.trace(input_ids=ids):
        out = m.lm_head.output.save()
    return [out]


def read_all(m, ids, v):
    with m.trace(input_ids=ids):
        saved = nnsight_fx.save([hidden(layer) for layer in layers_of(m)])
    return saved


def steer(m, ids, v):
    with m.trace(input_ids=ids):
        hidden(layers_of(m)[3])[:, -1] += v
        saved = [hidden(layer)[:, -2:].save() for layer in layers_of(m)]
        out = m.lm_head.output.save()
    return [*saved, out]


def change_in_place(m, ids, v):
    with m.trace(input_ids=ids):
        before = hidden(layers_of(m)[2]).clone().save()
        hidden(layers_of(m)[2])[:] = 0
        hidden(layers_of(m)[4])[:, 1] = v
        out = m.lm_head.output.save()
    return [before, out]


def carry(m, ids, v):
    """A value of one block is put into another."""
    with m.trace(input_ids=ids):
        early = hidden(layers_of(m)[1])
        hidden(layers_of(m)[4])[:, 0] = early[:, 2] * v
        out = m.lm_head.output.save()
    return [out]


def inside(m, ids, v):
    with m.trace(input_ids=ids):
        part = layers_of(m)[2].mlp
        part.output = part.output * 2 + v
        attention = layers_of(m)[4].input[..., :4].save()
        out = m.lm_head.output.save()
    return [attention, out]


def invokes(m, ids, v):
    with m.trace() as tracer:
        with tracer.invoke(input_ids=ids):
            clean = hidden(layers_of(m)[2])[:, -1].save()
        with tracer.invoke(input_ids=ids.flip(-1)):
            hidden(layers_of(m)[2])[:, -1] = v
            out = m.lm_head.output.save()
    return [clean, out]


def stop(m, ids, v):
    with m.trace(input_ids=ids) as tracer:
        saved = [hidden(layer).save() for layer in list(layers_of(m))[:5]]
        tracer.stop()
    return saved


def look(m, ids, v):
    with m.trace(input_ids=ids):
        if hidden(layers_of(m)[1]).sum().item() > -1e9:
            hidden(layers_of(m)[3])[:] *= 2
        out = m.lm_head.output.save()
    return [out]


def gradients(m, ids, v):
    with m.trace(input_ids=ids):
        h = hidden(layers_of(m)[2])
        h.requires_grad_()
        loss = m.lm_head.output.sum()
        with loss.backward():
            saved = h.grad.save()
    return [saved]


def attribution(m, ids, v):
    """A difference of two logits: the numbers of the tokens are tensors that the backward's graph has of its own."""
    with m.trace(input_ids=ids):
        layers_of(m)[0].input.requires_grad_()
        streams, saved = [hidden(layer) for layer in layers_of(m)], nnsight_fx.save([])
        logits = m.lm_head.output[0, -1]
        with (logits[3] - logits[7]).backward():
            for stream in reversed(streams):
                saved.append((stream.grad * stream).sum(-1))
    return saved


PROGRAMS = (nothing, read_all, steer, change_in_place, carry, inside, invokes, stop, look, gradients, attribution)
WHOLE = {look}  # too few blocks are left


LATER = (nothing, inside, stop, gradients)  # in `make test-slow`
CASES = [pytest.param(steer, llama, False, "dynamo")]
CASES += [pytest.param(p, llama, False, "symbolic") for p in PROGRAMS if p not in (steer, *LATER)]  # in half the time
CASES += [pytest.param(p, llama, False, "dynamo", marks=pytest.mark.slow) for p in PROGRAMS if p is not steer]
CASES += [
    pytest.param(p, gpt2, True, "dynamo", marks=pytest.mark.slow) for p in (steer, change_in_place, carry, invokes)
]


@pytest.mark.parametrize(("program", "build", "grad", "capture"), CASES)
def test_as_on_hooks(program, build, grad, capture):
    regional, hooks = NNsight(build()), NNsight(build())
    regional.compile(backend="aot_eager", regional=True, capture=capture)
    for seed in (0, 1):
        torch.manual_seed(seed)
        ids, v = torch.randint(0, 64, (2, 7)), torch.randn(16)
        with torch.set_grad_enabled(grad or program in (gradients, attribution)):
            with assert_no_fallback(), assert_max_compiles(0 if seed else 99):
                got = program(regional, ids, v)
            want = program(hooks, ids, v)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
            assert a.requires_grad == b.requires_grad
    told = str(regional.explain())
    assert ("outline" in told) == (program not in WHOLE) == ("in one piece" not in told), told


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("program", [steer, change_in_place, carry, invokes, inside])
def test_inductor(program):
    regional, hooks = NNsight(llama(frozen=False)), NNsight(llama(frozen=False))
    regional.compile()
    ids, v = torch.randint(0, 64, (2, 7)), torch.randn(16)
    for _ in range(2):
        with assert_no_fallback():
            got = program(regional, ids, v)
        for a, b in zip(got, program(hooks, ids, v), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert "outline" in str(regional.explain())


@pytest.mark.slow
@pytest.mark.inductor
def test_inductor_keeps_a_plans_regions_on_disk(tmp_path, monkeypatch):
    """Functions of ours, and methods that a plan calls, do not keep a graph out of its cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    counters.clear()
    model, v = NNsight(llama()), torch.randn(16)
    model.compile(regional=True)
    with torch.no_grad(), model.trace(input_ids=torch.randint(0, 64, (1, 7))):
        model.model.layers[3].output[:, -1] += v
        saved = nnsight_fx.save([layer.output[:, -1] for layer in model.model.layers])
    found = counters["aot_autograd"]
    assert len(saved) == LAYERS and found["autograd_cache_saved"] > 0 and not found["autograd_cache_bypass"]


def test_another_layer_and_another_save_compile_only_what_is_new():
    model = NNsight(llama())
    made = []

    def counting(gm, inputs):
        made.append(gm)
        return gm

    model.compile(backend=counting, regional=True, capture="symbolic")
    ids = torch.randint(0, 64, (2, 7))

    def steered(at):
        with torch.no_grad(), model.trace(input_ids=ids):
            model.model.layers[at].output += 1.0
            out = model.lm_head.output.save()
        return out

    steered(1)
    first = len(made)
    assert first == 4  # in front of the blocks, a block (the last is one too), the steered one, and the head
    out = steered(3)
    assert len(made) == first and not torch.equal(out, steered(2))
    assert len(made) == first


def test_a_model_in_training_gives_its_parameters_the_same_gradients():
    def step(model):
        ids = torch.arange(14).reshape(2, 7)
        with model.trace(input_ids=ids):
            model.model.layers[2].output[:, -1] *= 2
            loss = model.lm_head.output.square().mean().save()
        loss.backward()
        return {name: p.grad for name, p in model._module.named_parameters()}

    regional, hooks = NNsight(llama(frozen=False)), NNsight(llama(frozen=False))
    regional.compile(backend="aot_eager", regional=True)
    got, want = step(regional), step(hooks)
    assert "outline" in str(regional.explain())
    assert all(torch.allclose(got[name], want[name], rtol=1e-4, atol=1e-6) for name in want)


@pytest.mark.slow
def test_other_lengths():
    """A second length makes sizes symbols; blocks that a number decided are not used for another."""
    model, hooks = NNsight(llama()), NNsight(llama())
    model.compile(backend="aot_eager", regional=True)
    for length in (5, 9, 3, 12, 9, 2):
        ids, v = torch.randint(0, 64, (2, length)), torch.randn(16)
        with torch.no_grad():
            for a, b in zip(steer(model, ids, v), steer(hooks, ids, v), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert model.explain().to_dict()["captures"][0]["captures"] == 2


def differences(m):
    with torch.no_grad(), m.trace() as tracer:
        with tracer.invoke([[5, 6, 7, 8, 9, 10, 11]]):
            one = m.model.layers[3].output[:, -1].save()
        with tracer.invoke([[5, 6, 7]]):
            other = m.model.layers[3].output[:, -1].save()
    return [one - other]


def attributed(m):
    m.requires_grad_(False)
    with m.trace([[5, 6, 7, 8]]):
        m.model.layers[0].input.requires_grad_()
        streams, saved = [layer.output for layer in m.model.layers], nnsight_fx.save([])
        logits = m.lm_head.output[0, -1]
        with (logits[3] - logits[7]).backward():
            for stream in reversed(streams):
                saved.append((stream.grad * stream)[0].sum(-1))
    return list(saved)


def generated(m, length, new=3):
    with (
        torch.no_grad(),
        m.generate([[*range(1, length + 1)]], max_new_tokens=new, do_sample=False, use_cache=True) as tracer,
    ):
        for _ in tracer.iter[:]:
            m.model.layers[3].output += 2.0
        out = tracer.result.save()
    return [out]


LENGTHS = [attributed, lambda m: generated(m, 5), lambda m: generated(m, 9)]


@pytest.mark.parametrize(
    "runs", [LENGTHS, pytest.param([*LENGTHS[:1], differences, *LENGTHS[1:]], marks=pytest.mark.slow)]
)
def test_a_language_model_with_prompts_of_other_lengths(runs):
    """Sizes are symbols then, what comes in front of the first block computes with them, and a graph has tensors of its own."""
    model, hooks = (LanguageModel(llama(layers=6)) for _ in range(2))
    model.compile(backend="eager", regional=True)
    for run in runs:
        with assert_no_fallback():
            got = run(model)
        torch.testing.assert_close(got, run(hooks), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.inductor
def test_what_is_laid_out_by_a_size_that_does_not_cross_is_taken_where_it_is_used():
    """A second length makes it a symbol: the last position of all is laid out by it, and has no dimension of that size."""
    model, hooks = (LanguageModel(llama()) for _ in range(2))
    model.compile()
    for length in (5, 9):
        with assert_no_fallback():
            got = generated(model, length)
        torch.testing.assert_close(got, generated(hooks, length))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_more_layers_with_a_growing_cache_are_no_more_regions(backend):
    """Dynamo gives the sizes of each tensor of a cache symbols of their own."""
    found = []
    for layers in (LAYERS, LAYERS + 3):
        model, hooks = (LanguageModel(llama(layers=layers)) for _ in range(2))
        model.compile(backend=backend, regional=True)
        for length in (5, 9):
            with assert_no_fallback():
                got = generated(model, length, 6)
            torch.testing.assert_close(got, generated(hooks, length, 6))
        facts = model.explain().to_dict()["captures"][0]
        assert facts["whole"] is None
        found.append((facts["captures"], facts["regions"]))
    assert found[0] == found[1]


class Last(nn.Module):
    """Blocks for the last position; `select` is a method, of which only its fake tells that it gives a view."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(block() for _ in range(6))

    def forward(self, x):
        x = self.first(x).select(1, -1)
        for each in self.blocks:
            x = each(x)
        return x


def block():
    return nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(16, 16), nn.Tanh())))


def test_a_layout_by_a_size_that_does_not_cross_leaves_a_graph_whole():
    torch.manual_seed(0)
    module = Last().requires_grad_(False)
    model, hooks = NNsight(module), NNsight(module)
    model.compile(backend="eager", regional=True)
    found = []
    for length in (5, 9, 7):
        x = torch.randn(2, length, 16)
        values = []
        for each in (model, hooks):
            with torch.no_grad(), assert_no_fallback(), each.trace(x):
                each.blocks[2].output += 1.0
                values.append(each.output.save())
        torch.testing.assert_close(*values)
        found.append(model.explain().to_dict()["captures"][0]["whole"])
    assert found == [None, *["what crosses from block to block is laid out by a size that does not cross"] * 2]


def test_numbers_computed_between_blocks_leave_a_graph_whole():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    h = graph.call_function(torch.mul, (x, 2.0))
    rows = graph.call_method("size", (x, 0))  # what comes before the first block gives a number: no region
    rows.meta["example_value"] = 3
    blocks = []
    for _ in range(4):
        blocks.append(graph.call_function(torch.relu, (h,)))
        h = graph.call_function(torch.add, (blocks[-1], rows))
    graph.output((h,))
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    job, segment = SimpleNamespace(blocks=blocks), SimpleNamespace(regions={}, context=None)
    with pytest.raises(Whole, match="it computes numbers between its blocks"):
        regional(gm, job, segment, ([], [torch.ones(3)]), [], None)
