"""What is written, read and computed in a body."""

from __future__ import annotations

import torch

import nnsight_fx
from nnsight_fx import MissedSiteError, NotRecordableError, SkipError, UnsavedValueError

from .table import X, row


@row(RuntimeError, "`first.output` was written at", "mat1 and mat2")
def a_write_of_another_width(m):
    with m.trace(X):
        m.first.output = torch.zeros(2, 5)


@row(RuntimeError, "`first.output` was written at")
def a_write_of_another_dtype(m):
    with m.trace(X):
        m.first.output = m.first.output.double()


@row(TypeError, "`layers.0.output` was written at")
def a_write_of_a_tuple_for_a_tensor(m):
    with m.trace(X):
        m.layers[0].output = (m.layers[0].output, 1)


@row(ValueError, "`pair.output` was written at")
def a_write_of_a_shorter_tuple(m):
    with m.trace(X):
        m.pair.output = (m.pair.output[0],)


@row(NotRecordableError, "= None`", "`.skip(None)`")
def a_write_of_none(m):
    with m.trace(X):
        m.first.output = None


@row(RuntimeError, "size", line=False)
def rows_that_do_not_fit(m):
    with m.trace(X):
        m.first.output[:] = torch.zeros(3, 4)


@row(RuntimeError, "expand", line=False)
def a_column_that_does_not_fit(m):
    with m.trace(X):
        m.first.output[:, 0] = torch.zeros(7)


@row(IndexError, "out of bounds", line=False)
def a_position_that_is_not_there(m):
    with m.trace(X):
        m.first.output[:, 9] = 0


@row(IndexError, "too many indices", line=False)
def an_index_too_many(m):
    with m.trace(X):
        m.first.output[:, 0, 0].save()


@row(IndexError, "out of range")
def an_item_that_the_tuple_does_not_have(m):
    with m.trace(X):
        m.pair.output[2].save()


@row(TypeError, "'tuple'", line=False)
def an_item_of_a_tuple_assigned(m):
    with m.trace(X):
        m.pair.output[0] = torch.zeros(2, 4)


@row(AttributeError, "shap", line=False)
def an_attribute_of_a_tuple(m):
    with m.trace(X):
        m.pair.output.shap


@row(AttributeError, "savee", line=False)
def a_misspelt_save(m):
    with m.trace(X):
        m.first.output.savee()


@row(RuntimeError, "broadcast", line=False)
def an_addition_that_torch_refuses(m):
    with m.trace(X):
        m.first.output + torch.ones(7)


@row(RuntimeError, "same reduction dim", line=False)
def a_product_that_torch_refuses(m):
    with m.trace(X):
        m.first.output @ torch.ones(7, 7)


@row(RuntimeError, "shape", line=False)
def a_view_that_torch_refuses(m):
    with m.trace(X):
        m.first.output.view(3, 3)


@row(TypeError, line=False)
def a_wrong_argument_of_an_operation(m):
    with m.trace(X):
        m.first.output.sum(axis_="rows")


@row(RuntimeError, "leaf Variable", line=False)
def a_parameter_changed_in_place(m):
    with m.trace(X):
        m.first.output.save()
        m._module.first.weight[:] = m.last.output.sum()


@row(ZeroDivisionError, line=False)
def an_error_of_the_bodys_own(m):
    with m.trace(X):
        m.first.output.save()
        1 / 0


@row(KeyError, "steering", line=False)
def an_error_of_the_bodys_own_behind_a_sync_point(m):
    with m.trace(X):
        float(m.first.output.sum())
        {}["steering"]


@row(AssertionError, line=False)
def an_assertion_about_a_value(m):
    with m.trace(X):
        assert (m.last.output == 12345).all()


@row(RuntimeError, "ambiguous", line=False)
def the_truth_of_many_values(m):
    with m.trace(X):
        if m.first.output > 0:
            pass


@row(RuntimeError, "converted to Scalar", line=False)
def an_item_of_many_values(m):
    with m.trace(X):
        m.first.output.item()


@row(NotRecordableError)
def a_value_that_is_assigned_to_its_data(m):
    with m.trace(X):
        m.first.output.data = torch.zeros(2, 4)


@row(RuntimeError, "size", line=False)
def set_of_another_shape(m):
    with m.trace(X):
        m.first.output.copy_(torch.zeros(5, 5))


@row(SkipError, "is skipped in 1 of 2 invokes", "use two traces")
def a_skip_in_one_of_two_invokes(m):
    with m.trace() as tracer:
        with tracer.invoke(X):
            m.layers[0].skip(torch.zeros(2, 4))
        with tracer.invoke(X):
            m.last.output.save()


@row(MissedSiteError, "`layers.0.output` (call 0) was skipped", "called 1 time")
def a_skip_behind_a_read_of_its_output(m):
    with m.trace(X):
        m.layers[0].output.save()
        m.layers[0].skip(torch.zeros(2, 4))


@row(MissedSiteError, "`layers.0.output` (call 0) was skipped")
def a_skip_with_a_later_value(m):
    with m.trace(X):
        h = m.layers[1].output * 1
        m.layers[0].skip(h)


@row(RuntimeError, "`layers.0.output` was skipped at")
def a_skip_with_another_width(m):
    with m.trace(X):
        m.layers[0].skip(torch.zeros(2, 9))


@row(ValueError, "`pair.output` was skipped at")
def a_skip_of_a_tuple_with_too_few(m):
    with m.trace(X):
        m.pair.skip((torch.zeros(2, 4),))


@row(TypeError, "skip()", line=False)
def a_skip_without_a_value(m):
    with m.trace(X):
        m.layers[0].skip()


@row(UnsavedValueError, "`.save()`")
def a_value_kept_in_a_list_unsaved(m):
    found = []
    with m.trace(X):
        found.append(m.first.output)
    torch.stack(found)


@row(UnsavedValueError, "`.save()`")
def a_value_unsaved_in_a_dict(m):
    found = {}
    with m.trace(X):
        found["h"] = m.first.output.mean()
    found["h"].item()


@row(UnsavedValueError)
def an_unsaved_value_written_by_another_model(m):
    other = nnsight_fx.NNsight(torch.nn.Tanh())
    with other.trace(X):
        h = other.output
    with m.trace(X):
        m.first.output = h


@row(RuntimeError, "same reduction dim", line=False)
def a_module_called_on_the_wrong_width(m):
    with m.trace(X):
        m.last(m.first.input).save()


@row(TypeError, line=False)
def a_module_called_on_too_much(m):
    with m.trace(X):
        m.last(m.first.output, 1, 2).save()


@row(RuntimeError, "Sizes of tensors must match", line=False)
def a_cat_of_other_widths(m):
    with m.trace(X):
        torch.cat([m.first.output, m.last.output]).save()


@row(RuntimeError, "stack expects each tensor to be equal size", line=False)
def a_stack_of_other_widths(m):
    with m.trace(X):
        torch.stack([m.first.output, m.last.output]).save()
