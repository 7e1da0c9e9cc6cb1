"""A cell that fails: its error is raised and named, and what the others gave is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_fx import LanguageModel, NNsight
from nnsight_fx.sweep.executors import Devices

from ..generation.test_generate import llama

OPTIONS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PROMPT = torch.tensor([[5, 7, 11, 3]])
STRENGTHS = [0.0, 1.0, 2.0, 3.0, 4.0]
VECTORS = [torch.linspace(-1, 1, 7 if n == 3 else 32) for n in range(len(STRENGTHS))]


def grid(model: LanguageModel, chosen: list[int], vectors: list[torch.Tensor] = VECTORS, **more: Any) -> Any:
    def steer(tracer: Any, n: int) -> dict:
        seen = []
        for _step in tracer.iter[:]:
            model.model.layers[1].output[:] += STRENGTHS[n] * vectors[n]
            seen.append(model.lm_head.output[0, -1, 0])
        return {"seen": seen}

    options = {**OPTIONS, **more.pop("options", {})}
    return model.sweep(steer, [PROMPT], over={"n": chosen}, generate=options, progress=False, **more)


WAYS = {
    "in one loop": {},
    "one by one": {"options": {"num_beams": 2}},
    "compiled": {"engine": "compiled"},
    "in chunks": {"chunk": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_generations(way: str) -> None:
    module = llama()

    def wrapped() -> LanguageModel:
        model = LanguageModel(module)
        if way == "compiled":
            model.compile(backend="eager")
        return model

    want = grid(wrapped(), [0, 1, 2, 4], **WAYS[way])
    with pytest.raises(RuntimeError, match="7") as told:
        grid(wrapped(), [0, 1, 2, 3, 4], **WAYS[way])
    notes = "".join(told.value.__notes__)
    assert "test_failed_cells.py:" in notes and "in the sweep's cell prompt=0, n=3" in notes
    assert "4 of the sweep's 5 cells have their results" in notes
    results = told.value.results
    others = [0, 1, 2, 4]
    assert torch.equal(results["tokens"][:, others], want["tokens"])
    torch.testing.assert_close(results["seen"][:, others], want["seen"])
    assert (results["tokens"][:, 3] == -1).all() and results["seen"][:, 3].isnan().all()
    assert len(results.to_dataframe()) == 5 * OPTIONS["max_new_tokens"]


def test_the_first_cell_ends_it() -> None:
    model, ran = LanguageModel(llama()), []

    def steer(tracer: Any, n: int) -> None:
        ran.append(n)
        for _step in tracer.iter[:]:
            model.model.layers[1].output[:] += torch.ones(7)

    with pytest.raises(RuntimeError) as told:
        model.sweep(steer, [PROMPT], over={"n": [0, 1, 2]}, generate={**OPTIONS, "num_beams": 2}, progress=False)
    assert ran == [0] and not hasattr(told.value, "results")


def test_a_store_goes_on_where_it_is_mended(tmp_path: Path) -> None:
    model, chosen, mended = LanguageModel(llama()), [0, 1, 2, 3, 4], tmp_path / "mended"

    def steer(tracer: Any, n: int) -> None:
        for _step in tracer.iter[:]:
            if n == 3 and not mended.exists():
                raise RuntimeError("not yet")
            model.model.layers[1].output[:] += STRENGTHS[n]

    def run(**more: Any) -> Any:
        return model.sweep(steer, [PROMPT], over={"n": chosen}, generate=OPTIONS, progress=False, **more)

    with pytest.raises(RuntimeError) as told:
        run(store=tmp_path / "s", chunk=2)
    first = told.value.results  # type: ignore[attr-defined]
    mended.touch()
    found = run(store=tmp_path / "s", chunk=2)
    assert torch.equal(found["tokens"], run()["tokens"])
    assert torch.equal(found["tokens"][:, [0, 1, 2, 4]], first["tokens"][:, [0, 1, 2, 4]])


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_other_sweeps(engine: str) -> None:
    """A chunk runs as one: those before it have their results."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).requires_grad_(False)
    model, x = NNsight(module), torch.randn(3, 8)
    if engine != "hooks":
        model.compile(backend=engine)

    def body(tracer: Any, n: int) -> Any:
        model[0].output[:] += torch.ones(8 if n < 5 else 7) * n
        return model[2].output.sum()

    want = model.sweep(body, x, over={"n": [0, 1, 2, 3]}, progress=False)
    with pytest.raises(RuntimeError) as told:
        model.sweep(body, x, over={"n": [0, 1, 2, 3, 4, 5, 6]}, progress=False, chunk=2)
    assert "4 of the sweep's 7 cells have their results" in "".join(told.value.__notes__)
    results = told.value.results  # type: ignore[attr-defined]
    torch.testing.assert_close(results["result"][:4], want["result"])
    assert results["result"][4:].isnan().all()


def test_an_interrupt_keeps_what_is_done() -> None:
    torch.manual_seed(0)
    model, x = NNsight(nn.Linear(8, 4).requires_grad_(False)), torch.randn(3, 8)

    def body(tracer: Any, n: int) -> Any:
        if n == 4:
            raise KeyboardInterrupt
        return model.output.sum() * n

    with pytest.raises(KeyboardInterrupt) as told:
        model.sweep(body, x, over={"n": [1, 2, 3, 4]}, progress=False, chunk=2)
    results = told.value.results  # type: ignore[attr-defined]
    torch.testing.assert_close(results["result"][:2], model._module(x).sum() * torch.tensor([1.0, 2.0]))
    assert results["result"][2:].isnan().all()


class Unportable(Exception):
    """An error that no other process can have."""

    def __init__(self, what: str):
        super().__init__(what)
        self.held = lambda: what


def test_errors_of_workers() -> None:
    module = llama()

    def failing(n: int) -> None:
        if n == 3:
            raise Unportable("not this one")

    model = LanguageModel(module)

    def steer(tracer: Any, n: int) -> None:
        failing(n)
        for _step in tracer.iter[:]:
            model.model.layers[1].output[:] += n

    workers = Devices(["cpu"], threads=1)
    with pytest.raises(RuntimeError, match="Unportable: not this one") as told:
        model.sweep(steer, [PROMPT], over={"n": [0, 1, 2, 3, 4]}, generate=OPTIONS, executor=workers, progress=False)
    results = told.value.results  # type: ignore[attr-defined]
    assert (results["tokens"][0, 3] == -1).all() and (results["tokens"][0, [0, 1, 2, 4]] >= 0).all()
