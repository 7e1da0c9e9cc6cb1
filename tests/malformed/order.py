"""Order, names, and what is open."""

# ruff: noqa: B018

from __future__ import annotations

import torch

import nnsight_fx
from nnsight_fx import (
    InvokeError,
    MissedSiteError,
    NestedTraceError,
    OutOfOrderError,
    OutsideTraceError,
    SourceNotAvailable,
    UnknownModuleError,
    UnknownOperationError,
    UnsavedValueError,
)
from nnsight_fx.tracing.iteration import Never

from .table import X, row


@row(OutOfOrderError, "`first.output`", "Write it to a later site")
def an_earlier_site_written_with_a_later_value(m):
    with m.trace(X):
        m.first.output = m.layers[1].output * 1


@row(OutOfOrderError, "was passed when")
def read_behind_a_sync_point(m):
    with m.trace(X):
        if m.layers[1].output.sum() > 1e9:
            pass
        m.first.output.save()


@row(OutOfOrderError, "was passed when", "written")
def written_behind_a_sync_point(m):
    with m.trace(X):
        float(m.last.output.sum())
        m.first.output = torch.zeros(2, 4)


@row(OutOfOrderError, "skipped")
def skipped_behind_a_sync_point(m):
    with m.trace(X):
        m.last.output.tolist()
        m.layers[0].skip(torch.zeros(2, 4))


@row(MissedSiteError, "`unused.output` (call 0)", "was not called")
def read_of_a_module_that_nothing_calls(m):
    with m.trace(X):
        m.unused.output.save()


@row(MissedSiteError, "`tied.output` (call 0)", "`.source`")
def read_of_a_module_used_by_weight(m):
    with m.trace(X):
        m.tied.output.save()


@row(MissedSiteError, "`unused.output`", "written")
def written_where_nothing_comes_by(m):
    with m.trace(X):
        m.unused.output = torch.zeros(2, 4)


@row(MissedSiteError, "`unused.input`")
def changed_in_place_where_nothing_comes_by(m):
    with m.trace(X):
        m.unused.input[:] = 0


@row(Never, "occurrence 1 of `first.output` never came: there were 1")
def a_call_that_never_comes(m):
    with m.trace(X):
        m.first.next().output.save()


@row(MissedSiteError, "`unused.output` (call 0) was skipped")
def skip_of_a_module_that_nothing_calls(m):
    with m.trace(X):
        m.unused.skip(torch.zeros(2, 4))


@row(MissedSiteError, "`layers.0.fc.output`")
def read_inside_a_skipped_module(m):
    with m.trace(X):
        m.layers[0].skip(torch.zeros(2, 4))
        m.layers[0].fc.output.save()


@row(UnknownModuleError, "has no module `frist`", "did you mean `first`")
def a_misspelt_module(m):
    with m.trace(X):
        m.frist.output.save()


@row(UnknownModuleError, "has no module `fcc`", "did you mean `fc`")
def a_misspelt_child(m):
    with m.trace(X):
        m.layers[0].fcc.output.save()


@row(UnknownModuleError, "`outptu`", "did you mean `output`")
def a_misspelt_write(m):
    with m.trace(X):
        m.first.outptu = 0


@row(UnknownModuleError, "has no module `transformer`")
def a_gpt2_name_on_another_model(m):
    with m.trace(X):
        m.transformer.h[0].output.save()


@row(IndexError, "2 children", "[7]")
def a_layer_too_many(m):
    with m.trace(X):
        m.layers[7].output.save()


@row(IndexError, "2 children")
def a_layer_before_the_first(m):
    m.layers[-3]


@row(UnknownModuleError, "no module `layer.0.fc`; did you mean `layers.0.fc`")
def an_unknown_path_in_get(m):
    m.get("layer.0.fc")


@row(UnknownModuleError, "no module `layers.0.fcx`; did you mean `layers.0.fc`")
def an_unknown_last_name_in_get(m):
    m.get("layers.0.fcx")


@row(OutsideTraceError, "`first.output` outside of a trace")
def a_read_outside_of_a_trace(m):
    m.first.output


@row(OutsideTraceError, "outside of a trace")
def an_input_outside_of_a_trace(m):
    m.layers[0].input


@row(OutsideTraceError, "outside of a trace")
def a_write_outside_of_a_trace(m):
    m.first.output = torch.zeros(2, 4)


@row(OutsideTraceError, "outside of a trace")
def a_skip_outside_of_a_trace(m):
    m.first.skip(torch.zeros(2, 4))


@row(OutsideTraceError, "no trace is open")
def save_outside_of_a_trace(m):
    nnsight_fx.save([])


@row(OutsideTraceError, "outside of a trace")
def a_read_behind_the_trace(m):
    with m.trace(X):
        pass
    m.first.output.save()


