"""Generation that begins, goes on or ends in a way of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nnsight_fx import save

from .models import GREEDY, IDS, every, fixed, hooks
from .program import Program

V = fixed(32)


def generated(net, prompt=IDS, **options):
    """Plain `generate`, with a mask as our models give one."""
    return net.generate(prompt, **{"attention_mask": torch.ones_like(prompt), **GREEDY, **options})


def steps(keep=lambda k: True):
    """A hook that adds V at the calls whose number `keep` holds for."""
    count = iter(range(100))
    return lambda h: h + V if keep(next(count)) else None


# -- a loop of one's own, without `generate` --------------------------------------------------------------------------


def own_loop_ours(model):
    tokens, attended = IDS, []
    for _ in range(3):
        with model.trace(tokens):
            attended.append(model.model.layers[0].self_attn.output[0][:, -1].save())
            model.model.layers[1].mlp.output *= 0.5
            logits = model.lm_head.output[:, -1].save()
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens, torch.stack(attended)


def own_loop_plain(net):
    tokens, attended = IDS, []

    def keep(out):
        attended.append(out[0][:, -1])

    with hooks(net, {"model.layers.0.self_attn": keep, "model.layers.1.mlp": lambda out: out * 0.5}):
        for _ in range(3):
            tokens = torch.cat([tokens, net(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens, torch.stack(attended)


# -- an encoder in front of the loop, and the decoder in it -----------------------------------------------------------


def encoder_ours(model):
    with model.generate(IDS, **GREEDY) as tracer:
        model.encoder.block[1].output[0][:] += V
        read = save([])
        for _ in tracer.iter[:]:
            model.decoder.block[0].layer[1].EncDecAttention.o.output *= 2
            read.append(model.decoder.block[0].output[0][:, -1])
        tokens = tracer.result.save()
    return tokens, torch.stack(read)


def encoder_plain(net):
    kept = []

    def keep(out):
        kept.append(out[0][:, -1])

    changes = {
        "encoder.block.1": lambda out: (out[0] + V, *out[1:]),
        "decoder.block.0.layer.1.EncDecAttention.o": lambda out: out * 2,
        "decoder.block.0": keep,
    }
    with hooks(net, changes):
        tokens = generated(net)
    return tokens, torch.stack(kept)


# -- `.source` looked at, then a generation ---------------------------------------------------------------------------

RANDOM = fixed(2, 6, 32)


def source_first_ours(model):
    with model.trace(IDS):
        names = str(model.model.layers[0].self_attn.source)
        scaled = model.model.layers[0].self_attn.source.attention_interface_0.output[0].save()
    with model.generate(IDS, **GREEDY) as tracer:
        model.model.layers[0].output = RANDOM
        tokens = tracer.result.save()
    return "attention_interface" in names, scaled, tokens


def source_first_plain(net):
    ((z,),) = every(net, ["model.layers.0.self_attn.o_proj:in"], lambda: net(IDS))
    count = iter(range(9))
    with hooks(net, {"model.layers.0": lambda h: RANDOM if next(count) == 0 else None}):
        return True, z.unflatten(-1, (4, 8)), generated(net)


# -- hidden states that `generate` itself collects --------------------------------------------------------------------


def collected_ours(model):
    asked = {"output_hidden_states": True, "return_dict_in_generate": True}
    with model.generate(IDS, **GREEDY, **asked) as tracer:
        model.model.layers[0].output[:, -1] += V
        result = save(tracer.result)
    return result.sequences, result.hidden_states


def collected_plain(net):
    count = iter(range(9))

    def change(h):
        return torch.cat([h[:, :-1], h[:, -1:] + V], 1) if next(count) == 0 else None

    with hooks(net, {"model.layers.0": change}):
        out = generated(net, output_hidden_states=True, return_dict_in_generate=True)
    return out.sequences, out.hidden_states


# -- a generation that goes on from the keys and values of another ----------------------------------------------------


def goes_on_ours(model):
    with model.generate(IDS, return_dict_in_generate=True, **GREEDY) as tracer:
        model.model.layers[0].output += V
        first = save(tracer.result)
    with model.generate(first.sequences, past_key_values=first.past_key_values, **GREEDY) as tracer:
        tokens = tracer.result.save()
    return tokens


def goes_on_plain(net):
    with hooks(net, {"model.layers.0": steps(lambda k: k == 0)}):
        first = generated(net, return_dict_in_generate=True)
    return generated(net, first.sequences, past_key_values=first.past_key_values)


# -- prompts of several lengths, each with its own vector -------------------------------------------------------------


def own_vectors_ours(model):
    vectors = torch.stack([V, -V])
    with model.generate([[5, 6, 7, 8], [9, 10]], **GREEDY) as tracer:
        tokens = save([])
        for _ in tracer.all():
            model.transformer.h[0].output += vectors[:, None]
            tokens.append(F.softmax(model.lm_head.output[:, -1], dim=-1).argmax(-1))
    return torch.stack(tokens, 1)


def own_vectors_plain(net):
    rows = []
    for prompt, vector in (([5, 6, 7, 8], V), ([9, 10], -V)):
        with hooks(net, {"transformer.h.0": lambda h, vector=vector: h + vector}):
            rows.append(generated(net, torch.tensor([prompt]))[:, len(prompt) :])
    return torch.cat(rows)


NNSIGHT, PYVENE = "https://github.com/ndif-team/nnsight", "https://github.com/stanfordnlp/pyvene/issues"
PROGRAMS = [
    Program("generate in a loop of one's own, reading attention and changing MLPs", "https://github.com/mistralai/mistral-inference/issues/246", "Mistral", own_loop_ours, own_loop_plain),
    Program("steer T5's encoder and change cross-attention in each decoder step", "https://github.com/stanfordnlp/pyvene/pull/240", "T5", encoder_ours, encoder_plain),
    Program("look into `.source`, then generate with a layer replaced", f"{NNSIGHT}/issues/481", "Gemma 2", source_first_ours, source_first_plain),
    Program("get the hidden states that `generate` collects, with an intervention in them", "https://github.com/huggingface/transformers/issues/29839", "Qwen2", collected_ours, collected_plain),
    Program("go on generating from the keys and values of a steered generation", "https://github.com/huggingface/transformers/issues/24841", "Llama", goes_on_ours, goes_on_plain),
    Program("generate for padded prompts, each with a vector of its own", f"{NNSIGHT}/issues/369", "GPT-2", own_vectors_ours, own_vectors_plain, exact=False),
]  # fmt: skip
