"""Only the positions that a trace can change are computed, where the graph's own masks prove it: equal to the loop."""

import pytest
import torch
import torch.nn as nn
import transformers

from nnsight_fx import NNsight, assert_no_fallback

TOKENS = 9
IDS = torch.arange(TOKENS)[None] * 7 % 61
SMALL = {"vocab_size": 61, "use_cache": False}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **SMALL}


def seeded(module):
    """Weights that are large enough for a patch to be seen far behind it."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape) * (0.3 if p.dim() > 1 else 0.1) + (p.dim() == 1))
    return module.eval().requires_grad_(False)


def llama(attention="sdpa", **more):
    config = transformers.LlamaConfig(**LLAMA, num_key_value_heads=2, attn_implementation=attention, **more)
    return seeded(transformers.LlamaForCausalLM(config)), "model.layers"


def gpt2(attention="sdpa"):
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, attn_implementation=attention, bos_token_id=0, eos_token_id=0, **SMALL
    )
    return seeded(transformers.GPT2LMHeadModel(config)), "transformer.h"


def neox():
    return seeded(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**LLAMA))), "gpt_neox.layers"


def qwen():
    config = transformers.Qwen2Config(**LLAMA, num_key_value_heads=2, use_sliding_window=True, sliding_window=4)
    config.layer_types = ["sliding_attention", "full_attention"]
    return seeded(transformers.Qwen2ForCausalLM(config)), "model.layers"


def cached(made):
    """With the cache that transformers makes by default, and nobody looks at."""
    made[0].config.use_cache = True
    return made


APPLIES = {
    "llama, with a cache": lambda: cached(llama()),
    "gpt2, with a cache": lambda: cached(gpt2()),
    "neox, with a cache": lambda: cached(neox()),
    "llama": llama,
    "llama, written out": lambda: llama("eager"),
    "gpt2": gpt2,
    "gpt2, written out": lambda: gpt2("eager"),
    "neox": neox,
    "qwen, a sliding window": qwen,
}


def grid(model, layers, read, **inputs):
    """Patches at outputs (in place and as a clone that is written), at inputs and inside of a block."""
    found = []
    new = torch.linspace(-2, 3, 32).sin()
    for layer in range(2):
        block = layers(model)[layer]
        for position in (0, 4, TOKENS - 1):
            with model.trace(IDS, **inputs):
                block.output[:, position] = new * 3
                found.append(read(model)[:, -1].save())
            with model.trace(IDS, **inputs):
                h = block.input.clone()
                h[:, position:] *= 2
                block.input = h
                found.append(block.output.save())
                found.append(read(model)[:, 2:].save())
    return found


def run(module, path, backend, **inputs):
    def layers(model):
        return model.get(path) if hasattr(model, "get") else _walk(model, path)

    hooks, model = NNsight(module), NNsight(module)
    model.compile(backend=backend)
    with torch.no_grad():
        want = grid(
            hooks, layers, lambda m: m.lm_head.output if hasattr(module, "lm_head") else m.embed_out.output, **inputs
        )
        with assert_no_fallback(), model.session() as session:
            got = grid(
                model,
                layers,
                lambda m: m.lm_head.output if hasattr(module, "lm_head") else m.embed_out.output,
                **inputs,
            )
    assert len(want) == len(got) == 18
    assert (want[0] - want[3]).abs().max() > 1e-2, "the patches are not seen"
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    return session.explain().to_dict()["groups"][-1]


def _walk(model, path):
    for name in path.split("."):
        model = getattr(model, name)
    return model


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "eager") for name in APPLIES), pytest.param("llama", "aot_eager", marks=pytest.mark.slow)],
)
def test_it_applies_and_equals_the_loop(name, backend):
    module, path = APPLIES[name]()
    told = run(module, path, backend)
    assert told["strategy"] == "forked", told
    assert any("of the positions were computed" in note for note in told["notes"]), told


def test_padding_on_the_left_is_looked_at_when_it_runs():
    """A query of nothing but padding is spread over all keys where the mask is finite: seen, and every position computed."""
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    mask[:, :2] = 0
    module, path = llama("eager")
    told = run(module, path, "eager", attention_mask=mask)
    assert (
        told["strategy"] == "forked"
        and "every position was computed: attention weights are on later positions" in told["notes"]
    )


class Stack(nn.Module):
    """Blocks whose positions meet in one of several ways."""

    def __init__(self, mix):
        super().__init__()
        self.blocks = nn.ModuleList(Mixer(mix) for _ in range(2))
        self.lm_head = nn.Linear(32, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


class Mixer(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.mix, self.qkv, self.conv = mix, nn.Linear(32, 96), nn.Conv1d(32, 32, 3, padding=1)

    def forward(self, x):
        return x + MIXES[self.mix](self, x)


def heads(self, x):
    return (p.view(x.shape[0], TOKENS, 4, 8).transpose(1, 2) for p in self.qkv(x).split(32, -1))


def attention(self, x, **how):
    out = nn.functional.scaled_dot_product_attention(*heads(self, x), **how)
    return out.transpose(1, 2).reshape(x.shape[0], TOKENS, 32)


def prefix(self, x):
    mask = torch.ones(TOKENS, TOKENS).tril().bool()
    mask[:3, :3] = True
    return attention(self, x, attn_mask=mask)


def normalized_first(self, x):
    """The softmax is over all keys, the mask comes behind it: its weights are zero where they must be, and yet not causal."""
    q, k, v = heads(self, x)
    weights = (q @ k.transpose(-1, -2)).softmax(-1) * torch.ones(TOKENS, TOKENS).tril()
    return (weights @ v).transpose(1, 2).reshape(x.shape[0], TOKENS, 32)


MIXES = {
    "causal": lambda self, x: attention(self, x, is_causal=True),
    "window": lambda self, x: attention(self, x, attn_mask=torch.ones(TOKENS, TOKENS).tril().triu(-3).bool()),
    "no mask": attention,
    "prefix": prefix,
    "normalized first": normalized_first,
    "conv": lambda self, x: self.conv(x.transpose(1, 2)).transpose(1, 2),
    "cumsum": lambda self, x: x.cumsum(1),
    "mean": lambda self, x: x.mean(1, keepdim=True),
    "flip": lambda self, x: x.flip(1),
    "shift": lambda self, x: torch.roll(x, 1, 1),
    "table": lambda self, x: x.masked_fill(torch.eye(TOKENS, 32).bool(), 0.5),
}
POSITIONWISE = {"causal", "window", "table"}


@pytest.mark.parametrize("mix", MIXES)
def test_what_the_graph_proves_decides(mix):
    module = seeded(Stack(mix))
    x = torch.randn(1, TOKENS, 32, generator=torch.Generator().manual_seed(0))
    hooks, model = NNsight(module), NNsight(module)
    model.compile(backend="eager")

    def patched(m):
        found = []
        for layer in range(2):
            for position in (3, TOKENS - 1):
                with m.trace(x):
                    m.blocks[layer].output[:, position] = 1.5
                    found += [m.blocks[layer].output.save(), m.lm_head.output.save()]
        return found

    with torch.no_grad():
        want = patched(hooks)
        with model.session() as session:
            got = patched(model)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    (told,) = session.explain().to_dict()["groups"]
    notes = told.get("notes", [])
    assert told["strategy"] == "forked", told
    assert any("of the positions were computed" in n for n in notes) == (mix in POSITIONWISE | LATE), told
    assert any("every position was computed" in n for n in notes) == (mix not in POSITIONWISE), told


LATE = {"no mask", "prefix", "normalized first"}  # seen when it runs


def test_out_of_memory_halves_a_forked_batch(monkeypatch):
    """The halves give the same, and both leave out what is before a patch."""
    from nnsight_fx.batching import cells, forked

    module, path = gpt2()
    tried, go = [], cells.Walk.go

    def short(self, *args):
        tried.append(len(self.cells))
        if len(self.cells) > 8:
            raise torch.OutOfMemoryError("fake")
        return go(self, *args)

    monkeypatch.setattr(forked.Walk, "go", short)
    told = run(module, path, "eager")
    assert told["strategy"] == "forked" and max(tried) > 8 and told["forwards"] >= 2, (tried, told)
    assert any("out of memory" in note for note in told["notes"])
