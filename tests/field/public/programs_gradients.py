"""Gradients at inner values: read, set, cut, differentiated again, and trained with."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from nnsight_fx import save

from .models import IDS, IMAGE, OTHER, fixed, hooks, linear, seen
from .program import Program


def metric(logits):
    """A logit difference of two tokens, summed over the prompts."""
    return (logits[:, -1, 7] - logits[:, -1, 11]).sum()


# -- attribution patching over two invokes ----------------------------------------------------------------------------


def attribution_ours(model):
    heads = [block.attn.c_proj for block in model.transformer.h]
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            clean = [p.input.detach().save() for p in heads]
        with tracer.invoke(OTHER):
            model.transformer.wte.output = model.transformer.wte.output.requires_grad_(True)  # rows: written back
            corrupt = [p.input for p in heads]
            grads = [z.grad.save() for z in corrupt]
            corrupt = [z.detach().save() for z in corrupt]
            metric(model.lm_head.output).backward()
    effects = [(g * (a - b)).unflatten(-1, (4, 8)).sum((1, 3)) for g, a, b in zip(grads, clean, corrupt, strict=True)]
    return torch.stack(effects)


def attribution_plain(net):
    paths = [f"transformer.h.{i}.attn.c_proj:in" for i in range(2)]
    clean = seen(net, paths, IDS)
    with hooks(net, {"transformer.wte": lambda e: e.requires_grad_()}):
        *corrupt, logits = seen(net, [*paths, "lm_head"], OTHER)
    grads = torch.autograd.grad(metric(logits), corrupt)
    effects = [(g * (a - b.detach())).unflatten(-1, (4, 8)).sum((1, 3)) for g, a, b in zip(grads, clean, corrupt, strict=True)]  # fmt: skip
    return torch.stack(effects)


# -- a backward that drops what goes through one layer ----------------------------------------------------------------


def grad_drop_ours(model):
    layers, kept = model.model.layers, []
    for dropped in (None, 0, 1):
        with model.trace(IDS):
            embedded = model.model.embed_tokens.output
            embedded.requires_grad_(True)
            if dropped is not None:
                out = layers[dropped].mlp.output
                out.grad = torch.zeros_like(out)
            kept.append(embedded.grad.save())
            metric(model.lm_head.output).backward()
    return kept


def grad_drop_plain(net):
    kept = []
    for dropped in (None, 0, 1):
        changes = {"model.embed_tokens": lambda e: e.requires_grad_()}
        if dropped is not None:

            def drop(out):
                out.register_hook(torch.zeros_like)

            changes[f"model.layers.{dropped}.mlp"] = drop
        with hooks(net, changes):
            embedded, logits = seen(net, ["model.embed_tokens", "lm_head"], IDS)
        kept.append(torch.autograd.grad(metric(logits), embedded)[0])
    return kept


# -- the gradient of every head's output ------------------------------------------------------------------------------


def z_gradients_ours(model):
    with model.trace(IDS):
        model.gpt_neox.embed_in.output.requires_grad_(True)
        z = [layer.attention.dense.input for layer in model.gpt_neox.layers]
        with metric(model.output.logits).backward():
            grads = [x.grad.save() for x in reversed(z)]
    return grads[::-1]


def z_gradients_plain(net):
    paths = [f"gpt_neox.layers.{i}.attention.dense:in" for i in range(2)]
    with hooks(net, {"gpt_neox.embed_in": lambda e: e.requires_grad_()}):
        *z, logits = seen(net, [*paths, "lm_head"], IDS)
    return list(torch.autograd.grad(metric(logits), z))


# -- integrated gradients of the embedding layer ----------------------------------------------------------------------

STEPS = [(k + 0.5) / 5 for k in range(5)]


def integrated_ours(model):
    embedding = model.model.embed_tokens
    with model.trace(IDS) as tracer:
        embedded = embedding.output.save()
        tracer.stop()
    total = torch.zeros_like(embedded)
    for alpha in STEPS:
        with model.trace(IDS):
            scaled = (embedded * alpha).requires_grad_(True)
            embedding.output = scaled
            metric(F.log_softmax(model.lm_head.output, -1)).backward()
        total = total + scaled.grad  # a real leaf of the user's: its gradient is there afterwards
    return (total / len(STEPS) * embedded).sum(-1)


def integrated_plain(net):
    (embedded,) = seen(net, ["model.embed_tokens"], IDS)
    total = torch.zeros_like(embedded)
    for alpha in STEPS:
        scaled = (embedded * alpha).requires_grad_()
        with hooks(net, {"model.embed_tokens": lambda e, scaled=scaled: scaled}):
            loss = metric(net(IDS).logits.log_softmax(-1))
        total = total + torch.autograd.grad(loss, scaled)[0]
    return (total / len(STEPS) * embedded).sum(-1)


# -- a loss on gradients ----------------------------------------------------------------------------------------------


def second_order_ours(model):
    x = fixed(4, 8).requires_grad_()
    with model.trace(x):
        hidden = model[2].output
        (gradient,) = torch.autograd.grad(model.output.sigmoid().sum(), hidden, create_graph=True)
        penalty = (gradient * hidden).pow(2).sum().save()
    penalty.backward()
    return penalty.detach(), x.grad


def second_order_plain(net):
    x = fixed(4, 8).requires_grad_()
    hidden, out = seen(net, ["2", "4"], x)
    (gradient,) = torch.autograd.grad(out.sigmoid().sum(), hidden, create_graph=True)
    penalty = (gradient * hidden).pow(2).sum()
    penalty.backward()
    return penalty.detach(), x.grad


# -- gradient times activation of a layer that returns a tuple --------------------------------------------------------

TOKENS = torch.tensor([[3, 8, 1, 40, 7], [2, 2, 9, 30, 11]])


def lstm_ours(model):
    with model.trace(TOKENS):
        model.embed.output.requires_grad_(True)
        out, (h, c) = model.lstm.output
        attributed = (out.grad * out.detach()).sum(-1).save()
        state, cell = h.grad.save(), c.detach().save()
        model.output[:, 0].sum().backward()
    return attributed, state, cell


def lstm_plain(net):
    with hooks(net, {"embed": lambda e: e.requires_grad_()}):
        (out, (h, c)), logits = seen(net, ["lstm", "head"], TOKENS)
    of_out, of_h = torch.autograd.grad(logits[:, 0].sum(), (out, h))
    return (of_out * out.detach()).sum(-1), of_h, c.detach()


# -- guided backpropagation -------------------------------------------------------------------------------------------


def guided_ours(model):
    x = fixed(3, 8).requires_grad_()
    with model.trace(x):
        for relu in (model[1], model[3]):
            relu.output.grad = relu.output.grad.clamp(min=0)
        model.output[:, 2].sum().backward()
    return x.grad


def guided_plain(net):
    x = fixed(3, 8).requires_grad_()

    def guide(out):
        out.register_hook(lambda g: g.clamp(min=0))

    with hooks(net, {"1": guide, "3": guide}):
        (gradient,) = torch.autograd.grad(net(x)[:, 2].sum(), x)
    return gradient


# -- a class activation map behind a ReLU that works in place ---------------------------------------------------------


def cam_ours(model):
    images = IMAGE.clone().requires_grad_()
    with model.trace(images):
        features = model.conv2.output
        gradient = features.grad
        maps = F.relu((gradient.mean((2, 3), keepdim=True) * features.clone().detach()).sum(1)).save()
        model.output.max(-1).values.sum().backward()
    return maps


def cam_plain(net):
    images, kept = IMAGE.clone().requires_grad_(), []

    def keep(out):
        kept.append(out.clone().detach())
        out.register_hook(kept.append)

    with hooks(net, {"conv2": keep}):
        net(images).max(-1).values.sum().backward()
    features, gradient = kept
    return F.relu((gradient.mean((2, 3), keepdim=True) * features).sum(1))


# -- the same in a vision transformer ---------------------------------------------------------------------------------


def as_map(tokens):
    return tokens[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)


def vit_cam_ours(model):
    with model.trace(IMAGE):
        model.vit.embeddings.output.requires_grad_(True)
        target = model.vit.layers[-1].layernorm_before.output
        activations, gradient = as_map(target.detach()).save(), as_map(target.grad).save()
        model.output.logits[:, 3].sum().backward()
    return F.relu((gradient.mean((2, 3), keepdim=True) * activations).sum(1))


def vit_cam_plain(net):
    with hooks(net, {"vit.embeddings": lambda e: e.requires_grad_()}):
        target, logits = seen(net, ["vit.layers.1.layernorm_before", "classifier"], IMAGE)
    gradient = as_map(torch.autograd.grad(logits[:, 3].sum(), target)[0])
    return F.relu((gradient.mean((2, 3), keepdim=True) * as_map(target.detach())).sum(1))


# -- a probe and a vector, trained together through the frozen model --------------------------------------------------

LABELS = torch.tensor([1, 0])


def trained(step):
    """Three steps of SGD of a probe and a vector."""
    probe, vector = linear(32, 2, bias=True), nn.Parameter(torch.zeros(32))
    optimizer, losses = torch.optim.SGD([*probe.parameters(), vector], lr=0.5), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = step(probe, vector)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), vector.detach(), probe.weight.detach()


def probe_ours(model):
    def step(probe, vector):
        with model.trace(IDS):
            model.model.decoder.layers[0].output += vector
            loss = F.cross_entropy(probe(model.model.decoder.layers[1].output[:, -1]), LABELS).save()
        return loss

    return trained(step)


def probe_plain(net):
    def step(probe, vector):
        with hooks(net, {"model.decoder.layers.0": lambda h: h + vector}):
            (h,) = seen(net, ["model.decoder.layers.1"], IDS)
        return F.cross_entropy(probe(h[:, -1]), LABELS)

    return trained(step)


# -- saliency of a classifier's embeddings, with a mask ---------------------------------------------------------------

PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def saliency_ours(model):
    with model.trace(IDS, attention_mask=PADDED):
        embedded = model.bert.embeddings.output
        embedded.requires_grad_(True)
        saliency = embedded.grad.norm(dim=-1).save()
        probability = model.output.logits.softmax(-1)[:, 0]
        probability.sum().backward()
        probability = probability.detach().save()
    return saliency, probability


def saliency_plain(net):
    kept = []

    def keep(e):
        kept.append(e.requires_grad_())

    with hooks(net, {"bert.embeddings": keep}):
        probability = net(IDS, attention_mask=PADDED).logits.softmax(-1)[:, 0]
    (gradient,) = torch.autograd.grad(probability.sum(), kept[0])
    return gradient.norm(dim=-1), probability.detach()


# -- an image that fits the statistics of batch norm ------------------------------------------------------------------


def inversion_ours(model):
    images = IMAGE.clone().requires_grad_()
    with model.trace(images) as tracer:
        x, bn = model.bn1.input, model.bn1
        mean, var = x.mean((0, 2, 3)), x.permute(1, 0, 2, 3).flatten(1).var(1, unbiased=False)
        loss = ((bn.running_mean - mean).norm(2) + (bn.running_var - var).norm(2)).save()
        tracer.stop()
    loss.backward()
    return loss.detach(), images.grad


def inversion_plain(net):
    images = IMAGE.clone().requires_grad_()
    (x,) = seen(net, ["bn1:in"], images)
    mean, var = x.mean((0, 2, 3)), x.permute(1, 0, 2, 3).flatten(1).var(1, unbiased=False)
    loss = (net.bn1.running_mean - mean).norm(2) + (net.bn1.running_var - var).norm(2)
    loss.backward()
    return loss.detach(), images.grad


# -- the gradient at every module -------------------------------------------------------------------------------------


def all_gradients_ours(model):
    x = fixed(2, 8).requires_grad_()
    with model.trace(x):
        grads = save({})
        for path, envoy in model.named_modules():
            if not len(envoy):
                grads[path.removeprefix("model.")] = envoy.output.grad
        model.output.backward(torch.eye(4)[[1, 1]])
    return grads


def all_gradients_plain(net):
    x, grads = fixed(2, 8).requires_grad_(), {}

    def keep(name):
        return lambda out: out.register_hook(lambda g: grads.update({name: g})) and None

    with hooks(net, {name: keep(name) for name, _ in net.named_children()}):
        net(x).backward(torch.eye(4)[[1, 1]])
    return {name: grads[name] for name, _ in net.named_children()}


# -- the source text of an encoder-decoder ----------------------------------------------------------------------------


def source_words_ours(model):
    with model.trace(IDS, decoder_input_ids=OTHER[:, :3]):
        embedded = model.model.encoder.embed_tokens.output
        embedded.requires_grad_(True)
        words = (embedded.grad * embedded.detach()).sum(-1).save()
        metric(model.lm_head.output).backward()
    return words


def source_words_plain(net):
    kept = []

    def keep(e):
        kept.append(e.requires_grad_())

    with hooks(net, {"model.encoder.embed_tokens": keep}):
        loss = metric(seen(net, ["lm_head"], IDS, decoder_input_ids=OTHER[:, :3])[0])
    return (torch.autograd.grad(loss, kept[0])[0] * kept[0].detach()).sum(-1)


NNSIGHT, CAPTUM = "https://github.com/ndif-team/nnsight/issues", "https://github.com/meta-pytorch/captum/issues"
PROGRAMS = [
    Program("attribute heads by gradient over a clean and a corrupted invoke", f"{NNSIGHT}/539", "GPT-2", attribution_ours, attribution_plain, exact=False),
    Program("drop one layer's part of a gradient at a time", f"{NNSIGHT}/704", "Llama", grad_drop_ours, grad_drop_plain, exact=False),
    Program("read the gradient of every head before the projection", "https://github.com/TransformerLensOrg/TransformerLens/pull/1750", "GPT-NeoX", z_gradients_ours, z_gradients_plain, exact=False),
    Program("integrate gradients along the embeddings of a decoder", f"{CAPTUM}/1237", "Llama", integrated_ours, integrated_plain, exact=False),
    Program("differentiate a loss on the gradients of a layer", f"{CAPTUM}/762", "nn.Sequential", second_order_ours, second_order_plain),
    Program("attribute to an LSTM, which returns a nested tuple", f"{CAPTUM}/1220", "an LSTM", lstm_ours, lstm_plain),
    Program("guide a backward through the ReLUs", "https://github.com/pytorch/pytorch/issues/57157", "nn.Sequential", guided_ours, guided_plain),
    Program("map class activations in front of an in-place ReLU", "https://github.com/frgfm/torch-cam/pull/80", "a convolutional net", cam_ours, cam_plain),
    Program("map class activations of a vision transformer", "https://github.com/jacobgil/pytorch-grad-cam/issues/403", "ViT", vit_cam_ours, vit_cam_plain, exact=False),
    Program("train a probe and an intervention together", "https://github.com/stanfordnlp/pyvene/issues/26", "OPT", probe_ours, probe_plain),
    Program("find the saliency of a classifier's embeddings with padding", f"{CAPTUM}/373", "BERT", saliency_ours, saliency_plain, exact=False),
    Program("fit an image to the statistics of batch norm", "https://github.com/NVlabs/DeepInversion/issues/5", "a convolutional net", inversion_ours, inversion_plain),
    Program("keep the gradient at every module of a model", "https://github.com/chr5tphr/zennit/issues/12", "nn.Sequential", all_gradients_ours, all_gradients_plain),
    Program("attribute to the source words of BART", f"{CAPTUM}/1119", "BART", source_words_ours, source_words_plain, exact=False),
]  # fmt: skip
