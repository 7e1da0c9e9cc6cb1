"""Task 2, activation patching: the residual stream of the clean prompt in the corrupted one, by layer and position.

Vig et al. 2020; Meng et al. 2022. Up to the first token that differs both runs are the same: nothing can be patched there. On
hooks, where a sweep runs cells as the rows of one forward: for one grid of 150 cells a compile would cost more than it saves.
"""

import torch
from common import CLEAN, CORRUPTED, check, hooks, plain, record, smollm2, timed, token, tokens

from nnsight_fx import patching

model = smollm2()
mary, john = token(model, " Mary"), token(model, " John")
words = tokens(model, CLEAN)
first = next(i for i, pair in enumerate(zip(words, tokens(model, CORRUPTED), strict=True)) if len(set(pair)) == 2)


def difference(logits: torch.Tensor) -> torch.Tensor:
    """The logit of the name that the clean prompt goes on with, over the other's: (batch,)."""
    return logits[:, -1, mary] - logits[:, -1, john]


with timed("work"):
    found = patching.patch(model, CLEAN, CORRUPTED, difference, positions=range(first, len(words)))
scores = found["result"]  # (layers, positions)
found.heatmap("patching.png")
for flat in scores.flatten().argsort(descending=True)[:5].tolist():
    layer, column = divmod(flat, scores.shape[1])
    print(f"layer {layer:2}, {words[first + column]!r}: {scores[layer, column]:+.2f}")

# By hand: every sixth layer
module = plain(model)
layers = module.model.layers
clean, corrupted = (model.tokenizer(text, return_tensors="pt").input_ids for text in (CLEAN, CORRUPTED))
streams, by_hand = record(module, clean, list(layers)), []
for layer in range(0, len(layers), 6):
    for position in range(first, len(words)):

        def put(block, args, out, layer=layer, position=position):
            out[:, position] = streams[layer][:, position]

        with torch.no_grad(), hooks({layers[layer]: put}):
            by_hand.append(difference(module(corrupted).logits))
check(scores[::6], torch.stack(by_hand).view(-1, scores.shape[1]))
