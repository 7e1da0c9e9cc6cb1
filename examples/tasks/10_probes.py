"""Task 10, linear probes on harvested activations: at which layer is it plain whether a word is an animal or a place?"""

import tempfile

import torch
from common import check, record, smollm2, timed

ANIMALS = [
    "dog",
    "cat",
    "horse",
    "cow",
    "lion",
    "tiger",
    "bear",
    "wolf",
    "fox",
    "rabbit",
    "mouse",
    "elephant",
    "monkey",
    "snake",
    "eagle",
    "shark",
    "whale",
    "frog",
    "duck",
    "goat",
]
PLACES = [
    "Paris",
    "London",
    "Berlin",
    "Rome",
    "Madrid",
    "Tokyo",
    "China",
    "India",
    "Japan",
    "Brazil",
    "Canada",
    "Egypt",
    "Texas",
    "Boston",
    "Chicago",
    "Moscow",
    "Spain",
    "Italy",
    "Kenya",
    "Peru",
]
LAYERS = (0, 6, 12, 18, 24, 29)

model = smollm2()
texts = [f"I thought about {word}" for pair in zip(ANIMALS, PLACES, strict=True) for word in pair]
labels = torch.tensor([0, 1] * len(ANIMALS))  # every word once; the last quarter is held out
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
module = model._module
blocks = [module.model.layers[layer] for layer in LAYERS]
ids = [model.tokenizer(text, return_tensors="pt").input_ids for text in texts]
by_hand = torch.stack([torch.stack([h[0, -1] for h in record(module, row, blocks)]) for row in ids[:8]], 1)
check(torch.stack([rows[site][:8] for site in sites]), by_hand, 1e-3)  # padded in batches: rounded otherwise
