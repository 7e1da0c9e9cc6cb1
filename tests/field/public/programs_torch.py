"""What users of torch's own hooks ran into: keywords, shared modules, attention, adapters."""

from __future__ import annotations

import torch

from nnsight_fx import save

from .models import IDS, every, fixed, hooks, seen
from .program import Program

X = fixed(2, 5, 16)


def shared_relu_ours(model):
    with model.trace(fixed(3, 8)) as tracer:
        kept = save([])
        for call in tracer.iter[:3]:
            if call == 1:
                model.relu.output *= 0.5
            kept.append((model.relu.input, model.relu.output))
        out = model.output.save()
    return list(kept), out


def shared_relu_plain(net):
    count = iter(range(9))
    outs = []

    def halve(out):
        outs.append(out * 0.5 if next(count) == 1 else out)
        return outs[-1]

    with hooks(net, {"relu": halve}):
        (given,) = every(net, ["relu:in"], lambda: net(fixed(3, 8)))
    return list(zip(given, outs, strict=True)), outs[-1]


def head_weights_ours(model):
    with model.trace(X):
        args, kwargs = model.attn.inputs
        model.attn.inputs = args, {**kwargs, "need_weights": True, "average_attn_weights": False}
        weights, out = model.attn.output[1].save(), model.output.save()
    return weights, out


def head_weights_plain(net):
    out, weights = net.attn(X, X, X, need_weights=True, average_attn_weights=False)
    return weights, net.norm(X + out)


def fast_path_ours(model):
    with model.trace(X):
        attended = model.layers[0].self_attn.output[0].save()
        model.layers[1].linear1.output[..., 3] = 0
        out = model.output.save()
    return attended, out


def fast_path_plain(net):
    def without(h):
        h = h.clone()
        h[..., 3] = 0
        return h

    kept = []
    with hooks(net, {"layers.1.linear1": without}):
        (attended,) = every(net, ["layers.0.self_attn"], lambda: kept.append(net(X)))
    return attended[0][0], kept[0]


def keyword_inputs_ours(model):
    with model.trace(IDS):
        args, kwargs = model.model.layers[1].inputs
        names = sorted(kwargs)
        cos = kwargs["position_embeddings"][0].save()
        hidden = args[0].save()
    return names, cos, hidden


def keyword_inputs_plain(net):
    kept = []
    handle = net.model.layers[1].register_forward_pre_hook(lambda m, a, k: kept.append((a, k)), with_kwargs=True)
    net(IDS, attention_mask=torch.ones_like(IDS))
    handle.remove()
    args, kwargs = kept[0]
    return sorted(kwargs), kwargs["position_embeddings"][0], args[0]


def base_or_tuned_ours(model):
    layers, found = model.get("base_model.model.model.layers"), []
    for tuned in (True, False):
        with model.trace(IDS):
            if not tuned:
                for layer in layers:
                    for proj in (layer.self_attn.q_proj, layer.self_attn.v_proj):
                        proj.lora_B.default.output = torch.zeros_like(proj.lora_B.default.output)
            found.append(layers[1].output.save())
    return found


def base_or_tuned_plain(net):
    path = "base_model.model.model.layers.1"
    (tuned,) = seen(net, [path], IDS)
    with net.disable_adapter():
        (base,) = seen(net, [path], IDS)
    assert not torch.equal(tuned, base)
    return [tuned, base]


PROGRAMS = [
    Program("keep what a ReLU that runs three times gets and returns", "https://github.com/jmschrei/tangermeme/pull/54", "a shared ReLU", shared_relu_ours, shared_relu_plain),
    Program("get every head's weights from attention that is asked for none", "https://github.com/pytorch/pytorch/issues/34537", "nn.MultiheadAttention", head_weights_ours, head_weights_plain, exact=False),
    Program("hook attention in an encoder layer that has a fast path", "https://github.com/pytorch/pytorch/issues/128413", "nn.TransformerEncoder", fast_path_ours, fast_path_plain, exact=False),
    Program("read the keyword inputs of a decoder layer", "https://github.com/pytorch/pytorch/issues/156695", "Qwen2", keyword_inputs_ours, keyword_inputs_plain),
    Program("compare hidden states with an adapter and without it", "https://github.com/huggingface/peft/issues/2802", "LoRA on Llama", base_or_tuned_ours, base_or_tuned_plain),
]  # fmt: skip
