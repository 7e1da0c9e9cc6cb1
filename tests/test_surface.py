"""nnsight 0.8.1's public surface: `rename=`, `envoys=`, `fn=`, parts of a model, loading, `CONFIG`, and the helpers."""

import traceback

import pytest
import torch
import torch.nn as nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nnsight_fx import CONFIG, Envoy, LanguageModel, NNsight, TraceDict, UnknownModuleError, assert_no_fallback, steer
from nnsight_peer import run_peer

TEXT = """
class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(6, 6)
    def forward(self, x):
        return self.proj(x)

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(), torch.nn.Linear(6, 6)
    def forward(self, x):
        return x + self.mlp(self.attn(x))

class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.h = torch.nn.ModuleList(Block() for _ in range(3))
    def forward(self, x):
        for block in self.h:
            x = block(x)
        return x

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer, self.head = Inner(), torch.nn.Linear(6, 4)
    def encode(self, x, scale=1.0):
        return self.transformer(x) * scale
    def forward(self, x):
        return self.head(self.encode(x))
"""
SCOPE: dict = {"torch": torch}
exec(TEXT, SCOPE)
Net, Block, Attention = SCOPE["Net"], SCOPE["Block"], SCOPE["Attention"]
engines = pytest.mark.parametrize("engine", ["hooks", "eager", "aot_eager"])


def wrapped(engine="hooks", **options):
    torch.manual_seed(0)
    model = NNsight(Net(), **options)
    if engine != "hooks":
        model.compile(backend=engine)
    return model


# -- rename --------------------------------------------------------------------------------------------------------

RENAMES = {
    "one name, wherever it is": ({"mlp": "ffn"}, ["transformer.h.0.ffn", "transformer.h.2.ffn"]),
    "a leading dot": ({".mlp": "ffn"}, ["transformer.h.1.ffn"]),
    "a path, on the root": ({"transformer.h": "layers"}, ["layers.1", "layers.1.mlp"]),
    "several aliases": ({"attn": ["a", "self_attn"]}, ["transformer.h.0.a", "transformer.h.0.self_attn.proj"]),
    "any parent": ({"*.h": "layers"}, ["layers.2.attn"]),
    "inner aliases in outer keys": ({"h": "layers", "transformer.layers.1": "middle"}, ["middle.mlp"]),
    "a dotted alias": ({"attn.proj": "attn.o_proj"}, ["transformer.h.0.attn.o_proj"]),
    "no such module": ({"self_attn": "attention", "attn": "attention"}, ["transformer.h.0.attention"]),
    "a name of its own": ({"mlp": "mlp"}, ["transformer.h.0.mlp"]),
    "by index": ({"h.0": "first"}, ["transformer.first.mlp"]),
}
REFUSED = {
    "a value": {"mlp": "output"},
    "an attribute of the module": {"attn": "training"},
    "a child": {"mlp": "attn"},
    "an alias": {"mlp": "x", "attn": "x"},
    "two modules": {"*.mlp": "x"},
    "no ancestor": {"mlp": "attn.x"},
}


@pytest.mark.parametrize(("rename", "paths"), RENAMES.values(), ids=RENAMES)
def test_rename(rename, paths):
    model = wrapped(rename=rename)
    found = [model.get(path).path for path in paths]
    assert [p for p, _ in model.named_modules()] == [p for p, _ in wrapped().named_modules()]  # paths stay
    for path, where in zip(paths, found, strict=True):
        assert model.get(path) is model.get(where.removeprefix("model."))
    x = torch.randn(2, 6)
    with model.trace(x):
        by_alias = model.get(paths[0]).output.save()
        by_path = model.get(found[0].removeprefix("model.")).output.save()
    assert torch.equal(by_alias, by_path)


@pytest.mark.parametrize("rename", REFUSED.values(), ids=REFUSED)
def test_a_rename_that_would_hide_something_is_refused(rename):
    with pytest.raises(ValueError, match="would shadow|matches 3 modules|names no ancestor"):
        wrapped(rename=rename)


