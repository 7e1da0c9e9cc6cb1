"""Task 3, activation patching by head: what each head writes on the clean prompt, in the corrupted one (Wang et al. 2022).

`part="z"` is what a head gives to the output projection. On hooks, as in task 2, which also shows in which layers the name moves
from where it is read to the last position: those are looked at.
"""

import torch
from common import CLEAN, CORRUPTED, check, hooks, plain, smollm2, timed, token

from nnsight_fx import patching

LAYERS = range(16, 30)

model = smollm2()
mary, john = token(model, " Mary"), token(model, " John")


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, mary] - logits[:, -1, john]


with timed("work"):
    found = patching.patch(model, CLEAN, CORRUPTED, difference, part="z", layers=LAYERS)  # (layers, heads)
scores = found["result"]
for flat in (scores - scores.median()).abs().flatten().argsort(descending=True)[:8].tolist():
    layer, head = divmod(flat, scores.shape[1])
    print(f"head {LAYERS[layer]}.{head}: {scores[layer, head]:+.2f}")

# By hand: every fourth layer, all heads
module = plain(model)
projections, width = [block.self_attn.o_proj for block in module.model.layers], model.config.head_dim
clean, corrupted = (model.tokenizer(text, return_tensors="pt").input_ids for text in (CLEAN, CORRUPTED))
zs: dict = {}
with torch.no_grad(), hooks({}, {p: lambda m, args: zs.update({m: args[0].clone()}) for p in projections}):
    module(clean)
by_hand = []
for projection in projections[LAYERS.start :: 4]:
    for head in range(scores.shape[1]):

        def put(m, args, columns=slice(head * width, (head + 1) * width)):
            args[0][..., columns] = zs[m][..., columns]

        with torch.no_grad(), hooks({}, {projection: put}):
            by_hand.append(difference(module(corrupted).logits))
check(scores[::4], torch.stack(by_hand).view(-1, scores.shape[1]))
