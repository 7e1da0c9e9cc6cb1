"""Lifted positions: what is read and written at them is what eager reads and writes, views and all."""

import operator

import pytest
import torch
import torch.fx as fx

from nnsight_fx import passes
from nnsight_fx.passes.indexing import put_at, take_at
from nnsight_fx.passes.job import constant

from .graphs import targets
from .test_lift_constants import job_for

X = torch.linspace(-1, 1, 24).reshape(2, 3, 4)


ALL = slice(None)


def write(h, key, value):
    if isinstance(h, fx.Proxy):
        h.tracer.create_proxy("call_function", operator.setitem, (h, key, value), {})
    else:
        h[key] = value


def read_then_written(h, n, m):
    row = h[:, n]
    write(h, (ALL, m), 9.0)
    return h, row


def written_then_read(h, n, m):
    write(h, (ALL, m), 9.0)
    return h, h[:, n]


def read_used_up_then_written(h, n, m):
    row = h[:, n] * 2
    write(h, (ALL, m), row)
    return h, row


def augmented(h, n, m):
    row = h[:, n]
    row.add_(1.0)
    write(h, (ALL, n), row)
    return (h,)


def changed_through_the_view(h, n, m):
    row = h[:, n]
    row.mul_(3.0)
    return h, row * 2


def changed_twice(h, n, m):
    row = h[:, n, 1:]
    row.mul_(3.0)
    other = h[:, m] + 1
    row.add_(other[:, 1:])
    return h, row


def a_view_of_it_changed(h, n, m):
    row = h[:, n]
    write(row, (ALL, 0), 7.0)
    return h, row


def base_changed_between(h, n, m):
    row = h[:, n]
    h.add_(1.0)
    row.mul_(2.0)
    return h, row


def view_of_base_changed(h, n, m):
    row, half = h[:, n], h[:, :, :2]
    half.mul_(5.0)
    return h, row


def another_view_looked_at(h, n, m):
    half, row = h[:, :, :2], h[:, n]
    row.mul_(5.0)
    return half * 1.0, row


def a_view_of_another_kind_changed(h, n, m):
    row, diagonal = h[:, n], h.diagonal(0, 1, 2)
    diagonal.zero_()
    return h, row


def something_else_changed(h, n, m):
    row, other = h[:, n], h * 2.0
    other.zero_()
    return h, row, other


def two_positions(h, n, m):
    write(h, (n, m), h[m, n] + 1)
    return h, h[..., m]


def wider_values(h, n, m):
    write(h, (ALL, n), torch.ones(1, 1, 4))
    write(h, (ALL, m, slice(1, 3)), 5)
    write(h, (m), h[n][:, :1])
    return (h,)


VIEWS = {
    read_then_written,
    base_changed_between,
    view_of_base_changed,
    a_view_of_another_kind_changed,
}  # where a copy would show
PROGRAMS = (
    *(read_then_written, written_then_read, read_used_up_then_written, augmented, changed_through_the_view),
    *(
        changed_twice,
        a_view_of_it_changed,
        base_changed_between,
        view_of_base_changed,
        a_view_of_another_kind_changed,
        another_view_looked_at,
    ),
    *(something_else_changed, two_positions, wider_values),
)


def lifted(program):
    """A program as a recording has it: its numbers are constants."""
    gm = fx.symbolic_trace(lambda x, n, m: program(x * 2.0, n, m))
    for slot, node in enumerate([n for n in gm.graph.nodes if n.op == "placeholder"][1:]):
        with gm.graph.inserting_after(next(iter(gm.graph.nodes))):
            number = gm.graph.call_function(constant, (slot, "int"))
        node.replace_all_uses_with(number)
        gm.graph.erase_node(node)
    job = job_for()
    passes.lift_constants(gm, job)
    gm.graph.lint()
    gm.recompile()
    return gm, [take.slot for take in job.takes]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_as_in_eager(program, backend):
    gm, slots = lifted(program)
    run = gm if backend == "eager" else torch.compile(gm, backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for n, m in ((0, 1), (1, 1), (1, 0), (0, 0)):
            want = program(X.clone() * 2.0, n, m)
            numbers = [torch.tensor((n, m)[slot]) for slot in slots]
            assert all(torch.equal(a, b) for a, b in zip(run(X.clone(), *numbers), want, strict=True))


@pytest.mark.parametrize("program", PROGRAMS)
def test_views_stay_only_where_a_copy_would_show(program):
    found = targets(lifted(program)[0])
    assert ("select" in found) == (program in VIEWS)
    assert take_at in found or put_at in found or program in VIEWS