def test_rename_by_class():
    model = wrapped(rename={Attention: "mixer"})
    assert model.transformer.h[1].mixer is model.transformer.h[1].attn


@pytest.mark.peer
def test_rename_as_in_nnsight():
    program = TEXT + (
        "out['paths'] = [[NNsight(Net(), rename=r).get(p).path for p in paths] for r, paths in rows]\n"
        "def refuses(r):\n"
        "    try:\n"
        "        NNsight(Net(), rename=r)\n"
        "    except ValueError:\n"
        "        return True\n"
        "    return False\n"
        "out['refused'] = [refuses(r) for r in refused]\n"
    )
    theirs = run_peer(program, rows=[list(row) for row in RENAMES.values()], refused=list(REFUSED.values()))
    assert theirs["paths"] == [[wrapped(rename=r).get(p).path for p in paths] for r, paths in RENAMES.values()]
    assert all(theirs["refused"])


# -- envoys --------------------------------------------------------------------------------------------------------


class Named(Envoy):
    """An envoy with a view of its own."""

    @property
    def halves(self):
        return self.output.chunk(2, -1)


class Other(Named):
    pass


@pytest.mark.parametrize(
    ("envoys", "expected"),
    [
        (Named, {"transformer.h.0.mlp": Named, "head": Named}),
        ({nn.Linear: Named}, {"transformer.h.0.mlp": Named, "transformer.h.0": Envoy}),
        ({nn.Module: Named, Block: Other}, {"transformer.h.0": Other, "head": Named}),  # the nearest class
        ({"h.*": Named}, {"transformer.h.1": Named, "transformer.h": Envoy, "transformer.h.1.mlp": Envoy}),
        ({"layers.*": Named}, {"transformer.h.1": Named}),  # in aliased names
        ({"mlp": Named, nn.Linear: Other}, {"transformer.h.1.mlp": Other}),  # a class goes first
        (None, {"head": Envoy}),
    ],
)
def test_envoys(envoys, expected):
    model = wrapped(envoys=envoys, rename={"transformer.h": "layers"})
    assert {path: type(model.get(path)) for path in expected} == expected


@engines
def test_an_envoys_own_view(engine):
    class Custom(NNsight):
        envoys = {nn.Linear: Named}

    torch.manual_seed(0)
    model, x = Custom(Net()), torch.randn(2, 6)
    if engine != "hooks":
        model.compile(backend=engine)
    with assert_no_fallback(), model.trace(x):
        left, _ = model.transformer.h[0].mlp.halves
        left.save()
        out = model.transformer.h[0].mlp.output.save()
    assert torch.equal(left, out[:, :3])


# -- fn, parts -----------------------------------------------------------------------------------------------------


@engines
def test_another_method(engine):
    model, x = wrapped(engine), torch.randn(2, 6)
    net = model._module
    for again in range(2):
        x = x + again
        with assert_no_fallback(), model.trace(x, fn="encode", scale=2.0) as tracer:
            model.transformer.h[1].attn.output[:, 0] = 1.0
            result = tracer.result.save()

        def change(module, args, out):
            out[:, 0] = 1.0

        handle = net.transformer.h[1].attn.register_forward_hook(change)
        want = net.encode(x, scale=2.0)
        handle.remove()
        torch.testing.assert_close(result, want)
    assert torch.equal(model.trace(x, fn="encode", trace=False), net.encode(x))
    with model.scan(x, fn="encode") as tracer:
        assert tracer.result.shape == (2, 6)


@engines
def test_a_method_as_a_trace_of_its_own(engine):
    model, x = wrapped(engine), torch.randn(2, 6)
    net = model._module
    with assert_no_fallback(), model.encode(x, scale=2.0) as tracer:
        model.transformer.h[0].output *= 0
        result = tracer.result.save()
    handle = net.transformer.h[0].register_forward_hook(lambda m, a, out: out * 0)
    torch.testing.assert_close(result, net.encode(x, scale=2.0))
    handle.remove()
    got = model.encode(x)  # alone, it runs
    assert torch.equal(got, net.encode(x)) and [model.encode(x)][0].shape == (2, 6)
    with torch.no_grad(), model.encode(x), torch.enable_grad():
        saved = model.transformer.output.save()
    assert torch.equal(saved, got)
    with model.trace(x):  # and in a body it works on values
        inner = model.encode(model.transformer.h[0].input).save()
        model.head.output  # the model runs on
    assert torch.equal(inner, got)


