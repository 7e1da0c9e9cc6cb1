"""`effect`: what a node does beside computing its value."""

import operator

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F

from nnsight_fx.capture.marker import site
from nnsight_fx.passes.effects import changes, effect


def node(op, target, *args, **kwargs):
    made = fx.Graph()
    x = made.placeholder("x")
    return made.create_node(op, target, (x, *args), kwargs)


def theirs(x):
    return x


PURE = [
    ("call_function", torch.relu),
    ("call_function", F.linear, None),
    ("call_function", torch.conv2d, None),
    ("call_function", F.relu, False),
    ("call_function", F.dropout, 0.5, False),
    ("call_function", F.dropout, 0.0, True),
    ("call_function", F.batch_norm, None, None, None, None, True),
    ("call_function", F.batch_norm, torch.ones, torch.ones, None, None, False),
    ("call_function", F.embedding, None, None, None),
    ("call_function", F.scaled_dot_product_attention, None, None, None, 0.0),
    ("call_function", operator.getitem, 0),
    ("call_function", operator.and_, True),  # the name ends in `_`, the operator changes nothing
    ("call_function", operator.or_, True),
    ("call_function", operator.not_),
    ("call_function", getattr, "shape"),
    ("call_method", "view", 3),
    ("call_method", "item"),
    ("call_function", torch.ops.aten.add.Tensor, 1),
    ("call_function", site, "a", "output", 0, True),
]
IMPURE = [
    ("changes", "call_method", "add_", 1),
    ("changes", "call_method", "__iadd__", 1),
    ("changes", "call_method", "__setitem__", 0, 1),
    ("changes", "call_method", "requires_grad_"),
    ("changes", "call_function", operator.setitem, 0, 1),
    ("changes", "call_function", operator.iadd, 1),
    ("changes", "call_function", torch.relu_),
    ("changes", "call_function", F.relu, True),
    ("changes", "call_function", torch.ops.aten.add_.Tensor, 1),
    ("changes", "call_function", torch.ops.aten.native_batch_norm.default, None, None, None, None, True, 0.1, 1e-5),
    ("changes", "call_function", F.batch_norm, torch.ones, torch.ones, None, None, True),
    ("changes", "call_function", F.instance_norm, torch.ones, torch.ones),
    ("changes", "call_function", torch.batch_norm, None, None, None, None, True, 0.1, 1e-5, False),
    ("renormalises", "call_function", F.embedding, None, None, 1.0),
    ("draws", "call_function", torch.rand_like),
    ("draws", "call_function", torch.bernoulli),
    ("draws", "call_function", F.dropout),
    ("draws", "call_function", F.dropout, 0.5, True),
    ("draws", "call_function", torch.dropout, 0.5, False),
    ("draws", "call_function", F.rrelu, 0.1, 0.3, True),
    ("draws", "call_function", F.gumbel_softmax),
    ("draws", "call_function", F.scaled_dot_product_attention, None, None, None, 0.1),
    ("draws", "call_method", "multinomial", 2),
    ("draws", "call_function", torch.ops.aten.rand_like.default),
    ("calls", "call_function", torch._C._set_grad_enabled),
    ("calls", "call_function", torch.amp.autocast_mode._exit_autocast),
    ("calls", "call_function", torch.manual_seed),
    ("calls", "call_function", print),
    ("calls", "call_function", theirs),
    ("calls", "call_module", "layer"),
]


@pytest.mark.parametrize("case", PURE)
def test_what_only_computes(case):
    assert effect(node(*case)) is None


@pytest.mark.parametrize("says, case", [(says, case) for says, *case in IMPURE])
def test_what_does_more(says, case):
    assert str(effect(node(*case))).startswith(says)


def test_an_out_argument():
    made = fx.Graph()
    x = made.placeholder("x")
    assert effect(made.call_function(torch.add, (x, 1), {"out": x})) == "changes a tensor in place"
    assert effect(made.call_function(torch.add, (x, 1), {"out": None})) is None


def test_a_flag_that_only_the_call_knows_counts():
    made = fx.Graph()
    x = made.placeholder("x")
    assert effect(made.call_function(F.dropout, (x, 0.5, x))) == "draws random numbers"


@pytest.mark.parametrize(
    "case, answer", [(PURE[0], False), (PURE[11], False), (IMPURE[0][1:], True), (IMPURE[4][1:], True)]
)
def test_changes(case, answer):
    assert changes(node(*case)) is answer
