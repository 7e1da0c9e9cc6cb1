"""The tool behind docs/coverage.md: one small architecture through its programs, and what its verdicts and its page say."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # `tests.coverage`, as `make coverage` imports it
programs = importlib.import_module("tests.coverage.programs")
matrix = importlib.import_module("tests.coverage.__main__")
sys.path.pop(0)

NAMED = """
GPT-2, GPT-NeoX, GPT-J, OPT, BLOOM, Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3, Phi-3, Falcon, OLMo 2, StableLM, Cohere,
Granite, SmolLM3, DeepSeek-V3, Mixtral, Qwen3-MoE, gpt-oss, Mamba, Mamba-2, RecurrentGemma, RWKV, BERT, RoBERTa, DeBERTa-v2,
ModernBERT, ELECTRA, T5, BART, Whisper, ViT, DINOv2, CLIP, SigLIP, ConvNeXt, Swin, Wav2Vec2, LLaVA, Qwen2-VL, PaliGemma
"""  # issue 4


class Net(nn.Module):
    """Three blocks of one width; `broken` puts a graph break into the middle one."""

    def __init__(self, broken: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.broken = broken

    def forward(self, x):
        one, two, three = self.blocks
        x = torch.tanh(one(x))
        if self.broken:
            torch._dynamo.graph_break()  # not in a loop: there Dynamo would capture nothing of this frame
        return three(torch.tanh(two(x)))


def given() -> dict:
    return {"x": torch.linspace(-1, 1, 8).reshape(2, 4)}


def small(build=Net):
    return programs.Architecture("small", "stack", build, given)


@pytest.mark.parametrize("broken", [False, True])
def test_a_small_architecture_through_its_programs(broken):
    row = programs.run(small(lambda: Net(broken)))
    assert (row.error, row.fallbacks if not broken else [], row.red) == ("", [], False)
    assert {name: c.verdict for name, c in row.cells.items()} == dict.fromkeys(
        ("read", "steer", "skip", "stop", "gradient"), "equal"
    )
    assert (row.sites, row.captured) == (6, 6)
    assert (row.segments > 1, bool(row.breaks)) == (broken, broken)
    if not broken:
        assert row.whole and {c.engine for c in row.cells.values()} == {"spliced"}


def test_a_trace_that_fell_back_as_a_whole_is_no_proof_of_captured_code():
    class Refuses(Net):
        forward = torch.compiler.disable(Net.forward)

    row = programs.run(small(Refuses))
    assert {c.engine for c in row.cells.values()} == {"hooks"} and row.fallbacks
    assert row.captured == 0 and not row.whole
    assert "= (hooks)" in matrix.page([row], "eager")


def test_a_model_that_cannot_be_built_is_a_red_row():
    row = programs.run(small(lambda: nn.Linear(4, "four")))
    assert row.red and not row.whole and "TypeError" in row.error
    assert "TypeError" in matrix.page([row], "eager")


ONE, TWO = torch.ones(2), torch.ones(2) * 2
OPEN = torch.tensor([float("nan"), float("inf")])


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([ONE], [ONE.clone()], "equal"),
        ([OPEN], [OPEN.clone()], "equal"),
        ([ONE], [ONE + 1e-6], "close"),
        ([ONE], [TWO], "differs"),
        ([ONE], [OPEN], "differs"),
        ([ONE], [], "differs"),
        ([ONE], [torch.ones(3)], "differs"),
        ([ONE], [ONE.double()], "differs"),
        (ValueError("a"), ValueError("b"), "refused"),
        (ValueError("a"), KeyError("a"), "failed"),
        (ValueError("a"), [ONE], "failed"),
    ],
)
def test_verdicts(a, b, verdict):
    cell = programs.compare(a, b)
    assert cell.verdict == verdict and cell.red == (verdict in ("differs", "failed"))


def test_the_page_shows_red_cells_and_counts():
    good, bad = programs.Row("good", "stack", sites=4, captured=4, segments=1), programs.Row("bad", "stack", sites=4)
    good.cells["read"] = programs.Cell("close", 2e-6)
    bad.cells["read"] = programs.Cell("differs", 1.0, "other shapes")
    text = matrix.page([good, bad], "eager")
    assert (
        f"2 of {len(programs.ALL)} architectures" in text
        and "1 without a whole-model fallback" in text
        and "1 without a red cell" in text
    )
    assert "| good | stack | 1 | 4 | 100 % | ~ 2e-06 |" in text and "**red**" in text
    assert "- bad, read: differs: other shapes" in text


def test_every_architecture_that_was_asked_for_is_in_the_matrix():
    assert {name.strip() for name in NAMED.split(",")} <= set(programs.ALL)
    assert len(programs.ALL) >= 45