def test_an_unknown_method_says_what_there_is():
    with pytest.raises(UnknownModuleError, match="`encod` is no method of the model; did you mean `encode`"):
        wrapped().trace(torch.randn(2, 6), fn="encod")


@engines
def test_a_part_alone(engine):
    model, h = wrapped(engine), torch.randn(2, 6)
    net = model._module
    with assert_no_fallback(), model.transformer.h[1].trace(h) as tracer:
        model.transformer.h[1].attn.output *= 2
        inner = model.transformer.h[1].mlp.input.save()
        result = tracer.result.save()
    attn = net.transformer.h[1].attn(h) * 2
    torch.testing.assert_close(inner, attn)
    torch.testing.assert_close(result, h + net.transformer.h[1].mlp(attn))
    assert torch.equal(model.head.trace(h, trace=False), net.head(h))


def test_a_part_of_a_language_model_takes_no_prompts():
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30)
    model = LanguageModel(GPT2LMHeadModel(config).eval())
    h = torch.randn(1, 4, 16)
    with model.transformer.h[0].mlp.trace(h):
        act = model.transformer.h[0].mlp.act.output.save()
    mlp = model._module.transformer.h[0].mlp
    torch.testing.assert_close(act, mlp.act(mlp.c_fc(h)))


# -- loading -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 1, "<e>": 0}, "<e>")), eos_token="<e>")


@engines
def test_weights_are_loaded_by_the_first_trace(folder, engine):
    model = LanguageModel(folder, tokenizer=tokenizer(), rename={"model.layers": "blocks"})
    if engine != "hooks":
        model.compile(backend=engine)
    layer, block = model.model.layers[1], model.blocks[0]
    assert not model.dispatched and model.device == torch.device("meta")
    with model.scan([1, 2, 3]):
        assert layer.output.shape == (1, 3, 32)
        assert model.lm_head.output.shape == (1, 3, 50)
    assert not model.dispatched  # a scan needs none
    extra = layer.extra = nn.Linear(32, 32)
    with torch.no_grad(), model.trace([1, 2, 3]):
        h = layer.extra(layer.output).save()
        logits = model.lm_head.output.save()
    assert model.dispatched and model.device == torch.device("cpu") and not model._module.training
    assert layer is model.model.layers[1] and block is model.blocks[0]  # envoys stay what they are
    assert layer.device == torch.device("cpu") and layer.extra._module is extra
    reference = LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits, reference(torch.tensor([[1, 2, 3]])).logits)
    assert h.shape == (1, 3, 32)
    assert model._module.lm_head.weight is model._module.model.embed_tokens.weight  # still tied


def test_the_structure_has_the_dtype_that_the_weights_will_have(folder):
    for options in ({}, {"dtype": torch.bfloat16}, {"dtype": "auto"}, {"dtype": "float16"}):
        lazy = LanguageModel(folder, tokenizer=tokenizer(), **options)
        before = lazy._module.lm_head.weight.dtype
        lazy.dispatch()
        assert lazy.dispatched and lazy._module.lm_head.weight.dtype == before


def test_dispatch_at_once(folder):
    model = LanguageModel(folder, tokenizer=tokenizer(), dispatch=True)
    assert model.dispatched and model.device == torch.device("cpu")
    assert model.trace([1, 2], trace=False).logits.shape == (1, 2, 50)


def test_weights_that_cannot_be_loaded_leave_the_model_as_it_was(folder):
    (folder / "model.safetensors").unlink()
    model = LanguageModel(folder, tokenizer=tokenizer())
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="gave no model"):
            model.trace([1])
        assert not model.dispatched


