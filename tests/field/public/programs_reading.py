"""Reading: caches, lenses, features of vision and speech, experts, and ways to give inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nnsight_fx import LanguageModel, save

from .models import IDS, IMAGE, OTHER, fixed, hooks, seen
from .program import Program

ONES = torch.ones_like(IDS)


# -- a call without interventions -------------------------------------------------------------------------------------


def no_trace_ours(model):
    out = model.trace(IDS, trace=False)
    return out.logits, type(out).__name__


def no_trace_plain(net):
    return net(IDS).logits, "CausalLMOutputWithCrossAttentions"


# -- inputs by keyword, and what each invoke got ----------------------------------------------------------------------


def keywords_ours(model):
    with model.trace(input_ids=IDS, attention_mask=PADDED):
        hidden = model.transformer.layer[0].output.save()
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            clean = model.inputs[1]["input_ids"][0].save()
        with tracer.invoke(OTHER):
            corrupt = model.inputs[1]["input_ids"][0].save()
    return hidden, clean, corrupt


PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def keywords_plain(net):
    (hidden,) = seen(net, ["transformer.layer.0"], input_ids=IDS, attention_mask=PADDED)
    return hidden, IDS[0], OTHER[0]


# -- a cache of every second layer, with inputs -----------------------------------------------------------------------


def cached_ours(model):
    with model.trace(IDS) as tracer:
        cache = tracer.cache(modules=list(model.transformer.h[::2]) + [model.lm_head], include_inputs=True)
    block = cache.model.transformer.h[0]
    assert list(cache.keys()) == ["model.transformer.h.0", "model.lm_head"]
    return cache["model.transformer.h.0"].output, block.input, cache.model.lm_head.output, sorted(block.inputs[1])


def cached_plain(net):
    out, x, logits = seen(net, ["transformer.h.0", "transformer.h.0:in", "lm_head"], IDS, attention_mask=ONES)
    kept = []
    handle = net.transformer.h[0].register_forward_pre_hook(lambda m, a, k: kept.append(k), with_kwargs=True)
    net(IDS, attention_mask=ONES)
    handle.remove()
    return out, x, logits, sorted(kept[0])


# -- sizes first, values up to the last of some modules then ----------------------------------------------------------

NAMES = ["transformer.h.0.ln_1", "transformer.h.0.mlp.fc_out", "transformer.h.1.mlp"]


def sizes_ours(model):
    with model.scan(IDS):
        sizes = {name: tuple(model.get(name).output.shape) for name in NAMES}
    with model.trace(IDS) as tracer:
        values = save({})
        for name in NAMES:
            values[name] = model.get(name).output
        tracer.stop()
    return sizes, values


def sizes_plain(net):
    values = dict(zip(NAMES, seen(net, NAMES, IDS), strict=True))
    return {name: tuple(x.shape) for name, x in values.items()}, values


# -- a padded batch is what each prompt is alone ----------------------------------------------------------------------

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14]]


def padded_ours(model):
    with model.trace(PROMPTS):
        hidden = model.transformer.h[1].output.save()
        probabilities = model.lm_head.output[:, -1].softmax(-1).save()
    return [h[6 - len(p) :] for h, p in zip(hidden, PROMPTS, strict=True)], probabilities


def padded_plain(net):
    found = [seen(net, ["transformer.h.1", "lm_head"], torch.tensor([p])) for p in PROMPTS]
    return [h[0] for h, _ in found], torch.cat([logits[:, -1].softmax(-1) for _, logits in found])


# -- activations without those of padding -----------------------------------------------------------------------------


def flattened_ours(model):
    with model.trace({"input_ids": IDS, "attention_mask": PADDED}):
        kept = model.transformer.layer[1].output[PADDED.bool()]
        mean = kept.mean(0).save()
        kept = kept.save()
    return kept, mean


def flattened_plain(net):
    (h,) = seen(net, ["transformer.layer.1"], IDS, attention_mask=PADDED)
    kept = torch.cat([h[0], h[1, :3]])
    return kept, kept.mean(0)


# -- embeddings in place of tokens ------------------------------------------------------------------------------------

SOFT = fixed(2, 3, 32)


def embedded_ours(model):
    with model.trace(IDS) as tracer:
        tokens = model.model.embed_tokens.output.save()
        tracer.stop()
    with model.trace(inputs_embeds=torch.cat([SOFT, tokens], 1)):
        hidden, logits = model.model.layers[0].output.save(), model.lm_head.output.save()
    return hidden, logits


def embedded_plain(net):
    given = torch.cat([SOFT, net.model.embed_tokens(IDS)], 1)
    return tuple(seen(net, ["model.layers.0", "lm_head"], inputs_embeds=given))


# -- images and text --------------------------------------------------------------------------------------------------

SIGHT = {"input_ids": torch.cat([IDS[:, :2], torch.full((2, 16), 99), IDS[:, 2:]], 1), "pixel_values": IMAGE}


def sight_ours(model):
    with model.trace(**SIGHT, attention_mask=torch.ones(2, 22, dtype=torch.long)):
        model.model.multi_modal_projector.output[:, 3] = 0
        patches = model.model.vision_tower.encoder.layers[0].output[:, 1:].mean(1).save()
        text = model.model.language_model.layers[1].output[:, -1].save()
        best = model.output.logits[:, -1].topk(3).indices.save()
    return patches, text, best


def sight_plain(net):
    def blind(out):
        out = out.clone()
        out[:, 3] = 0
        return out

    paths = ["model.vision_tower.encoder.layers.0", "model.language_model.layers.1", "lm_head"]
    with hooks(net, {"model.multi_modal_projector": blind}):
        vision, text, logits = seen(net, paths, **SIGHT, attention_mask=torch.ones(2, 22, dtype=torch.long))
    return vision[:, 1:].mean(1), text[:, -1], logits[:, -1].topk(3).indices


# -- a logit lens, with each layer's own norm -------------------------------------------------------------------------


def lens_ours(model):
    with torch.no_grad(), model.trace(IDS):
        final = F.log_softmax(model.lm_head.output, dim=-1)
        entropies, divergences = save([]), save([])
        for layer in model.model.layers:
            p = F.log_softmax(model.lm_head(model.model.norm(layer.output)), dim=-1)
            entropies.append(-(p.exp() * p).sum(-1))
            divergences.append(F.kl_div(final, p, reduction="none", log_target=True).sum(-1))
    return torch.stack(entropies), torch.stack(divergences)


def lens_plain(net):
    *hidden, logits = seen(net, ["model.layers.0", "model.layers.1", "lm_head"], IDS)
    lens = [net.lm_head(net.model.norm(h)).log_softmax(-1) for h in hidden]
    entropies = torch.stack([-(p.exp() * p).sum(-1) for p in lens])
    return entropies, torch.stack([(p.exp() * (p - logits.log_softmax(-1))).sum(-1) for p in lens])


# -- the residual stream is the sum of its parts ----------------------------------------------------------------------


def parts_ours(model):
    body = model.gpt_neox
    with model.trace(IDS):
        parts = [body.embed_in.output]
        for layer in body.layers:
            parts += [layer.attention.output[0], layer.mlp.output]
        stack = torch.stack(parts).save()
        left = (stack.sum(0) - body.final_layer_norm.input).abs().max().save()
        attributed = (stack[:, :, -1] @ model.lm_head.weight[7]).save()
    return stack, left < 1e-5, attributed


def parts_plain(net):
    paths = ["gpt_neox.embed_in", *(f"gpt_neox.layers.{i}.{n}" for i in range(2) for n in ("attention", "mlp"))]
    stack = torch.stack([p[0] if isinstance(p, tuple) else p for p in seen(net, paths, IDS)])
    return stack, torch.tensor(True), stack[:, :, -1] @ net.lm_head.weight[7]


# -- a lens between attention and MLP ---------------------------------------------------------------------------------


def middle_ours(model):
    with model.trace(IDS):
        tops = save([])
        for layer in model.model.layers:
            for stream in (layer.post_attention_layernorm.input, layer.output):
                tops.append(model.lm_head(model.model.norm(stream))[:, -1].topk(3).indices)
    return torch.stack(tops)


def middle_plain(net):
    paths = [f"model.layers.{i}{n}" for i in range(2) for n in (".post_attention_layernorm:in", "")]
    return torch.stack([net.lm_head(net.model.norm(h))[:, -1].topk(3).indices for h in seen(net, paths, IDS)])


# -- neurons of all layers in one tensor, by names of one's own -------------------------------------------------------


def renamed_ours(model):
    other = LanguageModel(model._module, rename={"transformer": "model", "h": "layers", "act": "neurons"})
    with other.trace(IDS):
        stack = torch.stack([layer.mlp.neurons.output for layer in other.model.layers], dim=0).save()
    return stack


def renamed_plain(net):
    return torch.stack(seen(net, [f"transformer.h.{i}.mlp.act" for i in range(2)], IDS))


# -- from the middle of the model on ----------------------------------------------------------------------------------


def from_the_middle_ours(model):
    layers = model.model.layers
    with model.trace(IDS) as tracer:
        activations = layers[0].output.save()
        tracer.stop()
    with model.trace(IDS):
        layers[0].skip(activations * 0.5 + 1)
        logits = model.lm_head.output.save()
    return activations, logits


def from_the_middle_plain(net):
    (activations,) = seen(net, ["model.layers.0"], IDS)
    with hooks(net, {"model.layers.0": lambda h: activations * 0.5 + 1}):
        return activations, net(IDS).logits


# -- a session over a data loader, each trace stopped -----------------------------------------------------------------


def session_ours(model):
    with model.session():
        found = save([])
        for batch in torch.utils.data.DataLoader([*IDS, *OTHER], batch_size=1):
            with model.trace(batch) as tracer:
                acts = model.model.layers[0].output[0].save()
                tracer.stop()
            found.append(acts.mean(0))
    return torch.stack(list(found))


def session_plain(net):
    return torch.stack([seen(net, ["model.layers.0"], x[None])[0][0].mean(0) for x in [*IDS, *OTHER]])


# -- what a word's hidden state says in another prompt ----------------------------------------------------------------


def patchscope_ours(model):
    said = []
    for layer in range(2):
        with model.trace() as tracer:
            with tracer.invoke(IDS):
                word = model.model.layers[layer].output[:, -1]
            with tracer.invoke(OTHER):
                model.model.layers[layer].output[:, 2] = word
                said.append(model.lm_head.output[:, -1].softmax(-1).save())
    return torch.stack(said)


def patchscope_plain(net):
    said = []
    for path, h in zip(["model.layers.0", "model.layers.1"], seen(net, ["model.layers.0", "model.layers.1"], IDS), strict=True):  # fmt: skip

        def put(out, h=h):
            return torch.cat([out[:, :2], h[:, -1:], out[:, 3:]], 1)

        with hooks(net, {path: put}):
            said.append(net(OTHER).logits[:, -1].softmax(-1))
    return torch.stack(said)


NNSIGHT, TL = "https://github.com/ndif-team/nnsight", "https://github.com/TransformerLensOrg/TransformerLens/issues"
PROGRAMS = [
    Program("call the model without a trace", f"{NNSIGHT}/issues/308", "GPT-2", no_trace_ours, no_trace_plain),
    Program("give ids and mask by keyword, and read what each invoke got", f"{NNSIGHT}/issues/615", "DistilBERT", keywords_ours, keywords_plain),
    Program("cache every second layer, with inputs", f"{NNSIGHT}/issues/474", "GPT-2", cached_ours, cached_plain),
    Program("scan the sizes of named modules, then stop behind the last", f"{NNSIGHT}/issues/361", "GPT-J", sizes_ours, sizes_plain),
    Program("batch prompts of several lengths where positions are learned", f"{NNSIGHT}/issues/672", "GPT-2", padded_ours, padded_plain, exact=False),
    Program("keep activations of real tokens only", "https://github.com/FOR-sight-ai/interpreto/issues/48", "DistilBERT", flattened_ours, flattened_plain),
    Program("give embeddings in place of tokens", f"{NNSIGHT}/issues/85", "Qwen2", embedded_ours, embedded_plain),
    Program("trace a model of images and text", f"{NNSIGHT}/issues/498", "LLaVA", sight_ours, sight_plain),
    Program("find entropies and divergences of a logit lens with each layer's own norm", f"{TL}/1076", "Llama", lens_ours, lens_plain, exact=False),
    Program("check that the residual stream is the sum of its parts", f"{TL}/523", "GPT-NeoX", parts_ours, parts_plain, exact=False),
    Program("look through a lens between attention and MLP", "https://github.com/AlignmentResearch/tuned-lens/issues/104", "Qwen3", middle_ours, middle_plain),
    Program("stack neurons of all layers, under names of one's own", f"{NNSIGHT}/pull/298", "GPT-2", renamed_ours, renamed_plain),
    Program("go on from stored activations in the middle of the model", f"{NNSIGHT}/issues/358", "OLMo 2", from_the_middle_ours, from_the_middle_plain),
    Program("collect over a data loader in a session, stopping each trace", f"{NNSIGHT}/issues/399", "Mistral", session_ours, session_plain, exact=False),
    Program("ask another prompt what a hidden state says", "https://butanium.github.io/nnterp/interventions.html", "Phi-3", patchscope_ours, patchscope_plain, exact=False),
]  # fmt: skip
