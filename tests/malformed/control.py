"""Iteration, conditions, barriers, stops, caches, gradients."""

from __future__ import annotations

import torch

from nnsight_fx import (
    InvokeError,
    MissedSiteError,
    NestedTraceError,
    NotRecordableError,
    OutsideTraceError,
    UnknownModuleError,
)
from nnsight_fx.tracing.iteration import Never

from .table import X, row


@row(TypeError, "iter")
def iteration_over_a_name(m):
    with m.trace(X) as tracer:
        for _ in tracer.iter["first"]:
            m.first.output.save()


@row(ValueError)
def iteration_from_a_negative_step(m):
    with m.trace(X) as tracer:
        for _ in tracer.iter[-1]:
            m.first.output.save()


@row(ValueError)
def iteration_with_a_step_of_nothing(m):
    with m.trace(X) as tracer:
        for _ in tracer.iter[0:3:0]:
            m.first.output.save()


@row(Never, "`first.output`")
def next_too_often(m):
    with m.trace(X) as tracer:
        m.first.output.save()
        tracer.next()
        m.first.output.save()


@row(ValueError, "next")
def next_by_nothing(m):
    with m.trace(X):
        m.first.next(-1).output.save()


@row(ValueError, "next", "'second'")
def next_by_a_name(m):
    with m.trace(X):
        m.first.next("second").output.save()


@row(InvokeError)
def a_barrier_of_one_too_many(m):
    with m.trace() as tracer:
        barrier = tracer.barrier(3)
        with tracer.invoke(X):
            m.first.output.save()
            barrier()
        with tracer.invoke(X):
            barrier()


@row(ValueError, "barrier")
def a_barrier_of_none(m):
    with m.trace() as tracer:
        tracer.barrier(0)
        with tracer.invoke(X):
            m.first.output.save()


@row(OutsideTraceError)
def a_barrier_between_invokes(m):
    with m.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(X):
            barrier()
        barrier()


@row(RuntimeError, "the condition has shape (2, 4)", "`.any()`")
def a_condition_on_many_values(m):
    with m.trace(X) as tracer:
        with tracer.cond(m.first.output > 0):
            m.last.output.save()


@row(OutsideTraceError)
def a_condition_outside_of_a_trace(m):
    with m.trace(X) as tracer:
        pass
    with tracer.cond(True):
        pass


@row(NotRecordableError, "cond")
def a_conditional_write_of_another_shape(m):
    with m.trace(X) as tracer:
        with tracer.cond(m.first.output.sum() > 0):
            m.pair.output = (m.pair.output[0],)


@row(OutsideTraceError)
def a_stop_behind_the_trace(m):
    with m.trace(X) as tracer:
        pass
    tracer.stop()


@row(OutsideTraceError)
def a_stop_between_invokes(m):
    with m.trace() as tracer:
        with tracer.invoke(X):
            m.first.output.save()
        tracer.stop()


@row(InvokeError, "before")
def a_cache_behind_a_read(m):
    with m.trace(X) as tracer:
        m.first.output.save()
        tracer.cache()


@row(UnknownModuleError, "`frist`")
def a_cache_of_a_module_that_is_not_there(m):
    with m.trace(X) as tracer:
        tracer.cache(modules=["frist"])


@row(TypeError, "modules")
def a_cache_of_something_else(m):
    with m.trace(X) as tracer:
        tracer.cache(modules=[3])


@row(KeyError, "no module `model.frist`; did you mean `first`")
def an_entry_that_a_cache_does_not_have(m):
    with m.trace(X) as tracer:
        cache = tracer.cache()
    cache["model.frist"]


@row(OutsideTraceError)
def a_cache_between_invokes(m):
    with m.trace() as tracer:
        with tracer.invoke(X):
            m.first.output.save()
        tracer.cache()


@row(OutsideTraceError)
def the_result_behind_the_trace(m):
    with m.trace(X) as tracer:
        pass
    tracer.result.save()


@row(OutsideTraceError, "has not run")
def explain_of_a_trace_that_has_not_run(m):
    m.trace(X).explain()


@row(OutsideTraceError, "nothing is recorded yet")
def the_graph_of_a_trace_without_input(m):
    m.trace().graph  # noqa: B018


@row(TypeError, line=False)
def apply_of_what_cannot_be_called(m):
    with m.trace(X) as tracer:
        tracer.apply(3, m.first.output)


@row(ZeroDivisionError, line=False)
def apply_of_what_raises(m):
    with m.trace(X) as tracer:
        tracer.apply(lambda h: 1 / 0, m.first.output)


@row(NotRecordableError, "`first.input` does not require grad")
def a_gradient_of_what_has_none(m):
    with m.trace(X):
        m.first.input.grad.save()
        m.last.output.sum().backward()


@row(MissedSiteError, "grad")
def a_gradient_without_a_backward(m):
    with m.trace(X):
        m.first.output.grad.save()


@row(MissedSiteError, "looks at its numbers before a backward has run", "behind `loss.backward()`")
def a_gradient_looked_at_before_the_backward(m):
    with m.trace(X):
        grad = m.first.output.grad
        if grad.sum() > 0:
            pass
        m.last.output.sum().backward()


@row(MissedSiteError, "looks at its numbers before a backward has run", "behind the block")
def a_gradient_looked_at_in_the_block_of_its_backward(m):
    with m.trace(X) as tracer:
        h = m.first.output
        with m.last.output.sum().backward():
            tracer.apply(lambda g: g, h.grad)


@row(MissedSiteError, "grad")
def a_gradient_asked_for_behind_the_backward(m):
    with m.trace(X):
        h = m.first.output
        m.last.output.sum().backward()
        h.grad.save()


@row(RuntimeError, "scalar", line=False)
def a_backward_of_many_values(m):
    with m.trace(X):
        m.last.output.backward()


@row(RuntimeError, "does not require grad", line=False)
def a_backward_under_no_grad(m):
    with torch.no_grad(), m.trace(X):
        m.last.output.sum().backward()


@row(RuntimeError, "second time", line=False)
def a_backward_twice(m):
    with m.trace(X):
        loss = m.last.output.sum()
        loss.backward()
        loss.backward()


@row(RuntimeError, "shape", line=False)
def a_gradient_set_to_another_shape(m):
    with m.trace(X):
        m.first.output.grad = torch.zeros(7)
        m.last.output.sum().backward()


@row(RuntimeError, "it was set to 3")
def a_gradient_set_to_a_number(m):
    with m.trace(X):
        m.first.output.grad = 3
        m.last.output.sum().backward()


@row(RuntimeError, "Mismatch in shape", line=False)
def a_backward_with_the_wrong_weight(m):
    with m.trace(X):
        m.last.output.backward(torch.ones(7))


@row(NestedTraceError)
def a_trace_in_a_backward(m):
    with m.trace(X):
        with m.last.output.sum().backward():
            with m.trace(X):
                pass


@row(OutsideTraceError)
def an_iteration_behind_the_trace(m):
    with m.trace(X) as tracer:
        pass
    for _ in tracer.iter[:]:
        m.first.output.save()
