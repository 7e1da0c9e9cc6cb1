"""Task 11, attention patterns and edges: who looks where, and what is lost when one edge is cut (Geva et al. 2023).

Kernels (sdpa, flash) do not give their weights; `attn_implementation="eager"` writes attention out. A cut edge is a weight of
zero before the softmax's sum: minus infinity among the scores, which `.source` reaches.
"""

import torch
from common import CLEAN, check, hooks, plain, smollm2, timed, token, tokens

from nnsight_fx import save

model = smollm2(attn_implementation="eager")
mary, john, words = token(model, " Mary"), token(model, " John"), tokens(model, CLEAN)
layers = model.model.layers


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, mary] - logits[0, -1, john]


with timed("work: patterns"), torch.no_grad(), model.trace(CLEAN):
    patterns = [layer.self_attn.output[1].save() for layer in layers]  # (batch, heads, from, to)
    intact = save(difference(model.lm_head.output))
pattern = torch.stack(patterns)[:, 0]  # (layers, heads, from, to)
to_mary = pattern[:, :, -1, words.index(" Mary")]
for flat in to_mary.flatten().argsort(descending=True)[:5].tolist():
    print(
        f"head {flat // to_mary.shape[1]}.{flat % to_mary.shape[1]} looks from the end at ' Mary': {to_mary.flatten()[flat]:.2f}"
    )


def cut(tracer, layer, source):
    """No head of a layer (and the two behind it) looks from the last position at `source`."""
    for each in range(layer, layer + 3):
        scores = layers[each].self_attn.source.attention_interface_0.source.nn_functional_softmax_0.inputs[0][0]
        scores[:, :, -1, source] = float("-inf")
    return difference(model.lm_head.output)


over = {"layer": range(0, 30, 3), "source": range(1, len(words) - 1, 2)}
with timed("work: edges"):
    found = model.sweep(cut, CLEAN, over=over)
found.heatmap(
    "edges.png",
    x=[words[i] for i in over["source"]],
    center=intact.item(),
    title=f"edges from the last position cut; {intact:+.2f} with none",
)
for layer, row in zip(over["layer"], found["result"], strict=True):
    print(
        f"layers {layer:2} to {layer + 2:2}: "
        + ", ".join(f"{words[s]!r} {v:+.1f}" for s, v in zip(over["source"], row, strict=True))
    )

# By hand: the patterns, and edges cut by the mask that the attention gets
module, held, by_hand = plain(model), [], []
attentions = [block.self_attn for block in module.model.layers]
ids = model.tokenizer(CLEAN, return_tensors="pt").input_ids
with torch.no_grad(), hooks({a: lambda m, args, out: held.append(out[1]) for a in attentions}):
    module(ids)
check(pattern, torch.cat(held))
for layer in (15, 21):
    for source in over["source"]:

        def mask(m, args, kwargs, source=source):
            changed = kwargs["attention_mask"].clone()
            changed[:, :, -1, source] = float("-inf")
            return args, {**kwargs, "attention_mask": changed}

        handles = [a.register_forward_pre_hook(mask, with_kwargs=True) for a in attentions[layer : layer + 3]]
        with torch.no_grad():
            by_hand.append(difference(module(ids).logits))
        for handle in handles:
            handle.remove()
check(found["result"][[5, 7]], torch.stack(by_hand).view(2, -1))