# -- CONFIG --------------------------------------------------------------------------------------------------------


def frames(error):
    return [f.filename for f in traceback.extract_tb(error.__traceback__)]


@pytest.mark.parametrize("debug", [False, True])
def test_tracebacks_have_our_frames_only_in_debug(monkeypatch, debug):
    monkeypatch.setattr(CONFIG.APP, "DEBUG", debug)
    model = wrapped()
    with pytest.raises(RuntimeError) as in_body, model.trace(torch.randn(2, 6)):
        model.head.output @ torch.randn(3, 3)
    with pytest.raises(RuntimeError) as in_model, model.trace(torch.randn(2, 6)):
        model.transformer.output = torch.randn(2, 5)
    for caught in (in_body, in_model):
        assert any(name == __file__ for name in frames(caught.value))
        inside = [name for name in frames(caught.value) if "/nnsight_fx/" in name and not name.endswith("config.py")]
        assert bool(inside) == debug
        assert any(name.endswith("linear.py") for name in frames(in_model.value))  # the model's own stay


# -- helpers -------------------------------------------------------------------------------------------------------


@engines
def test_trace_dict(engine):
    model, x = wrapped(engine), torch.randn(2, 6)
    net = model._module
    layers = ["transformer.h.2", "transformer.h.0"]

    def edit(h, layer):
        return h * 0.5 if layer.endswith("0") else h

    with assert_no_fallback(), TraceDict(model, layers, retain_input=True, edit_output=edit) as seen:
        out = model(x)
    first = net.transformer.h[0](x) * 0.5
    second = net.transformer.h[1](first)
    last = net.transformer.h[2](second)
    torch.testing.assert_close(seen["transformer.h.0"].output, first)
    torch.testing.assert_close(seen["transformer.h.0"].input, x)
    torch.testing.assert_close(seen["transformer.h.2"].input, second)
    torch.testing.assert_close(seen["transformer.h.2"].output, last)
    torch.testing.assert_close(out, net.head(last))
    assert out.requires_grad and torch.equal(model(x), net(x))  # behind the block, the module itself


@engines
def test_trace_dict_clones_detaches_and_stops(engine):
    model, x = wrapped(engine), torch.randn(2, 6)
    called = []
    handle = model._module.head.register_forward_hook(lambda *_: called.append(1))
    with TraceDict(model, ["transformer.h.0"], detach=True, clone=True, stop=True, retain_output=True) as seen:
        assert model(x) is None
    handle.remove()
    kept = seen["transformer.h.0"]
    assert not called and kept.input is None and not kept.output.requires_grad
    torch.testing.assert_close(kept.output, model._module.transformer.h[0](x))


@engines
def test_trace_dict_retains_gradients(engine):
    model, x = wrapped(engine), torch.randn(2, 6)
    with TraceDict(model, ["transformer.h.1"], retain_grad=True) as seen:
        out = model(x)
    out.square().sum().backward()
    kept = []

    def keep(module, args, out):
        out.retain_grad()
        kept.append(out)

    handle = model._module.transformer.h[1].register_forward_hook(keep)
    model._module(x).square().sum().backward()
    handle.remove()
    torch.testing.assert_close(seen["transformer.h.1"].output.grad, kept[0].grad)


@engines
def test_steer(engine):
    model, x, v = wrapped(engine), torch.randn(2, 3, 6), torch.randn(6)
    for n, (positions, index) in enumerate([(None, slice(None)), (-1, -1), ([0, 2], [0, 2])]):
        factor = 2.0 + n
        with assert_no_fallback(), model.trace(x):
            steer(model.transformer.h[:2], v, factor=factor, positions=positions)
            got = model.output.save()

        def change(module, args, out, factor=factor, index=index):
            out = out.clone()
            out[:, index] += factor * v
            return out

        handles = [model._module.transformer.h[i].register_forward_hook(change) for i in range(2)]
        torch.testing.assert_close(got, model._module(x))
        for handle in handles:
            handle.remove()
