"""From which position on a body changes a site."""

import pytest
import torch

from nnsight_fx import NNsight
from nnsight_fx.batching.reach import reach

from .programs import X, mlp

A = (("blocks.0", "output", 0), 0)


def in_place(b):
    b[0].output[:, 3] = 0


def from_behind(b):
    b[0].output[:, -2:] += 1


def a_view(b):
    row = b[0].output[:, 4]
    row *= 2


def cloned(b):
    h = b[0].output.clone()
    h[:, 5] = 1
    h[:, 2:] *= 2
    b[0].output = h


def whole(b):
    b[0].output = b[0].output * 2


def all_positions(b):
    b[0].output[...] = 0


def another_dimension(b):
    b[0].output[:, :, 3] = 0


def every_second(b):
    b[0].output[:, 3::2] = 0


def late(b):
    h = b[0].output
    b[1].output.save()
    h[:, 3] = 0


def written_then_changed(b):
    h = b[0].output.clone()
    b[0].output = h
    h[:, 3] = 0


FOUND = {
    in_place: 3,
    from_behind: 5,
    a_view: 4,
    cloned: 2,
    whole: 0,
    all_positions: 0,
    another_dimension: 0,
    every_second: 0,
    late: 0,
    written_then_changed: 0,
}


@pytest.mark.parametrize("body", FOUND, ids=lambda body: body.__name__)
def test_reach(body):
    model = NNsight(mlp())
    with torch.no_grad(), model.session() as session:
        with model.trace(X[0]):
            body(model.blocks)
            model.head.output.save()
        (pending,) = session.waiting
        assert reach(pending.plan, pending.tape.constants, 7)[A] == FOUND[body]


def test_what_only_looks_changes_nothing():
    model = NNsight(mlp())
    with torch.no_grad(), model.session() as session:
        with model.trace(X[0]):
            model.blocks[0].output[:, 2].save()
        (pending,) = session.waiting
        assert reach(pending.plan, pending.tape.constants, 7) == {}
