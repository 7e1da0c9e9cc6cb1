"""Sessions, edits, scans, plans, sweeps, harvests, compile options, helpers."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import nnsight_fx
from nnsight_fx import (
    NNsight,
    NotRecordableError,
    OutsideTraceError,
    PlanError,
    StoreError,
    UnknownModuleError,
    UnsavedValueError,
    interventions,
)

from .table import X, row


@row(UnsavedValueError, "`.save()`")
def a_sessions_value_unsaved_behind_it(m):
    with m.session():
        with m.trace(X):
            h = m.first.output
    h + 1


@row(ZeroDivisionError, line=False)
def an_error_in_a_session(m):
    with m.session():
        with m.trace(X):
            m.first.output.save()
        1 / 0


@row(RuntimeError, "`first.output` was written at", "mat1 and mat2")
def a_write_that_fails_in_a_session(m):
    with m.session():
        with m.trace(X):
            m.first.output = torch.zeros(2, 5)


@row(OutsideTraceError, "outside of a trace")
def a_site_in_a_session_outside_of_its_traces(m):
    with m.session():
        m.first.output.save()


@row(NotRecordableError, "scan")
def a_number_in_a_scan(m):
    with m.scan(X):
        float(m.first.output.sum())


@row(UnknownModuleError, "`frist`")
def an_edit_of_a_module_that_is_not_there(m):
    with m.edit() as edited:
        edited.frist.output[:] = 0


@row(NotRecordableError, "edit")
def an_edit_that_looks_at_a_value(m):
    with m.edit() as edited:
        if edited.first.output.sum() > 0:
            edited.first.output[:] = 0


@row(UnknownModuleError, "no module `stop`")
def an_edit_that_stops(m):
    with m.edit() as edited:
        edited.first.output[:] = 0
        edited.stop()


@row(NotRecordableError)
def a_save_in_an_edit(m):
    with m.edit() as edited:
        edited.first.output.save()


@row(PlanError, "no edits")
def an_export_without_edits(m):
    m.export_edits("none", ".")


@row(PlanError, "there are no exported edits")
def an_import_of_nothing(m):
    m.import_edits("none", ".")


@row(TypeError, line=False)
def an_edit_with_an_input(m):
    with m.edit(X):
        pass


@row(FileNotFoundError, "nothing.safetensors", line=False)
def a_plan_that_is_not_there(m):
    nnsight_fx.load_plan("nothing.safetensors", m)


def _saved(m, name: str = "plan.safetensors") -> Path:
    with m.trace(X) as tracer:
        m.first.output = m.first.output * 2
        m.last.output.save()
    tracer.graph.save_plan(name)
    return Path(name)


def _changed(m, change) -> None:
    path = _saved(m)
    try:
        data = change(path.read_bytes())
        path.write_bytes(data)
        nnsight_fx.load_plan(path, m)
    finally:
        path.unlink()


@row(PlanError, "is damaged", line=False)
def a_plan_cut_short(m):
    _changed(m, lambda data: data[: len(data) // 2])


@row(PlanError, "is damaged", line=False)
def a_plan_of_no_bytes(m):
    _changed(m, lambda data: b"")


@row(PlanError, "is damaged", line=False)
def a_plan_that_is_text(m):
    _changed(m, lambda data: b"with model.trace(x): pass")


def _edited(data: bytes, old: str, new: str) -> bytes:
    """The header of a safetensors file, with another text in it."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    meta = {k: v.replace(old, new) for k, v in header["__metadata__"].items()}
    assert meta != header["__metadata__"]
    text = json.dumps({**header, "__metadata__": meta}).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@row(PlanError, "`frist`", "tools.py", line=False)
def a_plan_of_another_model(m):
    _changed(m, lambda data: _edited(data, '"first"', '"frist"'))


@row(PlanError, "`torch.Tensor.os.system`", line=False)
def a_plan_with_an_operation_that_is_not_torchs(m):
    _changed(m, lambda data: _edited(data, "mul", "os.system"))


@row(PlanError, "uses the module `first`", line=False)
def a_plan_that_does_not_fit_the_model(m):
    path = _saved(m)
    try:
        nnsight_fx.load_plan(path, NNsight(torch.nn.Tanh()))
    finally:
        path.unlink()


@row(PlanError, "cannot be saved")
def a_plan_of_several_runs(m):
    with m.trace(X) as tracer:
        if m.first.output.sum() > 1e9:
            pass
        m.last.output.save()
    tracer.graph.save_plan("plan.safetensors")


@row(PlanError)
def a_plan_with_a_callable(m):
    with m.trace(X) as tracer:
        tracer.log(m.first.output.sum() * 0)
    tracer.graph.save_plan("plan.safetensors")


@row(PlanError, "`names`")
def a_plan_with_a_name_for_nothing(m):
    with m.trace(X) as tracer:
        m.last.output.save()
    tracer.graph.save_plan("plan.safetensors", names={"v": torch.zeros(3)})


def _patch(tracer, layer):
    return tracer.layers[layer].output.sum()


@row(ValueError, "over")
def a_sweep_over_nothing(m):
    m.sweep(_patch, X, over={}, progress=False)


