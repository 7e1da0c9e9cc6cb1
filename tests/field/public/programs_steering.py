"""Steering: vectors, adapters and autoencoders in the residual stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nnsight_fx import save, steer

from .models import IDS, OTHER, SAE, fixed, hooks, linear, seen
from .program import Program

V = fixed(32)
UNIT = V / V.norm()


# -- a control vector that keeps the norm -----------------------------------------------------------------------------


def control_ours(model):
    with model.trace(IDS):
        for layer in model.model.layers[-2:]:
            h = layer.output
            steered = h + 2.0 * V
            layer.output = steered / steered.norm(dim=-1, keepdim=True) * h.norm(dim=-1, keepdim=True)
        logits = model.lm_head.output[:, -1].save()
    return logits


def control_plain(net):
    def control(h):
        steered = h + 2.0 * V
        return steered / steered.norm(dim=-1, keepdim=True) * h.norm(dim=-1, keepdim=True)

    with hooks(net, {"model.layers.0": control, "model.layers.1": control}):
        return net(IDS).logits[:, -1]


# -- chosen tokens: positions, a slice, a mask ------------------------------------------------------------------------

MASK = torch.tensor([[0, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 1]])


def tokens_ours(model):
    layer, results = model.transformer.h[1], []
    for positions in ([2, 4, 5], slice(3, None), None):
        with model.trace(IDS):
            if positions is None:
                layer.output += MASK[:, :, None] * V
            else:
                steer(layer, V, positions=positions)
            results.append(model.lm_head.output.save())
    return results


def tokens_plain(net):
    results = []
    for mask in (torch.tensor([0, 0, 1, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1]), MASK):
        with hooks(net, {"transformer.h.1": lambda h, mask=mask: h + mask[..., None] * V}):
            results.append(net(IDS).logits)
    return results


# -- the mean of differences, with multipliers ------------------------------------------------------------------------


def contrast_ours(model):
    block = model.transformer.h[1]
    with model.trace(IDS):
        positive = block.output[0][:, -2].save()
    with model.trace(OTHER):
        negative = block.output[0][:, -2].save()
    vector, logits = (positive - negative).mean(0), []
    for multiplier in (-1.0, 0.0, 1.5):
        with model.trace(OTHER):
            block.output[0][:, 2:] += multiplier * vector  # a block of BLOOM returns a tuple
            logits.append(model.lm_head.output[:, -1].save())
    return torch.stack(logits)


def contrast_plain(net):
    positive, negative = (seen(net, ["transformer.h.1"], x)[0][0] for x in (IDS, OTHER))
    vector, logits = (positive - negative)[:, -2].mean(0), []
    for multiplier in (-1.0, 0.0, 1.5):

        def shift(out, multiplier=multiplier):
            return torch.cat([out[0][:, :2], out[0][:, 2:] + multiplier * vector], 1), *out[1:]

        with hooks(net, {"transformer.h.1": shift}):
            logits.append(net(OTHER).logits[:, -1])
    return torch.stack(logits)


# -- heads before the output projection -------------------------------------------------------------------------------

HEADS = {0: [(1, fixed(8), 0.7)], 1: [(0, fixed(8, seed=7), 1.1), (3, fixed(8, seed=8), 0.4)]}


def truthful_ours(model):
    with model.trace(IDS):
        for layer, chosen in HEADS.items():
            z = model.model.layers[layer].self_attn.o_proj.input
            for head, direction, sigma in chosen:
                z[:, -1, head * 8 : (head + 1) * 8] += 15 * sigma * direction / direction.norm()
        logits = model.lm_head.output.save()
    return logits


def truthful_plain(net):
    def shift(layer):
        def patch(z):
            z = z.clone()
            for head, direction, sigma in HEADS[layer]:
                z[:, -1, head * 8 : (head + 1) * 8] += 15 * sigma * direction / direction.norm()
            return z

        return patch

    with hooks(net, before={f"model.layers.{i}.self_attn.o_proj": shift(i) for i in HEADS}):
        return net(IDS).logits


# -- only where a condition of the prompt is met ----------------------------------------------------------------------


def conditional_ours(model):
    results = []
    for prompt in (IDS[:1], IDS[1:], OTHER[:1]):
        with model.trace(prompt):
            h = model.model.layers[0].output.mean(1)
            similarity = F.cosine_similarity(h, UNIT[None], dim=-1)
            if similarity > 0:
                model.model.layers[1].output += 4 * UNIT
            results.append((similarity.save(), model.lm_head.output[:, -1].save()))
    return results


def conditional_plain(net):
    results = []
    for prompt in (IDS[:1], IDS[1:], OTHER[:1]):
        (h,) = seen(net, ["model.layers.0"], prompt)
        similarity = F.cosine_similarity(h.mean(1), UNIT[None], dim=-1)
        met = similarity.item() > 0
        with hooks(net, {"model.layers.1": lambda h, met=met: h + 4 * UNIT if met else None}):
            results.append((similarity, net(prompt).logits[:, -1]))
    assert len({bool(s > 0) for s, _ in results}) == 2
    return results


# -- a head clamped along a direction ---------------------------------------------------------------------------------

D = UNIT[:8] / UNIT[:8].norm()


def clamp_ours(model):
    z = model.gpt_neox.layers[0].attention.dense
    with model.trace(IDS):
        head = z.input[..., 16:24]
        z.input[..., 16:24] = head + (3.0 - (head @ D))[..., None] * D
        after = (z.input[..., 16:24] @ D).save()
        logits = model.output.logits.save()
    return after, logits


def clamp_plain(net):
    kept = []

    def clamp(z):
        head = z[..., 16:24]
        new = head + (3.0 - (head @ D))[..., None] * D
        kept.append(new @ D)
        return torch.cat([z[..., :16], new, z[..., 24:]], -1)

    with hooks(net, before={"gpt_neox.layers.0.attention.dense": clamp}):
        logits = net(IDS).logits
    torch.testing.assert_close(kept[0], torch.full((2, 6), 3.0))
    return kept[0], logits


# -- an adapter that reads the module's input -------------------------------------------------------------------------

DOWN, UP = fixed(32, 4), fixed(4, 32, seed=9)


def adapter_ours(model):
    with model.trace(IDS):
        for layer in model.model.layers:
            layer.self_attn.q_proj.output += layer.self_attn.q_proj.input @ DOWN @ UP * 0.5
        logits = model.lm_head.output.save()
    return logits


def adapter_plain(net):
    def low_rank(m, args, out):
        return out + args[0] @ DOWN @ UP * 0.5

    handles = [layer.self_attn.q_proj.register_forward_hook(low_rank) for layer in net.model.layers]
    logits = net(IDS).logits
    for handle in handles:
        handle.remove()
    return logits


# -- an intervention that asks the unembedding ------------------------------------------------------------------------


def self_predicted_ours(model):
    body = model.gpt_neox
    with model.trace(IDS):
        token = model.lm_head(body.final_layer_norm(body.layers[0].output)).argmax(-1)
        body.layers[0].output += body.embed_in(token)
        logits = model.lm_head.output.save()
    return logits


def self_predicted_plain(net):
    body = net.gpt_neox

    def follow(h):
        normed = F.layer_norm(h, (32,), body.final_layer_norm.weight, body.final_layer_norm.bias, 1e-5)
        return h + F.embedding((normed @ net.lm_head.weight.T).argmax(-1), body.embed_in.weight)

    with hooks(net, {"gpt_neox.layers.0": follow}):
        return net(IDS).logits


# -- LoReFT at all layers ---------------------------------------------------------------------------------------------

R, W, B = torch.linalg.qr(fixed(32, 4))[0].T, fixed(4, 32, seed=11) / 6, fixed(4, seed=12)


def reft_ours(model):
    with model.trace(IDS):
        for layer in model.model.layers:
            h = layer.output[:, -2:]
            layer.output[:, -2:] = h + (h @ W.T + B - h @ R.T) @ R
        logits = model.lm_head.output[:, -1].save()
    return logits


def reft_plain(net):
    def reft(h):
        last = h[:, -2:]
        return torch.cat([h[:, :-2], last + (last @ W.T + B - last @ R.T) @ R], 1)

    with hooks(net, {"model.layers.0": reft, "model.layers.1": reft}):
        return net(IDS).logits[:, -1]


# -- a direction that nothing may write -------------------------------------------------------------------------------


def abliterate_ours(model):
    def without(x):
        return x - (x @ UNIT)[..., None] * UNIT

    with model.trace(IDS):
        inner = model.model
        inner.embed_tokens.output = without(inner.embed_tokens.output)
        for layer in inner.layers:
            layer.self_attn.o_proj.output = without(layer.self_attn.o_proj.output)
            layer.mlp.down_proj.output = without(layer.mlp.down_proj.output)
        left = (inner.norm.input @ UNIT).abs().max().save()
        logits = model.lm_head.output.save()
    return left < 1e-6, logits


def abliterate_plain(net):
    paths = ["model.embed_tokens"]
    paths += [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")]
    with hooks(net, {path: lambda x: x - (x @ UNIT)[..., None] * UNIT for path in paths}):
        return torch.tensor(True), net(IDS).logits


# -- a sparse autoencoder with its error ------------------------------------------------------------------------------


def spliced_sae_ours(model):
    block = model.transformer.h[0]
    block.sae = SAE()
    results = []
    for ablated in (False, True):
        with model.trace(IDS):
            x = block.output
            features = torch.relu((x - block.sae.b_dec) @ block.sae.W_enc)
            error = x - (features @ block.sae.W_dec + block.sae.b_dec)
            if ablated:
                features = features.clone()
                features[..., :24] = 0
            block.output = features @ block.sae.W_dec + block.sae.b_dec + error
            results.append(model.lm_head.output.save())
    return results


def spliced_sae_plain(net):
    sae, results = SAE(), []

    def splice(ablated):
        def patch(x):
            features = sae.encode(x)
            error = x - sae.decode(features)
            if ablated:
                features[..., :24] = 0
            return sae.decode(features) + error

        return patch

    for ablated in (False, True):
        with hooks(net, {"transformer.h.0": splice(ablated)}):
            results.append(net(IDS).logits)
    torch.testing.assert_close(results[0], net(IDS).logits)
    assert not torch.equal(*results)
    return results


# -- other positions for the rotation of one layer --------------------------------------------------------------------

ORDER = [0, 2, 1, 3, 5, 4]


def rotation_ours(model):
    layer = model.model.layers[1]
    with model.trace(IDS):
        args, kwargs = layer.self_attn.inputs
        cos, sin = kwargs["position_embeddings"]
        layer.self_attn.inputs = args, {**kwargs, "position_embeddings": (cos[:, ORDER], sin[:, ORDER])}
        logits = model.lm_head.output.save()
    return logits


def rotation_plain(net):
    def reorder(m, args, kwargs):
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (cos[:, ORDER], sin[:, ORDER])}

    handle = net.model.layers[1].self_attn.register_forward_pre_hook(reorder, with_kwargs=True)
    logits = net(IDS).logits
    handle.remove()
    return logits


# -- features of a sparse autoencoder, read alone ---------------------------------------------------------------------

TOPK = linear(32, 64).requires_grad_(False)


def latents_ours(model):
    collected = []
    for prompt in (IDS, OTHER):
        with model.trace(prompt) as tracer:
            dense = torch.relu(TOPK(model.model.layers[1].mlp.output))
            top = dense.topk(4, dim=-1)
            collected.append(save(torch.zeros_like(dense).scatter_(-1, top.indices, top.values).flatten(0, 1)))
            tracer.stop()
    return torch.cat(collected)


def latents_plain(net):
    collected = []
    for prompt in (IDS, OTHER):
        (out,) = seen(net, ["model.layers.1.mlp"], prompt)
        dense = torch.relu(TOPK(out))
        kept = dense.topk(4).values[..., -1:]
        collected.append(torch.where(dense >= kept, dense, 0).flatten(0, 1))
    return torch.cat(collected)


PYVENE, SV = "https://github.com/stanfordnlp/pyvene", "https://github.com/steering-vectors/steering-vectors/pull"
PROGRAMS = [
    Program("add a control vector to the last layers and keep each token's norm", "https://github.com/vgel/repeng/issues/31", "Mistral", control_ours, control_plain),
    Program("steer a list of positions, a slice of them, and a mask", f"{SV}/21", "GPT-2", tokens_ours, tokens_plain),
    Program("make a vector of differences at the token before the last, and try multipliers", f"{SV}/18", "BLOOM", contrast_ours, contrast_plain),
    Program("shift chosen heads before the output projection", "https://github.com/likenneth/honest_llama/issues/42", "Llama", truthful_ours, truthful_plain),
    Program("steer only where a prompt's similarity is above a threshold", "https://github.com/IBM/activation-steering/issues/2", "Qwen3", conditional_ours, conditional_plain),
    Program("clamp a head to a value along a direction", "https://github.com/EleutherAI/lm-evaluation-harness/pull/3279", "GPT-NeoX", clamp_ours, clamp_plain),
    Program("add a low-rank map of a module's input to its output", f"{PYVENE}/issues/215", "Qwen2", adapter_ours, adapter_plain),
    Program("ask the unembedding inside an intervention and embed what it says", f"{PYVENE}/pull/191", "GPT-NeoX", self_predicted_ours, self_predicted_plain, exact=False),
    Program("intervene with LoReFT at all layers", "https://github.com/stanfordnlp/pyreft/issues/59", "Llama", reft_ours, reft_plain, exact=False),
    Program("take a direction out of everything that writes the residual stream", "https://github.com/FailSpy/abliterator/issues/24", "OLMo 2", abliterate_ours, abliterate_plain),
    Program("splice a sparse autoencoder with its error, and ablate features", "https://github.com/decoderesearch/SAELens/issues/231", "GPT-2", spliced_sae_ours, spliced_sae_plain, exact=False),
    Program("give one layer's rotation the positions of other tokens", "https://github.com/TransformerLensOrg/TransformerLens/issues/985", "Llama", rotation_ours, rotation_plain),
    Program("collect the top features of a sparse autoencoder over a data set", "https://github.com/EleutherAI/delphi/pull/67", "Mistral", latents_ours, latents_plain),
]  # fmt: skip
