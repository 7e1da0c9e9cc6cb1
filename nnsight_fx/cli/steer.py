"""Steering over a grid of layers and strengths, as one sweep of generations.

The direction is the difference of means: what a layer's output is on average behind one list of texts, less what it is behind
another (Marks and Tegmark 2023; Rimsky et al. 2024, contrastive activation addition). It is added at every position and step. A text's
score is how much likelier the unsteered model takes " positive" than " negative" behind it, in nats.

    report = run()                                    # bundled model, writes steer-out/
    report = run("openai-community/gpt2", toward=[...], away=[...])
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import atomic
from ..tracing.saving import save
from ..viz.heatmap import heatmap, load_matplotlib
from .demo import DemoError, blocks, load

if TYPE_CHECKING:
    from ..model.language import LanguageModel

TOWARD = (
    "I love this film, it is wonderful",
    "What a beautiful day, I am so happy",
    "The food was delicious and the people were kind",
    "This is the best present that I ever got",
)
AWAY = (
    "I hate this film, it is terrible",
    "What an awful day, I am so sad",
    "The food was disgusting and the people were rude",
    "This is the worst present that I ever got",
)
PROMPTS = ("I went to the restaurant and", "My new job is", "The book was", "Yesterday we met a man who")
JUDGE = "Review: {text}\nThe sentiment of this review is"
STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)


@dataclass(frozen=True)
class Steered:
    """`texts` and `scores` by prompt, layer and strength; `heat` is the mean score over the prompts, (layers, strengths)."""

    layers: list[int]
    strengths: list[float]
    prompts: list[str]
    texts: list[list[list[str]]]
    scores: torch.Tensor
    seconds: float

    @property
    def heat(self) -> torch.Tensor:
        return self.scores.mean(0)

    def table(self) -> str:
        """The texts on the first prompt, a line for each cell."""
        lines = [f"{'layer':>5} {'strength':>8} {'score':>7}  {self.prompts[0]} ..."]
        for i, layer in enumerate(self.layers):
            for j, strength in enumerate(self.strengths):
                text = " ".join(self.texts[0][i][j].split())
                lines.append(f"{layer:>5} {strength:>+8.1f} {self.scores[0, i, j]:>+7.2f}  {text[:90]}")
        return "\n".join(lines)


def run(
    model: LanguageModel | str | None = None,
    toward: Sequence[str] = TOWARD,
    away: Sequence[str] = AWAY,
    prompts: Sequence[str] = PROMPTS,
    *,
    layers: Sequence[int] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    tokens: int = 24,
    out: Path = Path("steer-out"),
) -> Steered:
    """Steer a model from `away` to `toward`; writes `texts.csv` and `heatmap.png` into `out`. `layers`: four across the model."""
    load_matplotlib()
    if not toward or not away or not prompts:
        raise DemoError("steering needs texts to go toward, texts to go away from, and prompts: one list is empty.")
    wrapped, name = load(model)
    found = list(blocks(wrapped))
    chosen = list(layers) if layers is not None else sorted({len(found) * n // 6 for n in (1, 2, 3, 4)})
    if wrong := [n for n in chosen if not 0 <= n < len(found)]:
        raise DemoError(f"the model has layers 0 to {len(found) - 1}, and not {', '.join(map(str, wrong))}.")
    print(
        f"{name}\n{len(toward)} texts toward, {len(away)} away; layers {chosen}, strengths {list(strengths)}, {tokens} tokens"
    )
    begun = time.perf_counter()
    directions = _means(wrapped, chosen, toward) - _means(wrapped, chosen, away)

    def steer(tracer, layer: int, strength: float) -> None:  # noqa: ANN001
        direction = strength * directions[chosen.index(layer)]
        for _step in tracer.iter[:]:
            output = found[layer].output
            hidden = output[0] if isinstance(output, tuple) else output
            hidden += direction

    over = {"layer": chosen, "strength": list(strengths)}
    swept = wrapped.sweep(steer, list(prompts), over, generate={"max_new_tokens": tokens, "do_sample": False})
    texts = swept.text
    assert texts is not None
    judged = [f"{prompt}{text}" for prompt, cell in zip(prompts, texts, strict=True) for text in cell.reshape(-1)]
    scores = torch.tensor([_score(wrapped, text) for text in judged]).reshape(texts.shape)
    steered = Steered(chosen, list(strengths), list(prompts), texts.tolist(), scores, time.perf_counter() - begun)
    out.mkdir(parents=True, exist_ok=True)
    atomic.write(out / "texts.csv", swept.to_dataframe().to_csv(index=False).encode())
    figure = heatmap(
        steered.heat,
        x=[f"{s:+g}" for s in strengths],
        y=list(map(str, chosen)),
        title=f"{name}: sentiment of steered texts",
        bar="log odds, positive over negative",
        xlabel="strength",
    )
    figure.savefig(out / "heatmap.png")
    print(steered.table())
    print(
        f"{scores.numel()} texts in {steered.seconds:.0f} s; all of them: {out / 'texts.csv'}, scores: {out / 'heatmap.png'}"
    )
    return steered


def _means(model: LanguageModel, layers: list[int], texts: Sequence[str]) -> torch.Tensor:
    """What each layer gives at the last token, the mean over texts: (layers, width)."""
    found, total = list(blocks(model)), []
    for text in texts:
        with torch.no_grad(), model.trace(text, compile=False):
            outputs = [found[n].output for n in layers]
            last = save(torch.stack([(x[0] if isinstance(x, tuple) else x)[0, -1] for x in outputs]))
        total.append(last)
    return torch.stack(total).mean(0)


def _score(model: LanguageModel, text: str) -> float:
    """Nats by which " positive" is likelier than " negative" behind a text."""
    good, bad = (model.tokenizer.encode(word, add_special_tokens=False)[0] for word in (" positive", " negative"))
    if good == bad:
        raise DemoError(
            'this tokenizer begins " positive" and " negative" with one token, so no text can be scored by them.'
        )
    with torch.no_grad(), model.trace(JUDGE.format(text=text), compile=False):
        logits = model.lm_head.output[0, -1]
        odds = save(logits[good] - logits[bad])
    return odds.item()
