"""Features: experts, state spaces, speech, images, and what comes of them later."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers.models.vit.modeling_vit import ViTLayer

from nnsight_fx import save

from .models import IDS, IMAGE, every, fixed, hooks, seen
from .program import Program

ONES = torch.ones_like(IDS)


# -- experts ----------------------------------------------------------------------------------------------------------


def experts_ours(model):
    with model.trace(IDS):
        logits, weights, chosen = model.model.layers[0].mlp.gate.output
        counts = torch.bincount(chosen.flatten(), minlength=4).save()
        per_token = logits.unflatten(0, IDS.shape).save()
        model.model.layers[1].mlp.gate.output = [
            torch.stack([x[..., 0]] * 2, -1) if i == 2 else x
            for i, x in enumerate(model.model.layers[1].mlp.gate.output)
        ]
        out = model.lm_head.output.save()
    return counts, per_token, out


def experts_plain(net):
    def first_twice(out):
        return out[0], out[1], torch.stack([out[2][:, 0]] * 2, -1)

    with hooks(net, {"model.layers.1.mlp.gate": first_twice}):
        (logits, _, chosen), out = seen(net, ["model.layers.0.mlp.gate", "lm_head"], IDS)
    return torch.bincount(chosen.flatten(), minlength=4), logits.view(2, 6, 4), out


def shared_expert_ours(model):
    mlp = model.model.layers[0].mlp
    with model.trace(IDS):
        shared = mlp.shared_expert.output.save()
        mlp.shared_expert.output = torch.zeros_like(shared)
        gate = torch.sigmoid(mlp.shared_expert_gate.output).view(2, 6).save()
        routed, logits = mlp.output.save(), model.lm_head.output.save()
    return gate, shared, routed, logits


def shared_expert_plain(net):
    path = "model.layers.0.mlp"
    gate, shared = seen(net, [f"{path}.shared_expert_gate", f"{path}.shared_expert"], IDS)
    with hooks(net, {f"{path}.shared_expert": torch.zeros_like}):
        routed, logits = seen(net, [path, "lm_head"], IDS)
    return gate.sigmoid().view(2, 6), shared, routed, logits


# -- a state space model ----------------------------------------------------------------------------------------------


def ssm_ours(model):
    with model.trace(IDS):
        mixers = [layer.mixer for layer in model.backbone.layers]
        steps = F.softplus(mixers[0].x_proj.output[..., :2] @ mixers[0].dt_proj.weight.T).mean().save()
        mixers[1].x_proj.output[..., :2] = 0
        scans = [m.out_proj.input.save() for m in mixers]
        logits = model.lm_head.output[:, -1].save()
    return scans, steps, logits


def ssm_plain(net):
    layer = "backbone.layers.{}.mixer.{}"

    def still(out):
        return torch.cat([torch.zeros_like(out[..., :2]), out[..., 2:]], -1)

    paths = [layer.format(0, "out_proj:in"), layer.format(1, "out_proj:in"), layer.format(0, "x_proj"), "lm_head"]
    with hooks(net, {layer.format(1, "x_proj"): still}):
        a, b, x, logits = seen(net, paths, IDS)
    steps = x[..., :2] @ net.backbone.layers[0].mixer.dt_proj.weight.T
    return [a, b], F.softplus(steps).mean(), logits[:, -1]


# -- speech -----------------------------------------------------------------------------------------------------------

SPEECH = {"input_features": fixed(2, 16, 40), "decoder_input_ids": IDS[:, :4]}


def speech_ours(model):
    with model.trace(**SPEECH):
        states = torch.stack([layer.output for layer in model.model.encoder.layers]).save()
        heard = torch.stack([layer.encoder_attn.output[1] for layer in model.model.decoder.layers]).mean(2).save()
    return states, heard.argmax(-1)


def speech_plain(net):
    encoder, decoder = ([f"model.{n}.layers.{i}{m}" for i in range(2)] for n, m in (("encoder", ""), ("decoder", ".encoder_attn")))  # fmt: skip
    a, b, c, d = seen(net, encoder + decoder, **SPEECH)
    return torch.stack([a, b]), torch.stack([c[1], d[1]]).mean(2).argmax(-1)


# -- vision -----------------------------------------------------------------------------------------------------------


def attention_map_ours(model):
    with model.trace(IMAGE):
        attention = model.encoder.layer[-1].attention
        q, k = (p.output.unflatten(-1, (4, 8)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
        maps = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1)[:, :, 0, 1:].unflatten(-1, (4, 4)).save()
        tokens = [layer.output for layer in model.encoder.layer]
        patches = torch.stack([model.layernorm(t)[:, 1:] for t in tokens]).save()
    return maps, patches


def attention_map_plain(net):
    path = "encoder.layer.1.attention.{}_proj"
    q, k, *tokens = seen(net, [path.format("q"), path.format("k"), "encoder.layer.0", "encoder.layer.1"], IMAGE)
    q, k = (x.view(2, 17, 4, 8).transpose(1, 2) for x in (q, k))
    maps = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)[:, :, 0, 1:]
    return maps.unflatten(-1, (4, 4)), torch.stack([net.layernorm(t)[:, 1:] for t in tokens])


def both_towers_ours(model):
    vision, text = model.vision_model, model.text_model
    with model.trace(input_ids=IDS, attention_mask=ONES, pixel_values=IMAGE):
        lens = [model.visual_projection(vision.post_layernorm(layer.output[:, 0])) for layer in vision.encoder.layers]
        words = text.encoder.layers[0].output[:, 1].save()
        similar = (F.normalize(torch.stack(lens), dim=-1) @ F.normalize(model.text_projection.output, dim=-1).T).save()
    return words, similar


def both_towers_plain(net):
    layers = [f"vision_model.encoder.layers.{i}" for i in range(2)]
    found = seen(net, [*layers, "text_model.encoder.layers.0", "text_projection"], input_ids=IDS, attention_mask=ONES, pixel_values=IMAGE)  # fmt: skip
    *images, words, text = found
    lens = [net.visual_projection(net.vision_model.post_layernorm(h[:, 0])) for h in images]
    return words[:, 1], F.normalize(torch.stack(lens), dim=-1) @ F.normalize(text, dim=-1).T


def by_class_ours(model):
    blocks = [envoy for _, envoy in model.named_modules() if isinstance(envoy._module, ViTLayer)]
    with model.trace(IMAGE):
        hidden = save([block.output for block in blocks])
        last = model.vit.layernorm.output.save()
        again = (model.vit.layernorm(hidden[-1]) - last).abs().max().save()
    return hidden, last, again


def by_class_plain(net):
    *hidden, last = seen(net, ["vit.layers.0", "vit.layers.1", "vit.layernorm"], IMAGE)
    return hidden, last, torch.tensor(0.0)


def windows_ours(model):
    with model.trace(IMAGE):
        model.encoder.layers[0].blocks[0].mlp.output[..., 0] = 0
        stages = [stage.output for stage in model.encoder.layers]
        stages = save([s[0] if isinstance(s, tuple) else s for s in stages])
        pooled = model.output.pooler_output.save()
    return stages, pooled


def windows_plain(net):
    def without(out):
        out = out.clone()
        out[..., 0] = 0
        return out

    with hooks(net, {"encoder.layers.0.blocks.0.mlp": without}):
        kept, out = [], None
        found = every(net, ["encoder.layers.0", "encoder.layers.1"], lambda: kept.append(net(IMAGE)))
        out = kept[0].pooler_output
    stages = [f[0][0] if isinstance(f[0], tuple) else f[0] for f in found]
    return stages, out


NNSIGHT, TL = "https://github.com/ndif-team/nnsight", "https://github.com/TransformerLensOrg/TransformerLens/issues"
PROGRAMS = [
    Program("read router logits and count experts, and choose others", "https://github.com/vllm-project/vllm/issues/9905", "Mixtral", experts_ours, experts_plain, exact=False),
    Program("read and ablate the expert that all tokens share", f"{TL}/1464", "Qwen2-MoE", shared_expert_ours, shared_expert_plain),
    Program("read what a state space layer has scanned and change its step", "https://github.com/state-spaces/mamba/issues/208", "Mamba", ssm_ours, ssm_plain, exact=False),
    Program("stack Whisper's hidden states and align by cross-attention", "https://github.com/speechbrain/speechbrain/pull/1751", "Whisper", speech_ours, speech_plain),
    Program("map the last layer's attention and keep patches of all layers", "https://github.com/facebookresearch/dinov2/issues/69", "DINOv2", attention_map_ours, attention_map_plain, exact=False),
    Program("compare every layer of an image encoder with the text", "https://github.com/mlfoundations/open_clip/issues/827", "CLIP", both_towers_ours, both_towers_plain, exact=False),
    Program("hook blocks by their class, and find the last norm again", "https://github.com/facebookresearch/segment-anything/issues/695", "ViT", by_class_ours, by_class_plain),
    Program("read the stages of a windowed transformer", "https://github.com/jacobgil/pytorch-grad-cam/issues/426", "Swin", windows_ours, windows_plain),
]  # fmt: skip
