"""Task 6, attribution patching (Nanda 2023) against real patching: one forward and backward for what takes a forward a cell."""

import torch
from common import CLEAN, CORRUPTED, check, hooks, plain, smollm2, timed, token

from nnsight_fx import patching, save

LAYERS, POSITIONS = range(0, 30, 3), range(9, 14)

model = smollm2()
mary, john = token(model, " Mary"), token(model, " John")


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, mary] - logits[:, -1, john]


with timed("work: attribution"):
    quick = patching.attribution(model, CLEAN, CORRUPTED, difference)["result"]  # (layers, positions)
with timed("work: patching"):
    real = patching.patch(model, CLEAN, CORRUPTED, difference, layers=LAYERS, positions=POSITIONS)["result"]
with torch.no_grad(), model.trace(CORRUPTED):
    corrupted = save(difference(model.lm_head.output)[0])
both = torch.stack([quick[list(LAYERS)][:, list(POSITIONS)].flatten(), (real - corrupted).flatten()])
print(f"correlation over {both.shape[1]} cells: {both.corrcoef()[0, 1]:.2f}")

# By hand: the gradient of every block's output, by plain hooks and autograd
module = plain(model)
streams = {}
for text in (CLEAN, CORRUPTED):
    held = streams[text] = []

    def hold(block, args, out, held=held):
        if not out.requires_grad:
            out.requires_grad_()
        held.append(out)
        return out

    with hooks(dict.fromkeys(module.model.layers, hold)):
        logits = module.requires_grad_(False)(model.tokenizer(text, return_tensors="pt").input_ids).logits
grads = torch.autograd.grad(difference(logits).sum(), streams[CORRUPTED])
pairs = zip(streams[CLEAN], streams[CORRUPTED], grads, strict=True)
check(quick, torch.stack([((a - b) * g)[0].sum(-1) for a, b, g in pairs]).detach())
