"""Task 5, causal tracing: noise on the subject's embeddings, one clean value restored at a time (Meng et al. 2022)."""

import torch
from common import check, hooks, plain, record, smollm2, timed, token, tokens

from nnsight_fx import patching, save

PROMPT, SUBJECT, ANSWER, ROWS = "The Eiffel Tower is in the city of", slice(1, 4), " Paris", 4  # rows: draws of noise

model = smollm2()
answer, words = token(model, ANSWER), tokens(model, PROMPT)
layers, ids = model.model.layers, model.tokenizer(PROMPT, return_tensors="pt").input_ids
clean = patching.activations(model, PROMPT)
spread = plain(model).model.embed_tokens.weight.std().item()
noise = 3 * spread * torch.randn(ROWS, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))


def probability(logits: torch.Tensor) -> torch.Tensor:
    """Of the answer, the mean over the draws."""
    return logits[:, -1].softmax(-1)[:, answer].mean()


def restore(tracer, layer, position):
    model.model.embed_tokens.output[:, SUBJECT] += noise
    layers[layer].output[:, position] = clean[layer][:, position]
    return probability(model.lm_head.output)


with timed("work"):
    over = {"layer": range(0, len(layers), 3), "position": range(SUBJECT.start, len(words))}
    found = model.sweep(restore, ids.repeat(ROWS, 1), over=over)
    with torch.no_grad(), model.trace(ids.repeat(ROWS, 1)):
        model.model.embed_tokens.output[:, SUBJECT] += noise
        noised = save(probability(model.lm_head.output))
scores = found["result"]
found.heatmap(
    "tracing.png",
    x=words[SUBJECT.start :],
    center=noised.item(),
    title=f"P({ANSWER!r}), one value restored; {noised:.3f} with noise and nothing restored",
)
for layer, row in zip(found.over["layer"], scores, strict=True):
    print(f"layer {layer:2}  " + "  ".join(f"{w!r} {p:.2f}" for w, p in zip(words[SUBJECT.start :], row, strict=True)))

# By hand: two layers
module, by_hand = plain(model), []
streams = record(module, ids, list(module.model.layers))
for layer in (6, 21):
    for position in over["position"]:

        def disturb(m, args, out):
            out[:, SUBJECT] += noise

        def put(m, args, out, layer=layer, position=position):
            out[:, position] = streams[layer][:, position]

        with torch.no_grad(), hooks({module.model.embed_tokens: disturb, module.model.layers[layer]: put}):
            by_hand.append(probability(module(ids.repeat(ROWS, 1)).logits))
check(scores[[2, 7]], torch.stack(by_hand).view(2, -1))