@row(UnsavedValueError, "not saved", "`.save()`")
def an_unsaved_value_behind_the_trace(m):
    with m.trace(X):
        h = m.first.output
    h.sum().item()


@row(UnsavedValueError, "`.save()`")
def an_unsaved_value_printed(m):
    with m.trace(X):
        h = m.first.output * 2
    torch.nn.functional.relu(h)


@row(UnsavedValueError, "`.save()`")
def an_unsaved_value_in_another_trace(m):
    with m.trace(X):
        h = m.first.output
    with m.trace(X):
        m.first.output = h


@row(UnsavedValueError, "`.save()`")
def an_unsaved_item_of_a_tuple(m):
    with m.trace(X):
        a = m.pair.output[0]
    a + 1


@row(UnsavedValueError, "not saved", "`.save()`")
def a_save_too_late(m):
    with m.trace(X):
        h = m.first.output
    h.save()


@row(NestedTraceError, "Leave it first")
def a_trace_in_a_trace(m):
    with m.trace(X):
        with m.trace(X):
            pass


@row(NestedTraceError)
def an_edit_in_a_trace(m):
    with m.trace(X):
        with m.edit():
            pass


@row(NestedTraceError)
def a_scan_in_a_trace(m):
    with m.trace(X):
        with m.scan(X):
            pass


@row(InvokeError, "neither an input nor an invoke")
def no_input_at_all(m):
    with m.trace():
        pass


@row(InvokeError, "already has an input")
def an_invoke_in_a_trace_with_an_input(m):
    with m.trace(X) as tracer:
        with tracer.invoke(X):
            pass


@row(InvokeError, "already open")
def an_invoke_in_an_invoke(m):
    with m.trace() as tracer:
        with tracer.invoke(X):
            with tracer.invoke(X):
                pass


@row(InvokeError, "whole batch", "Open an invoke with an input first")
def a_promptless_invoke_alone(m):
    with m.trace() as tracer:
        with tracer.invoke():
            pass


@row(OutsideTraceError, "no input is open")
def a_site_between_invokes(m):
    with m.trace() as tracer:
        with tracer.invoke(X):
            pass
        m.first.output.save()


@row(InvokeError, "cannot be batched", "(2, 5)")
def invokes_of_other_widths(m):
    with m.trace() as tracer:
        with tracer.invoke(X):
            m.first.output.save()
        with tracer.invoke(torch.ones(2, 5)):
            m.first.output.save()


@row(InvokeError, "cannot be batched", "not equal")
def invokes_of_other_keywords(m):
    with m.trace() as tracer:
        with tracer.invoke(X, scale=1.0):
            m.first.output.save()
        with tracer.invoke(X, scale=2.0):
            m.first.output.save()


@row(InvokeError)
def an_invoke_behind_the_trace(m):
    with m.trace(X) as tracer:
        pass
    with tracer.invoke(X):
        pass


@row(TypeError, "`scales=` is no keyword of `trace` and none of the model's forward; did you mean `scale`")
def a_wrong_keyword(m):
    with m.trace(X, scales=2):
        m.first.output.save()


@row(TypeError, "forward()")
def an_argument_too_many(m):
    with m.trace(X, 1.0, 2.0):
        m.first.output.save()


@row(UnknownModuleError, "`encod` is no method", "`encode`")
def a_method_that_does_not_exist(m):
    with m.trace(X, fn="encod"):
        m.first.output.save()


@row(MissedSiteError, "`last.output`")
def a_site_that_a_method_does_not_pass(m):
    with m.trace(X, fn="encode"):
        m.last.output.save()


@row(RuntimeError, "mat1 and mat2", line=False)
def an_input_of_the_wrong_width(m):
    with m.trace(torch.ones(2, 5)):
        m.last.output.save()


@row(RuntimeError, "dtype", line=False)
def an_input_of_the_wrong_dtype(m):
    with m.trace(X.double()):
        m.last.output.save()


@row(TypeError, line=False)
def an_input_that_is_no_tensor(m):
    with m.trace("a prompt"):
        m.first.output.save()


@row(UnknownOperationError, "`matmul_7`")
def an_operation_that_is_not_there(m):
    with m.trace(X):
        m.layers[0].source.matmul_7.output.save()


@row(SourceNotAvailable)
def the_source_of_a_builtin(m):
    with m.trace(X):
        m.layers[0].source.self_fc_0.source.linear_0.source.output.save()


@row(OutsideTraceError)
def an_operation_outside_of_a_trace(m):
    m.layers[0].source.self_fc_0.output


@row(AttributeError, "result")
def the_result_written(m):
    with m.trace(X) as tracer:
        tracer.result = 0
