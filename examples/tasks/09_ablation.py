"""Task 9, ablation over a data set: each layer's attention set to zero, to its mean, to another prompt's value.

Wang et al. 2022 (mean), Chan et al. 2022 (resample). The metric is a mean over prompts, with its standard error.
"""

import torch
from common import check, hooks, plain, smollm2, timed, token

from nnsight_fx import patching

NAMES = [("Mary", "John"), ("Anna", "Paul"), ("Sarah", "Peter"), ("Jane", "Mark")]
PROMPTS = [f"When {a} and {b} went to the store, {b} gave a drink to" for a, b in NAMES]
OTHERS = [
    f"When {a} and {b} went to the store, {c} gave a drink to"
    for (a, b), (c, _) in zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)
]
LAYERS = range(0, 30, 3)

model = smollm2()
pairs = [(token(model, f" {a}"), token(model, f" {b}")) for a, b in NAMES]


def difference(logits: torch.Tensor, prompt: int) -> torch.Tensor:
    """The logit of the name that comes next, over the other's; `prompt` is the number of the prompt."""
    right, wrong = pairs[prompt]
    return logits[0, -1, right] - logits[0, -1, wrong]


options = {"part": "attention", "over": ("layer",), "layers": LAYERS, "reduce": "mean", "progress": False}
found = {}
with timed("work"):
    for by in ("zero", "mean", "resample"):
        found[by] = patching.ablate(
            model, PROMPTS, difference, by=by, reference=None if by == "zero" else OTHERS, **options
        )
print(f"intact: {found['zero'].baselines['intact'].mean():+.2f}")
for i, layer in enumerate(LAYERS):
    shown = (f"{by} {f['result'][i]:+.2f} ± {f.errors['result'][i]:.2f}" for by, f in found.items())
    print(f"layer {layer:2}: " + ", ".join(shown))

# By hand: two layers, all three
module = plain(model)
outputs = [block.self_attn for block in module.model.layers]
ids = [model.tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
others = [model.tokenizer(text, return_tensors="pt").input_ids for text in OTHERS]
ours, by_hand = [], []
for i in (3, 8):
    attention, held = outputs[LAYERS[i]], []
    with torch.no_grad(), hooks({attention: lambda m, args, out, held=held: held.append(out[0].clone())}):
        for other in others:
            module(other)
    mean = torch.cat(held, 1).double().mean((0, 1)).float()
    for by, result in found.items():
        numbers = []
        for n, prompt in enumerate(ids):
            value = {"zero": torch.zeros_like(held[n]), "mean": mean.expand(held[n].shape), "resample": held[n]}[by]
            with torch.no_grad(), hooks({attention: lambda m, args, out, value=value: (value, *out[1:])}):
                numbers.append(difference(module(prompt).logits, n))
        ours.append(result["result"][i])
        by_hand.append(torch.stack(numbers).mean())
check(torch.stack(ours), torch.stack(by_hand))
