"""`model.sweep`: the loop's numbers, labelled, on disk, resumed."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight, NotRecordableError, OutsideTraceError, StoreError

ENGINES = ["hooks", "eager", "aot_eager"]
LAYERS, SCALES = range(3), [0.5, 1.0, 2.0, 4.0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def wrap(engine="hooks", seed=0):
    torch.manual_seed(seed)
    model = NNsight(Net())
    if engine != "hooks":
        model.compile(backend=engine)
    return model


def given():
    return torch.linspace(-1, 1, 12).reshape(2, 6)


def body(model):
    def scale(tracer, layer, by):
        model.layers[layer].output = model.layers[layer].output * by
        return model.head.output[:, 0]

    return scale


def loop(raw, x):
    """The same by hand."""
    found = torch.empty(len(LAYERS), len(SCALES), 2)
    for i in LAYERS:
        for j, by in enumerate(SCALES):
            with raw.layers[i].register_forward_hook(lambda m, a, out, by=by: out * by), torch.no_grad():
                found[i, j] = raw(x)[:, 0]
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_a_grid_is_the_loop(engine, chunk):
    model = wrap(engine)
    found = model.sweep(body(model), given(), over={"layer": LAYERS, "by": SCALES}, chunk=chunk, progress=False)
    torch.testing.assert_close(found["result"], loop(model._module, given()))
    assert found.array.dims == ("layer", "by", "result_0") and found.array.shape == (3, 4, 2)
    assert found.array.sel(layer=2, by=4.0).values.tolist() == found["result"][2, 3].tolist()
    frame = found.to_dataframe()
    assert list(frame.columns) == ["layer", "by", "result_0", "result"] and len(frame) == 24


def test_names_and_shapes_of_results():
    model = wrap()

    def two(tracer, by):
        h = model.layers[0].output
        return {"norm": h.norm() * by, "hidden": h}

    found = model.sweep(two, (given(),), over={"by": SCALES}, progress=False)
    assert found["norm"].shape == (4,) and found["hidden"].shape == (4, 2, 6)
    assert found.dataset["hidden"].dims == ("by", "hidden_0", "hidden_1")
    with pytest.raises(ValueError, match=r"test_sweep\.py:\d+: this sweep has 2 results, norm, hidden"):
        _ = found.array
    assert repr(found).startswith("Results(by: 4; norm: (4,)")


def test_a_heat_map(tmp_path):
    model = wrap()

    def mean(tracer, layer, by):
        return body(model)(tracer, layer, by).mean()

    found = model.sweep(mean, given(), over={"layer": LAYERS, "by": SCALES}, progress=False)
    found.heatmap(tmp_path / "map.png", bar="mean")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="a heat map has two axes"):
        model.sweep(body(model), given(), over={"layer": LAYERS, "by": SCALES}, progress=False).heatmap()


def test_a_killed_sweep_goes_on(tmp_path):
    model, runs = wrap(), []
    scale = body(model)
    over = {"layer": LAYERS, "by": SCALES}

    store = tmp_path / "run"
    stop = tmp_path / "stop"
    stop.touch()
    interrupted = interrupting(stop, runs, scale)
    with pytest.raises(KeyboardInterrupt):
        model.sweep(interrupted, given(), over=over, store=store, chunk=4, progress=False)
    assert [p.name for p in sorted(store.iterdir())] == ["000000.safetensors", "manifest.json"]
    assert model.tracer is None
    runs.clear()
    stop.unlink()
    found = model.sweep(interrupted, given(), over=over, store=store, chunk=4, progress=False)
    assert len(runs) == 12 - 4  # the first file's cells are there
    torch.testing.assert_close(found["result"], loop(model._module, given()))
    runs.clear()
    again = model.sweep(interrupted, given(), over=over, store=store, progress=False)
    assert again.manifest["chunk"] == 4
    assert runs == [] and torch.equal(again["result"], found["result"])


def interrupting(stop, runs, scale):
    def body(tracer, layer, by):
        if stop.exists() and len(runs) == 6:
            raise KeyboardInterrupt
        runs.append((layer, by))
        return scale(tracer, layer, by)

    return body


def test_the_manifest_and_what_it_refuses(tmp_path):
    model, store = wrap(), tmp_path / "run"
    scale = body(model)
    over = {"layer": LAYERS, "by": SCALES}
    first = model.sweep(scale, given(), over=over, store=store, progress=False)
    about = json.loads((store / "manifest.json").read_text())
    assert about["over"] == {"layer": [0, 1, 2], "by": SCALES} and about["versions"]["torch"] == torch.__version__
    assert first.manifest == about

    def another(tracer, layer, by):
        return scale(tracer, layer, by) + 1

    for what, run in {
        "another model": lambda: wrap(seed=1).sweep(scale, given(), over=over, store=store, progress=False),
        "another input": lambda: model.sweep(scale, given() + 1, over=over, store=store, progress=False),
        "another body": lambda: model.sweep(another, given(), over=over, store=store, progress=False),
        "another grid": lambda: model.sweep(scale, given(), over={**over, "by": [1.0]}, store=store, progress=False),
    }.items():
        with pytest.raises(StoreError, match=rf"test_sweep\.py:\d+: the folder `.*` is of {what}"):
            run()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not empty and no sweep"):
        model.sweep(scale, given(), over=over, store=tmp_path / "other", progress=False)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_bad_input():
    model = wrap()
    with pytest.raises(ValueError, match=r"test_sweep\.py:\d+: `over` needs at least one axis"):
        model.sweep(body(model), given(), over={"layer": []})
    with pytest.raises(NotRecordableError, match="`result` is a NoneType") as error:
        model.sweep(lambda tracer, layer: None, given(), over={"layer": LAYERS}, progress=False)
    assert "in the sweep's cell layer=0" in error.value.__notes__[-1] and model.tracer is None
    with pytest.raises(ValueError, match="cell by=2 has results"):
        model.sweep(lambda tracer, by: model.head.output[:by], given(), over={"by": [1, 2]}, progress=False)
    with pytest.raises(IndexError) as error:
        model.sweep(lambda tracer, layer: model.layers[layer].output, given(), over={"layer": [0, 7]}, progress=False)
    assert "in the sweep's cell layer=7" in error.value.__notes__[-1]
    with pytest.raises(OutsideTraceError):
        model.layers[0].output  # noqa: B018


def test_the_bar_counts_cells(capsys):
    model = wrap()
    model.sweep(body(model), given(), over={"layer": LAYERS, "by": SCALES}, chunk=6)
    assert "12/12" in capsys.readouterr().err
