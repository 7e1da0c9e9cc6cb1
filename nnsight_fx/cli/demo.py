"""Activation patching on a real language model, at every layer and position, as one compiled sweep.

"When Mary and John went to the store, John gave a drink to" goes on with " Mary". Where does the model hold
what it needs for that? Run a corrupted prompt, put one position of one layer's output of the clean run in its
place, see how much of the answer comes back (Wang et al. 2022, indirect object identification; Meng et al.
2022, causal tracing).

    report = run()                                         # bundled model, writes demo-out/
    report = run("openai-community/gpt2", out=Path("runs/gpt2"))
"""

from __future__ import annotations

import contextlib
import io
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers

from .. import atomic
from ..envoys.envoy import path_of
from ..errors import NNsightFXError
from ..model.language import LanguageModel
from ..viz.heatmap import heatmap, load_matplotlib
from . import weights

if TYPE_CHECKING:
    from ..envoys.envoy import Envoy


Cell = tuple[int, int]  # layer, position
T = TypeVar("T")

SAMPLE = 30  # cells run with the hook engine too: one at a time, and as the rows of one forward
BLOCKS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers")


class DemoError(NNsightFXError, ValueError):
    """A task that cannot be patched: prompts of different lengths, an answer of several tokens."""


@dataclass(frozen=True)
class Task:
    """Two prompts of equally many tokens, and the two next tokens whose logits are compared."""

    clean: str = "When Mary and John went to the store, John gave a drink to"
    corrupt: str = "When Mary and John went to the store, Mary gave a drink to"
    answer: str = " Mary"
    wrong: str = " John"


IOI = Task()