@row(ValueError, "layer")
def a_sweep_over_an_empty_axis(m):
    m.sweep(_patch, X, over={"layer": []}, progress=False)


@row(TypeError, "layer")
def a_sweep_with_other_names_than_its_function(m):
    m.sweep(lambda tracer, depth, *, layer: tracer.first.output.sum(), X, over={"depht": [0]}, progress=False)


@row(TypeError)
def a_sweep_of_no_function(m):
    m.sweep("patch", X, over={"layer": [0]}, progress=False)


@row(TypeError, "`over` maps")
def a_sweep_over_a_list(m):
    m.sweep(_patch, X, over=[0, 1], progress=False)


@row(NotRecordableError, "`result` is a NoneType")
def a_sweep_that_returns_nothing(m):
    def body(tracer, layer):
        tracer.layers[layer].output.sum()

    m.sweep(body, X, over={"layer": [0, 1]}, progress=False)


@row(ValueError)
def a_sweep_whose_cells_differ_in_shape(m):
    def body(tracer, layer):
        return tracer.layers[layer].output[:, : layer + 1]

    m.sweep(body, X, over={"layer": [0, 1]}, progress=False)


@row(IndexError, "2 children")
def a_sweep_over_a_layer_too_many(m):
    m.sweep(_patch, X, over={"layer": [0, 1, 2]}, progress=False)


@row(ZeroDivisionError, line=False)
def a_sweep_whose_body_fails(m):
    m.sweep(lambda tracer, layer: 1 / 0, X, over={"layer": [0]}, progress=False)


@row(ValueError, "median")
def a_sweep_reduced_in_an_unknown_way(m):
    m.sweep(_patch, [X, X], over={"layer": [0]}, reduce="median", progress=False)


@row(ValueError, "no executor `slurm`")
def a_sweep_on_an_unknown_executor(m):
    m.sweep(_patch, X, over={"layer": [0]}, executor="slurm", progress=False)


@row(ValueError, "chunk")
def a_sweep_in_chunks_of_nothing(m):
    m.sweep(_patch, X, over={"layer": [0]}, chunk=0, progress=False)


@row(StoreError)
def a_sweep_into_the_store_of_another(m):
    import shutil

    try:
        m.sweep(_patch, X, over={"layer": [0]}, store="store", progress=False)
        m.sweep(
            lambda tracer, layer: tracer.layers[layer].output.mean(),
            X,
            over={"layer": [0]},
            store="store",
            progress=False,
        )
    finally:
        shutil.rmtree("store")


@row(StoreError)
def a_sweep_into_a_folder_of_something_else(m):
    import shutil

    Path("store").mkdir()
    Path("store", "notes.txt").write_text("mine")
    try:
        m.sweep(_patch, X, over={"layer": [0]}, store="store", progress=False)
    finally:
        assert Path("store", "notes.txt").read_text() == "mine"
        shutil.rmtree("store")


@row(KeyError, "logits", line=False)
def a_result_that_a_sweep_does_not_have(m):
    m.sweep(_patch, X, over={"layer": [0]}, progress=False)["logits"]


@row(ValueError)
def a_heatmap_of_one_axis(m):
    m.sweep(_patch, X, over={"layer": [0, 1]}, progress=False).heatmap("h.png")


@row(UnknownModuleError, "no table of parts")
def patching_of_a_model_of_no_family(m):
    nnsight_fx.patching.patch(m, X, X, lambda logits: logits.sum(), progress=False)


@row(ValueError, "sites")
def a_harvest_of_nothing(m):
    m.harvest([X], [], "acts", progress=False)


@row(UnknownModuleError, "`frist`")
def a_harvest_of_a_module_that_is_not_there(m):
    m.harvest([X], ["frist"], "acts", progress=False)


@row(TypeError)
def a_harvest_of_a_number(m):
    m.harvest(3, ["first"], "acts", progress=False)


@row(StoreError, line=False)
def activations_that_are_not_there(m):
    nnsight_fx.Activations("nothing")


@row(ValueError, "no backend `inductr`; did you mean `inductor`?")
def an_unknown_backend(m):
    m.compile(backend="inductr")


@row(RuntimeError, "Unrecognized mode=fastest", line=False)
def an_unknown_mode(m):
    NNsight(m._module).compile(mode="fastest")


@row(TypeError, "`backends=` is no keyword of `compile`; did you mean `backend`?")
def an_unknown_compile_option(m):
    m.compile(backends="eager")


@row(TypeError, "`LanguageModel`")
def a_wrapper_of_something_else(m):
    NNsight("gpt2")


@row(RuntimeError, line=False)
def an_intervention_of_another_width(m):
    add = interventions.Add(torch.zeros(9))
    with m.trace(X):
        m.first.output = add(m.first.output)


@row(UnknownModuleError, "`frist`")
def a_trace_dict_of_a_module_that_is_not_there(m):
    with nnsight_fx.TraceDict(m, ["frist"]):
        m(X)


@row(NotRecordableError)
def torchscript_in_a_body(m):
    with m.trace(X):
        torch.jit.trace(lambda h: h * 2, m.first.output)
