"""Generation: interventions and reads at all steps, at chosen ones, with and without a cache."""

from __future__ import annotations

import torch

from nnsight_fx import save

from .models import GREEDY, IDS, SAE, every, fixed, hooks
from .program import Program

V = fixed(32)


def generated(net, prompt=IDS, **options):
    """Plain `generate`, with a mask as our models give one."""
    return net.generate(prompt, **{"attention_mask": torch.ones_like(prompt), **GREEDY, **options})


def steps(keep=lambda k: True):
    """A hook that adds V at the calls whose number `keep` holds for."""
    count = iter(range(100))
    return lambda h: h + V if keep(next(count)) else None


# -- only the prompt is steered, and the result read after some steps -------------------------------------------------


def prompt_only_ours(model):
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke({"input_ids": IDS}):
            model.transformer.h[0].output[:] += V
            for _ in range(3):
                tracer.next()
            tokens = tracer.result.save()
    return tokens


def prompt_only_plain(net):
    with hooks(net, {"transformer.h.0": steps(lambda k: k == 0)}):
        return generated(net)


# -- features ablated at all steps ------------------------------------------------------------------------------------

CODER = SAE()


def all_steps_ours(model):
    with model.generate(IDS, **GREEDY) as tracer:
        for _ in tracer.all():
            x = model.model.layers[0].output
            values, indices = torch.topk(CODER.encode(x), k=8, dim=-1)
            values = values * (indices != 7) * (indices != 11)
            latents = torch.zeros(*x.shape[:2], 48).scatter(-1, indices, values)
            model.model.layers[0].output = CODER.decode(latents)
        tokens = tracer.result.save()
    return tokens


def all_steps_plain(net):
    def ablate(x):
        latents = CODER.encode(x)
        values, indices = latents.topk(8)
        latents = torch.zeros_like(latents).scatter(-1, indices, values)
        latents[..., [7, 11]] = 0
        return CODER.decode(latents)

    with hooks(net, {"model.layers.0": ablate}):
        return generated(net)


# -- the tokens, one by one, with `.next()` ---------------------------------------------------------------------------


def each_token_ours(model):
    tokens = []
    with model.generate(IDS, **GREEDY):
        for _ in range(4):
            tokens.append(model.lm_head.output.argmax(dim=-1)[0][-1].save())
            model.lm_head.next()
    return torch.stack(tokens)


def each_token_plain(net):
    return generated(net)[0, 6:]


# -- attention weights of every step, recomputed from queries, rotations and the cache --------------------------------


