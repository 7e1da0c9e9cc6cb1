"""Task 1, logit lens: what the model would say after each block (nostalgebraist 2020).

On hooks: one forward pays for no compile.
"""

import torch
from common import check, plain, record, smollm2, timed

from nnsight_fx import patching

PROMPT = "The Eiffel Tower is in the city of"

model = smollm2()
with timed("work"):
    lens = patching.logit_lens(model, PROMPT)  # an axis `layer`, of "embedding" and the layers' numbers

logits = lens["result"][:, 0]  # (1 + layers, vocabulary)
for layer, row in zip(lens.over["layer"], logits.softmax(-1), strict=True):
    p, best = row.max(-1)
    print(f"{layer:>9}  {p:.2f}  {model.tokenizer.decode([int(best)])!r}")

# By hand
module = plain(model)
inner, ids = module.model, model.tokenizer(PROMPT, return_tensors="pt").input_ids
streams = record(module, ids, [inner.embed_tokens, *inner.layers])
with torch.no_grad():
    check(logits, torch.stack([module.lm_head(inner.norm(h[:, -1]))[0] for h in streams]))
