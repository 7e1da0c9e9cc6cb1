"""Who runs a workload: our engines, the model as it is, hand-written hooks, nnsight 0.8.1 and TransformerLens 4.

nnsight and TransformerLens run in a process of their own, with the same weights; TransformerLens runs its attention in eager.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nnsight_fx
from nnsight_fx import NNsight

from .measure import Told
from .models import Model
from .tables import ALL_LOGITS
from .workloads import STEPS, Parts, Workload

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests/peer"))
from nnsight_peer import run_peer  # type: ignore[import-not-found]  # noqa: E402

OURS: dict[str, dict[str, Any] | None] = {
    "ours": {"backend": "inductor"},
    "ours, aot_eager": {"backend": "aot_eager"},
    "ours, eager": {"backend": "eager"},
    "ours, hooks": None,
}
REPLAYED = "reduce-overhead"  # CUDA graphs
THEIRS = ("nnsight 0.8.1", "TransformerLens 4")

BEGIN = """
import operator, time
import transformers
kept = torch.__dict__.setdefault("_bench", {})
if kept.get("weights") != weights:
    cls = getattr(transformers, cls)
    module = cls(cls.config_class(**config)).eval().requires_grad_(False)
    module.load_state_dict(torch.load(weights))
    kept.clear()
    import tokenizers  # nnsight's `generate` asks for a tokenizer, and does not use it on ids
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 0}, unk_token="<end>"))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    kept.update(weights=weights, module=module, model=NNsight(module), generate=LanguageModel(module, tokenizer=words))
model = kept["generate" if generates else "model"]
blocks, norm = (operator.attrgetter(path)(model) for path in (blocks_path, norm_path))
"""

LENS = """
if "bridge" not in kept:
    import copy
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    twin = copy.deepcopy(kept["module"])
    kept["bridge"] = build_bridge_from_module(twin, type(twin).__name__, hf_config=twin.config)
bridge = kept["bridge"]
def call():
    with torch.no_grad():
{text}
    return last
"""

END = """
if values:
    out["values"] = [x.detach() for x in call()]
else:
    start = time.perf_counter()
    for _ in range(runs):
        call()
    out["seconds"] = (time.perf_counter() - start) / runs
"""


class Bench:
    """One model: everybody's calls of a workload."""

    def __init__(self, model: Model, module: Any, folder: Path):
        self.model, self.module = model, module
        at = operator.attrgetter(model.blocks)
        self.parts = Parts(module, at(module), operator.attrgetter(model.norm)(module), module.lm_head)
        self.weights = folder / f"{model.name}-{len(self.parts.blocks)}.pt"
        torch.save(module.state_dict(), self.weights)

    def calls(self, workload: Workload, ids: torch.Tensor, vector: torch.Tensor) -> dict[str, Callable[[], Any]]:
        """By name; the values that calls give are those of the workload, but for the plain function's."""
        found: dict[str, Callable[[], Any]] = {}
        gpu = self.model.device == "cuda"
        ways = {**OURS, f"ours, {REPLAYED}": {"mode": REPLAYED}} if gpu else OURS
        texts = {name: (workload.text, options) for name, options in ways.items()}
        if workload.all_logits is not None:
            texts = {"ours": texts["ours"], ALL_LOGITS: (workload.all_logits, ways["ours"]), **texts}
        for name, (text, options) in texts.items():
            wrapped, run = NNsight(self.module), self._text(text, workload.name)
            if options is not None:
                wrapped.compile(**options)
            found[name] = lambda wrapped=wrapped, run=run: run(wrapped, ids, vector)
        plain = workload.plain(self.parts) if workload.plain is not None else None
        if plain is not None:
            found["eager"] = lambda: plain(ids)
            found["torch.compile"] = self._compiled(workload, plain, ids)
            if gpu:
                found[f"torch.compile, {REPLAYED}"] = self._compiled(workload, plain, ids, mode=REPLAYED)
        found["raw hooks"] = lambda: workload.hooks(self.parts, ids, vector)
        modes = torch.enable_grad if workload.grad else torch.no_grad
        return {name: modes()(call) for name, call in found.items()}

    def _compiled(
        self, workload: Workload, plain: Callable, ids: torch.Tensor, mode: str | None = None
    ) -> Callable[[], Any]:
        if workload.name != "generate":
            made = torch.compile(plain, mode=mode)
            return lambda: made(ids)
        forward = torch.compile(self.module.forward, mode=mode)

        def generate() -> Any:
            self.module.forward = forward
            try:
                return plain(ids)
            finally:
                del self.module.forward

        return generate

    def _text(self, text: str, name: str) -> Callable:
        """The text on our side."""

        def run(model: Any, ids: torch.Tensor, vector: torch.Tensor) -> list:
            at = {name: operator.attrgetter(path)(model) for name, path in self._paths.items()}
            scope.update(at)
            return scope["run"](model, ids, vector)

        scope: dict[str, Any] = {"torch": torch, "nnsight": nnsight_fx, "steps": STEPS}
        exec(compile(text, f"bench/workloads.py: {name}", "exec"), scope)
        return run

    @property
    def _paths(self) -> dict[str, str]:
        return {"blocks": self.model.blocks, "norm": self.model.norm}

    def peer(self, who: str, workload: Workload, ids: torch.Tensor, vector: torch.Tensor) -> Peer | None:
        """A peer in its own process; `None` where it has no such text."""
        if self.model.device != "cpu" or (who != "nnsight 0.8.1" and workload.lens is None):
            return None
        if who == "nnsight 0.8.1":
            call = f"{workload.text}\ncall = lambda: run(model, ids, vector)\n"
        else:
            lines = (workload.lens or "").strip().splitlines()
            call = LENS.format(text="\n".join(f"        {line}" for line in lines))
        given = {
            "cls": self.model.cls.__name__,
            "config": {**self.model.config, **_size(self.module.config)},
            "weights": str(self.weights),
            "blocks_path": self.model.blocks,
            "norm_path": self.model.norm,
            "layers": len(self.parts.blocks),
            "steps": STEPS,
            "generates": workload.name == "generate",
            "ids": ids,
            "vector": vector,
        }
        return Peer(BEGIN + call + END, given)


def _size(config: Any) -> dict[str, int]:
    key = "n_layer" if hasattr(config, "n_layer") else "num_hidden_layers"
    return {key: getattr(config, key)}


class Peer:
    """A program in the peers' process."""

    def __init__(self, program: str, given: dict[str, Any]):
        self.program, self.given = program, given

    def values(self) -> list[torch.Tensor]:
        return run_peer(self.program, values=True, runs=1, **self.given)["values"]

    def timed(self, runs: int) -> Told:
        return Told(lambda: run_peer(self.program, values=False, runs=runs, **self.given)["seconds"])
