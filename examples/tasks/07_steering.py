"""Task 7, steering: a direction added while text is generated, on a grid of layers and strengths (Turner et al. 2023)."""

import torch
from common import hooks, plain, record, smollm2, timed

PROMPT, TOWARDS, AWAY = (
    "I went to the cinema yesterday, and the film was",
    " wonderful, I loved it",
    " terrible, I hated it",
)
LAYERS, STRENGTHS, TOKENS = (6, 12, 18), (-2.0, 0.0, 2.0), 10

model = smollm2()
layers = model.model.layers
with torch.no_grad(), model.trace() as tracer:
    with tracer.invoke(TOWARDS):
        towards = [layers[layer].output[0, -1].save() for layer in LAYERS]
    with tracer.invoke(AWAY):
        away = [layers[layer].output[0, -1].save() for layer in LAYERS]
vectors = {layer: a - b for layer, a, b in zip(LAYERS, towards, away, strict=True)}

texts = {}
with timed("work"), torch.no_grad():
    for layer in LAYERS:
        for strength in STRENGTHS:
            with model.generate(PROMPT, max_new_tokens=TOKENS, do_sample=False) as tracer:
                for _ in tracer.iter[:]:
                    layers[layer].output += strength * vectors[layer]
                ids = tracer.result.save()
            texts[layer, strength] = model.tokenizer.decode(ids[0], skip_special_tokens=True)
            print(f"layer {layer:2}, {strength:+.0f}: {texts[layer, strength].removeprefix(PROMPT)!r}")

# By hand: the same texts
module = plain(model)
ends = []
for text in (TOWARDS, AWAY):
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    ends.append([h[0, -1] for h in record(module, ids, [module.model.layers[layer] for layer in LAYERS])])
prompt = model.tokenizer(PROMPT, return_tensors="pt")
for layer, a, b in zip(LAYERS, *ends, strict=True):
    torch.testing.assert_close(vectors[layer], a - b, rtol=0, atol=2e-4)
    for strength in STRENGTHS:

        def steer(block, args, out, vector=strength * (a - b)):
            return out + vector

        with torch.no_grad(), hooks({module.model.layers[layer]: steer}):
            ids = module.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
        assert model.tokenizer.decode(ids[0], skip_special_tokens=True) == texts[layer, strength]
print(f"equal to plain hooks: {len(texts)} texts, letter by letter")