def rotated(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def cached_attention_ours(model):
    attention, weights = model.model.layers[1].self_attn, []
    with model.generate(IDS, **GREEDY) as tracer:
        kept = save([])
        for _ in tracer.iter[:4]:
            cos, sin = (x[:, None] for x in attention.inputs[1]["position_embeddings"])
            q, k = (p.output.unflatten(-1, (-1, 8)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
            kept.append((rotated(q, cos, sin)[:, :, -1:], rotated(k, cos, sin)))
    keys = torch.cat([k for _, k in kept], 2).repeat_interleave(2, 1)
    for step, (q, _) in enumerate(kept):
        weights.append((q @ keys[:, :, : 6 + step].transpose(-1, -2) / 8**0.5).softmax(-1))
    return weights


def cached_attention_plain(net):
    out = generated(net, output_attentions=True, return_dict_in_generate=True)
    return [step[1][:, :, -1:] for step in out.attentions]


# -- all steps, though an end token comes early -----------------------------------------------------------------------


def early_end_ours(model):
    options = {**GREEDY, "max_new_tokens": 8, "eos_token_id": end_of(model._module)}
    with model.generate(IDS[:1], **options) as tracer:
        norms = save([])
        for _ in tracer.iter[:]:
            model.model.layers[0].output += V
            norms.append(model.model.layers[1].output[:, -1].norm())
        tokens = tracer.result.save()
    assert len(norms) == tokens.shape[1] - 6 < 8
    return tokens, torch.stack(norms)


def end_of(net):
    """The token that the steered model says third."""
    with hooks(net, {"model.layers.0": lambda h: h + V}):
        return int(generated(net, IDS[:1])[0, 8])


def early_end_plain(net):
    kept, end = [], end_of(net)

    def look(h):
        kept.append(h[:, -1].norm())

    with hooks(net, {"model.layers.0": lambda h: h + V, "model.layers.1": look}):
        return generated(net, IDS[:1], max_new_tokens=8, eos_token_id=end), torch.stack(kept)


# -- a list of steps, and a slice -------------------------------------------------------------------------------------


def chosen_steps_ours(model):
    results = []
    for chosen in ([0, 2], slice(1, 3), 3):
        with model.generate(IDS, **GREEDY) as tracer:
            if isinstance(chosen, int):
                with tracer.iter[chosen]:
                    model.transformer.h[1].output += V
            else:
                for _ in tracer.iter[chosen]:
                    model.transformer.h[1].output += V
            results.append(tracer.result.save())
    return results


def chosen_steps_plain(net):
    results = []
    for chosen in ([0, 2], [1, 2], [3]):
        with hooks(net, {"transformer.h.1": steps(lambda k, c=chosen: k in c)}):
            results.append(generated(net))
    return results


# -- a loop without an end in one invoke, what follows in another -----------------------------------------------------


def two_invokes_ours(model):
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(IDS):
            logits = save([])
            for _ in tracer.iter[:]:
                logits.append(model.lm_head.output[:, -1])
        with tracer.invoke():
            tokens = model.generator.output.save()
    return torch.stack(logits), tokens


def two_invokes_plain(net):
    out = generated(net, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits), out.sequences


# -- a cache of the hidden states of all layers and steps -------------------------------------------------------------


def all_hidden_ours(model):
    layers = list(model.gpt_neox.layers)
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache(modules=layers)
    return [cache[layer.path].output for layer in layers]


def all_hidden_plain(net):
    return every(net, ["gpt_neox.layers.0", "gpt_neox.layers.1"], lambda: generated(net))


# -- a position of the prompt, in a generation with a cache -----------------------------------------------------------


def prompt_position_ours(model):
    with model.generate(IDS, **GREEDY) as tracer:
        model.model.layers[0].output[:, 2] = 0
        model.model.layers[0].output[:, -1] += V
        steps = save([])
        for _ in tracer.iter[:]:
            steps.append(model.model.layers[0].output.shape[1])
        tokens = tracer.result.save()
    return tokens, steps


def prompt_position_plain(net):
    shapes = []

    def change(h):
        shapes.append(h.shape[1])
        if len(shapes) > 1:
            return None
        return torch.cat([h[:, :2], torch.zeros_like(h[:, :1]), h[:, 3:5], h[:, 5:] + V], 1)

    with hooks(net, {"model.layers.0": change}):
        return generated(net), shapes


# -- steered with and without a cache of keys and values --------------------------------------------------------------


def cache_or_none_ours(model):
    results = []
    for use_cache in (True, False):
        with model.generate(IDS, use_cache=use_cache, **GREEDY) as tracer:
            for _ in tracer.iter[:]:
                model.model.layers[0].mlp.output += V
            results.append(tracer.result.save())
    assert torch.equal(*results)
    return results


def cache_or_none_plain(net):
    results = []
    for use_cache in (True, False):
        with hooks(net, {"model.layers.0.mlp": lambda h: h + V}):
            results.append(generated(net, use_cache=use_cache))
    return results


# -- a probe that decides at every step -------------------------------------------------------------------------------


def probed_ours(model):
    decisions = []
    with model.generate(IDS[:1], **GREEDY) as tracer:
        for _ in tracer.iter[:4]:
            score = torch.sigmoid(model.model.layers[0].self_attn.o_proj.output[:, -1] @ V * 20).item()
            decisions.append(score < 0.5)
            if score < 0.5:
                model.model.layers[1].output += V
        tokens = tracer.result.save()
    return tokens, decisions


def probed_plain(net):
    decisions = []

    def probe(out):
        decisions.append(torch.sigmoid(out[:, -1] @ V * 20).item() < 0.5)

    with hooks(net, {"model.layers.0.self_attn.o_proj": probe, "model.layers.1": lambda h: h + V if decisions[-1] else None}):  # fmt: skip
        return generated(net, IDS[:1]), decisions


NNSIGHT, PYVENE = "https://github.com/ndif-team/nnsight", "https://github.com/stanfordnlp/pyvene/issues"
PROGRAMS = [
    Program("steer the prompt alone and read the result after `tracer.next()`", f"{NNSIGHT}/issues/600", "GPT-2", prompt_only_ours, prompt_only_plain),
    Program("ablate features of a top-k autoencoder in `tracer.all()`", f"{NNSIGHT}/issues/510", "Mistral", all_steps_ours, all_steps_plain),
    Program("save the token of each step with `lm_head.next()`", f"{NNSIGHT}/issues/411", "Llama", each_token_ours, each_token_plain),
    Program("recompute attention weights at each step from rotated queries and keys", f"{NNSIGHT}/issues/466", "Llama, eager", cached_attention_ours, cached_attention_plain, exact=False),
    Program("steer all steps of a generation that ends before its limit, with code behind the loop", f"{NNSIGHT}/issues/488", "Qwen2", early_end_ours, early_end_plain),
    Program("intervene at a list of steps, a slice and a single one", f"{NNSIGHT}/pull/274", "GPT-2", chosen_steps_ours, chosen_steps_plain),
    Program("loop without an end in one invoke and read the output in another", f"{NNSIGHT}/pull/613", "OPT", two_invokes_ours, two_invokes_plain),
    Program("cache all layers over all generated tokens", "https://github.com/TransformerLensOrg/TransformerLens/issues/889", "GPT-NeoX", all_hidden_ours, all_hidden_plain),
    Program("intervene at positions of the prompt while generating with a cache", f"{PYVENE}/193", "Llama", prompt_position_ours, prompt_position_plain),
    Program("generate the same with and without a key-value cache", "https://github.com/hijohnnylin/neuronpedia/issues/163", "Phi-3", cache_or_none_ours, cache_or_none_plain),
    Program("let a probe decide at every step whether to intervene", f"{NNSIGHT}/issues/281", "Qwen3", probed_ours, probed_plain),
]  # fmt: skip