class Patching:
    """A task on a model: the clean run's residual stream, and corrupted runs patched with it.

    `clean` and `corrupt` are the two runs' logit differences, the ends of the scale.
    """

    def __init__(self, model: LanguageModel, task: Task):
        self.model, self.task = model, task
        self.layers = list(blocks(model))
        self.answer = _one_token(model, "answer", task.answer)
        self.wrong = _one_token(model, "wrong", task.wrong)
        self.clean_ids, self.corrupt_ids = _token_ids(model, task)
        self.clean, self.stream = self._record(self.clean_ids)
        self.corrupt, _ = self._record(self.corrupt_ids)
        if abs(self.clean - self.corrupt) < 1e-6:
            raise DemoError(
                f"both prompts give the same logit difference, {self.clean:+.4f}: nothing to recover. "
                f"Choose prompts that {task.answer!r} and {task.wrong!r} tell apart."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and positions."""
        return len(self.layers), self.clean_ids.shape[1]

    @property
    def cells(self) -> list[Cell]:
        """Every cell, layer by layer."""
        layers, positions = self.shape
        return [(layer, position) for layer in range(layers) for position in range(positions)]

    def tokens(self) -> list[str]:
        """A label for each position: the clean prompt's token, and the corrupted one's where it differs."""
        pairs = zip(self.clean_ids[0].tolist(), self.corrupt_ids[0].tolist(), strict=True)
        texts = ([self.model.tokenizer.decode([i]).strip(" ") for i in pair] for pair in pairs)
        return [clean if clean == corrupt else f"{clean} / {corrupt}" for clean, corrupt in texts]

    def one(self, layer: int, position: int) -> float:
        """Score one cell as one does by hand: one forward of the hook engine."""
        with torch.no_grad(), self.model.trace(self.corrupt_ids, compile=False):
            self.layers[layer].output[:, position] = self.stream[layer][:, position]
            score = self._metric().save()
        return score.item()

    def many(self, cells: Sequence[Cell]) -> torch.Tensor:
        """Score cells as one batches them by hand: the rows of one forward of the hook engine."""
        shape, device = (len(cells), self.shape[1], 1), self.corrupt_ids.device
        here = [torch.zeros(shape, dtype=torch.bool, device=device) for _ in self.layers]
        for row, (layer, position) in enumerate(cells):
            here[layer][row, position] = True
        with torch.no_grad(), self.model.trace(self.corrupt_ids.repeat(len(cells), 1), compile=False):
            for layer, chosen, clean in zip(self.layers, here, self.stream, strict=True):
                layer.output = torch.where(chosen, clean, layer.output)
            scores = self._metric().save()
        return scores.float().cpu()

    def grid(self, chunk: int | None = None) -> torch.Tensor:
        """Score every cell, (layers, positions), under a progress bar: `model.sweep`, `chunk` cells in a session."""
        layers, positions = self.shape

        def patch(tracer: object, layer: int, position: int) -> object:
            self.layers[layer].output[:, position] = self.stream[layer][:, position]
            return self._metric()

        over = {"layer": range(layers), "position": range(positions)}
        found = self.model.sweep(patch, self.corrupt_ids, over, chunk=chunk or len(self.cells))
        return found["result"].view(self.shape).float()

    def recovered(self, scores: torch.Tensor) -> torch.Tensor:
        """Rescale logit differences: 0 is the corrupted run's, 1 the clean run's."""
        return (scores - self.corrupt) / (self.clean - self.corrupt)

    def _metric(self) -> Any:
        logits = self.model.lm_head.output[:, -1]
        return logits[:, self.answer] - logits[:, self.wrong]

    def _record(self, ids: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
        with torch.no_grad(), self.model.trace(ids, compile=False):
            stream = [layer.output.save() for layer in self.layers]
            score = self._metric().save()
        return score.item(), stream


def run(
    model: str | LanguageModel | None = None,
    task: Task = IOI,
    *,
    backend: str = "inductor",
    out: Path = Path("demo-out"),
    chunk: int | None = None,
    sample: int = SAMPLE,
) -> dict:
    """Patch every cell, compare a sample with the hook engine, write `out`/heatmap.png and `out`/scores.json.

    `model` is a hub id, a folder, a LanguageModel, or None for the bundled SmolLM2; `chunk` cells make a session, by
    default all. Returns what scores.json holds.
    """
    load_matplotlib()  # before the minutes of work, not after
    with _folder(out):
        lm, name = load(model)
        patching = Patching(lm, task)
        _introduce(patching, name)

        lm.compile(backend=backend)
        print(f"first sweep, which compiles with {backend}, and then a second one ...", flush=True)
        scores, first = _timed(lambda: patching.grid(chunk))
        scores, compiled = _timed(lambda: patching.grid(chunk))
        _print_strongest(patching, scores)

        seconds = {"compiled": compiled, "compiled_with_compile_time": first}
        report = _describe(patching, name, scores) | {"backend": backend, "chunk": chunk}
        report |= _against_hooks(patching, scores, sample, seconds)
        _write(patching, name, scores, report, out)
    print(_last_line(report))
    return report


def load(model: str | LanguageModel | None) -> tuple[LanguageModel, str]:
    if isinstance(model, LanguageModel):
        return model, type(model).__name__
    if model is not None:
        return LanguageModel(model, dispatch=True), model
    return LanguageModel(str(weights.smollm2()), dtype=torch.float32, dispatch=True), weights.NOTE


def _against_hooks(p: Patching, scores: torch.Tensor, sample: int, seconds: dict) -> dict[str, object]:
    """Time and score some cells with the hook engine: one at a time, and as one batch."""
    cells = _sampled(p.cells, sample)
    p.one(*cells[0])  # once untimed, as the compiled sweep was
    p.many(cells)
    one, one_seconds = _timed(lambda: torch.tensor([p.one(*cell) for cell in cells]))
    batch, batch_seconds = _timed(lambda: p.many(cells))
    compiled = torch.stack([scores[cell] for cell in cells])
    scale = len(p.cells) / len(cells)
    return {
        "sampled_cells": [list(cell) for cell in cells],
        "largest_difference": max((compiled - hooks).abs().max().item() for hooks in (one, batch)),
        "seconds": seconds
        | {
            "hooks_one_at_a_time_scaled": one_seconds * scale,
            "hooks_batched_scaled": batch_seconds * scale,
        },
    }


def _last_line(report: dict) -> str:
    s, layers = report["seconds"], len(report["logit_difference"])
    compiled, total = s["compiled"], s["compiled_with_compile_time"]
    one, batched = s["hooks_one_at_a_time_scaled"], s["hooks_batched_scaled"]
    return (
        f"{layers * len(report['tokens'])} cells: "
        f"{compiled:.1f} s compiled (the first time {total:.1f} s, with compile time), "
        f"{one:.1f} s with the hook engine one cell at a time and {batched:.1f} s batched by hand "
        f"({len(report['sampled_cells'])} cells timed, scaled), "
        f"ratio {one / compiled:.1f} and {batched / compiled:.1f} "
        f"({one / total:.1f} and {batched / total:.1f} with compile time), "
        f"largest difference {report['largest_difference']:.1e} in logit difference"
    )


def _introduce(p: Patching, name: str) -> None:
    layers, positions = p.shape
    print(f"{name}\n{layers} layers x {positions} tokens, logit({p.task.answer!r}) - logit({p.task.wrong!r})")
    print(f"  {p.clean:+7.3f}  clean      {p.task.clean}\n  {p.corrupt:+7.3f}  corrupted  {p.task.corrupt}")


def _print_strongest(p: Patching, scores: torch.Tensor, n: int = 8) -> None:
    recovered, tokens = p.recovered(scores), p.tokens()
    print(f"\nstrongest cells\n  {'layer':>5}  {'position':>8}  {'difference':>10}  {'recovered':>9}  token")
    for flat in recovered.abs().flatten().argsort(descending=True, stable=True)[:n].tolist():
        layer, position = divmod(flat, len(tokens))
        score, share = scores[layer, position].item(), recovered[layer, position].item()
        print(f"  {layer:>5}  {position:>8}  {score:>+10.3f}  {share:>9.1%}  {tokens[position]}")


def _describe(p: Patching, name: str, scores: torch.Tensor) -> dict[str, object]:
    device = p.corrupt_ids.device
    return {
        "task": asdict(p.task),
        "model": name,
        "metric": "logit(answer) - logit(wrong) at the end of the corrupted prompt, one cell patched",
        "tokens": p.tokens(),
        "layers": [path_of(layer) for layer in p.layers],
        "clean": p.clean,
        "corrupt": p.corrupt,
        "logit_difference": scores.tolist(),
        "recovered": p.recovered(scores).tolist(),
        "versions": {
            "nnsight_fx": _own_version(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "hardware": {"device": _device_name(device), "threads": torch.get_num_threads()},
    }


def _write(p: Patching, name: str, scores: torch.Tensor, report: dict[str, object], out: Path) -> None:
    figure = heatmap(
        p.recovered(scores),
        x=p.tokens(),
        y=[str(layer) for layer in range(len(p.layers))],
        title=f"Clean residual stream patched into the corrupted run\n{name}\nclean {p.clean:+.3f}, corrupted {p.corrupt:+.3f}",
        bar=f"recovered logit({p.task.answer!r}) - logit({p.task.wrong!r})",
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    atomic.write(out / "heatmap.png", picture.getvalue())
    atomic.write(out / "scores.json", text.encode())
    print(f"\nwrote {out / 'heatmap.png'} and {out / 'scores.json'}")


def blocks(model: LanguageModel) -> Envoy:
    for path in BLOCKS:
        try:
            return model.get(path)
        except AttributeError:
            continue
    raise DemoError(f"the model has its layers at none of {', '.join(BLOCKS)}. Name one that has.")


def _one_token(model: LanguageModel, option: str, text: str) -> int:
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        pieces = [model.tokenizer.decode([i]) for i in ids]
        raise DemoError(
            f"`{option}` {text!r} is {len(ids)} tokens, {pieces}; logits are compared of one. "
            f"Give a single token, in most tokenizers a word with its leading space."
        )
    return ids[0]


def _token_ids(model: LanguageModel, task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Both prompts as (1, tokens) tensors on the model's device."""
    clean, corrupt = (model.tokenizer.encode(text) for text in (task.clean, task.corrupt))
    if len(clean) != len(corrupt) or not clean:
        pieces = [[model.tokenizer.decode([i]) for i in ids] for ids in (clean, corrupt)]
        raise DemoError(
            f"the clean prompt has {len(clean)} tokens and the corrupted one {len(corrupt)}:\n"
            f"    {pieces[0]}\n    {pieces[1]}\n"
            f"A patch goes from position to position. Give two prompts of equally many tokens."
        )
    if clean == corrupt:
        raise DemoError(f"both prompts are {task.clean!r}. Give a corrupted one that differs.")
    device = model.lm_head.weight.device
    return torch.tensor([clean], device=device), torch.tensor([corrupt], device=device)


def _sampled(cells: list[Cell], n: int) -> list[Cell]:
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(0))
    return [cells[i] for i in order[:n].tolist()]


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    value = work()
    return value, time.perf_counter() - start  # values come back to the CPU, which waits for the device


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Make the folder before any work; where the work fails, what was made of it goes again."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"`{out}` cannot be made ({error}). Name another folder with --out.") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # somebody has put something into it
            for folder in missing:
                folder.rmdir()
        raise


def _own_version() -> str:
    try:
        return metadata.version("nnsight_fx")
    except metadata.PackageNotFoundError:
        return "a checkout, not installed"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
