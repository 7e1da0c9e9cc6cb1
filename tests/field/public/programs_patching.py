"""Patching, ablation and knock-outs: a value of one run, or none, in another."""

from __future__ import annotations

import torch

import nnsight_fx
from nnsight_fx import save

from .models import IDS, OTHER, fixed, hooks, seen
from .program import Program

LAST = slice(-1, None)


# -- a function vector ------------------------------------------------------------------------------------------------


def function_vector_ours(model):
    with model.trace() as tracer:
        with tracer.invoke(torch.cat([OTHER, IDS])):
            vector = model.transformer.h[0].output[:, -1].mean(dim=0).save()
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            clean = model.lm_head.output[:, -1].save()
        with tracer.invoke(IDS):
            model.transformer.h[0].output[:, -1] += vector
            steered = model.lm_head.output[:, -1].save()
    return vector, clean, steered


def function_vector_plain(net):
    (h,) = seen(net, ["transformer.h.0"], torch.cat([OTHER, IDS]))
    vector = h[:, -1].mean(0)
    clean = net(IDS).logits[:, -1]
    with hooks(net, {"transformer.h.0": lambda h: torch.cat([h[:, :-1], h[:, -1:] + vector], 1)}):
        return vector, clean, net(IDS).logits[:, -1]


# -- every layer and position, each an invoke of one trace ------------------------------------------------------------


def grid_ours(model):
    with model.trace() as tracer:
        grid = save([])
        with tracer.invoke(IDS[:1]):
            clean = [model.transformer.h[layer].output for layer in range(2)]
        for layer in range(2):
            for position in range(3):
                with tracer.invoke(OTHER[:1]):
                    model.transformer.h[layer].output[:, position, :] = clean[layer][:, position, :]
                    grid.append(model.lm_head.output[0, -1])
    return torch.stack(grid)


def grid_plain(net):
    clean, grid = seen(net, ["transformer.h.0", "transformer.h.1"], IDS[:1]), []
    for layer in range(2):
        for position in range(3):

            def patch(h, layer=layer, position=position):
                h = h.clone()
                h[:, position] = clean[layer][:, position]
                return h

            with hooks(net, {f"transformer.h.{layer}": patch}):
                grid.append(net(OTHER[:1]).logits[0, -1])
    return torch.stack(grid)


# -- a value of an earlier trace: saved, not saved, or of a later layer -----------------------------------------------


def unset_ours(model):
    layers = model.model.decoder.layers
    with model.trace(IDS):
        hidden, unsaved = layers[0].output.save(), layers[1].output
    with model.trace(OTHER):
        layers[0].output = hidden
        patched = model.lm_head.output.save()
    errors = []
    for wrong in ("unsaved", "later"):
        try:
            with model.trace(OTHER):
                layers[0].output = unsaved if wrong == "unsaved" else layers[1].output
                model.lm_head.output.save()
        except (nnsight_fx.UnsavedValueError, nnsight_fx.OutOfOrderError) as error:
            errors.append(type(error).__name__)
    return patched, errors


def unset_plain(net):
    (hidden,) = seen(net, ["model.decoder.layers.0"], IDS)
    with hooks(net, {"model.decoder.layers.0": lambda h: hidden}):
        return net(OTHER).logits, ["UnsavedValueError", "OutOfOrderError"]


# -- key and value heads of grouped attention -------------------------------------------------------------------------


def heads_of(x, heads):
    return x.view(*x.shape[:-1], heads, -1)


def kv_heads_ours(model):
    attention, heads = model.model.layers[1].self_attn, model.config.num_key_value_heads
    with model.trace(IDS):
        k, v = (save(heads_of(p.output, heads)) for p in (attention.k_proj, attention.v_proj))
    with model.trace(OTHER):
        for proj, clean in ((attention.k_proj, k), (attention.v_proj, v)):
            heads_of(proj.output, heads)[:, :, 1] = clean[:, :, 1]
        logits = model.lm_head.output[:, -1].save()
    return logits


def kv_heads_plain(net):
    paths = ["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"]
    k, v = seen(net, paths, IDS)

    def patch(clean):
        return lambda out: torch.cat([out[..., :8], clean[..., 8:]], -1)

    with hooks(net, dict(zip(paths, (patch(k), patch(v)), strict=True))):
        return net(OTHER).logits[:, -1]


