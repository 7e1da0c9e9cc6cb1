"""Task 10, linear probes on harvested activations: where does a later word know whether it was an animal or a place?"""

import tempfile

import torch
from common import check, plain, record, smollm2, timed

WORDS = """dog Paris cat London horse Berlin cow Rome lion Madrid tiger Tokyo bear China wolf India fox Japan rabbit Brazil mouse
Canada elephant Egypt monkey Texas snake Boston eagle Chicago shark Moscow whale Spain frog Italy duck Kenya goat Peru"""
LAYERS = (0, 6, 12, 18, 24, 29)

model = smollm2()
texts = [f"I thought about {word} again" for word in WORDS.split()]
labels = torch.arange(len(texts)) % 2  # animal, place, animal, ...; the last quarter is held out
sites = [f"model.layers.{layer}" for layer in LAYERS]
with timed("work: harvest"), tempfile.TemporaryDirectory() as folder:
    acts = model.harvest(texts, sites, out=f"{folder}/acts", positions=-1, progress=False)
    rows = {site: torch.as_tensor(acts[site][:]).clone() for site in sites}

train = 3 * len(texts) // 4
with timed("work: probes"):
    for site, x in rows.items():
        x = (x - x[:train].mean(0)) / x[:train].std(0)
        torch.manual_seed(0)
        probe = torch.nn.Linear(x.shape[1], 1)
        adam = torch.optim.AdamW(probe.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(100):
            logits = probe(x[:train])[:, 0]
            torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[:train].float()).backward()
            adam.step()
            adam.zero_grad()
        right = (probe(x[train:])[:, 0] > 0) == labels[train:].bool()
        print(f"{site}: {right.float().mean():.0%} of {len(right)} held-out words")

# By hand
module = plain(model)
blocks = [module.model.layers[layer] for layer in LAYERS]
ids = [model.tokenizer(text, return_tensors="pt").input_ids for text in texts]
by_hand = torch.stack([torch.stack([h[0, -1] for h in record(module, row, blocks)]) for row in ids[:8]], 1)
check(torch.stack([rows[site][:8] for site in sites]), by_hand, 1e-3)  # padded in batches: rounded otherwise
