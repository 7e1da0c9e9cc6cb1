"""Task 4, path patching: what each earlier head does to one later head's query, all other heads frozen (Wang et al. 2022).

Two forwards for each sender: the first, with the sender's corrupted and all other heads' clean values, gives the query; the
second is the clean run with it. Both are traces of one session, which runs many together as rows of one forward.
"""

import torch
from common import CLEAN, CORRUPTED, check, hooks, plain, smollm2, timed, token

import nnsight_fx
from nnsight_fx import patching

RECEIVER, ITS_HEAD, SENDERS = 23, 3, range(17, 23)  # a head that task 3 finds, and the layers in front of it

model = smollm2()
mary, john = token(model, " Mary"), token(model, " John")
width, heads = model.config.head_dim, model.config.num_attention_heads
layers = model.model.layers
clean_z, corrupted_z = (patching.activations(model, text, "z") for text in (CLEAN, CORRUPTED))


def columns(head: int) -> slice:
    return slice(head * width, (head + 1) * width)


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, mary] - logits[0, -1, john]


with timed("work"), torch.no_grad(), model.session():
    scores = nnsight_fx.save([])
    for sender in SENDERS:
        for head in range(heads):
            with model.trace(CLEAN):
                for layer in range(sender, RECEIVER):
                    z = layers[layer].self_attn.o_proj.input
                    z[:] = clean_z[layer]
                    if layer == sender:
                        z[..., columns(head)] = corrupted_z[layer][..., columns(head)]
                query = layers[RECEIVER].self_attn.q_proj.output[..., columns(ITS_HEAD)]
            with model.trace(CLEAN):
                layers[RECEIVER].self_attn.q_proj.output[..., columns(ITS_HEAD)] = query
                scores.append(difference(model.lm_head.output))
with torch.no_grad(), model.trace(CLEAN):
    clean = nnsight_fx.save(difference(model.lm_head.output))
effects = torch.stack(scores).view(len(SENDERS), heads) - clean
for flat in effects.abs().flatten().argsort(descending=True)[:5].tolist():
    print(f"{SENDERS[flat // heads]}.{flat % heads} -> {RECEIVER}.{ITS_HEAD}: {effects.flatten()[flat]:+.3f}")

# By hand: every ninth sender
module, by_hand, ours = plain(model), [], []
ids = model.tokenizer(CLEAN, return_tensors="pt").input_ids
blocks = [block.self_attn for block in module.model.layers]
for flat in range(0, effects.numel(), 10):
    sender, head, held = SENDERS[flat // heads], flat % heads, {}

    def freeze(m, args, sender=sender, head=head):
        layer = next(i for i, block in enumerate(blocks) if block.o_proj is m)
        args[0][:] = clean_z[layer]
        if layer == sender:
            args[0][..., columns(head)] = corrupted_z[layer][..., columns(head)]

    def put(m, args, out, held=held):
        out[..., columns(ITS_HEAD)] = held["query"]

    query = blocks[RECEIVER].q_proj
    with torch.no_grad():
        frozen = {blocks[layer].o_proj: freeze for layer in range(sender, RECEIVER)}
        with hooks(
            {query: lambda m, args, out, held=held: held.update(query=out[..., columns(ITS_HEAD)].clone())}, frozen
        ):
            module(ids)
        with hooks({query: put}):
            by_hand.append(difference(module(ids).logits))
    ours.append(scores[flat])
check(torch.stack(ours), torch.stack(by_hand))
