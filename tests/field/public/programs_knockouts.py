"""Knock-outs: neurons, experts, edges and whole modules in another's place."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import nnsight_fx

from .models import IDS, hooks, linear, seen
from .program import Program

LAST = slice(-1, None)


# -- a table of neurons -----------------------------------------------------------------------------------------------

TABLE = [(0, 3, 0.5), (0, 17, -1.0), (1, 3, 2.0), (1, 30, 0.0)]


def neurons_ours(model):
    with model.trace(IDS) as tracer:
        for layer, neuron, value in TABLE:
            model.model.layers[layer].mlp.down_proj.output[:, :, neuron] = torch.tensor(value)
        tokens = torch.topk(model.lm_head.output, 2, dim=-1).indices.save()
        tracer.stop()
    return tokens


def neurons_plain(net):
    def set_in(layer):
        def patch(out):
            out = out.clone()
            for where, neuron, value in TABLE:
                if where == layer:
                    out[:, :, neuron] = value
            return out

        return patch

    with hooks(net, {f"model.layers.{i}.mlp.down_proj": set_in(i) for i in range(2)}):
        return net(IDS).logits.topk(2).indices


# -- a router that is biased before it chooses ------------------------------------------------------------------------

BIAS = torch.tensor([3.0, -3.0, 0.0, 0.5])


def router_bias_ours(model):
    gate = model.model.layers[0].mlp.gate
    with model.trace(IDS):
        gate.source.F_linear_0.output += BIAS
        chosen, logits = gate.output[2].save(), model.lm_head.output.save()
    return chosen.sort().values, logits


def router_bias_plain(net):
    path, chosen = "model.layers.0.mlp.gate", []
    gate = net.get_submodule(path)
    (x,) = seen(net, [f"{path}:in"], IDS)
    logits = F.linear(x.reshape(-1, 32), gate.weight) + BIAS
    probabilities = logits.float().softmax(-1)
    weights, chosen = probabilities.topk(2, dim=-1)
    with hooks(net, {path: lambda out: (logits, weights / weights.sum(-1, keepdim=True), chosen)}):
        return chosen.sort().values, net(IDS).logits


# -- a transcoder whose features begin behind the first token ---------------------------------------------------------

ENCODER, DECODER = linear(32, 48).requires_grad_(False), linear(48, 32).requires_grad_(False)


def transcoder_ours(model):
    mlp = model.model.layers[0].mlp
    with model.trace(IDS):
        features = torch.relu(ENCODER(mlp.input))
        features[..., slice(0, 1), :] = 0
        mlp.output = DECODER(features)
        acts, logits = features.save(), model.lm_head.output.save()
    return acts, logits


def transcoder_plain(net):
    (x,) = seen(net, ["model.layers.0.mlp:in"], IDS)
    features = torch.relu(ENCODER(x))
    features[:, :1] = 0
    with hooks(net, {"model.layers.0.mlp": lambda out: DECODER(features)}):
        return features, net(IDS).logits


# -- attention edges knocked out at one layer -------------------------------------------------------------------------


def knockout_ours(model):
    attention = model.model.layers[1].self_attn
    with model.trace(IDS):
        args, kwargs = attention.inputs
        mask = kwargs["attention_mask"].clone()
        mask[:, :, -1, 1:3] = torch.finfo(torch.float32).min
        attention.inputs = args, {**kwargs, "attention_mask": mask}
        weights, logits = attention.output[1].save(), model.lm_head.output.save()
    return weights, logits


def knockout_plain(net):
    attention, kept = net.model.layers[1].self_attn, []

    def block(m, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        mask[:, :, -1, 1:3] = torch.finfo(torch.float32).min
        return args, {**kwargs, "attention_mask": mask}

    handles = [attention.register_forward_pre_hook(block, with_kwargs=True)]
    handles.append(attention.register_forward_hook(lambda m, a, out: kept.append(out[1])))
    logits = net(IDS, attention_mask=torch.ones_like(IDS)).logits
    for handle in handles:
        handle.remove()
    assert not kept[0][:, :, -1, 1:3].any()
    return kept[0], logits


# -- attention ablated, with the MLP read before and behind ----------------------------------------------------------


def access_order_ours(model):
    results, errors = [], []
    for order in ("attention, mlp", "mlp, attention"):
        try:
            with model.trace(IDS):
                for layer in model.model.layers:
                    if order == "mlp, attention":
                        layer.mlp.output.save()
                    layer.self_attn.output[0][:, -1, :] = 0
                    layer.mlp.output.save()
                results.append(model.lm_head.output.save())
        except nnsight_fx.OutOfOrderError as error:
            errors.append("is changed in place behind `model.layers.0.mlp.output`" in str(error))
    return results, errors


def access_order_plain(net):
    def ablate(out):
        out[0][:, -1, :] = 0

    with hooks(net, {f"model.layers.{i}.self_attn": ablate for i in range(2)}):
        return [net(IDS).logits], [True]


NNSIGHT, TL = "https://github.com/ndif-team/nnsight/issues", "https://github.com/TransformerLensOrg/TransformerLens"
PYVENE = "https://github.com/stanfordnlp/pyvene/issues"
PROGRAMS = [
    Program("set neurons from a table of layers, neurons and values", f"{NNSIGHT}/115", "Mistral", neurons_ours, neurons_plain),
    Program("bias a router's logits before it chooses the experts", "https://github.com/p-e-w/heretic/issues/322", "Mixtral", router_bias_ours, router_bias_plain, exact=False),
    Program("put a transcoder in an MLP's place, its features zero at the first token", "https://github.com/decoderesearch/circuit-tracer/pull/88", "OLMo 2", transcoder_ours, transcoder_plain),
    Program("ablate attention before and behind a read of the MLP: too late is an error", f"{NNSIGHT}/398", "Qwen2", access_order_ours, access_order_plain),
    Program("knock out attention edges from the last position at one layer", "https://github.com/matanbt/interp-jailbreak/issues/2", "Llama, eager", knockout_ours, knockout_plain),
]  # fmt: skip
