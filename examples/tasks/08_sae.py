"""Task 8, a sparse autoencoder: trained on harvested activations, and spliced back (Bricken et al. 2023; Marks et al. 2024).

The text is Python's own manual, which every Python has. A real dictionary takes a thousand times the tokens.
"""

import tempfile
from pydoc_data.topics import topics

import torch
from common import check, hooks, plain, smollm2, timed

from nnsight_fx import save
from nnsight_fx.interventions import SAESplice

LAYER, LATENTS, STEPS, PROMPT = 12, 1024, 300, "The assignment statement binds a name to"


class SAE(torch.nn.Module):
    def __init__(self, width: int, latents: int):
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, latents), torch.nn.Linear(latents, width)

    def encode(self, h: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.up(h - self.down.bias))

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return self.down(features)


torch.manual_seed(0)
model = smollm2()
block = model.model.layers[LAYER]
texts = [text[i : i + 400] for text in list(topics.values())[:40] for i in range(0, min(len(text), 2000), 400)]
with timed("work: harvest"), tempfile.TemporaryDirectory() as folder:
    site = f"model.layers.{LAYER}"
    # The first token of a text is an attention sink, a hundred times as large as all others.
    acts = model.harvest(texts, [site], out=f"{folder}/acts", positions=slice(1, None), max_length=64)[site]
    rows = torch.cat(list(acts.batches(4096, seed=0)))
scale = rows.square().mean().sqrt()
sae = SAE(rows.shape[1], LATENTS)
adam = torch.optim.Adam(sae.parameters(), lr=1e-3)
with timed(f"work: training on {len(rows)} tokens"):
    for _ in range(STEPS):
        h = rows[torch.randint(len(rows), (256,))] / scale
        features = sae.encode(h)
        loss = (sae.decode(features) - h).square().sum(-1).mean() + 0.5 * features.sum(-1).mean()
        loss.backward()
        adam.step()
        adam.zero_grad()
with torch.no_grad():
    h = rows[:1000] / scale
    left = (sae.decode(sae.encode(h)) - h).square().sum() / (h - h.mean(0)).square().sum()
    print(
        f"variance explained {1 - left:.0%}, {(sae.encode(h) > 0).sum(-1).float().mean():.0f} of {LATENTS} features a token"
    )
    sae.up.weight /= scale  # from here on in the model's own scale
    sae.down.weight *= scale
    sae.down.bias.mul_(scale)

splice = SAESplice(sae)  # what the autoencoder does not explain is added: unedited, it changes nothing
with timed("work: splice"), torch.no_grad():
    with model.trace(PROMPT):
        features = save(splice.encode(block.output))
    strongest = int(features[0, 1:].max(0).values.argmax())
    with model.trace(PROMPT):
        block.output = splice(block.output, edit=lambda f: f.index_fill(-1, torch.tensor([strongest]), 0.0))
        logits = model.lm_head.output.save()
print(f"feature {strongest} off, the next token: {model.tokenizer.decode([int(logits[0, -1].argmax())])!r}")


# By hand
def spliced(m, args, out):
    edited = sae.encode(out)
    explained = sae.decode(edited)
    edited[..., strongest] = 0
    return sae.decode(edited) + (out - explained)


module = plain(model)
with torch.no_grad(), hooks({module.model.layers[LAYER]: spliced}):
    check(logits, module(model.tokenizer(PROMPT, return_tensors="pt").input_ids).logits)