# -- direct path: one head's change into the queries of a later layer -------------------------------------------------


def direct_path_ours(model):
    first, second = model.transformer.h
    with model.trace(IDS):
        clean = first.attn.c_proj.input.save()
    with model.trace(OTHER):
        delta = (clean - first.attn.c_proj.input)[..., 8:16] @ first.attn.c_proj.weight[8:16]
        scale = (second.ln_1.input.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        second.attn.c_attn.output[..., :32] += (delta / scale) @ second.attn.c_attn.weight[:, :32]
        logits = model.lm_head.output.save()
    return logits


def direct_path_plain(net):
    first, second = net.transformer.h
    (clean,) = seen(net, ["transformer.h.0.attn.c_proj:in"], IDS)
    corrupt, resid = seen(net, ["transformer.h.0.attn.c_proj:in", "transformer.h.1.ln_1:in"], OTHER)
    delta = (clean - corrupt)[..., 8:16] @ first.attn.c_proj.weight[8:16]
    scale = (resid.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    more = (delta / scale) @ second.attn.c_attn.weight[:, :32]
    with hooks(net, {"transformer.h.1.attn.c_attn": lambda qkv: torch.cat([qkv[..., :32] + more, qkv[..., 32:]], -1)}):
        return net(OTHER).logits


# -- one head at one position -----------------------------------------------------------------------------------------


def head_at_position_ours(model):
    z = model.model.decoder.layers[1].self_attn.out_proj
    with model.trace(IDS):
        source = z.input.save()
    with model.trace(OTHER):
        z.input[:, 3, 16:24] = source[:, 2, 16:24]
        logits = model.output.logits.save()
    return logits


def head_at_position_plain(net):
    path = "model.decoder.layers.1.self_attn.out_proj"
    (source,) = seen(net, [f"{path}:in"], IDS)

    def patch(z):
        z = z.clone()
        z[:, 3, 16:24] = source[:, 2, 16:24]
        return z

    with hooks(net, before={path: patch}):
        return net(OTHER).logits


# -- query heads exchanged --------------------------------------------------------------------------------------------


def query_heads_ours(model):
    q = model.model.layers[0].self_attn.q_proj
    with model.trace(IDS):
        heads = heads_of(q.output, 4).permute(0, 2, 1, 3)
        q.output = heads[:, [1, 0, 3, 2]].permute(0, 2, 1, 3).flatten(2)
        logits = model.output.logits.save()  # capped, behind the unembedding
    return logits


def query_heads_plain(net):
    def exchange(q):
        a, b, c, d = q.split(8, -1)
        return torch.cat([b, a, d, c], -1)

    with hooks(net, {"model.layers.0.self_attn.q_proj": exchange}):
        return net(IDS).logits


# -- the input of the queries, not of keys and values -----------------------------------------------------------------


def query_input_ours(model):
    attention = model.model.layers[1].self_attn
    with model.trace(IDS):
        attention.q_proj.input = torch.zeros_like(attention.q_proj.input)
        keys, logits = attention.k_proj.input.save(), model.lm_head.output.save()
    with model.trace(IDS):
        attention.q_proj.input[:] = 0  # the tensor itself, which keys and values read, too
        all_three = model.lm_head.output.save()
    return keys, logits, all_three


def query_input_plain(net):
    (keys,) = seen(net, ["model.layers.1.self_attn.k_proj:in"], IDS)
    results = []
    for names in ("q", "qkv"):
        with hooks(net, before={f"model.layers.1.self_attn.{n}_proj": torch.zeros_like for n in names}):
            results.append(net(IDS).logits)
    return keys, *results


# -- a head without its value, for a while ----------------------------------------------------------------------------


def ablated_loss_ours(model):
    with model.edit() as ablated:
        ablated.transformer.h[0].attn.c_attn.output[..., 64 + 8 : 64 + 16] = 0.0
    losses = []
    for each in (ablated, model, ablated):
        with each.trace(IDS, labels=IDS):
            losses.append(each.output.loss.save())
    return torch.stack(losses)


def ablated_loss_plain(net):
    def ablate(qkv):
        qkv = qkv.clone()
        qkv[..., 72:80] = 0
        return qkv

    with hooks(net, {"transformer.h.0.attn.c_attn": ablate}):
        ablated = net(IDS, labels=IDS).loss
    return torch.stack([ablated, net(IDS, labels=IDS).loss, ablated])


# -- causal tracing ---------------------------------------------------------------------------------------------------

ROWS, NOISE = IDS[:1].repeat(3, 1), fixed(2, 2, 32)


def causal_trace_ours(model):
    with torch.no_grad(), model.trace(ROWS):
        model.transformer.wte.output[1:, 1:3] += NOISE
        for block in model.transformer.h:
            out = block.mlp.output
            out[1:, 2] = out[0, 2]
        probs = torch.softmax(model.lm_head.output[1:, -1], dim=-1).mean(0).save()
    return probs


def causal_trace_plain(net):
    def corrupt(e):
        e = e.clone()
        e[1:, 1:3] += NOISE
        return e

    def restore(out):
        out = out.clone()
        out[1:, 2] = out[0, 2]
        return out

    with hooks(net, {"transformer.wte": corrupt, "transformer.h.0.mlp": restore, "transformer.h.1.mlp": restore}):
        return net(ROWS).logits[1:, -1].softmax(-1).mean(0)


# -- an interchange in a subspace -------------------------------------------------------------------------------------

U = torch.linalg.qr(fixed(32, 1))[0]


def subspace_ours(model):
    layer, projection = model.model.layers[0], U @ U.T
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            source = layer.output[:, -1]
        with tracer.invoke(OTHER):
            layer.output[:, -1] = layer.output[:, -1] + (source - layer.output[:, -1]) @ projection
            logits = model.lm_head.output[:, -1].save()
    return logits


def subspace_plain(net):
    (source,) = seen(net, ["model.layers.0"], IDS)

    def exchange(h):
        return torch.cat([h[:, :-1], h[:, -1:] + (source - h)[:, -1:] @ (U @ U.T)], 1)

    with hooks(net, {"model.layers.0": exchange}):
        return net(OTHER).logits[:, -1]


NNSIGHT, TL = "https://github.com/ndif-team/nnsight/issues", "https://github.com/TransformerLensOrg/TransformerLens"
PYVENE = "https://github.com/stanfordnlp/pyvene/issues"
PROGRAMS = [
    Program("take the mean of the last tokens of one trace, add it in an invoke of another", f"{NNSIGHT}/607", "GPT-2", function_vector_ours, function_vector_plain, exact=False),
    Program("patch every layer and position, all as invokes of one trace", f"{NNSIGHT}/502", "GPT-2", grid_ours, grid_plain, exact=False),
    Program("patch from an earlier trace; an unsaved or later value must not pass in silence", f"{NNSIGHT}/143", "OPT", unset_ours, unset_plain),
    Program("patch key and value heads where they are fewer than query heads", f"{TL}/issues/980", "Llama", kv_heads_ours, kv_heads_plain),
    Program("patch the direct path from one head into the queries of the next layer", f"{TL}/issues/111", "GPT-2", direct_path_ours, direct_path_plain),
    Program("exchange one head at one position with another prompt's", f"{PYVENE}/17", "OPT", head_at_position_ours, head_at_position_plain),
    Program("permute query heads of a model that is not GPT-2", f"{PYVENE}/158", "Gemma 2", query_heads_ours, query_heads_plain),
    Program("zero what the queries get, while keys and values get the same tensor", f"{TL}/pull/336", "Qwen2", query_input_ours, query_input_plain),
    Program("ablate a value head for some calls and compare losses", f"{TL}/pull/200", "GPT-2", ablated_loss_ours, ablated_loss_plain),
    Program("corrupt the subject's embeddings in all rows but one and restore a window of MLPs from that", "https://github.com/kmeng01/rome/issues/40", "GPT-J", causal_trace_ours, causal_trace_plain),
    Program("exchange what lies in a one-dimensional subspace", "https://github.com/kdu4108/context-vs-prior-finetuning/issues/1", "Phi-3", subspace_ours, subspace_plain, exact=False),
]  # fmt: skip
